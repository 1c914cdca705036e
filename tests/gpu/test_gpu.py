"""`python -m tests.gpu`: its arithmetic, and what it does on a CPU with toy models."""

import json
from dataclasses import replace

import pytest

from lightning_fdfo.files import format_bytes
from tests import processes
from tests.docs.test_models_page import tables
from tests.gpu import __main__ as command
from tests.gpu.build import write_model
from tests.gpu.cases import CASES, CONFIGS, ROOT, Case, read_settings, reason_to_skip, write_config
from tests.gpu.run import Device, Session
from tests.gpu.sizes import Sizes, measure
from tests.gpu.table import promises, table

GIB = 2**30
SIZES = Sizes(
    weights=2 * GIB,
    lora=GIB // 16,
    vae=0,
    encoders=GIB,
    blocks=2,
    width=64,
    tokens=64,
    forward=10**9,
    training=2 * 10**9,
)
SETTINGS = {
    "model": {
        "flow": {"init_args": {}},
        "sampling": {"num_steps": 40},
        "batching": {"num_pairs": 8, "batch_size": 8, "num_points_per_pair": 20},
    }
}


def settings_of(name, folder):
    case = next(case for case in CASES if case.name == name)
    return read_settings(write_config(case, folder / name, folder / "model", toy=False))


@pytest.mark.parametrize(
    ("model", "prefix"), [("sd35_medium", ""), pytest.param("flux_dev", "flux-", marks=pytest.mark.slow)]
)
def test_full_size_models_come_to_what_docs_models_md_says(model, prefix, tmp_path):
    folder = write_model(model, tmp_path / "model", weights=False)
    settings = settings_of(f"{prefix}24gb", tmp_path)
    sizes = measure(model, folder, settings)
    models, memory, *_ = tables()
    said = next(row for row in models.values() if f"configs/{CONFIGS[model]}.yaml" in row[2])
    assert [f"{sizes.weights / 1e9:.2f}", f"{sizes.lora / 1e6:.1f}"] == said[:2]
    texts, small, _, large, _ = memory[CONFIGS[model]]
    assert f"{sizes.texts() / GIB:.1f}" == texts
    assert f"{sum(sizes.memory(settings).values()) / GIB:.1f}" == small
    assert f"{sum(sizes.memory(settings_of(f'{prefix}80gb', tmp_path)).values()) / GIB:.1f}" == large
    forward, training = {"sd35_medium": (2.247, 4.769), "flux_dev": (21.617, 44.894)}[model]
    assert sizes.forward / 1e12 == pytest.approx(forward, abs=1e-3)
    assert sizes.training / 1e12 == pytest.approx(training, abs=1e-3)


def test_flops_of_an_epoch_are_those_of_its_velocities():
    assert SIZES.epoch(SETTINGS) == {"rollout": 8 * 2 * 40 * 10**9, "training": 8 * 20 * 2 * 10**9}


@pytest.mark.parametrize(
    ("quantization", "memory", "cuda", "said"),
    [
        (None, 80 * GIB, True, None),
        (None, 4 * GIB, False, "does not fit: weights 4.0 GiB + LoRA 1.0 GiB + activations "),
        (None, 5 * GIB, True, "CUDA 1.0 GiB = 6.0 GiB of 5.0 GiB"),
        ("nf4", 80 * GIB, False, "nf4 needs a CUDA device"),
        ("nf4", 80 * GIB, True, "nf4 needs bitsandbytes: pip install"),
    ],
)
def test_what_cannot_run_is_skipped_with_a_reason(quantization, memory, cuda, said, monkeypatch):
    monkeypatch.setattr("tests.gpu.cases.find_spec", lambda name: None)
    model = SETTINGS["model"] | {"flow": {"init_args": {"quantization": quantization}}}
    reason = reason_to_skip({"model": model}, SIZES, memory, cuda)
    assert reason is None if said is None else said in reason


def test_text_encoders_that_do_not_fit_are_a_reason():
    sizes = replace(SIZES, encoders=10 * GIB)
    assert reason_to_skip(SETTINGS, sizes, 16 * GIB, True) == "does not fit: text encoders 20.0 GiB of 16.0 GiB"


