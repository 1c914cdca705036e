from contextlib import suppress

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_fdfo import LoRA, PromptDataModule
from lightning_fdfo.callbacks import EMA, LoRAExport
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.flows.lora_files import LORA_FILE
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import trainable


class Watch(Callback):
    """Keeps the weights after each batch, and those that a validation sees; `save` writes a checkpoint in the midst."""

    def __init__(self, save=None):
        self.save = save
        self.after_batch, self.in_validation = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after_batch.append(trainable(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.in_validation.append(trainable(pl_module))
        if self.save is not None and not trainer.sanity_checking:
            trainer.save_checkpoint(self.save, weights_only=True)


@pytest.fixture
def val(tmp_path):
    path = tmp_path / "val.txt"
    path.write_text("x\ny\n")
    return str(path)


def averages(start, weights, decays):
    """The running average after each step, in float64."""
    result, average = [], {name: value.double() for name, value in start.items()}
    for step, decay in zip(weights, decays, strict=True):
        average = {name: decay * value + (1 - decay) * step[name].double() for name, value in average.items()}
        result.append(average)
    return result


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def assert_close(actual, expected):
    assert set(actual) == set(expected)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "decays"),
    [(False, [0.5, 0.5, 0.5, 0.5]), (True, [1 / 10, 2 / 11, 3 / 12, 4 / 13])],
)
def test_the_formula(toy_module, fit, warmup, decays):
    ema, watch, module = EMA(decay=0.5, warmup=warmup), Watch(), toy_module()
    start = {}
    module.on_train_start = lambda: start.update(trainable(module))
    batches = fit(module, 2, callbacks=[ema, watch]).accumulate_grad_batches
    expected = averages(start, watch.after_batch[batches - 1 :: batches], decays)
    assert ema.num_updates == 4
    assert all(value.dtype == torch.float32 for value in ema.average.values())
    assert_close(ema.average, expected[-1])


