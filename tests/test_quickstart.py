"""The quick start as it is shipped: minutes, so on demand with -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quick_start_gains_fifteen_points(tmp_path):
    command = [sys.executable, "-m", "lightning_fdfo", "fit", "--config", "configs/quickstart.yaml"]
    subprocess.run([*command, f"--trainer.default_root_dir={tmp_path}"], cwd=ROOT, check=True, timeout=1200)
    summary = json.loads((tmp_path / "before_after.json").read_text())
    assert 0.3 <= summary["before"]["exact_match"] <= 0.7
    assert summary["after"]["exact_match"] >= summary["before"]["exact_match"] + 0.15
