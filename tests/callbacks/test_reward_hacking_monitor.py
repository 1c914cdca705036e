import json
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fdfo.callbacks import EMA, Band, RewardHackingMonitor
from lightning_fdfo.errors import ConfigurationError
from tests.conftest import trainable


def train(fit, module, monitor, tmp_path, epochs=6, **options):
    saving = ModelCheckpoint(
        tmp_path / "c", "{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1, save_last=True
    )
    return fit(module, epochs, callbacks=[monitor, saving], enable_checkpointing=True, **options)


@pytest.fixture
def greedy(toy_module):
    """A toy that brightens fast."""
    return lambda: toy_module(
        num_pairs=80,
        updates_per_epoch=4,
        batch_size=80,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    )


class Notes(ModelCheckpoint):
    """Keeps each epoch's numbers."""

    def __init__(self):
        super().__init__(save_top_k=0)
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def numbers(greedy, fit, tmp_path):
    notes = Notes()
    fit(greedy(), 6, callbacks=[notes], enable_checkpointing=True, default_root_dir=tmp_path / "numbers")
    return notes.seen


def test_brightness_rises_and_the_velocity_drifts(numbers):
    brightness = [row["image/brightness"] for row in numbers]
    assert max(brightness[:3]) < min(brightness[3:])
    assert numbers[0]["train/drift"] == 0
    assert numbers[-1]["train/drift"] > numbers[1]["train/drift"] > 0


def test_it_stops_at_the_first_epoch_out_of_its_band_and_names_the_way_back(greedy, fit, numbers, tmp_path):
    limit = (numbers[3]["image/brightness"] + numbers[2]["image/brightness"]) / 2 - numbers[0]["image/brightness"]
    monitor = RewardHackingMonitor({"image/brightness": Band(change=(None, limit))}, action="stop")
    with pytest.warns(
        UserWarning, match=r"epoch 3: image/brightness is .*the run stops, and go back to epoch 1: "
    ) as told:
        trainer = train(fit, greedy(), monitor, tmp_path)
    assert str(tmp_path / "c/epoch=1.ckpt") in str(told[-1].message)
    assert trainer.current_epoch == 4
    record = json.loads((tmp_path / "reward_hacking.json").read_text())
    assert record["start"] == {"image/brightness": numbers[0]["image/brightness"]}
    (event,) = record["events"]
    assert (event["epoch"], event["last_good_checkpoint"]) == (3, 1)
    assert event["value"] == numbers[3]["image/brightness"]


def test_it_warns_and_goes_on_also_after_a_resume(greedy, fit, numbers, tmp_path):
    def monitor():
        return RewardHackingMonitor({"image/brightness": Band(times=(None, 0.9))})

    with pytest.warns(UserWarning, match="epoch 0: .*no checkpoint is from before: start again") as told:
        train(fit, greedy(), monitor(), tmp_path, epochs=1)
    with pytest.warns(UserWarning, match="epoch [1-5]: "):
        trainer = train(fit, greedy(), monitor(), tmp_path, ckpt_path="last")
    assert trainer.current_epoch == 6
    assert sum("image/brightness" in str(warning.message) for warning in told) == 1
    record = json.loads((tmp_path / "reward_hacking.json").read_text())
    assert [event["epoch"] for event in record["events"]] == [0, 1, 2, 3, 4, 5]
    assert {event["start"] for event in record["events"]} == {numbers[0]["image/brightness"]}


@pytest.mark.parametrize(
    ("band", "number", "start", "held"),
    [
        (Band(value=(0.0, 1.0)), 1.0, 5.0, True),
        (Band(value=(0.0, 1.0)), 1.1, 5.0, False),
        (Band(change=(-0.5, None)), 4.5, 5.0, True),
        (Band(change=(-0.5, None)), 4.4, 5.0, False),
        (Band(times=(0.5, 2.0)), 10.0, 5.0, True),
        (Band(times=(0.5, 2.0)), 2.4, 5.0, False),
        (Band(times=(0.5, 2.0)), 0.0, 0.0, True),
        (Band(times=(0.5, 2.0)), 0.1, 0.0, False),
        (Band(value=(0.0, 1.0)), float("nan"), 5.0, False),
    ],
)
def test_bands(band, number, start, held):
    assert band.holds(number, start) is held


@pytest.mark.parametrize(
    "band",
    [Band(), Band(value=(0, 1), times=(0, 1)), Band(value=(1.0, 0.0)), Band(value=(None, None))],
)
def test_a_band_that_makes_no_sense_is_refused(band):
    with pytest.raises(ConfigurationError, match="expected one of value, change and times as"):
        RewardHackingMonitor({"image/brightness": band})


@pytest.mark.parametrize("name", ["image/colour", "reward/OCR/mean"])
def test_a_number_that_nothing_logs_is_told_before_any_model_is_loaded(toy_module, fit, name):
    module = toy_module()
    with pytest.raises(ConfigurationError, match=f"nothing logs {name}; there are image/brightness, .*brightness"):
        fit(module, 1, callbacks=[RewardHackingMonitor({name: Band(value=(0, 1))})])
    assert not hasattr(module.flow, "transformer")


def test_another_name_is_told_after_the_first_epoch(toy_module, fit):
    with pytest.raises(ConfigurationError, match=r"\['loss'\] was not logged in epoch 0; logged: image/brightness"):
        fit(toy_module(), 1, callbacks=[RewardHackingMonitor({"loss": Band(value=(0, 1))})])


# Going back by itself


