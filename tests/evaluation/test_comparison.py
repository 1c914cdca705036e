"""`test` on the toy flow: what it computes is what painting and counting by hand give."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightning_fdfo import LoRA, Reward
from lightning_fdfo.callbacks import EMA, MetricsWriter
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows.generate import generate
from lightning_fdfo.flows.lora_files import add_lora
from lightning_fdfo.image_statistics import STATISTICS
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.settings import Evaluation
from tests.conftest import ToyFlow, brightness
from tests.rewards import hub_folders

CPU = torch.device("cpu")
PROMPTS = [Prompt(text, "", {}, "") for text in ("a cat", "the dog", "some bird", "one fish", "five trees")]
PLACES = [place for place in range(5) for _ in range(3)]
REPEATS = [0, 1, 2] * 5


class Darkness(Reward):
    higher_is_better = False

    def __call__(self, images, prompts, metadata):
        return brightness(images, prompts, metadata)


def by_hand(module, weights=None):
    """All fifteen images, generated in one batch by a fresh base, or by weights put into a copy of the module."""
    flow = ToyFlow()
    flow.load()
    if weights is not None:
        if module.lora is not None:
            add_lora(flow, module.lora, module.seed)
        state = {name.removeprefix("flow.transformer."): value for name, value in weights.items()}
        _, unexpected = flow.transformer.load_state_dict(state, strict=False)
        assert not unexpected
    prompts = [PROMPTS[place] for place in PLACES]
    return generate(flow, prompts, PLACES, seed=0, sampling=module.sampling, device=CPU, repeats=REPEATS)


@pytest.fixture
def checkpoint(toy_module, fit, tmp_path, weights):
    """Trains six epochs, and gives the file and the weights."""

    def make(callbacks=(), **options):
        module, path = toy_module(**options), tmp_path / "trained.ckpt"
        fit(module, 6, callbacks=list(callbacks)).save_checkpoint(path)
        return str(path), weights(module)

    return make


def rows(module):
    return {row.name: row for row in module.comparison}


def standard_error(values):
    return values.reshape(5, 3).mean(axis=1).std(ddof=1) / 5**0.5


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4), None], ids=["lora", "full"])
def test_every_number_by_hand(toy_module, judge, checkpoint, weights, lora):
    path, trained = checkpoint(lora=lora)
    module = toy_module(lora=lora, metrics={"dark": {"reward": Darkness()}})
    logged = judge(module, ckpt_path=path)
    painted, found = (by_hand(module, trained), by_hand(module)), rows(module)
    brightnesses, edges = (
        [statistic(images).double().numpy() for images in painted]
        for statistic in (lambda images: images.mean(dim=(1, 2, 3)), STATISTICS["edge_density"])
    )
    assert set(found) == {"reward", "brightness", "dark", *(f"image/{name}" for name in STATISTICS)}
    for name in ("reward", "brightness", "dark", "image/edge_density"):
        row = found[name]
        own, theirs = edges if name == "image/edge_density" else brightnesses
        if name == "image/edge_density":
            assert row.win_rate is None
        else:
            wins = sum(float(a > b) + 0.5 * float(a == b) for a, b in zip(own, theirs, strict=True)) / 15
            assert row.win_rate.rate == pytest.approx(1 - wins if name == "dark" else wins)
        for estimate, values in ((row.tuned, own), (row.base, theirs), (row.difference, own - theirs)):
            assert estimate.mean == pytest.approx(values.mean(), abs=1e-6)
            assert estimate.standard_error == pytest.approx(standard_error(values), abs=1e-6)
    assert found["reward"].difference.mean > 0.01, "it was trained"
    assert 0.5 < found["reward"].win_rate.low <= found["reward"].win_rate.rate
    assert logged == [{f"test/{name}": pytest.approx(row.tuned.mean, abs=1e-6) for name, row in found.items()}]
    after = weights(module)
    assert all(torch.equal(after[name], value) for name, value in trained.items())


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4), LoRA(rank=2, alpha=4, dora=True), None])
def test_the_base_is_not_better_than_itself(toy_module, judge, lora):
    module = toy_module(lora=lora)
    judge(module)
    for row in module.comparison:
        assert row.difference == (0, 0)
        assert row.win_rate in (None, (0.5, 0.5, 0.5))
    assert rows(module)["reward"].win_rate == (0.5, 0.5, 0.5)


def test_a_prompts_images_differ_and_the_first_is_validations(toy_module, judge):
    seen = {}

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            seen.setdefault("validation", []).append(outputs["images"])

    judge(toy_module(), "validate", callbacks=[Watch()])
    outputs = {count: judge(toy_module(), "predict", images_per_prompt=count) for count in (1, 3)}
    one, three = (torch.cat([output["images"] for output in outputs[count]]) for count in (1, 3))
    torch.testing.assert_close(one, torch.cat(seen["validation"]))
    torch.testing.assert_close(three[::3], one)
    assert len(three.flatten(1).unique(dim=0)) == 15
    labels = [(row.prompt_index, row.repeat) for output in outputs[3] for row in output["rows"]]
    assert labels == list(zip(PLACES, REPEATS, strict=True))


def test_diversity_by_hand(toy_module, judge, checkpoint, tmp_path):
    hub_folders.clip_folder(tmp_path / "clip")
    path, trained = checkpoint()
    module = toy_module(evaluation=Evaluation(diversity=str(tmp_path / "clip")))
    judge(module, ckpt_path=path)
    distances = []
    for images in (by_hand(module, trained), by_hand(module)):
        embeddings = module.evaluator.embedder(images).double().numpy()
        units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        pairs = [[1 - units[3 * p + i] @ units[3 * p + j] for i, j in ((0, 1), (0, 2), (1, 2))] for p in range(5)]
        distances.append(np.mean(pairs, axis=1))
    row = rows(module)["diversity"]
    tuned, base = distances
    assert tuned.mean() > 1e-6
    for estimate, values in ((row.tuned, tuned), (row.base, base), (row.difference, tuned - base)):
        assert estimate.mean == pytest.approx(values.mean(), abs=1e-6)
        assert estimate.standard_error == pytest.approx(values.std(ddof=1) / 5**0.5, abs=1e-6)


def test_diversity_of_one_image_is_refused_before_the_model_loads(toy_module, judge, tmp_path):
    hub_folders.clip_folder(tmp_path / "clip")
    module = toy_module(evaluation=Evaluation(diversity=str(tmp_path / "clip")))
    with pytest.raises(ConfigurationError, match="images_per_prompt of at least 2, got 1"):
        judge(module, images_per_prompt=1)
    assert not hasattr(module.flow, "transformer")


def test_an_embedder_that_is_not_there_is_told_for_test_alone_before_the_model_loads(toy_module, judge, tmp_path):
    module = toy_module(evaluation=Evaluation(diversity=str(tmp_path / "none")))
    with pytest.raises(ConfigurationError, match=r"evaluation\.diversity: weights"):
        judge(module)
    assert not hasattr(module.flow, "transformer")
    judge(toy_module(evaluation=Evaluation(diversity=str(tmp_path / "none"))), "predict")


def test_without_the_base_it_is_not_painted(toy_module, judge, monkeypatch):
    painted = []
    module = toy_module(evaluation=Evaluation(base=False), lora=None)
    generate = module.evaluator.generate
    monkeypatch.setattr(module.evaluator, "generate", lambda *given: painted.append(given) or generate(*given))
    judge(module)
    assert len(painted) == 4
    assert module.evaluator._base is None
    assert all(row.base is row.difference is row.win_rate is None for row in module.comparison)


def test_a_whole_transformer_that_has_been_trained_has_no_base(toy_module, fit, judge):
    module = toy_module(lora=None)
    fit(module, 1)
    with pytest.raises(ConfigurationError, match="the base's weights are gone"):
        judge(module)
    tuned = toy_module()
    fit(tuned, 6)
    judge(tuned)
    assert rows(tuned)["reward"].difference.mean > 0.01


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_the_average_is_judged_and_the_weights_come_back(toy_module, judge, checkpoint, weights, command):
    ema, seen = EMA(0.5), []

    class Watch(Callback):
        def on_test_batch_end(self, trainer, pl_module, *_):
            seen.append(weights(pl_module))

        on_predict_batch_end = on_validation_batch_end = on_test_batch_end

    path, trained = checkpoint([ema])
    module = toy_module()
    judge(module, command, path, callbacks=[EMA(0.5), Watch()])
    assert all(torch.equal(value, ema.average[name]) for name, value in seen[0].items())
    assert any(not torch.equal(value, trained[name]) for name, value in seen[0].items())
    assert all(torch.equal(value, trained[name]) for name, value in weights(module).items())


def test_images_that_a_reward_fails_on_are_left_out(toy_module, judge, tmp_path):
    def fragile(images, prompts, metadata):
        if any(prompt == "one fish" for prompt in prompts):
            raise RuntimeError("no fish")
        return brightness(images, prompts, metadata)

    module = toy_module(rewards={"fragile": {"reward": fragile}}, on_reward_error="drop_pair")
    with pytest.warns(UserWarning, match="no fish"):
        judge(module, callbacks=[MetricsWriter()])
    images = by_hand(module)[[place != 3 for place in PLACES]]
    assert rows(module)["fragile"].tuned.mean == pytest.approx(images.double().mean().item(), abs=1e-6)
    assert math.isfinite(rows(module)["fragile"].win_rate.low)


@pytest.mark.parametrize("options", [{"confidence": 0.0}, {"confidence": 1.0}, {"num_resamples": 0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match="0 < confidence < 1 and num_resamples >= 1"):
        Evaluation(**options)
