"""A resume says what is not the checkpoint's, and lets count what it says that counts."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
)

from lightning_fdfo import Objective, Reward, Sampling
from lightning_fdfo.checkpoints.resumed_settings import ResumedSettings
from lightning_fdfo.checkpoints.settings_record import MAX_LINES, difference_lines
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.guards.finite_weights import FiniteWeights
from lightning_fdfo.reward import FunctionReward
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.training.learning_rate import WarmupDecay
from tests.conftest import ToyFlow, brightness

UPDATES = 2


def darkness(images, prompts, metadata):
    return -images.mean(dim=(1, 2, 3))


def adamw(lr=1e-2, **options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, **options)


@pytest.fixture
def resume(toy_module, fit, tmp_path, caplog):
    """Trains two epochs, changes the checkpoint, goes on for one; gives the module, the trainer and the lines."""

    def run(first, then, overrides=frozenset(), change=None, **options):
        def once(module, epochs, ckpt_path=None, **options):
            saving = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            return fit(module, epochs, ckpt_path, callbacks=[saving], enable_checkpointing=True, **options)

        once(toy_module(**first), 2)
        path = str(tmp_path / "c/epoch=1.ckpt")
        if change is not None:
            checkpoint = torch.load(path, weights_only=True)
            change(checkpoint)
            torch.save(checkpoint, path)
        caplog.clear()
        caplog.set_level(logging.INFO)
        module = toy_module(**first | then)
        module.resume_overrides = frozenset(overrides)
        trainer = once(module, 3, path, **options)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("resume: ")]
        return module, trainer, [line.removeprefix("resume: ") for line in lines]

    return run


def without_record(checkpoint):
    del checkpoint["fdfo"]["settings"]


def test_the_same_settings_say_nothing(resume):
    assert resume({}, {"flow": ToyFlow()})[2] == []


@pytest.mark.parametrize("change", [None, without_record], ids=["record", "older"])
def test_the_checkpoints_learning_rate_counts_and_the_other_is_named(resume, change):
    _, trainer, lines = resume({}, {"flow": ToyFlow(), "optimizer": adamw(5e-2)}, change=change)
    assert lines == [
        "model.optimizer: lr is 0.01 in the checkpoint, which counts, 0.05 in the configuration; "
        "--model.optimizer.init_args.lr would change it"
    ]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("overrides", "lr", "decay"), [({"lr"}, 5e-2, 1e-2), ({"weight_decay"}, 1e-2, 0.5), ({"*"}, 5e-2, 0.5)]
)
def test_settings_that_are_named_count_and_the_moments_stay(resume, monkeypatch, overrides, lr, decay):
    seen = []
    module_hook = "lightning_fdfo.FDFOModule.on_train_batch_start"
    original = __import__("lightning_fdfo").FDFOModule.on_train_batch_start

    def look(self, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        seen.append([state["step"].item() for state in optimizer.state.values()])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module_hook, look)
    _, trainer, lines = resume({}, {"flow": ToyFlow(), "optimizer": adamw(5e-2, weight_decay=0.5)}, overrides)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    counting = {line.split(": ")[1].split(" ")[0] for line in lines if line.endswith("command line, which counts")}
    assert counting == ({"lr", "weight_decay"} if overrides == {"*"} else overrides)
    assert len(lines) == 2
    steps = trainer.num_training_batches
    assert set(seen[-steps]) == {2.0 * UPDATES}  # AdamW goes on with its moments, and counts on


def test_what_counted_is_in_the_next_checkpoint(resume, tmp_path):
    resume({}, {"flow": ToyFlow(), "optimizer": adamw(5e-2, eps=1e-6)}, {"lr"})
    settings = torch.load(tmp_path / "c/epoch=2.ckpt", weights_only=True)["fdfo"]["settings"]
    (group,) = settings["optimizer"]["groups"]
    assert (group["lr"], group["eps"]) == (5e-2, 1e-8)


SCHEDULES = {
    "linear": lambda optimizer: LinearLR(optimizer, 0.1, total_iters=20),
    "warmup": lambda optimizer: WarmupDecay(optimizer, 20, warmup_steps=6),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 20, eta_min=1e-3),
    "cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=2 * optimizer.param_groups[0]["lr"], total_steps=20),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "factor": lambda optimizer: MultiplicativeLR(optimizer, lambda step: 0.9),
    "chain": lambda optimizer: ChainedScheduler(
        [LinearLR(optimizer, 0.1, total_iters=3), ExponentialLR(optimizer, 0.9)]
    ),
    "two others": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), LambdaLR(optimizer, lambda step: 1 / (1 + step))], [3]
    ),
    "two": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 20)], [3]
    ),
}


def rate_after(schedule, lr, steps):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=lr)
    scheduler = SCHEDULES[schedule](optimizer)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_learning_rate_moves_the_schedule_as_if_it_had_been_there_from_the_start(resume, schedule):
    given = {"flow": ToyFlow(), "optimizer": adamw(5e-2)}
    _, trainer, lines = resume({"lr_scheduler": SCHEDULES[schedule]}, given, {"lr"})
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate_after(schedule, 5e-2, 3 * UPDATES))
    assert any("lr is 0.01 in the checkpoint, 0.05 on the command line, which counts" in line for line in lines)


@pytest.mark.parametrize("change", [None, without_record], ids=["record", "older"])
def test_a_schedule_goes_on_where_nothing_is_named(resume, change):
    _, trainer, lines = resume({"lr_scheduler": SCHEDULES["linear"]}, {"flow": ToyFlow()}, change=change)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate_after("linear", 1e-2, 3 * UPDATES))
    assert lines == []


@pytest.mark.parametrize(("overrides", "gamma"), [(set(), 0.5), ({"lr_scheduler"}, 0.9)])
def test_a_schedulers_settings_are_the_checkpoints_unless_named(resume, overrides, gamma):
    def decay(gamma):
        return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    _, trainer, (line,) = resume(
        {"lr_scheduler": decay(0.5)}, {"flow": ToyFlow(), "lr_scheduler": decay(0.9)}, overrides
    )
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * gamma ** (3 * UPDATES))
    assert line.startswith("model.lr_scheduler: gamma is 0.5 in the checkpoint, ")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "linear"),
        ("linear", None),
        ("cycle", None),
        ("linear", "cosine"),
        ("cosine", "lambda"),
        ("cosine", "factor"),
        ("cosine", "two"),
        ("cosine", "chain"),
        ("chain", "cycle"),
        ("two", "lambda"),
        ("two", "two others"),
    ],
    ids=lambda name: str(name),
)
def test_another_kind_of_schedule_is_the_configurations(resume, before, after):
    first = {"lr_scheduler": SCHEDULES[before]} if before else {}
    _, trainer, (line,) = resume(first, {"flow": ToyFlow(), "lr_scheduler": SCHEDULES[after] if after else None})
    expected = rate_after(after, 1e-2, 3 * UPDATES) if after else 1e-2
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(expected)
    assert after == "cycle" or tuple(group["betas"]) == (0.9, 0.999)
    assert line.startswith("model.lr_scheduler is ")


@pytest.mark.parametrize("change", [None, without_record], ids=["record", "older"])
def test_another_optimiser_is_refused_in_one_sentence(resume, change):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-2)

    with pytest.raises(ConfigurationError, match=r"the checkpoint's optimizer is .*, the configuration's 'torch.*SGD"):
        resume({}, {"flow": ToyFlow(), "optimizer": sgd}, change=change)


def test_what_else_differs_is_said_and_is_the_configurations(resume, tmp_path):
    prompts = tmp_path / "others.txt"
    prompts.write_text("a cat\nthe dog\nsome bird\none fish\nsix trees\n", encoding="utf-8")
    then = {
        "flow": ToyFlow(),
        "rewards": {"brightness": RewardTerm(brightness, 0.5), "dark": RewardTerm(darkness, 0.1)},
        "sampling": Sampling(num_steps=4, height=2, width=2, churn=0.2),
        "objective": Objective(clip_range=0.2, normalization="root_mean_square"),
        "num_pairs": 8,
        "rollout_batch_size": 4,
    }
    module, _, lines = resume({}, then, train=str(prompts))
    named = {line.partition(": ")[0]: line for line in lines}
    assert set(named) == {
        "model.rewards.brightness.weight",
        "model.rewards.dark",
        "model.sampling.churn",
        "model.objective.clip_range",
        "model.batching.num_pairs",
        "data.train",
    }
    assert named["model.sampling.churn"] == (
        "model.sampling.churn: 0.1 in the checkpoint, 0.2 in the configuration, which counts"
    )
    assert "nothing in the checkpoint" in named["model.rewards.dark"]
    assert module.sampling.churn == 0.2


class Counting(Reward):
    def __init__(self, power=1.0):
        self.power = power
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        return images.mean(dim=(1, 2, 3)) * self.power


@pytest.mark.parametrize("copied", [False, True])
def test_what_scoring_changes_in_a_reward_is_no_setting(resume, copied):
    def made(power):
        return {"counting": RewardTerm(copy.deepcopy(Counting(power)) if copied else Counting(power))}

    lines = resume({"rewards": made(1.0)}, {"flow": ToyFlow(), "rewards": made(2.0)})[2]
    assert [line for line in lines if "power: 1.0 in the checkpoint, 2.0" in line] == lines[:1]
    assert copied or len(lines) == 1


def scaled(images, prompts, metadata, power=1.0):
    return images.mean(dim=(1, 2, 3)) * power


def test_another_function_and_its_options_are_said(resume):
    first, then = ({"it": RewardTerm(FunctionReward(function, **options))} for function, options in OTHERS)
    lines = resume({"rewards": first}, {"flow": ToyFlow(), "rewards": then})[2]
    assert [line.partition(": ")[0] for line in lines] == ["model.rewards.it.class", "model.rewards.it.options.power"]


OTHERS = [(darkness, {}), (scaled, {"power": 2.0})]


class Failing(Callback):
    def on_fit_start(self, trainer, pl_module):
        raise RuntimeError("before the first batch")


def test_a_fit_that_fails_before_its_first_batch_hands_nothing_on(fit, toy_module, tmp_path):
    def once(module, epochs, ckpt_path=None, *more):
        saving = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_on_train_epoch_end=True)
        fit(module, epochs, ckpt_path, callbacks=[saving, *more], enable_checkpointing=True)

    once(toy_module(), 1)
    settings = ResumedSettings()
    module = toy_module(optimizer=adamw(5e-2))
    module.configure_callbacks = list
    with pytest.raises(RuntimeError, match="before the first batch"):
        once(module, 2, str(tmp_path / "c/epoch=0.ckpt"), settings, Failing())
    assert settings._resumed is not None
    settings.setup(module.trainer, module, "fit")
    settings.on_train_start(module.trainer, module)
    assert settings._optimizer["optimizer"]["groups"][0]["lr"] == 5e-2


def test_a_fit_begins_without_the_point_of_the_one_before():
    guard = FiniteWeights()
    guard._point = object()
    guard.setup(None, None, "fit")
    guard.on_train_epoch_end(None, None)  # looks at no velocity


def nothing_odd(checkpoint):
    checkpoint["fdfo"]["settings"] = {
        "model": {"rewards": ["x" * 10_000] * 99, "\x1b[31m" * 999: 1, **dict.fromkeys(map(str, range(99)), 0)},
        "optimizer": "none",
        "lr_scheduler": {"class": ["x" * 10_000]},
        "data": None,
    }


def test_a_record_from_anywhere_is_compared_and_no_more(resume):
    _, trainer, lines = resume({}, {"flow": ToyFlow()}, change=nothing_odd)
    assert trainer.current_epoch == 3
    assert 2 < len(lines) <= MAX_LINES + 3
    assert max(map(len, lines)) < 500
    assert not any("\x1b" in line for line in lines)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_judged_checkpoint_is_compared_with_nothing(resume, judge, toy_module, tmp_path, caplog):
    resume({}, {"flow": ToyFlow()})
    caplog.clear()
    judge(toy_module(num_pairs=8, optimizer=adamw(1.0)), "validate", str(tmp_path / "c/epoch=1.ckpt"))
    assert not [record for record in caplog.records if "resume: " in record.getMessage()]


def test_no_record_no_lines():
    assert difference_lines(None, {"model": {"batching": {"num_pairs": 1}}}) == []