def test_it_follows_steps_not_batches(toy_module, fit, tmp_path):
    """Sums of gradients differ in their last bits between batch sizes, averages do no more than that."""
    results = []
    for batch_size in (64, 8):
        ema, watch = EMA(decay=0.5), Watch()
        folder = tmp_path / str(batch_size)
        trainer = fit(toy_module(batch_size=batch_size), 2, callbacks=[ema, watch], default_root_dir=folder)
        assert len(watch.after_batch) == trainer.accumulate_grad_batches * trainer.global_step
        assert ema.num_updates == trainer.global_step == 4
        results.append(ema.average)
    assert trainer.accumulate_grad_batches == 8
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(toy_module, fit, weights, val):
    plain = toy_module()
    fit(plain, 3, val=val, num_sanity_val_steps=-1)
    ema, watch, module = EMA(decay=0.5), Watch(), toy_module()
    seen = []

    class Keep(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append({name: value.clone() for name, value in ema.average.items()})

    fit(module, 3, val=val, callbacks=[ema, watch, Keep()], num_sanity_val_steps=-1)
    assert len(seen) == len(watch.in_validation) == 4
    for average, in_validation in zip(seen, watch.in_validation, strict=True):
        assert_same(in_validation, average)
    assert not torch.equal(seen[-1]["flow.transformer.first.lora_B.default.weight"], torch.zeros(32, 2))
    assert_same(weights(module), weights(plain))
    assert_same(weights(module), watch.after_batch[-1])


def test_weights_are_back_after_a_validation_that_fails(toy_module, fit, weights, val, tmp_path):
    class Failing(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            raise RuntimeError("no more")

    watch, module = Watch(), toy_module()
    saving = ModelCheckpoint(tmp_path / "c", save_on_exception=True)
    with pytest.raises(RuntimeError, match="no more"):
        fit(
            module, 3, val=val, callbacks=[EMA(0.5), watch, Failing(), saving],
            num_sanity_val_steps=0, enable_checkpointing=True,
        )  # fmt: skip
    assert_same(weights(module), watch.after_batch[-1])
    (saved,) = (tmp_path / "c").glob("*.ckpt")
    assert_same(torch.load(saved, weights_only=True)["state_dict"], watch.after_batch[-1])


def test_a_checkpoint_at_the_end_of_validation_or_in_its_midst_holds_the_weights(toy_module, fit, val, tmp_path):
    ema, watch = EMA(0.5), Watch(save=tmp_path / "midst.ckpt")
    saving = ModelCheckpoint(tmp_path / "c", monitor="val/reward", save_on_train_epoch_end=False)
    fit(
        toy_module(), 2, val=val, callbacks=[saving, ema, watch],  # Lightning moves `saving` to the end
        num_sanity_val_steps=0, enable_checkpointing=True,
    )  # fmt: skip
    step = torch.load(saving.best_model_path, weights_only=True)
    last = len(watch.after_batch) // 2 * (step["epoch"] + 1) - 1
    assert_same(step["state_dict"], watch.after_batch[last])
    entry = step["callbacks"]["EMA"]
    assert entry["num_updates"] == step["global_step"]
    assert_same(entry["average"], watch.in_validation[step["epoch"]])
    midst = torch.load(tmp_path / "midst.ckpt", weights_only=True)
    assert_same(midst["state_dict"], watch.after_batch[-1])


@pytest.mark.parametrize("sanity_steps", [0, -1])
def test_stop_and_resume_is_no_stop_to_the_bit(toy_module, fit, weights, val, tmp_path, sanity_steps):
    options = {"val": val, "num_sanity_val_steps": sanity_steps}
    whole, ema = toy_module(batch_size=16), EMA(0.9)
    fit(whole, 6, callbacks=[ema], default_root_dir=tmp_path / "whole", **options)
    for epochs, ckpt_path in ((3, None), (6, "last")):
        saving = ModelCheckpoint(tmp_path / "c", save_last=True)
        resumed, resumed_ema = toy_module(batch_size=16), EMA(0.9)
        fit(resumed, epochs, ckpt_path, callbacks=[resumed_ema, saving], enable_checkpointing=True, **options)
    assert_same(weights(resumed), weights(whole))
    assert_same(resumed_ema.average, ema.average)
    assert resumed_ema.num_updates == ema.num_updates == 12


def trained(toy_module, fit, folder, callbacks=()):
    module, path = toy_module(), str(folder / "a.ckpt")
    fit(module, 2, callbacks=list(callbacks)).save_checkpoint(path)
    return module, path


def test_a_checkpoint_without_an_average_starts_one_from_its_weights(toy_module, fit, weights, tmp_path):
    module, path = trained(toy_module, fit, tmp_path)
    ema, watch = EMA(0.5, warmup=False), Watch()
    batches = fit(toy_module(), 3, path, callbacks=[ema, watch]).accumulate_grad_batches
    assert_close(ema.average, averages(weights(module), watch.after_batch[batches - 1 :: batches], [0.5, 0.5])[-1])


def test_validate_judges_a_checkpoints_average(toy_module, fit, weights, val, tmp_path, prompts_file):
    ema = EMA(0.5)
    module, path = trained(toy_module, fit, tmp_path, [ema])
    watch, other = Watch(), toy_module()
    trainer = Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", callbacks=[EMA(0.5), watch],
        plugins=[SafeCheckpointIO()], default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(other, PromptDataModule(str(prompts_file), val), ckpt_path=path, verbose=False)
    assert_same(watch.in_validation[0], ema.average)
    assert_same(weights(other), weights(module))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda average: average.pop("flow.transformer.first.lora_A.default.weight"), r"nothing for .*first\.lora_A"),
        (lambda average: average.update(more=torch.zeros(2)), r"it has \(2,\) for more, expected nothing"),
        (
            lambda average: average.update({"flow.transformer.second.lora_B.default.weight": torch.zeros(12, 3)}),
            r"has \(12, 3\) for .*second\.lora_B\.default\.weight, expected \(12, 2\)",
        ),
    ],
)
def test_an_average_of_other_weights_is_refused(toy_module, fit, tmp_path, change, message):
    _, path = trained(toy_module, fit, tmp_path, [EMA(0.5)])
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["callbacks"]["EMA"]["average"])
    torch.save(checkpoint, path)
    with pytest.raises(ConfigurationError, match=message):
        fit(toy_module(), 3, path, callbacks=[EMA(0.5)])


def test_a_callback_that_averaged_another_module_is_refused(toy_module, fit):
    ema = EMA(0.5)
    fit(toy_module(), 1, callbacks=[ema])
    with pytest.raises(ConfigurationError, match="the average is of other weights"):
        fit(toy_module(lora=LoRA(rank=3, alpha=3)), 1, callbacks=[ema])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigurationError, match="EMA: decay: expected a finite number above 0 and below 1, got"):
        EMA(decay)


