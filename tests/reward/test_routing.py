"""Which rewards a prompt goes to, from its line in a file to the numbers."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fdfo import PromptDataModule, Reward, RewardMix, Sampling
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.reward.routing import check_route, is_for, routes
from lightning_fdfo.reward.scores import compare
from lightning_fdfo.reward.term import Gate, RewardTerm
from tests.conftest import brightness

NAMES = ["a", "b"]


class Answer(Reward):
    """Needs metadata, and notes for which prompts it is asked."""

    required_metadata = ("answer",)

    def __init__(self, fails_on=None):
        self.asked = []
        self.fails_on = fails_on

    def __call__(self, images, prompts, metadata):
        self.asked += prompts
        if self.fails_on in prompts:
            raise OSError("no answer")
        return brightness(images, prompts, metadata) + torch.tensor([float(row["answer"]) for row in metadata])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_routes_are_numbers_of_the_named():
    found = routes(NAMES, [{}, {"rewards": {"a": 0.5}}, {"rewards": {"a": 0, "b": -2}}])
    assert found["a"].multiplier.tolist() == [1, 0.5, 0]
    assert found["b"].routed.tolist() == [True, False, True]
    assert found["b"].multiplier[[0, 2]].tolist() == [1, -2]
    assert is_for("a", {"rewards": {"a": 0}})
    assert not is_for("b", {"rewards": {"a": 0}})


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (["a"], r"expected an object like \{\"a\": 1\}, got \['a'\]"),
        (None, "expected an object"),
        ({"c": 1}, "unknown 'c'; the mixture has a, b, exact"),
        ({"a": "1"}, "expected a finite number for 'a', got '1'"),
        ({"a": True}, "expected a finite number for 'a', got True"),
        ({"a": float("nan")}, "expected a finite number"),
        ({}, r"expected at least one of a, b, got \{\}"),
        ({"exact": 1}, "expected at least one of a, b"),
    ],
)
def test_routes_that_make_no_sense_are_refused(route, message):
    with pytest.raises(ConfigurationError, match=message):
        check_route({"rewards": route}, NAMES, [*NAMES, "exact"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rewards": {"anwser": 1}}, "unknown 'anwser'; the mixture has light, answer, metric"),
        ({"rewards": {"light": "1"}}, "expected a finite number for 'light'"),
        ({"rewards": {"light": 1, "answer": 0}}, "Answer needs metadata"),
        ({"rewards": {"answer": 1}, "answer": 1}, "'answer' has a gate on 'light', which does not score this prompt"),
        ({}, "Answer needs metadata"),
    ],
)
def test_a_bad_route_is_told_with_file_and_line_before_the_model_loads(toy_module, fit, tmp_path, row, message):
    rewards = {"light": RewardTerm(brightness), "answer": RewardTerm(Answer(), gate=Gate("light", above=0.0))}
    module = toy_module(rewards=rewards, metrics={"metric": RewardTerm(brightness)})
    train = write(tmp_path / "train.jsonl", [{"prompt": "fine", "answer": 1}, {"prompt": "bad"} | row])
    with pytest.raises(ConfigurationError, match=rf"train\.jsonl:2: .*{message}"):
        fit(module, 1, train=train)
    assert not hasattr(module.flow, "transformer")


def test_a_reward_sees_only_the_prompts_that_go_to_it():
    answer = Answer()
    mix = RewardMix({"light": RewardTerm(brightness), "answer": RewardTerm(answer)})
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    metadata = [{"rewards": {"light": 1}}, {"answer": 3}, {"rewards": {"light": 1, "answer": 0}, "answer": 4}, {}]
    metadata[3] = {"rewards": {"light": 2}}
    scores = mix(images, list("pqrs"), metadata, routes=routes(mix.terms, metadata))
    light = brightness(images, [], [])
    assert answer.asked == ["q", "r"]
    assert torch.equal(scores["light"].values, light)
    assert scores["answer"].scored.tolist() == [False, True, True, False]
    assert not scores["answer"].failed.any()
    torch.testing.assert_close(scores["answer"].values[1:3].float(), light[1:3] + torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(
        mix.total(scores).values,
        torch.stack([light[0], light[1] + scores["answer"].values[1].float(), light[2], 2 * light[3]]),
    )


def test_a_reward_without_prompts_is_not_called():
    answer = Answer()
    mix = RewardMix({"light": RewardTerm(brightness), "answer": RewardTerm(answer, scale="std")})
    metadata = [{"rewards": {"light": 1}}] * 4
    scores = mix(torch.rand(4, 3, 2, 2), list("pppp"), metadata, routes=routes(mix.terms, metadata))
    mix.update_scales(0, compare(scores))
    assert not answer.asked
    assert not scores["answer"].scored.any()
    assert not mix.scales_known
    added = mix.contributions(scores, compare(scores))
    assert torch.equal(added["answer"], torch.zeros(4))  # though its scale is not known


def test_a_failure_names_its_row_of_the_whole_batch():
    mix = RewardMix({"light": RewardTerm(brightness), "answer": RewardTerm(Answer(fails_on="s"))})
    metadata = [{"rewards": {"light": 1}}, {"answer": 1}, {"rewards": {"light": 1}}, {"answer": 1}]
    with pytest.raises(RewardError, match="prompt 's': reward 'answer'") as error:
        mix(torch.rand(4, 3, 2, 2), list("pqrs"), metadata, routes=routes(mix.terms, metadata))
    assert error.value.row == 3


VAL = [
    {"prompt": "one", "rewards": {"light": 1}},
    {"prompt": "two", "rewards": {"light": 1, "answer": 2, "answered": 1}, "answer": 5},
    {"prompt": "three", "rewards": {"light": 1}},
]


def test_validation_means_are_over_images_that_were_scored(toy_module, fit, tmp_path):
    """And what no validation prompt goes to is not logged at all."""
    rewards = {"light": RewardTerm(brightness), "answer": RewardTerm(Answer()), "idle": RewardTerm(brightness, 0)}
    module = toy_module(rewards=rewards, metrics={"answered": RewardTerm(Answer()), "unused": RewardTerm(brightness)})
    train = write(tmp_path / "train.jsonl", [{"prompt": "q", "answer": 1}])
    outputs = []
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx: outputs.append(step(batch, batch_idx)) or outputs[-1]
    trainer = fit(module, 1, train=train, val=write(tmp_path / "val.jsonl", VAL), num_sanity_val_steps=0)
    (scores,) = [output["scores"] for output in outputs]
    light, answer = scores["light"], scores["answer"]
    assert answer.scored.tolist() == [False, True, False]
    torch.testing.assert_close(scores["reward"].values, light.values + 2 * answer.values)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert logged == pytest.approx(
        {
            "val/reward": scores["reward"].values.mean().item(),
            "val/light": light.values.mean().item(),
            "val/answer": answer.values[1].item(),
            "val/answered": answer.values[1].item(),
        }
    )


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_a_pair_is_dropped_for_its_own_rewards_only(toy_module, fit, tmp_path):
    """Of three prompts, one fails; another does not go to the reward that fails, and stays."""
    rows = [
        {"prompt": "p", "rewards": {"light": 1}},
        {"prompt": "q", "answer": 1},
        {"prompt": "s", "answer": 1},
    ]
    rewards = {"light": RewardTerm(brightness), "answer": RewardTerm(Answer(fails_on="s"), scale="std")}
    sampling = Sampling(num_steps=4, height=2, width=2, churn=0.1)
    options = {"sampling": sampling, "num_pairs": 6, "batch_size": 24, "rollout_batch_size": 1}
    module = toy_module(rewards=rewards, on_reward_error="drop_pair", max_dropped=0.5, **options)
    trainer = fit(module, 1, train=write(tmp_path / "train.jsonl", rows))
    scores = module.collector.scores
    assert trainer.callback_metrics["reward/dropped"] == pytest.approx(2 / 6)
    assert scores.kept.sum() == 4
    to_answer = scores.scores["answer"].routed.view(-1, 2).any(dim=1)
    assert to_answer.sum() == 4
    assert (scores.kept & to_answer).sum() == 2
    assert module.rewards.running["answer"].total[0] == 2 * 2  # pairs that it has scored, and that were kept
    mean = scores.scores["answer"].values.view(-1, 2)[scores.kept & to_answer].double().mean().item()
    assert trainer.callback_metrics["reward/answer/mean"].item() == pytest.approx(mean)


def test_texts_in_a_data_module_keep_their_routes(tmp_path):
    data = PromptDataModule(write(tmp_path / "train.jsonl", VAL))
    data.setup("fit")
    assert [prompt.metadata["rewards"] for prompt in data.train_prompts] == [row["rewards"] for row in VAL]


def test_validation_weighs_by_the_epoch(toy_module, fit, tmp_path):
    seen = []

    class Watch(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append([trainer.callback_metrics[f"val/{name}"].item() for name in ("reward", "light")])

    module = toy_module(rewards={"light": RewardTerm(brightness, {0: 1.0, 2: 3.0})})
    val = write(tmp_path / "val.jsonl", [{"prompt": "one"}, {"prompt": "two", "rewards": {"light": 1}}])
    fit(module, 3, val=val, callbacks=[Watch()], num_sanity_val_steps=0)
    assert [total / light for total, light in seen] == pytest.approx([1.0, 2.0, 3.0])