def test_every_overlay_for_a_device_is_a_case():
    overlays = {"ddp", "fsdp2", "multi_node", "single_gpu_24gb", "single_gpu_80gb"}
    assert {overlay for case in CASES for overlay in case.overlays} == overlays
    assert overlays <= {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("X1", None)]
)
def test_a_chips_peak_is_known_or_left_out(name, peak):
    assert Device(name, 80 * GIB, cuda=True).peak_flops == peak
    assert Device(name, 80 * GIB, cuda=False).peak_flops is None


def row(name, speed, reserved=10**10):
    part = {"seconds": 1.0, "peak": 3 * GIB, "reserved": reserved}
    record = {"start": part, "epochs": [{"rollout": part, "training": part}], "host_peak": None}
    speeds = dict.fromkeys(("rollout_images_per_second", "training_images_per_second", "tflops"), 1.0)
    shares = dict.fromkeys(("share_of_peak", "rollout_share_of_peak", "training_share_of_peak"), 0.5)
    found = {"name": name, "record": record, "images_per_second": speed, "formula": {"weights": 2 * GIB}, "texts": GIB}
    return found | speeds | shares


def test_promises_hold_for_the_fastest_case_and_the_largest_peak():
    rows = [row("base", 0.9), row("80gb", 1.1), row("20-of-80", 1.9), row("24gb", 0.5, reserved=25 * 10**9)]
    assert [promise["kept"] for promise in promises(rows, "NVIDIA H100 80GB HBM3")] == [True, False, False]
    assert "1.10 (80gb)" in promises(rows, "NVIDIA H100 80GB HBM3")[0]["text"]
    assert [promise["text"][:16] for promise in promises(rows, "NVIDIA L40S")] == ["at most 24 GB wi"]


def test_a_row_of_the_table():
    header, line = table([row("base", 1.234), {"name": "other", "status": "skipped"}]).splitlines()
    assert header.split()[:2] == ["case", "images/s"]
    assert line.split() == ["base", "1.23", "1", "1", "1", *["50%"] * 3, "3.00", "2.00", "3.00", "3.00", "1.00", "-"]


def test_a_run_that_fails_is_named_by_its_last_line(tmp_path):
    session = Session(tmp_path, Device("CPU", 16 * GIB, cuda=False), toy=True)
    session.command = lambda words: processes.Result(1, "starts\n", "Traceback\nerror: no such thing\n\n")
    session.sizes["sd35_medium"] = SIZES
    found = session.run(Case("broken"))
    assert (found["status"], found["reason"]) == ("failed", "exit code 1: error: no such thing")


def test_without_a_gpu_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(command, "_gpu", lambda: None)
    assert command.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_dry_run(tmp_path, capsys, monkeypatch):
    broken = Case("broken", changes={"model": {"sampling": {"churn": -1.0}}})
    monkeypatch.setattr(command, "CASES", [*CASES, broken])
    file = tmp_path / "gpu.json"
    words = ["--dry-run", "--folder", str(tmp_path), "--json", str(file), "--only", "20-of-80", "24gb", "broken"]
    assert command.main(words) == 1
    report = json.loads(file.read_text(encoding="utf-8"))
    ran, *_ = report["cases"]
    assert [case["status"] for case in report["cases"]] == ["passed", "skipped", "failed"]
    assert len(ran["record"]["epochs"]) == 2
    assert ran["record"]["host_peak"] > 2**27
    assert ran["images_per_second"] > 0
    out = capsys.readouterr().out
    assert "skipped: 24gb: nf4 needs a CUDA device" in out
    assert "failed: broken: exit code 2: error: sampling.churn: " in out
    assert format_bytes(report["device"]["memory"]) in out


@pytest.mark.slow
def test_the_complete_dry_run(tmp_path):
    file = tmp_path / "gpu.json"
    assert command.main(["--dry-run", "--json", str(file), "--folder", str(tmp_path)]) == 0
    rows = {case["name"]: case for case in json.loads(file.read_text(encoding="utf-8"))["cases"]}
    assert {name for name, case in rows.items() if case["status"] == "skipped"} == {"24gb", "24gb-int8", "flux-24gb"}
    assert rows["resume"]["largest_difference"] == 0
    assert rows["profile"]["record"]["kernels"][0]["seconds"] > 0
