"""Each configuration in configs/, killed in the middle of an epoch and gone on with: nothing is lost but that epoch.

What kill -9 leaves is what lies on the disk at that moment. So the short form copies the run's folder in the middle of
epochs of one undisturbed run, and goes on from each copy; the slow form kills processes.
"""

import random
import shutil
import signal
import time

import pytest

from lightning_fdfo.__main__ import main
from lightning_fdfo.rollout.collector import RolloutCollector
from tests.runs.shipped import is_the_same, last, words
from tests.runs.test_configs import BASES, CONFIGS, FULL_SIZE, SINGLE_GPU, read
from tests.runs.test_kills import EVER, said, start  # noqa: F401 - a fixture
from tests.runs.test_parallel import ROOT

MIXTURES = ("legible_and_small", "legible_then_small", "legible_and_colorful")
OVERLAYS = dict.fromkeys([*MIXTURES, "guarded"], "quickstart") | dict.fromkeys(SINGLE_GPU, "sd35_medium_pickscore")
"""Those for one process, and what they are laid over; test_parallel.py and test_kills.py have the others, and
tests/people has `people`, which needs somebody who clicks."""
RUNS = [*BASES, *OVERLAYS]
ALWAYS = ("quickstart", "sd35_medium_pickscore", "legible_and_colorful", "guarded")
"""Those that are tried on every change."""
MINE = {
    "single_gpu_24gb": ["--model.flow.init_args.quantization=null", "--trainer.accelerator=cpu"],
    "single_gpu_80gb": ["--trainer.accelerator=cpu"],
}
"""What an overlay sets that this machine lacks, set back."""


def line(name, folder, epochs):
    """The command's words for a configuration, or for an overlay over the first that it is for."""
    more = ["--config", str(CONFIGS[name]), *MINE.get(name, [])] if name in OVERLAYS else []
    return words(OVERLAYS.get(name, name), folder, epochs, *more)


@pytest.fixture
def fit(monkeypatch):
    """Runs the command in this process; gives the epochs that were rolled out."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weigh_scores = RolloutCollector.weigh_scores

    def run(arguments, at=lambda epoch: None):
        epochs = []

        def counted(self, rollout, endpoint_difference, epoch):
            epochs.append(epoch)
            at(epoch)
            return weigh_scores(self, rollout, endpoint_difference, epoch)

        monkeypatch.setattr(RolloutCollector, "weigh_scores", counted)
        main(arguments)
        return epochs

    return run


def test_every_configuration_is_here():
    assert set(RUNS) | {"ddp", "fsdp2", "multi_node", "people"} == set(CONFIGS)


def test_the_full_size_configurations_run_in_the_same_way():
    """So that one of them stands for all below; each is killed in the slow form."""
    trainers = [read(name)["trainer"] | {"default_root_dir": ""} for name in FULL_SIZE]
    assert all(trainer == trainers[0] for trainer in trainers)


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_killed_run_of_each_configuration_loses_no_more_than_an_epoch(fit, tmp_path, name, monkeypatch):
    monkeypatch.setattr("lightning_fdfo.callbacks.curves.Curves.on_fit_end", lambda *_: None)  # seconds of matplotlib
    epochs, killed_in, run, whole = 4, 2, tmp_path / "run", tmp_path / "whole"

    def copy(epoch):
        if epoch:
            assert last(run)["epoch"] == epoch - 1, "last.ckpt is there after each epoch"
        if epoch == killed_in:
            shutil.copytree(run, tmp_path / "killed")

    assert fit(line(name, tmp_path, epochs), copy) == [0, 1, 2, 3]
    assert last(run)["epoch"] == 3
    run.rename(whole)
    (tmp_path / "killed").rename(run)
    assert fit([*line(name, tmp_path, epochs), "--ckpt_path=last"]) == [2, 3], "one epoch is done again"
    is_the_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_each_configuration_survives_kill_9_in_three_epochs(start, tmp_path, name):  # noqa: F811
    """At random moments of epochs 2, 5 and 8 of ten: what is done again is counted."""
    whole, run, begun, dice = tmp_path / "whole", tmp_path / "killed", tmp_path / "begun.txt", random.Random(name)
    note = f"--trainer.callbacks+={{class_path: tests.runs.chaos.Begun, init_args: {{file: {begun}}}}}"
    for folder in (whole, run):
        folder.mkdir()
    undisturbed = start(whole, *line(name, whole, 10))
    undisturbed.join(EVER)
    assert undisturbed.exitcode == 0, said(whole)[-3000:]
    epoch = 0.0
    for target in (2, 5, 8):
        more = ["--ckpt_path=last"] if epoch else []
        process = start(run, *line(name, run, 10), note, *more)
        seen, deadline = {}, time.monotonic() + EVER
        while target not in seen:
            assert process.exitcode is None, said(run)[-3000:]
            assert time.monotonic() < deadline
            for number in map(int, begun.read_text().split() if begun.exists() else []):
                seen.setdefault(number, time.monotonic())
            time.sleep(0.002)
        if target - 1 in seen:
            epoch = max(seen[target] - seen[target - 1], 0.01)
        time.sleep(dice.uniform(0, epoch))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert last(run / "run")["epoch"] >= target - 1
    process = start(run, *line(name, run, 10), note, "--ckpt_path=last")
    process.join(EVER)
    assert process.exitcode == 0, said(run)[-3000:]
    done = [int(number) for number in begun.read_text().split()]
    assert sorted(set(done)) == list(range(10))
    assert len(done) - 10 <= 3, f"no more than an epoch a kill is done again: {done}"
    is_the_same(run / "run", whole / "run")
