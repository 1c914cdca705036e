"""The quick start, killed at random moments, again and again, and gone on with: is it the same run?

    python -m tests.runs.chaos [--kills 20] [--seed 0] [--strategy one]

configs/quickstart.yaml with its own callbacks, reward and model, and 4 pairs per epoch. An undisturbed run first. Then
the same one, its process group sent SIGKILL: one life in five while it starts, the others at a random moment of their
next epochs (sampling, reward, training, writing). After each kill last.ckpt is read, its checksums compared, and the
run goes on by --ckpt_path last. In the end every tensor and number of last.ckpt, every byte of the exported LoRA, and
every logged row must be the undisturbed run's, and no more epochs may have been done again than there were kills; the
exit code says so. About 10 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

from tests.runs import shipped
from tests.runs.test_kills import are_whole, said
from tests.runs.test_parallel import ROOT, WAYS, checkpoint, flat, trained

EPOCHS_PER_KILL = 4
WINDOW = 5
"""Epochs of a life within which it is killed: with fewer than 2 * EPOCHS_PER_KILL, the run lasts for all kills."""
EVER = 900
"""Seconds that no life takes."""


class Begun(Callback):
    """Notes each epoch that begins."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{trainer.current_epoch}\n")


def begun(folder: Path) -> list[int]:
    file = folder / "begun.txt"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def line(folder: Path, epochs: int, strategy: str) -> list[str]:
    """The command's words."""
    folder.mkdir(exist_ok=True)
    (folder / "val.txt").write_text('"12" in red\n"345" in blue\n')
    note = {"class_path": "tests.runs.chaos.Begun", "init_args": {"file": str(folder / "begun.txt")}}
    return [
        "fit", "--config=configs/quickstart.yaml", *WAYS[strategy], f"--data.val={folder / 'val.txt'}",
        "--model.batching.num_pairs=4", f"--model.batching.batch_size={16 if strategy == 'one' else 8}",
        f"--trainer.callbacks+={json.dumps([note, shipped.EMA])}", f"--trainer.max_epochs={epochs}",
        f"--trainer.default_root_dir={folder / 'run'}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def start(folder: Path, epochs: int, strategy: str, *more: str) -> subprocess.Popen[bytes]:
    words = [*line(folder, epochs, strategy), *more]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_fdfo", *words],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def wait_for_epochs(process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    """Until so many epochs have begun, in all lives, or the process has ended."""
    deadline = time.monotonic() + EVER
    while process.poll() is None and len(begun(folder)) < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no epoch in {EVER} s; see {folder}/log.txt")
        time.sleep(0.01)


def resume(folder: Path) -> list[str]:
    """How a user goes on with what a kill has left: always by the same words, once there is a run."""
    return ["--ckpt_path=last"] if (folder / "run/config.yaml").exists() else []


def state(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint(folder)
    return trained(saved) | dict(flat(saved["lr_schedulers"], "scheduler"))


def bytes_that_differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors and numbers of `one` that `other` does not have, bit for bit."""
    return sum(v.nbytes for name, v in one.items() if name not in other or not torch.equal(v, other[name]))


def main(kills: int = 20, seed: int = 0, strategy: str = "one", folder: Path | None = None) -> int:
    """Prints a line a kill and the outcome; 0 if nothing is lost."""
    root = folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    dice, epochs, began = random.Random(seed), EPOCHS_PER_KILL * kills, time.monotonic()
    undisturbed, killed = root / "undisturbed", root / "killed"
    process = start(undisturbed, epochs, strategy)
    wait_for_epochs(process, undisturbed, 1)
    started = time.monotonic() - began
    if process.wait(EVER):
        raise RuntimeError(f"the undisturbed run failed: {said(undisturbed)[-2000:]}")
    epoch = (time.monotonic() - began - started) / epochs
    print(f"{strategy}, {epochs} epochs: {started:.1f} s to start, {epoch:.2f} s an epoch; in {root}", flush=True)

    survived = 0
    while survived < kills:
        so_far = len(begun(killed))
        process = start(killed, epochs, strategy, *resume(killed))
        early = dice.random() < 0.2
        if not early:
            wait_for_epochs(process, killed, so_far + 1)
        time.sleep(dice.uniform(0, started if early else WINDOW * epoch))
        if process.poll() is not None:
            print(f"life {survived + 1} ended by itself, with {process.returncode}", flush=True)
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        survived += 1
        whole, now = are_whole(killed), begun(killed)
        print(
            f"kill {survived}: {len(now) - so_far} epochs begun in this life, {max(now, default=-1) + 1} of {epochs} "
            f"in all, {whole.get('last.ckpt', -1) + 1} in last.ckpt",
            flush=True,
        )
    code = process.returncode if process.returncode != -signal.SIGKILL else None
    if code is None:
        code = start(killed, epochs, strategy, *resume(killed)).wait(EVER)
    if code:
        raise RuntimeError(f"the last life failed: {said(killed)[-2000:]}")

    rows, own_rows = shipped.logged(undisturbed / "run"), shipped.logged(killed / "run")
    lost = bytes_that_differ(state(undisturbed), state(killed))
    missing = [step for step, row in rows.items() if own_rows.get(step) != row]
    same_files = shipped.loras(undisturbed / "run") == shipped.loras(killed / "run")
    now = begun(killed)
    again = len(now) - len(set(now))
    print(
        f"{survived} of {kills} kills survived, {again} epochs done again, {lost} bytes lost, {len(missing)} logged "
        f"rows lost, LoRA files {'equal' if same_files else 'NOT equal'}, in {time.monotonic() - began:.0f} s"
    )
    return int(bool(lost or missing or not same_files or again > kills or survived < kills))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="one", choices=list(WAYS))
    given = parser.parse_args()
    sys.exit(main(given.kills, given.seed, given.strategy))
