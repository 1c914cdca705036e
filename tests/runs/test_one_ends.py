"""The command is ended while a reward scores, or by an error on one of two processes: one line, and its exit code."""

import os
import re
import signal
import subprocess
import sys

import pytest

from lightning_fdfo.__main__ import main
from tests.runs.test_parallel import ROOT, WAYS, overlay

SMALL = ["--model.evaluation.metrics=null", "--model.sampling.num_steps=2", "--trainer.enable_progress_bar=false"]
KILLED = {"SIGINT": ("ctrl-C", 130), "SIGTERM": ("SIGTERM", 143)}


def interrupted(images, prompts, metadata):
    os.kill(os.getpid(), signal.SIGINT)
    return images.mean(dim=(1, 2, 3))


def terminated(images, prompts, metadata):
    os.kill(os.getpid(), signal.SIGTERM)
    return images.mean(dim=(1, 2, 3))


def fails_on_one(images, prompts, metadata):
    """On the process that the environment names."""
    if os.environ.get("LOCAL_RANK", "0") == os.environ["FAILING_RANK"]:
        raise ValueError("no score")
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("policy", ["raise", "drop_pair"])
@pytest.mark.parametrize(("reward", "sent"), [("interrupted", "SIGINT"), ("terminated", "SIGTERM")])
def test_a_signal_while_a_reward_scores_ends_validate_and_is_not_the_rewards_fault(
    tmp_path, monkeypatch, capfd, reward, sent, policy
):
    name, code = KILLED[sent]
    (tmp_path / "val.txt").write_text('"12" in red\n"345" in blue\n')
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    rewards = f"--model.rewards={{tests.runs.test_one_ends.{reward}: 1.0}}"
    data = [f"--data.{part}={tmp_path}/val.txt" for part in ("train", "val")]
    more = [
        rewards,
        f"--model.failures.on_reward_error={policy}",
        *data,
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(SystemExit) as end:
        main(["validate", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, *more])
    said = capfd.readouterr().err
    assert end.value.code == code
    assert said.count(f"{name}: ended outside of training; the same command does it again") == 1
    assert "reward 'tests" not in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_of_two_processes_ends_both_as_it_would_end_one(tmp_path, rank):
    rewards = "--model.rewards={tests.runs.test_one_ends.fails_on_one: 1.0}"
    words = ["fit", "--config", "configs/quickstart.yaml", "--config", str(overlay(tmp_path, lora=True)), *WAYS["ddp"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAILING_RANK": str(rank)}
    result = subprocess.run(
        [sys.executable, "-m", "lightning_fdfo", *words, rewards, f"--trainer.default_root_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = re.findall(r"^\S*[Ee]rror: .*$", result.stderr, re.MULTILINE)
    assert [line for line in errors if line.startswith("error: ")] == [errors[0]], result.stderr
    assert "no score" in errors[0]
    assert not re.search(r"closed by peer|Traceback \(", result.stderr), result.stderr
    assert result.returncode == 3
