"""A module in plain Python and notebooks: each use works, or one line says what to do instead; docs/python.md."""

import copy
import dataclasses
import logging
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_fdfo import Batching, FDFOModule, LoRA, PromptDataModule, Sampling
from lightning_fdfo.callbacks import LoRAExport
from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.commands import console
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.flows import StableDiffusion3
from lightning_fdfo.flows.lora_files import LORA_FILE, save_lora
from lightning_fdfo.remote.client import Client
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import ToyFlow, trainable

COMMANDS = ("fit", "validate", "test", "predict")
DIGITS = Path(__file__).parents[2] / "configs/prompts/digits_heldout.txt"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def trainer(folder, epochs=1, **options):
    return Trainer(max_epochs=epochs, default_root_dir=folder, **(QUIET | options))


@pytest.fixture
def data(prompts_file):
    return PromptDataModule(str(prompts_file), str(prompts_file), val_batch_size=4, images_per_prompt=2)


@pytest.fixture
def module(toy_module):
    return toy_module(optimizer=adamw)


def equal(one, other):
    one, other = (trainable(part) if isinstance(part, FDFOModule) else part for part in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def scores(module, data, folder, **options):
    return trainer(folder).validate(module, data, verbose=False, **options)


# fit, validate, test and predict in any order


@pytest.mark.parametrize("before", ["validate", "test", "predict"])
def test_fit_after_another_command_is_the_fit_of_a_new_module(before, toy_module, data, tmp_path):
    used, new = toy_module(), toy_module()
    runner = trainer(tmp_path / "used")
    getattr(runner, before)(used, data, **({} if before == "predict" else {"verbose": False}))
    runner.fit(used, data)
    trainer(tmp_path / "new").fit(new, data)
    assert equal(used, new)


def test_validate_after_fit_judges_the_trained_weights(toy_module, data, tmp_path):
    module = toy_module()
    runner = trainer(tmp_path)
    (untrained,) = runner.validate(module, data, verbose=False)
    runner.fit(module, data)
    (trained,) = runner.validate(module, data, verbose=False)
    assert trained["val/brightness"] > untrained["val/brightness"]
    assert scores(module, data, tmp_path) == [trained]
    assert scores(toy_module(), data, tmp_path, ckpt_path=tmp_path / "checkpoints/last.ckpt") == [trained]


@pytest.fixture
def outspoken():
    """Lightning as plain Python hears it, also after a command of this process has quieted it."""
    for name in console.LOGGERS:
        logging.getLogger(f"lightning.{name}").removeFilter(console.matters)


@pytest.mark.usefixtures("outspoken")
def test_another_fit_of_a_module_begins_from_its_weights_and_says_so(toy_module, data, tmp_path, caplog):
    module = toy_module()
    caplog.set_level(logging.INFO, "lightning.pytorch")
    trainer(tmp_path / "first").fit(module, data)
    assert "begins from weights" not in caplog.text
    before = trainable(module)
    second = trainer(tmp_path / "second")
    second.fit(module, data)
    assert second.global_step == 2
    assert not equal(module, before)
    assert "begins from weights that an earlier fit or checkpoint has left" in caplog.text
    caplog.clear()
    second.fit(module, data)  # its epochs are done
    assert second.global_step == 2
    assert "`max_epochs=1` reached" in caplog.text


@pytest.mark.usefixtures("outspoken")
def test_a_fit_after_one_that_ended_by_an_error_says_so(toy_module, data, tmp_path, caplog):
    calls = []

    def fails_in_the_second_epoch(images, prompts, metadata):
        calls.append(len(images))
        if sum(calls) > 60:  # images: 32 of the first epoch, and 10 of validation before and after it
            raise ValueError("no score")
        return images.mean(dim=(1, 2, 3))

    module = toy_module(rewards={"late": RewardTerm(fails_in_the_second_epoch)})
    caplog.set_level(logging.INFO, "lightning.pytorch")
    with pytest.raises(RewardError, match="no score"):
        trainer(tmp_path / "first", 2).fit(module, data)
    calls.clear()
    trainer(tmp_path / "second").fit(module, data)
    assert "begins from weights that an earlier fit or checkpoint has left" in caplog.text


def test_a_setting_that_is_replaced_counts_in_evaluation_too(toy_module, judge, monkeypatch):
    module = toy_module()
    steps = []
    sigmas = module.flow.sigmas
    monkeypatch.setattr(
        module.flow, "sigmas", lambda num_steps, *size: steps.append(num_steps) or sigmas(num_steps, *size)
    )
    module.sampling = dataclasses.replace(module.sampling, num_steps=7)
    judge(module, "validate")
    assert set(steps) == {7}


def test_a_process_that_is_not_connected_writes_whatever_its_number(toy_module, data, tmp_path, monkeypatch):
    """As one of many independent jobs that a cluster has numbered."""
    monkeypatch.setattr("lightning_utilities.core.rank_zero.rank_zero_only.rank", 1)
    trainer(tmp_path, callbacks=[LoRAExport()]).fit(toy_module(), data)
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").exists()


def test_another_fit_that_goes_on_by_ckpt_path_is_one_run(toy_module, data, tmp_path, caplog):
    module, undisturbed = toy_module(), toy_module()
    caplog.set_level(logging.INFO, "lightning.pytorch")
    trainer(tmp_path / "two").fit(module, data)
    trainer(tmp_path / "two", 2).fit(module, data, ckpt_path=tmp_path / "two/checkpoints/last.ckpt")
    trainer(tmp_path / "one", 2).fit(undisturbed, data)
    assert equal(module, undisturbed)
    assert "begins from weights" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("options", [{}, {"ckpt_path": "last"}])
def test_a_folder_that_holds_a_run(options, toy_module, data, tmp_path):
    """Lightning finds no `last` where a logger has a folder of its own."""
    trainer(tmp_path, logger=True).fit(toy_module(), data)
    go_on = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(ConfigurationError, match=f'holds a run already: .*in Python by ckpt_path="{go_on}"'):
        trainer(tmp_path, logger=True).fit(toy_module(), data, **options)
    assert go_on.exists()


def test_two_modules_in_a_process_do_not_touch_each_other(toy_module, data, tmp_path):
    first, second, alone = toy_module(), toy_module(seed=1), toy_module(seed=1)
    trainer(tmp_path / "first").fit(first, data)
    before = trainable(first)
    trainer(tmp_path / "second").fit(second, data)
    trainer(tmp_path / "alone").fit(alone, data)
    assert equal(first, before)
    assert equal(second, alone)


def test_two_modules_of_one_flow_are_refused(toy_module, data, tmp_path):
    flow = ToyFlow()
    trainer(tmp_path / "first").fit(toy_module(flow=flow), data)
    with pytest.raises(ConfigurationError, match=r"this ToyFlow is loaded already, .* a new ToyFlow"):
        trainer(tmp_path / "second").fit(toy_module(flow=flow, lora=LoRA(rank=1)), data)


# Copies


def test_a_copy_of_a_trained_module_is_a_module(module, data, tmp_path):
    trainer(tmp_path / "module").fit(module, data)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    before = trainable(module)
    for number, twin in enumerate((copied, pickled)):
        assert scores(twin, data, tmp_path) == scores(module, data, tmp_path)
        trainer(tmp_path / str(number)).fit(twin, data)
    assert equal(copied, pickled)
    assert not equal(copied, before)
    assert equal(module, before)


class CopiesAtEachHook(Callback):
    def __init__(self):
        self.copies = []

    def copy(self, trainer, module, *_):
        self.copies.append(copy.deepcopy(module))

    on_rollout_end = on_train_batch_end = on_train_epoch_end = on_validation_epoch_end = copy


def test_a_module_is_copied_while_it_trains(module, data, tmp_path):
    copier = CopiesAtEachHook()
    trainer(tmp_path, callbacks=[copier]).fit(module, data)
    assert len(copier.copies) >= 5
    assert copier.copies[-1]._trainer is None


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The shipped model, trained for an epoch."""
    folder = tmp_path_factory.mktemp("digits")
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    sampling = Sampling(num_steps=2, height=32, width=64, churn=0.05)
    batching = Batching(num_pairs=4, updates_per_epoch=1, batch_size=4, rollout_batch_size=2)
    rewards = {"JPEGSize": 1.0, "OCR": {"reward": "OCR", "weight": 0.1, "scale": "std"}}
    module = FDFOModule(flow, rewards, sampling, batching, lora=LoRA(rank=4))
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(DIGITS.read_text(encoding="utf-8").splitlines()[:2]), encoding="utf-8")
    data = PromptDataModule(str(prompts), str(prompts), val_batch_size=2)
    assert type(pickle.loads(pickle.dumps(module)).flow) is StableDiffusion3  # it is not loaded yet
    trainer(folder / "run", limit_val_batches=0).fit(module, data)
    save_lora(module.flow, folder / "lora")
    return module, data, folder


def test_the_shipped_model_is_copied_and_goes_on_alike(digits):
    module, data, folder = digits
    twin = copy.deepcopy(module)
    assert twin.flow.pipeline.transformer is twin.flow.transformer
    assert twin.flow.transformer is not module.flow.transformer
    assert scores(twin, data, folder) == scores(module, data, folder)
    before = trainable(module)
    trainer(folder / "twin", limit_val_batches=0).fit(twin, data)
    assert equal(module, before)
    assert not equal(twin, before)


@pytest.mark.parametrize("save", [lambda module, path: pickle.dumps(module), torch.save])
def test_a_loaded_pipeline_is_not_pickled(save, digits, tmp_path):
    with pytest.raises(ConfigurationError, match=r"a loaded model cannot be pickled: .* or copy it by copy\.deepcopy"):
        save(digits[0], tmp_path / "module.pt")


def test_a_lora_is_no_checkpoint_and_the_message_says_where_it_goes(digits, tmp_path):
    module, data, folder = digits
    file = folder / "lora" / LORA_FILE
    for path in (folder / "lora", file):
        with pytest.raises(ConfigurationError, match=f'a new module\'s lora_file to Path."{file}"'):
            scores(copy.deepcopy(module), data, tmp_path, ckpt_path=path)
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    new = FDFOModule(flow, {"JPEGSize": 1.0}, module.sampling)
    new.lora_file = file
    (row,), (trained,) = scores(new, data, tmp_path), scores(module, data, tmp_path)
    assert row["val/JPEGSize"] == pytest.approx(trained["val/JPEGSize"], rel=1e-3)
    late = copy.deepcopy(module)
    late.lora_file = file
    with pytest.raises(ConfigurationError, match="is loaded already; set it on a new module"):
        scores(late, data, tmp_path)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_remote_rewards_client_is_copied_with_connections_of_its_own(through):
    client = Client("http://127.0.0.1:1", timeout=2.0, attempts=3, backoff=0.5)
    twin = through(client)
    assert (twin.url, twin.timeout, twin.attempts, twin.backoff) == ("http://127.0.0.1:1", 2.0, 3, 0.5)
    assert twin._http is not client._http


# What is refused


@pytest.mark.parametrize("command", COMMANDS)
def test_a_compiled_module_is_refused_and_stays_usable(command, module, data, tmp_path):
    with pytest.raises(ConfigurationError, match=r"torch\.compile: .*give the Trainer the module itself"):
        getattr(trainer(tmp_path), command)(torch.compile(module, backend="eager"), data)
    assert not hasattr(module.flow, "transformer")
    getattr(trainer(tmp_path), command)(module, data)


def test_compiling_in_place_is_refused(module):
    with pytest.raises(ConfigurationError, match=r"torch\.compile: "):
        module.compile()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", [None, ["a cat"]])
def test_prompts_come_by_a_data_module(command, given, module, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"trainer\.{command}: expected PromptDataModule\(train, val\)"):
        getattr(trainer(tmp_path), command)(module, given)
    assert not hasattr(module.flow, "transformer")


def touch(path):
    Path(path).touch()


class RunsCode:
    """What an untrusted checkpoint may hold."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return touch, (self.path,)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_of_a_checkpoint(command, module, data, tmp_path):
    saved, ran = tmp_path / "mine.ckpt", tmp_path / "ran"
    SafeCheckpointIO().save_checkpoint(
        {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "more": RunsCode(ran)}, saved
    )
    options = {"enable_checkpointing": False} if command == "fit" else {}
    with pytest.raises(ConfigurationError, match="which only code of its own could load"):
        getattr(trainer(tmp_path / "run", **options), command)(module, data, ckpt_path=saved)
    assert not ran.exists()
