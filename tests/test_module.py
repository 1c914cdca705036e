import inspect
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_fdfo import Batching, FDFOModule, LoRA, Objective, Sampling
from lightning_fdfo.callbacks import BeforeAfter, Curves
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3
from lightning_fdfo.image_statistics import STATISTICS
from lightning_fdfo.objective import velocity_objective
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import ToyFlow, brightness

NUMBERS = ("mean", "std", "difference", "ties", "share")
"""What is logged of each reward."""


class Recorder(Callback):
    """Keeps each epoch's metrics."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def mean_reward(self, last):
        return sum(epoch["reward/mean"] for epoch in self.epochs[-last:]) / last


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4), None], ids=["lora", "full"])
def test_the_reward_rises_and_falls_when_its_sign_is_flipped(toy_module, fit, lora):
    """40 epochs, seed 0: brightness leaves its start of about 0.5 by at least 0.1, in the direction asked for."""
    for weight, sign in ((1.0, 1), (-1.0, -1)):
        recorder = Recorder()
        fit(toy_module(rewards={"brightness": RewardTerm(brightness, weight)}, lora=lora), 40, callbacks=[recorder])
        start, end = recorder.epochs[0]["reward/brightness/mean"], recorder.epochs[-1]["reward/brightness/mean"]
        assert sign * (end - start) > 0.1, (start, end)
        assert recorder.mean_reward(5) > recorder.epochs[0]["reward/mean"] + 0.1


@pytest.mark.filterwarnings("ignore:reward flat")
def test_what_is_logged(toy_module, fit):
    recorder = Recorder()
    rewards = {
        "brightness": RewardTerm(brightness),
        "flat": RewardTerm(lambda images, *_: torch.ones(len(images)), 0.5),
    }
    fit(toy_module(rewards=rewards), 2, callbacks=[recorder])
    first = recorder.epochs[0]
    assert set(first) == {
        "mean_reward",
        "reward/mean", "reward/std", "reward/difference", "reward/ties",
        *(f"reward/{name}/{number}" for name in ("brightness", "flat") for number in NUMBERS),
        "rollout/pair_distance", "rollout/images_per_second",
        *(f"image/{name}" for name in STATISTICS),
        "train/loss", "train/ratio", "train/clip_fraction", "train/grad_norm", "train/skipped", "train/learning_rate",
        "train/drift", "train/points_per_second",
    }  # fmt: skip
    assert first["reward/flat/mean"] == 1
    assert first["reward/flat/std"] == 0
    assert first["reward/mean"] == pytest.approx(first["reward/brightness/mean"] + 0.5)
    assert first["reward/std"] == pytest.approx(first["reward/brightness/std"], rel=1e-4)
    assert first["reward/ties"] == 0
    assert first["train/learning_rate"] == pytest.approx(1e-2)
    assert first["train/points_per_second"] > 0


@pytest.mark.filterwarnings("ignore:none of the 16 pairs", "ignore:reward", "ignore:no pair of any epoch")
def test_ties_are_counted_and_teach_nothing(toy_module, fit, weights):
    recorder, module = (
        Recorder(),
        toy_module(
            rewards={"flat": RewardTerm(lambda images, *_: torch.zeros(len(images)))},
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        ),
    )
    fit(module, 1, callbacks=[recorder])
    assert recorder.epochs[0]["reward/ties"] == 1
    assert all(bool((value == 0).all()) for name, value in weights(module).items() if "lora_B" in name)


def test_the_plan_is_lightnings_accumulation(toy_module, fit, capsys):
    module = toy_module(batch_size=16)
    trainer = fit(module, 3)
    assert trainer.accumulate_grad_batches == 4
    assert trainer.global_step == 3 * 2
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches=3: leave it out"):
        fit(toy_module(), 1, accumulate_grad_batches=3)


@pytest.mark.parametrize(("batch_size", "rollout_batch_size"), [(16, 8), (64, 3), (8, 16)])
def test_batch_sizes_only_set_memory(toy_module, fit, weights, batch_size, rollout_batch_size):
    results = []
    for options in (
        {},
        {
            "batch_size": batch_size,
            "rollout_batch_size": rollout_batch_size,
        },
    ):
        module = toy_module(**options)
        fit(module, 3)
        results.append(weights(module))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_runs_repeat_and_seeds_differ(toy_module, fit, weights):
    results = []
    for seed in (0, 0, 1):
        module = toy_module(seed=seed)
        torch.manual_seed(torch.randint(1000, ()).item())
        fit(module, 2)
        results.append(weights(module))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def checkpoints(folder):
    return ModelCheckpoint(
        dirpath=folder,
        filename="{epoch}",
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        save_last=True,
        save_top_k=-1,
    )


def test_stop_and_resume_is_no_stop_to_the_bit(toy_module, fit, weights, tmp_path):
    """20 epochs, and 10 + 10: the same weights, optimiser and scales, also with a scheduler and accumulation."""
    options = {
        "rewards": {"brightness": RewardTerm(brightness, 1.0, "std"), "red": RewardTerm(redness, -0.1, "std")},
        "batch_size": 16,
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40),
    }
    whole = toy_module(**options)
    trainer_a = fit(whole, 20)
    stopped = toy_module(**options)
    fit(stopped, 10, enable_checkpointing=True, callbacks=[checkpoints(tmp_path / "c")])
    resumed = toy_module(**options)
    trainer_b = fit(resumed, 20, ckpt_path="last", enable_checkpointing=True, callbacks=[checkpoints(tmp_path / "c")])
    assert trainer_b.global_step == trainer_a.global_step == 40
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (trainer_a, trainer_b)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert resumed.rewards.state_dict() == whole.rewards.state_dict()
    assert resumed.rewards.running["red"].total[0] == 20 * 2 * 16


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))


def test_a_scaled_rewards_unit_changes_nothing(toy_module, fit, weights):
    results = []
    for gain in (1.0, 512.0):  # a power of two: to the bit
        rewards = {
            "brightness": RewardTerm(lambda *batch, gain=gain: gain * brightness(*batch), 1.0, "std"),
            "red": RewardTerm(redness, -0.2, "std"),
        }
        module = toy_module(rewards=rewards)
        fit(module, 3)
        results.append(weights(module))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_before_the_first_rollout_a_scaled_mixture_has_terms_and_no_total(toy_module, fit, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\n")
    seen = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(set(outputs["scores"]))

    rewards = {"brightness": RewardTerm(brightness, 1.0, "std")}
    curve = Curves()
    fit(
        toy_module(rewards=rewards), 2, val=str(prompts), callbacks=[Watch(), curve, BeforeAfter()],
        num_sanity_val_steps=-1,
    )  # fmt: skip
    assert seen == [{"brightness"}, {"brightness", "reward"}, {"brightness", "reward"}]
    assert [epoch for epoch, _ in curve.history["val/reward"]] == [1, 2]


def test_a_checkpoint_holds_what_trains_and_is_strict(toy_module, fit, tmp_path):
    module = toy_module()
    fit(module, 1, enable_checkpointing=True, callbacks=[checkpoints(tmp_path / "c")])
    saved = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}
    for other, message in (
        (
            {"lora": LoRA(rank=2, alpha=4, targets=("first",))},
            r"2 weights differ in name or shape, first flow\.transformer",
        ),
        ({"lora": LoRA(rank=3, alpha=4)}, "written with lora.rank=2, the configuration says 3"),
        ({"lora": LoRA(rank=2, alpha=40)}, "written with lora.alpha=4, the configuration says 40"),
        ({"seed": 9}, "written with seed=0, the configuration says 9"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            fit(toy_module(**other), 2, ckpt_path=str(tmp_path / "c" / "last.ckpt"))


def test_the_kl_term_is_measured_from_the_base_and_holds_the_velocity(toy_module, fit):
    ends = []
    for kl_weight in (1e-6, 1.0):
        recorder = Recorder()
        objective = Objective(normalization="root_mean_square", kl_weight=kl_weight)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
        fit(toy_module(objective=objective, optimizer=sgd), 15, callbacks=[recorder])
        assert recorder.epochs[0]["train/divergence"] < recorder.epochs[-1]["train/divergence"]
        ends.append(recorder.epochs[-1]["train/divergence"])
    assert ends[1] < ends[0] / 2


def test_validation_scores_rewards_and_metrics(toy_module, fit, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("x\ny\nz\n")
    seen = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(outputs)

    trainer = fit(
        toy_module(metrics={"half": {"reward": lambda images, *_: torch.full((len(images),), 0.5)}}),
        2, val=str(prompts), callbacks=[Watch()], num_sanity_val_steps=-1,
    )  # fmt: skip
    assert trainer.callback_metrics["val/half"] == 0.5
    assert trainer.callback_metrics["val/reward"] == trainer.callback_metrics["val/brightness"]
    assert [output["prompts"] for output in seen] == [["x", "y", "z"]] * 3
    assert seen[0]["images"].shape == (3, 3, 2, 2)
    assert not torch.equal(seen[0]["images"], seen[2]["images"])


def test_validation_paints_the_same_images_in_every_epoch(toy_module, fit, prompts_file):
    """As long as the weights stay where they are, whatever the churn of rollouts."""
    seen = []

    class Watch(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            seen.append(outputs["images"])

    still = lambda parameters: torch.optim.SGD(parameters, lr=1e-30)  # noqa: E731
    for churn in (0.1, 0.9):
        sampling = Sampling(num_steps=4, height=2, width=2, churn=churn)
        module = toy_module(optimizer=still, sampling=sampling)
        fit(module, 3, val=str(prompts_file), callbacks=[Watch()], num_sanity_val_steps=-1)
    assert len(seen) == 8
    assert all(torch.equal(images, seen[0]) for images in seen)


def test_prompts_are_checked_with_file_and_line_before_the_model_loads(toy_module, fit, prompts_file):
    flow = ToyFlow()
    with pytest.raises(ConfigurationError, match=r"prompts\.txt:1: OCR needs"):
        fit(toy_module(flow=flow, rewards={"OCR": 1.0}), 1)
    assert not hasattr(flow, "transformer")


def test_pairs_that_do_not_divide_are_refused_before_the_model_loads(toy_module, fit):
    flow = ToyFlow()
    with pytest.raises(ConfigurationError, match="updates_per_epoch=7 must divide"):
        fit(toy_module(flow=flow, updates_per_epoch=7), 1)
    assert not hasattr(flow, "transformer")


def test_batches_much_smaller_than_asked_for_are_reported(toy_module, fit):
    with pytest.warns(UserWarning, match="batch_size=10: no number from 2 to it divides the 11 points of an update"):
        fit(toy_module(num_pairs=11, updates_per_epoch=8, batch_size=10), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": Objective(kl_weight=1.0), "lora": None}, "kl_weight needs the base model"),
        ({"seed": -1}, "seed: expected a finite number of at least 0"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        FDFOModule(ToyFlow(), {"brightness": RewardTerm(brightness)}, **options)


@pytest.mark.parametrize("name", ["reward", "brightness"])
def test_names_are_not_taken_twice(toy_module, name):
    with pytest.raises(ConfigurationError, match=rf"\['{name}'\] would be two"):
        toy_module(metrics={name: RewardTerm(brightness)})


def ratio_error(fit, monkeypatch):
    """How far ratios leave 1 where training has not moved the weights, in bf16-mixed."""
    ratios = []

    def watched(*arguments, **options):
        result = velocity_objective(*arguments, **options)
        ratios.append((result.ratio - 1).abs().max().item())
        return result

    module = FDFOModule(
        StableDiffusion3("tiny-digits", max_sequence_length=0),
        {"brightness": RewardTerm(brightness)},
        sampling=Sampling(num_steps=3, height=32, width=64, churn=0.0025),
        batching=Batching(num_pairs=4, updates_per_epoch=1, batch_size=4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-30),
    )
    monkeypatch.setattr("lightning_fdfo.training.step.velocity_objective", watched)
    fit(module, 1, precision="bf16-mixed")
    assert len(ratios) == 6
    return max(ratios)


def test_rollout_and_training_see_the_same_velocities_in_bf16_mixed(fit, monkeypatch):
    """The rollout runs in the trainer's precision; in float32 it would store other velocities than training sees."""
    with_context = ratio_error(fit, monkeypatch)
    monkeypatch.setattr(MixedPrecision, "forward_context", contextmanager(forward_context_in_training_only))
    without_context = ratio_error(fit, monkeypatch)
    assert with_context < 1e-6
    assert without_context > 1e-4


