"""Each setting and callback of Lightning's that could change an update: it works, or one sentence refuses it."""

from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from lightning_fdfo import PromptDataModule
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards import trainer_settings

EPOCHS = 2
UPDATES, BATCHES = 2, 4
"""An epoch of `toy_module`: two updates of two batches."""


@pytest.fixture(scope="module")
def without(tmp_path_factory, request):
    """The weights of a run without any of these, by what changes them: kept for the module."""
    return {}


def trained(toy_module, fit, weights, epochs=EPOCHS, **options):
    module = toy_module()
    fit(module, epochs, **options)
    return weights(module)


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


WORKS = {
    "limit_train_batches=1.0": {"limit_train_batches": 1.0},
    "limit_train_batches=batches": {"limit_train_batches": BATCHES},
    "limit_train_batches above": {"limit_train_batches": 100},
    "accumulate_grad_batches=derived": {"accumulate_grad_batches": BATCHES // UPDATES},
    "reload every epoch": {"reload_dataloaders_every_n_epochs": 1},
    "reload every second epoch": {"reload_dataloaders_every_n_epochs": 2},
    "val_check_interval=0.25": {"val_check_interval": 0.25, "val": True},
    "val_check_interval=0.01": {"val_check_interval": 0.01, "val": True},
    "val_check_interval=3": {"val_check_interval": 3, "val": True},
    "val_check_interval over epochs": {"val_check_interval": 6, "check_val_every_n_epoch": None, "val": True},
    "val_check_interval in time": {"val_check_interval": timedelta(seconds=0), "val": True},
    "check_val_every_n_epoch=2": {"check_val_every_n_epoch": 2, "val": True},
    "num_sanity_val_steps=-1": {"num_sanity_val_steps": -1, "val": True},
    "limit_val_batches=0": {"limit_val_batches": 0, "val": True},
    "limit_val_batches=1": {"limit_val_batches": 1, "val": True},
    "max_time that does not come": {"max_time": "00:01:00:00"},
    "min_epochs": {"min_epochs": 1},
    "min_steps": {"min_steps": 3},
    "barebones": {"barebones": True},
    "deterministic": {"deterministic": True},
    "detect_anomaly": {"detect_anomaly": True},
    "inference_mode=False": {"inference_mode": False, "val": True},
    "use_distributed_sampler=False": {"use_distributed_sampler": False},
    "sync_batchnorm": {"sync_batchnorm": True},
    "profiler": {"profiler": "simple"},
    "log_every_n_steps=0": {"log_every_n_steps": 0},
    "Timer": {"callbacks": [Timer(timedelta(hours=1))]},
    "EarlyStopping that does not come": {"callbacks": [EarlyStopping("reward/mean", patience=9, mode="max")]},
    "LambdaCallback": {"callbacks": [LambdaCallback(on_train_start=lambda *_: None)]},
    "LearningRateMonitor": {"callbacks": [LearningRateMonitor()], "logger": True},
    "DeviceStatsMonitor": {"callbacks": [DeviceStatsMonitor()], "logger": True},
    "ModelSummary": {"callbacks": [ModelSummary()], "enable_model_summary": True},
}
"""Trains the same weights, to the bit, as a run without it."""


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*`deterministic`")
@pytest.mark.parametrize("name", WORKS)
def test_works(name, without, toy_module, fit, weights, prompts_file, tmp_path):
    if not without:
        without["weights"] = trained(toy_module, fit, weights)
    options = dict(WORKS[name])
    if options.pop("val", False):
        options["val"] = str(prompts_file)
    if options.get("logger"):
        options["logger"] = CSVLogger(tmp_path)
    if options.get("barebones"):  # it allows no other word about these
        options |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    assert same(trained(toy_module, fit, weights, **options), without["weights"])


REFUSED = {
    "limit_train_batches=0.5": (
        {"limit_train_batches": 0.5},
        r"limit_train_batches=0.5: .* lower model.batching.num_pairs",
    ),
    "limit_train_batches=3": ({"limit_train_batches": 3}, r"limit_train_batches=3: an epoch is 2 updates of 2 batches"),
    "limit_train_batches=0": ({"limit_train_batches": 0}, r"limit_train_batches=0: "),
    "overfit_batches=2": ({"overfit_batches": 2}, r"overfit_batches=2: .* give data.train a file of few prompts"),
    "overfit_batches=0.5": ({"overfit_batches": 0.5}, r"overfit_batches=0.5: "),
    "max_steps": ({"max_steps": 3}, r"max_steps=3: .* set trainer.max_epochs=2"),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4: leave it out"),
    "val_check_interval": ({"val_check_interval": 5}, r"val_check_interval=5: an epoch has 4 batches"),
    "gradient_clip_val=-1": ({"gradient_clip_val": -1.0}, r"gradient_clip_val: expected above 0, .* got -1.0"),
    "gradient_clip_val=nan": ({"gradient_clip_val": float("nan")}, r"gradient_clip_val: .* got nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_before_a_model_is_loaded(name, toy_module, fit):
    options, message = REFUSED[name]
    module = toy_module()
    with pytest.raises(ConfigurationError, match=message):
        fit(module, EPOCHS, **options)
    assert not hasattr(module.flow, "transformer")


CALLBACKS = [
    GradientAccumulationScheduler({0: 4}),
    StochasticWeightAveraging(swa_lrs=1e-2),
    WeightAveraging(),
    EMAWeightAveraging(),
    BatchSizeFinder(),
    LearningRateFinder(),
    ModelPruning("l1_unstructured", amount=0.5),
    BackboneFinetuning(),
]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda one: type(one).__name__)
def test_a_callback_that_changes_updates_is_refused_with_what_to_use_instead(callback, toy_module, fit):
    module, name = toy_module(), type(callback).__name__
    with pytest.raises(ConfigurationError, match=f"trainer.callbacks: {name} cannot be used: .+(leave|use|set|says)"):
        fit(module, EPOCHS, callbacks=[callback])
    assert not hasattr(module.flow, "transformer")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_callback_that_changes_weights_is_refused_where_they_are_judged(stage, toy_module, judge):
    with pytest.raises(ConfigurationError, match="EMAWeightAveraging cannot be used"):
        judge(toy_module(), stage, callbacks=[EMAWeightAveraging()])


@pytest.mark.parametrize("what", ["scale_batch_size", "lr_find"])
def test_the_tuner_is_refused(what, toy_module, tmp_path, prompts_file):
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        getattr(Tuner(trainer), what)(toy_module(), PromptDataModule(str(prompts_file)))


def test_every_callback_of_lightnings_is_decided_about():
    """A new one is seen here, with the version of Lightning that brings it."""
    import lightning.pytorch.callbacks as theirs

    harmless = {
        "BasePredictionWriter", "Callback", "Checkpoint", "DeviceStatsMonitor", "EarlyStopping", "LambdaCallback",
        "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "ProgressBar",
        "RichModelSummary", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor", "SpikeDetection", "Timer",
    }  # fmt: skip
    refused = {name for name in theirs.__all__ if issubclass(getattr(theirs, name), tuple(trainer_settings.REFUSED))}
    assert refused | harmless == set(theirs.__all__)


class Meddles(Callback):
    """Somebody else's scheduler of accumulation, of a class that nobody knows."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 4


def test_an_accumulation_that_anything_changes_stops_the_run(toy_module, fit):
    with pytest.raises(ConfigurationError, match=r"has become 4 .* an update is 2 batches"):
        fit(toy_module(), 1, callbacks=[Meddles()])


@pytest.mark.parametrize("how", ["max_time", "Timer"])
def test_a_time_limit_ends_the_run_between_epochs(how, toy_module, fit, weights):
    """By Lightning's default it would end it after a batch, and the checkpoint would be of part of an epoch."""
    at_once = timedelta(milliseconds=1)
    options = {"max_time": at_once} if how == "max_time" else {"callbacks": [Timer(at_once)]}
    module, ends = toy_module(), []
    callback = LambdaCallback(on_train_epoch_end=lambda trainer, _: ends.append(trainer.global_step))
    options["callbacks"] = [callback, *options.get("callbacks", [])]
    fit(module, 5, **options)
    assert ends == [UPDATES]
    assert same(weights(module), trained(toy_module, fit, weights, 1))


def test_a_limit_by_value_clips_by_value(toy_module, fit):
    """Lightning's documented effect: no element of the gradient is larger."""
    largest = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            largest.append(max((grad.abs().max().item() for grad in grads), default=0.0))

    fit(toy_module(), 1, gradient_clip_val=1e-6, gradient_clip_algorithm="value", callbacks=[Watch()])
    assert max(largest[1:]) <= 1e-6 * (1 + 1e-6)


def test_fast_dev_run_runs_a_batch_and_writes_no_checkpoint(toy_module, fit, tmp_path):
    trainer = fit(toy_module(), EPOCHS, fast_dev_run=True)
    assert trainer.global_step == 1
    assert not list(tmp_path.glob("**/*.ckpt"))


SCHEDULERS = {
    "ReduceLROnPlateau": (torch.optim.lr_scheduler.ReduceLROnPlateau, "model.lr_scheduler: ReduceLROnPlateau follows"),
    "StepLR without step_size": (torch.optim.lr_scheduler.StepLR, "model.lr_scheduler: StepLR: .*'step_size'"),
    "OneCycleLR for fewer updates than the run's": (
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=3),
        "model.lr_scheduler: OneCycleLR: Tried to step",
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_cannot_work(name, toy_module, fit):
    scheduler, message = SCHEDULERS[name]
    module = toy_module(lr_scheduler=scheduler)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, EPOCHS)
    assert not hasattr(module.flow, "transformer")


OPTIMIZERS = {
    "lr=-1": (partial(torch.optim.AdamW, lr=-1), "model.optimizer: AdamW: Invalid learning rate: -1"),
    "lr=nan": (partial(torch.optim.SGD, lr=float("nan")), "model.optimizer: SGD: "),
    "lr=inf": (partial(torch.optim.AdamW, lr=float("inf")), "AdamW: lr: expected a finite number, got inf"),
    "betas": (partial(torch.optim.Adam, betas=(0.9, 1.5)), "model.optimizer: Adam: Invalid beta parameter"),
    "no such option": (partial(torch.optim.AdamW, learning_rate=1), "model.optimizer: AdamW: .*learning_rate"),
    "SparseAdam": (torch.optim.SparseAdam, "model.optimizer: SparseAdam: .* dense gradients"),
    "LBFGS": (torch.optim.LBFGS, "model.optimizer: LBFGS evaluates the loss several times a step"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_cannot_work(name, toy_module, fit):
    optimizer, message = OPTIMIZERS[name]
    module = toy_module(optimizer=optimizer)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, EPOCHS)
    assert not hasattr(module.flow, "transformer")


@pytest.mark.parametrize("kind", ["Adafactor", "Adagrad", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "SGD"])
def test_optimizers_that_train(kind, toy_module, fit, weights):
    module = toy_module(optimizer=partial(getattr(torch.optim, kind), lr=1e-3))
    fit(module, 1)
    assert all(value.isfinite().all() for value in weights(module).values())
