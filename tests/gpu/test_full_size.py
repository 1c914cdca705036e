"""Stable Diffusion 3.5 medium at its full size, with random weights, through `fit` on a CPU."""

import json
import shutil

import pytest
import yaml

from lightning_fdfo.guards.memory import rollout_bytes
from tests import processes
from tests.gpu.build import write_model
from tests.gpu.cases import Case, read_settings, write_config
from tests.gpu.record import STATUS
from tests.gpu.run import start
from tests.gpu.sizes import measure

GIB = 2**30
CASE = Case("cpu", ("single_gpu_80gb",), epochs=1)
SMALL = {
    "model": {
        "sampling": {"num_steps": 2, "height": 128, "width": 128},
        "batching": {"num_pairs": 2, "updates_per_epoch": 1, "batch_size": 1, "rollout_batch_size": 1},
    },
    "data": {"val": None},
    "trainer": {"accelerator": "cpu", "num_sanity_val_steps": 0},
}


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux, which tells a program's peak")
def test_it_trains_in_the_memory_that_the_formula_tells(tmp_path):
    """The shipped configuration and overlay at 128 px, two pairs of two steps; one layer of T5, to save the disk."""
    model = write_model("sd35_medium", tmp_path / "sd35_medium-1", t5_layers=1)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    files = [*write_config(CASE, tmp_path / "case", model, toy=False), small]
    settings = read_settings(files)
    sizes = measure("sd35_medium", model, settings, t5_layers=1)
    done: processes.Result = start(["fit", *(word for file in files for word in ("--config", str(file)))])
    shutil.rmtree(model)  # gigabytes, which pytest would keep
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "case/record.json").read_text(encoding="utf-8"))
    told = sum(sizes.memory(settings).values()) + rollout_bytes(2, 4, 16 * 16 * 16, 0, 4)
    sizes_in_bytes = {"peak": record["host_peak"], "formula": told, "text encoders": sizes.texts()}
    parts = {"start": record["start"]} | {name: record["epochs"][0][name] for name in ("rollout", "training")}
    print("\n" + ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in parts.items()))
    print(", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in sizes_in_bytes.items()))
    assert told < record["host_peak"] < 1.15 * told + GIB  # of Python and its libraries
