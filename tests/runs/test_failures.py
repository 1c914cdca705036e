"""What fails in a run: a reward, for a pair or for all; a gradient."""

import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.errors import ConfigurationError, DivergenceError, RewardError
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import brightness

PROMPTS = ["a cat", "the dog", "some bird", "one fish"]
IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


class Failing(Reward):
    """Fails on prompts of some words, in one of several ways."""

    def __init__(self, words=("dog",), how="raise"):
        self.words, self.how = words, how
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        scores = brightness(images, prompts, metadata)
        bad = [any(word in prompt for word in self.words) for prompt in prompts]
        if any(bad) and self.how == "raise":
            raise ConnectionError("the server is gone")
        return scores.masked_fill(torch.tensor(bad), float(self.how) if self.how != "raise" else 0.0)


def mix(**options):
    return RewardMix({"judge": RewardTerm(Failing(**options)), "light": RewardTerm(brightness)})


@pytest.mark.parametrize("how", ["raise", "nan", "inf", "-inf"])
def test_a_failure_names_reward_and_prompt(how):
    with pytest.raises(RewardError, match=r"prompt 'the dog': reward 'judge'") as error:
        mix(how=how)(IMAGES, PROMPTS, [{}] * 4)
    assert error.value.row == 1


@pytest.mark.parametrize("how", ["raise", "nan", "inf", "-inf"])
def test_what_is_dropped_has_no_score_and_is_reported_and_the_rest_is_as_it_was(how):
    with pytest.warns(UserWarning, match=r"dropped, with its pair: prompt 'the dog': reward 'judge'"):
        scores = mix(how=how)(IMAGES, PROMPTS, [{}] * 4, drop=True)
    expected = brightness(IMAGES, PROMPTS, [{}] * 4)
    assert scores["judge"].failed.tolist() == [False, True, False, False]
    assert torch.equal(scores["judge"].values[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.equal(scores["light"].values, expected)


def test_a_dead_reward_is_not_asked_for_every_image():
    reward = Failing(words=("",))
    mixture = RewardMix({"judge": RewardTerm(reward)})
    images = IMAGES.repeat(5, 1, 1, 1)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        scores = mixture(images, PROMPTS * 5, [{}] * 20, drop=True)
    assert scores["judge"].failed.all()
    assert reward.calls == 1 + 3


class Once(Reward):
    """Fails on batches, never on one image."""

    def __call__(self, images, prompts, metadata):
        if len(images) > 1:
            raise MemoryError("too many")
        return brightness(images, prompts, metadata)


def test_a_reward_that_fails_on_batches_alone():
    mixture = RewardMix({"judge": RewardTerm(Once())})
    with pytest.raises(RewardError, match="too many") as error:
        mixture(IMAGES, PROMPTS, [{}] * 4)
    assert error.value.row is None
    scores = mixture(IMAGES, PROMPTS, [{}] * 4, drop=True)["judge"]
    torch.testing.assert_close(scores.values.float(), brightness(IMAGES, PROMPTS, []))


def test_by_default_the_run_stops_and_names_the_pair(toy_module, fit):
    module = toy_module(rewards={"judge": RewardTerm(Failing())})
    with pytest.raises(RewardError, match=r"pair \d+ of epoch 0: prompt 'the dog': reward 'judge'"):
        fit(module, 1)


class Watch(Callback):
    """Keeps each batch, and what is logged."""

    def __init__(self):
        self.batches, self.metrics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(dict(trainer.callback_metrics))


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_a_dropped_pair_does_not_train_and_the_gradient_keeps_its_scale(toy_module, fit, prompts_file):
    """A pair's loss is proportional to the size of its difference: kept ones count num_pairs / kept."""
    prompts_file.write_text("a cat\nthe dog\nsome bird\none fish\n", encoding="utf-8")
    dropping, watch, reference = Failing(), Watch(), Watch()
    module = toy_module(rewards={"judge": RewardTerm(dropping)}, on_reward_error="drop_pair", max_dropped=0.5)
    fit(module, 1, callbacks=[watch])
    fit(toy_module(rewards={"judge": RewardTerm(brightness)}), 1, callbacks=[reference])
    (metrics,) = watch.metrics
    assert metrics["reward/dropped"] == 4 / 16
    assert metrics["reward/mean"].isfinite()
    for ours, theirs in zip(watch.batches, reference.batches, strict=True):
        dropped = ours.reward_difference == 0
        assert dropped.float().mean() == 0.25
        torch.testing.assert_close(ours.reward_difference[~dropped], theirs.reward_difference[~dropped] * 16 / 12)
        assert torch.equal(ours.latents, theirs.latents)


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_dropped_pairs_do_not_enter_the_scale(toy_module, fit, prompts_file):
    prompts_file.write_text("a cat\nthe dog\nsome bird\none fish\n", encoding="utf-8")
    module = toy_module(
        rewards={"judge": RewardTerm(Failing(how="nan"), scale="std")}, on_reward_error="drop_pair", max_dropped=0.5
    )
    fit(module, 2)
    count, squares = module.rewards.running["judge"].total
    assert count == 2 * 2 * 12
    assert 0 < squares < 1


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_too_many_dropped_pairs_stop_the_run(toy_module, fit, prompts_file):
    prompts_file.write_text("a cat\nthe dog\nsome bird\none fish\n", encoding="utf-8")
    module = toy_module(rewards={"judge": RewardTerm(Failing())}, on_reward_error="drop_pair", max_dropped=0.2)
    with pytest.raises(RewardError, match="failed for 4 of 16 pairs of epoch 0, max_dropped is 20%"):
        fit(module, 1)


@pytest.mark.filterwarnings("ignore:dropped, with its pair")
def test_validation_leaves_out_what_a_reward_failed_on(toy_module, fit, prompts_file):
    class Mean(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.scores = outputs["scores"]["judge"]

        def on_validation_epoch_end(self, trainer, pl_module):
            self.logged = trainer.callback_metrics["val/judge"]

    prompts_file.write_text("a cat\nthe dog\nsome bird\none fish\n", encoding="utf-8")
    watch = Mean()
    module = toy_module(rewards={"judge": RewardTerm(Failing())}, on_reward_error="drop_pair", max_dropped=0.5)
    fit(module, 1, val=str(prompts_file), callbacks=[watch])
    assert watch.scores.failed.sum() == 1
    torch.testing.assert_close(watch.logged, watch.scores.values[watch.scores.scored].mean())


class Poison(Callback):
    """Makes gradients NaN in some updates."""

    def __init__(self, updates):
        self.updates, self.weights = updates, []

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.updates:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))


def test_an_update_whose_gradient_is_not_finite_is_skipped(toy_module, fit):
    poison, watch = Poison({1}), Watch()
    with pytest.warns(UserWarning, match="update 1: the gradient's norm is nan: it is skipped"):
        fit(toy_module(), 2, callbacks=[poison, watch])
    updates = poison.weights[1::2]  # two batches each
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[1], updates[2])
    assert all(weights.isfinite().all() for weights in poison.weights)
    assert [metrics["train/skipped"].item() for metrics in watch.metrics] == [0.5, 0.0]
    assert watch.metrics[0]["train/grad_norm"].isfinite()


@pytest.mark.filterwarnings("ignore:update .* it is skipped")
def test_too_many_in_a_row_stop_the_run_and_name_the_last_checkpoint(toy_module, fit, tmp_path):
    with pytest.raises(DivergenceError, match=re.escape(str(tmp_path / "checkpoints/last.ckpt"))):
        fit(toy_module(max_skipped=1), 4, callbacks=[Poison({2, 3, 4, 5})], enable_checkpointing=True)


@pytest.mark.filterwarnings("ignore:update .* it is skipped")
def test_some_in_a_row_are_borne(toy_module, fit):
    fit(toy_module(max_skipped=2), 3, callbacks=[Poison({0, 1, 3, 4})])


@pytest.mark.parametrize(
    "options", [{"max_dropped": 1.0}, {"max_dropped": -0.1}, {"max_skipped": -1}, {"max_dropped": float("nan")}]
)
def test_limits_that_make_no_sense(toy_module, options):
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"{name}: expected a finite number of at least 0"):
        toy_module(**options)