@pytest.mark.parametrize("subfolder", ["lora", "out/mine"])
def test_the_averaged_lora_is_exported_beside_the_trained_one(toy_module, fit, weights, tmp_path, subfolder):
    ema, module = EMA(0.5), toy_module(lora=LoRA(rank=2, alpha=2))
    fit(module, 2, callbacks=[LoRAExport(subfolder), ema])
    for folder, expected in ((subfolder, ema.average), (f"{subfolder}_raw", weights(module))):
        named = {n.removeprefix("flow.").replace(".default", ""): v for n, v in expected.items()}
        assert_same(load_file(tmp_path / folder / LORA_FILE), named)
        assert [file.name for file in (tmp_path / folder).iterdir()] == [LORA_FILE]


def test_without_an_average_there_is_one_export(toy_module, fit, tmp_path):
    fit(toy_module(), 1, callbacks=[LoRAExport()])
    assert (tmp_path / "lora" / LORA_FILE).exists()
    assert not (tmp_path / "lora_raw").exists()


def test_averaged_swaps_and_swaps_back(toy_module, fit, weights):
    ema, module = EMA(0.5), toy_module()
    fit(module, 2, callbacks=[ema])
    raw = weights(module)
    with ema.averaged(module):
        assert_same(weights(module), ema.average)
        with ema.averaged(module):
            assert_same(weights(module), ema.average)
        assert_same(weights(module), ema.average)
    assert_same(weights(module), raw)
    with suppress(RuntimeError), ema.averaged(module):
        raise RuntimeError
    assert_same(weights(module), raw)
    with EMA().averaged(module):
        assert_same(weights(module), raw)


def test_sharded_weights_are_averaged_in_place_and_saved_whole(tmp_path):
    """One process; what is asked is that averages are shards like the weights, and whole in a checkpoint."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module = nn.Linear(2, 4, bias=False)
        start = module.weight.detach().clone()
        module.weight = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        ema, trainer = EMA(0.5, warmup=False), Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
        ema.on_train_start(trainer, module)
        with torch.no_grad():
            module.weight.add_(1)
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 1
        ema.on_train_batch_end(trainer, module)
        state = ema.state_dict()
        assert not isinstance(state["average"]["weight"], DTensor)
        torch.testing.assert_close(state["average"]["weight"], start + 0.5)
        again = EMA(0.5)
        again.load_state_dict(state)
        again.on_train_start(trainer, module)
        assert isinstance(again.average["weight"], DTensor)
        with again.averaged(module):
            torch.testing.assert_close(module.weight.full_tensor(), start + 0.5)
        torch.testing.assert_close(module.weight.full_tensor(), start + 1)
    finally:
        torch.distributed.destroy_process_group()


class Rollouts(Callback):
    """Keeps the weights that generate each rollout's batches, and those after it."""

    def __init__(self):
        self.generate, self.after = [], []

    def on_rollout_batch_start(self, trainer, pl_module):
        self.generate.append(trainable(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.after.append(trainable(pl_module))


@pytest.mark.parametrize("rollouts", [False, True])
def test_the_average_generates_rollouts_where_it_is_asked_to(toy_module, fit, rollouts):
    ema, watch, seen = EMA(decay=0.5, warmup=False, rollouts=rollouts), Watch(), Rollouts()
    module = toy_module(updates_per_epoch=1, batch_size=128, rollout_batch_size=8)
    fit(module, 3, callbacks=[ema, watch, seen])
    start, (one, two, _) = seen.generate[0], watch.after_batch
    average = averages(start, [one, two], [0.5, 0.5])
    for batches, raw, averaged in ((seen.generate[2:4], one, average[0]), (seen.generate[4:6], two, average[1])):
        for weights in batches:
            assert_close(weights, averaged if rollouts else {name: value.double() for name, value in raw.items()})
    for weights, raw in zip(seen.after, (start, one, two), strict=True):
        assert_same(weights, raw)


def test_a_rollout_that_fails_leaves_the_weights_themselves(toy_module, fit):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError("no more")
        return images.mean(dim=(1, 2, 3))

    ema, watch = EMA(decay=0.5, warmup=False, rollouts=True), Watch()
    module = toy_module(rewards={"short": RewardTerm(reward)}, rollout_batch_size=16)
    with suppress(RewardError):
        fit(module, 4, callbacks=[ema, watch])
    assert_same(trainable(module), watch.after_batch[-1])
