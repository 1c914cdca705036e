"""Runs that are killed, or asked to stop, at a chosen moment and gone on with: what they are in the end.

Each run is a process of its own, forked from one that has imported everything; two devices are started as a user does.
SLURM's warning, SIGUSR1, is `SLURMRequeue`'s; ctrl-C and SIGTERM are `StopOnSignal`'s.
"""

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_fdfo.checkpoints.checkpoint_io import SafeCheckpointIO
from lightning_fdfo.reward.mix import RewardMix
from tests.runs import shipped
from tests.runs.test_parallel import ROOT, WAYS, checkpoint, overlay

pytestmark = pytest.mark.slow
EPOCHS = 4
EVER = 120
"""Seconds that no run of this file takes."""


class At(Callback):
    """Sends this process a signal at a moment of an epoch, on one of the processes.

    Moments: `sampling` (the third velocity of a rollout), `reward`, `training` (before a batch; the last of four is the
    second of two that are accumulated), `writing` and `writing last` (half of the epoch's file, or of last.ckpt, is on
    disk), `between` the two, and `logging` (both are written).
    """

    def __init__(self, moment: str, epoch: int, rank: int = 0, sent: str = "SIGKILL", batch: int = 3) -> None:
        self.moment, self.epoch, self.rank, self.number = moment, epoch, rank, signal.Signals[sent]
        self.batch, self.calls = batch, 0

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            self.trainer = trainer
            self.watch(pl_module)

    def fire(self, moment, nth=1):
        if self.is_now(moment):
            self.calls += 1
            if self.calls == nth:
                os.kill(os.getpid(), self.number)

    def is_now(self, moment):
        return (moment, self.trainer.current_epoch) == (self.moment, self.epoch)

    def watch(self, pl_module):
        velocity, score, write = pl_module.flow.velocity, RewardMix.__call__, SafeCheckpointIO.save_checkpoint
        save = torch.save

        def watched_velocity(*arguments):
            if not torch.is_grad_enabled():
                self.fire("sampling", nth=3)
            return velocity(*arguments)

        def watched_score(*arguments, **options):
            self.fire("reward")
            return score(*arguments, **options)

        def watched_save(saved, file):
            save(saved, file)
            name = "writing last" if "last" in file.name else "writing"
            if self.is_now(name):
                file.truncate(file.tell() // 2)
                self.fire(name)

        def watched_write(io, saved, path, storage_options=None):
            write(io, saved, path, storage_options)
            self.fire("logging" if "last" in Path(path).name else "between")

        pl_module.flow.velocity = watched_velocity
        RewardMix.__call__, SafeCheckpointIO.save_checkpoint, torch.save = watched_score, watched_write, watched_save

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            self.fire("training")


def configuration(folder, epochs=EPOCHS, callbacks=(), **moment):
    """That of tests/runs/test_parallel.py, with an Adam that decays, a log, and `At`."""
    config = yaml.safe_load(overlay(folder, lora=True).read_text())
    config["model"] |= {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
        "batching": config["model"]["batching"] | {"updates_per_epoch": 2},
    }
    logger = {"save_dir": str(folder / "run"), "name": "csv", "flush_logs_every_n_steps": 1}
    config["trainer"] |= {
        "max_epochs": epochs,
        "limit_val_batches": 0,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
    }
    shared = config["trainer"]["callbacks"][:-1]
    at = [{"class_path": "tests.runs.test_kills.At", "init_args": moment}] if moment else []
    config["trainer"]["callbacks"] = [*shared, *callbacks, *at]
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def arguments(folder, *more, way="one", **options):
    """Of the command; `way` is one of tests/runs/test_parallel.py's."""
    configs = ["--config", "configs/quickstart.yaml", "--config", str(configuration(folder, **options)), *WAYS[way]]
    own = [f"--trainer.default_root_dir={folder / 'run'}", f"--model.batching.batch_size={4 if way == 'one' else 2}"]
    return ["fit", *configs, *own, *more]


def live(line, log, environment):
    """The life of a forked process."""
    from lightning_fdfo.__main__ import main

    torch.set_num_threads(1)  # two that compute on two busy cores wait for each other most of the time
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["lightning-fdfo"]
    main(line)


@pytest.fixture(scope="module")
def start():
    """Starts a run, given the command's words; what has not ended at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_fdfo.commands.cli", "tests.runs.test_kills", "diffusers", "torchvision"])
    started = []

    def run(folder, *line, environment=()):
        process = context.Process(target=live, args=(list(line), str(folder / "log.txt"), dict(environment)))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def fit(start):
    """Runs to its end, and gives its exit code."""

    def run(folder, *more, environment=(), **options):
        process = start(folder, *arguments(folder, *more, **options), environment=environment)
        process.join(EVER)
        assert process.exitcode is not None, f"has not ended in {EVER} s"
        return process.exitcode

    return run


def said(folder):
    return (folder / "log.txt").read_text(errors="replace")


def is_the_same(folder, whole):
    shipped.is_the_same(folder / "run", whole / "run")


def are_whole(folder):
    """Each checkpoint that a run has left can be loaded, its checksums compared."""
    paths = sorted((folder / "run").glob("hpc_ckpt_*.ckpt")) + sorted((folder / "run/checkpoints").glob("*.ckpt"))
    return {path.name: SafeCheckpointIO().load_checkpoint(path)["epoch"] for path in paths}


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit(folder) == 0, said(folder)[-3000:]
    saved = checkpoint(folder)
    assert (saved["epoch"], saved["global_step"], saved["reward_scales"]["Colorfulness"]["epoch"]) == (3, 8, 3)
    assert len(shipped.logged(folder / "run")) == EPOCHS
    return folder


@pytest.mark.parametrize(
    "moment",
    [
        "sampling",
        "reward",
        "training",
        "writing",
        "between",
        "writing last",
        "logging",
    ],
)
def test_a_killed_run_goes_on_to_the_bit(fit, whole, tmp_path, moment):
    assert fit(tmp_path, moment=moment, epoch=2) == -signal.SIGKILL, said(tmp_path)[-3000:]
    partial = [re.sub(r"-\d+$", "", path.name) for path in (tmp_path / "run/checkpoints").glob(".*")]
    assert partial == {"writing": [".epoch=2.ckpt.partial"], "writing last": [".last.ckpt.partial"]}.get(moment, [])
    assert are_whole(tmp_path)["last.ckpt"] == (2 if moment == "logging" else 1)
    assert fit(tmp_path, "--ckpt_path=last") == 0, said(tmp_path)[-3000:]
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "what was half-written is gone"
    is_the_same(tmp_path, whole)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(fit, whole, tmp_path):
    assert fit(tmp_path, moment="training", epoch=0) == -signal.SIGKILL
    assert are_whole(tmp_path) == {}
    assert fit(tmp_path) == 2
    assert "holds a run already: resume it by --ckpt_path last" in said(tmp_path)
    assert fit(tmp_path, "--ckpt_path=last") == 0
    assert "was ended before its first checkpoint: it starts again from epoch 0" in said(tmp_path)
    is_the_same(tmp_path, whole)


def test_a_run_killed_before_its_first_last_names_the_file_to_go_on_with(fit, whole, tmp_path):
    assert fit(tmp_path, moment="between", epoch=0) == -signal.SIGKILL
    assert are_whole(tmp_path) == {"epoch=0.ckpt": 0}
    assert fit(tmp_path, "--ckpt_path=last") == 2
    file = tmp_path / "run/checkpoints/epoch=0.ckpt"
    assert f"holds no last.ckpt, but epoch=0.ckpt: resume from one by --ckpt_path {file}" in said(tmp_path)
    assert fit(tmp_path, f"--ckpt_path={file}") == 0
    is_the_same(tmp_path, whole)


def on_two(folder, *more, **options):
    """A run on two processes, each of which may end the other's; its exit code."""
    line = [sys.executable, "-m", "lightning_fdfo", *arguments(folder, *more, way="ddp", **options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(EVER)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_of_which_one_is_killed_go_on_to_the_bit(tmp_path):
    """The other ends too, by itself."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert on_two(one) == 0, said(one)[-3000:]
    assert on_two(two, moment="sampling", epoch=2, rank=1) != 0
    assert are_whole(two)["last.ckpt"] == 1
    assert on_two(two, "--ckpt_path=last") == 0, said(two)[-3000:]
    is_the_same(two, one)


# Asked to stop

STOPS = {"SIGINT": ("ctrl-C", 130), "SIGTERM": ("SIGTERM", 143)}


@pytest.mark.parametrize("sent", STOPS)
@pytest.mark.parametrize(("moment", "last"), [("sampling", 1), ("reward", 1), ("training", 1), ("between", 2)])
def test_a_run_that_is_asked_to_stop_stops_soon_and_goes_on_to_the_bit(fit, start, whole, tmp_path, moment, last, sent):
    name, code = STOPS[sent]
    assert fit(tmp_path, moment=moment, epoch=2, sent=sent, batch=2) == code, said(tmp_path)[-3000:]
    text = said(tmp_path)
    assert f"{name}: the run ends after the current batch or update; a" in text
    (sentence,) = re.findall(r"^Stopped by .*$", text, re.MULTILINE)
    file = tmp_path / "run/checkpoints/last.ckpt"
    assert sentence.startswith(f"Stopped by {name}: {file} holds {last + 1} of 4 epochs; resume by lightning-fdfo fit ")
    assert "Traceback" not in text
    assert are_whole(tmp_path)["last.ckpt"] == last
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    _, *line = shlex.split(sentence.partition("resume by ")[2])
    configuration(tmp_path)  # the same, undisturbed
    process = start(tmp_path, *line)
    process.join(EVER)
    assert process.exitcode == 0, said(tmp_path)[-3000:]
    is_the_same(tmp_path, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_of_which_one_is_asked_to_stop_stop_together(tmp_path, rank):
    assert on_two(tmp_path, moment="sampling", epoch=1, rank=rank, sent="SIGTERM") == 143, said(tmp_path)[-3000:]
    assert said(tmp_path).count("Stopped by SIGTERM: ") == 1
    assert "Traceback" not in said(tmp_path)
    assert are_whole(tmp_path)["last.ckpt"] == 0
    assert on_two(tmp_path, "--ckpt_path=last") == 0, said(tmp_path)[-3000:]
    assert are_whole(tmp_path)["last.ckpt"] == EPOCHS - 1


@pytest.fixture
def slurm(tmp_path):
    """The variables of a job, and an `scontrol` that notes its call and then ends the caller, as SLURM does."""
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called.txt\nkill -TERM $PPID\n')
    program.chmod(0o755)
    names = {"NTASKS": "1", "JOB_ID": "4321", "JOB_NAME": "fdfo", "NODELIST": "localhost"}
    ranks = dict.fromkeys(("NODEID", "LOCALID", "PROCID"), "0")
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path} | {f"SLURM_{name}": value for name, value in (names | ranks).items()}


@pytest.mark.parametrize("moment", ["sampling", "training", "between"])
def test_a_job_that_slurm_requeues_goes_on_to_the_bit_by_the_same_command(fit, whole, tmp_path, slurm, moment):
    options = {"moment": moment, "epoch": 2, "sent": "SIGUSR1", "batch": 2}
    assert fit(tmp_path, environment=slurm, **options) == 143, said(tmp_path)[-3000:]
    assert (tmp_path / "called.txt").read_text() == "requeue 4321\n"
    last = 2 if moment == "between" else 1
    assert are_whole(tmp_path) == {f"epoch={epoch}.ckpt": epoch for epoch in range(last + 1)} | {"last.ckpt": last}
    assert fit(tmp_path, environment=slurm) == 2  # not requeued: somebody else's job, in a folder that is taken
    assert fit(tmp_path, environment=slurm | {"SLURM_RESTART_COUNT": "1"}) == 0, said(tmp_path)[-3000:]
    is_the_same(tmp_path, whole)