class Weights(ModelCheckpoint):
    """Keeps the weights of each epoch's end, as its checkpoint has them, and its learning rate."""

    def __init__(self):
        super().__init__(save_top_k=0)
        self.ends, self.rates = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(trainable(pl_module))
        self.rates.append(round(trainer.callback_metrics["train/learning_rate"].item(), 6))


def restoring(numbers, max_restores=3):
    """Out of its band from epoch 3 on, if nothing is done; epoch 2 is the best before."""
    limit = (numbers[3]["image/brightness"] + numbers[2]["image/brightness"]) / 2 - numbers[0]["image/brightness"]
    band = Band(change=(None, limit))
    return RewardHackingMonitor({"image/brightness": band}, action="restore", max_restores=max_restores)


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


SCHEDULERS = {
    "none": None,
    "lambda": constant,
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [constant(o), constant(o)], [2]),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.1 + 1e-9, cycle_momentum=False),
}


@pytest.mark.parametrize("scheduled", SCHEDULERS)
def test_it_goes_back_to_the_best_weights_and_halves_the_learning_rate(greedy, fit, numbers, tmp_path, scheduled):
    kept, monitor, module, ema = Weights(), restoring(numbers), greedy(), EMA(decay=0.9)
    module.lr_scheduler = SCHEDULERS[scheduled]
    with pytest.warns(UserWarning, match=r"epoch 3: .* goes back to the weights that generated epoch 2, with half"):
        fit(module, 5, callbacks=[monitor, kept, ema], enable_checkpointing=True, default_root_dir=tmp_path / "run")
    assert numbers[2]["reward/mean"] > max(row["reward/mean"] for row in numbers[:2])
    assert all(torch.equal(value, kept.ends[1][name]) for name, value in kept.ends[3].items())
    assert kept.rates == [0.1, 0.1, 0.1, 0.1, 0.05]
    assert not all(torch.equal(value, kept.ends[3][name]) for name, value in kept.ends[4].items())
    assert ema.num_updates == 4  # of one epoch
    (event,) = json.loads((tmp_path / "run/reward_hacking.json").read_text())["events"]
    assert (event["epoch"], event["restored"]) == (3, 2)


def test_after_so_many_the_next_one_stops_the_run(greedy, fit, tmp_path):
    """Nothing can be in this band."""
    monitor = RewardHackingMonitor({"image/brightness": Band(value=(2.0, 3.0))}, action="restore", max_restores=2)
    kept = Weights()
    with pytest.warns(UserWarning, match="goes back to its first weights|the run stops") as told:
        trainer = fit(
            greedy(), 9, callbacks=[monitor, kept], enable_checkpointing=True, default_root_dir=tmp_path / "run"
        )
    assert trainer.current_epoch == 3
    assert sum("goes back" in str(one.message) for one in told) == 2
    assert "the run stops" in str(told[-1].message)
    assert kept.rates == [0.1, 0.05, 0.025]
    assert all(torch.equal(value, kept.ends[1][name]) for name, value in kept.ends[0].items())


@pytest.mark.parametrize("first", [2, 3, 4])
def test_a_run_that_resumes_goes_back_to_the_same(greedy, fit, numbers, tmp_path, first):
    """Before the restore, in the epoch before it, and after."""
    ends = []
    for name, runs in (("whole", [(6, None)]), ("parts", [(first, None), (6, "last")])):
        for epochs, ckpt_path in runs:
            module, kept, ema = greedy(), Weights(), EMA(decay=0.9)
            options = {"enable_checkpointing": True, "default_root_dir": tmp_path / name}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit(module, epochs, ckpt_path, callbacks=[restoring(numbers), kept, ema], **options)
        ends.append((trainable(module), ema.average, kept.rates[-1]))
    assert ends[0][2] == ends[1][2] < 0.1
    for one, other in zip(ends[0][:2], ends[1][:2], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_where_an_average_generates_it_is_gone_back_to(greedy, fit, numbers, tmp_path):
    """The images that were good were the average's."""
    averages = []

    class Watch(Weights):
        def on_train_epoch_end(self, trainer, pl_module):
            averages.append({name: value.clone() for name, value in ema.average.items()})
            super().on_train_epoch_end(trainer, pl_module)

    kept, ema = Watch(), EMA(decay=0.5, warmup=False, rollouts=True)
    monitor = RewardHackingMonitor({"image/brightness": Band(change=(None, 0.03))}, action="restore")
    with pytest.warns(UserWarning, match="goes back to"):
        fit(greedy(), 12, callbacks=[monitor, kept, ema], enable_checkpointing=True, default_root_dir=tmp_path / "run")
    event = json.loads((tmp_path / "run/reward_hacking.json").read_text())["events"][0]
    assert event["restored"] > 0
    good = averages[event["restored"] - 1]
    for name, value in kept.ends[event["epoch"]].items():
        torch.testing.assert_close(value, good[name])


def test_a_mixture_that_changes_goes_back_to_the_last_good_epoch(greedy, fit, numbers, tmp_path):
    module, monitor = greedy(), restoring(numbers)
    term = module.rewards.terms["brightness"]
    module.rewards.terms["brightness"] = replace(term, weight={0: 1.0, 5: 0.9})
    with pytest.warns(UserWarning, match="goes back to the weights that generated epoch"):
        fit(module, 5, callbacks=[monitor], enable_checkpointing=True, default_root_dir=tmp_path / "run")
    events = json.loads((tmp_path / "run/reward_hacking.json").read_text())["events"]
    assert events[0]["restored"] == events[0]["epoch"] - 1