forward_context = MixedPrecision.forward_context


def forward_context_in_training_only(self):
    with forward_context(self) if torch.is_grad_enabled() and not from_rollout() else nullcontext():
        yield


def from_rollout():
    return any(frame.function == "collect" for frame in inspect.stack())


def dropout_module(toy_module, **options):
    return toy_module(lora=LoRA(rank=2, alpha=4, dropout=0.5), **options)


def test_dropout_is_on_in_training_only_and_resumes_exactly(toy_module, fit, tmp_path, weights, monkeypatch):
    states = {"rollout": set(), "training": set()}
    original = ToyFlow.velocity

    def watched(self, latents, sigma, conditioning, guidance_scale=1.0):
        drops = {m.training for n, m in self.transformer.named_modules() if n.endswith("lora_dropout.default")}
        states["training" if torch.is_grad_enabled() else "rollout"] |= drops
        return original(self, latents, sigma, conditioning, guidance_scale)

    monkeypatch.setattr(ToyFlow, "velocity", watched)
    whole = dropout_module(toy_module)
    fit(whole, 3)
    assert states == {"rollout": {False}, "training": {True}}
    first = dropout_module(toy_module)
    fit(first, 1).save_checkpoint(tmp_path / "one.ckpt")
    second = dropout_module(toy_module)
    fit(second, 3, ckpt_path=str(tmp_path / "one.ckpt"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(second).items())
    plain = toy_module()
    fit(plain, 3)
    assert any(not torch.equal(value, expected[name]) for name, value in weights(plain).items())


def test_dropout_leaves_the_global_generator_alone(toy_module, fit):
    drawn = []
    for module in (toy_module(), dropout_module(toy_module)):
        torch.manual_seed(3)
        fit(module, 1)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_guidance_without_guidance_is_refused(toy_module, fit):
    class Guideless(ToyFlow):
        guidance = "none"

    sampling = Sampling(num_steps=4, height=2, width=2, guidance_scale=2.0)
    with pytest.raises(ConfigurationError, match=r"expected 1, got 2\.0: this model has no guidance"):
        fit(toy_module(flow=Guideless(), sampling=sampling), 1)


@pytest.mark.parametrize("text_encoders", ["keep", "cache"])
def test_training_does_not_depend_on_where_texts_are_encoded(fit, weights, tmp_path, text_encoders):
    def train(text_encoders):
        module = FDFOModule(
            StableDiffusion3(
                "tiny-digits",
                max_sequence_length=0,
                text_encoders=text_encoders,
                text_cache=str(tmp_path / "texts"),
            ),
            {"brightness": RewardTerm(brightness)},
            sampling=Sampling(num_steps=2, height=32, width=64, churn=0.1, guidance_scale=2.0),
            batching=Batching(num_pairs=4, updates_per_epoch=1, batch_size=4, rollout_batch_size=2),
            lora=LoRA(rank=2, alpha=2),
        )
        fit(module, 1)
        return weights(module)

    expected = train("offload")
    for name, value in train(text_encoders).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
    assert (tmp_path / "texts").exists() == (text_encoders == "cache")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_trains_the_transformer_alone(fit, checkpointing):
    module = FDFOModule(
        StableDiffusion3("tiny-digits", max_sequence_length=0, gradient_checkpointing=checkpointing),
        {"brightness": RewardTerm(brightness)},
        sampling=Sampling(num_steps=2, height=32, width=64, churn=0.1),
        batching=Batching(num_pairs=2, updates_per_epoch=1, batch_size=4),
        lora=None,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )
    flow = StableDiffusion3("tiny-digits")
    flow.load()
    fit(module, 1)
    before = dict(flow.transformer.named_parameters())
    moved = [n for n, p in module.flow.transformer.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)
    assert not any(p.requires_grad for p in module.flow.pipeline.vae.parameters())


def test_the_model_is_the_cpus_whatever_the_default_device():
    """Lightning makes the accelerator the default device while a model is built."""
    starts = []
    for device in ("cpu", "meta"):
        module = FDFOModule(
            StableDiffusion3("tiny-digits", max_sequence_length=0), {"b": RewardTerm(brightness)}, seed=3
        )
        with torch.device(device):
            module.configure_model()
        starts.append({name: value for name, value in module.named_parameters() if value.requires_grad})
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


class Remembers(ToyFlow):
    """Keeps what it has first computed, as some models keep positions on the device."""

    kept = None

    def velocity(self, latents, sigma, conditioning, guidance_scale=1.0):
        if self.kept is None:
            self.kept = torch.ones(1) * 2
        return super().velocity(latents, sigma, conditioning) * self.kept


def test_what_validation_has_made_a_model_keep_does_for_training(toy_module, fit, prompts_file):
    """Lightning validates in inference mode, whose tensors cannot be saved for a backward pass."""
    fit(toy_module(flow=Remembers()), 1, val=str(prompts_file), num_sanity_val_steps=-1)


@pytest.fixture(scope="module")
def reference():
    return {}


@pytest.mark.parametrize("rollout_batch_size", [1, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_sizes_that_set_memory_set_nothing_else(toy_module, fit, weights, reference, rollout_batch_size, accumulation):
    """Three epochs by SGD: Adam would make steps of rounding."""
    module = toy_module(
        rollout_batch_size=rollout_batch_size,
        batch_size=64 // accumulation,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    trainer = fit(module, 3)
    assert trainer.accumulate_grad_batches == accumulation
    expected = reference.setdefault("weights", weights(module))
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_checkpoint_whose_weights_are_not_what_it_says_is_refused(toy_module, fit, tmp_path):
    path = tmp_path / "one.ckpt"
    fit(toy_module(), 1).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {}
    torch.save(saved, path)
    with pytest.raises(ConfigurationError, match=r"weights differ in name or shape.*it has nothing"):
        fit(toy_module(), 2, ckpt_path=str(path))


class GuidanceOfTheLoaded(ToyFlow):
    """Knows how it is guided only once it is loaded."""

    @property
    def guidance(self):
        return "classifier-free" if self.transformer is not None else None


def test_guidance_may_be_known_only_once_the_model_is_loaded(toy_module, fit):
    sampling = Sampling(num_steps=4, height=2, width=2, guidance_scale=2.0)
    fit(toy_module(flow=GuidanceOfTheLoaded(), sampling=sampling), 1)


def test_load_from_checkpoint_says_what_to_do_instead():
    with pytest.raises(ConfigurationError, match="build the module, and give the file"):
        FDFOModule.load_from_checkpoint("last.ckpt")
