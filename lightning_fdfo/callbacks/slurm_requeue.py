"""SLURMRequeue: queues a job again that SLURM is about to end; it resumes from its last complete epoch."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class SLURMRequeue(Callback):
    """Calls `scontrol requeue` on SLURM's warning (SIGUSR1, by `#SBATCH --signal=SIGUSR1@90`), and writes nothing.

    It takes the place of Lightning's own handler, which also writes a checkpoint, wherever the run is. From the middle
    of an epoch no run resumes exactly: its rollout was made with weights that are gone. The last complete epoch is on
    disk already. The requeued job runs the same command, and `lightning-fdfo fit` resumes there (`is_requeued`).

    SLURM ends the requeued job by SIGTERM, on which `StopOnSignal` stops after the current batch or update. Outside of
    SLURM, or with `SLURMEnvironment(auto_requeue=False)`, the callback does nothing. The command line adds it
    to every run.

    Source: https://slurm.schedmd.com/sbatch.html, `--signal` and `SLURM_RESTART_COUNT`.
    """

    def __init__(self) -> None:
        self._number: signal.Signals | None = None
        self._before: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signal; Lightning, which asks for it later, leaves a handler that it finds."""
        environment = trainer._accelerator_connector.cluster_environment  # nothing public names it on one device
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._number = environment.requeue_signal
            self._before = signal.signal(self._number, lambda *_: _requeue(trainer))  # type: ignore[arg-type]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts back what handled the signal before."""
        if self._number is not None:
            signal.signal(self._number, self._before)
            self._number = None


def is_requeued() -> bool:
    """Whether SLURM has started this job before.

    Example:
        >>> is_requeued()
        False
    """
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def _requeue(trainer: Trainer) -> None:
    """From one process of all: a signal comes to each."""
    if not trainer.is_global_zero:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    rank_zero_info(f"SLURM is about to end job {job}: it is requeued, and resumes from its last complete epoch")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"job {job} could not be requeued: {error}; start it again by hand, with --ckpt_path last")
