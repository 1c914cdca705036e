"""What the cases gave, for people: a table, what failed, and whether what is promised holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GIB = 2**30
COLUMNS = (
    "case", "images/s", "rollout", "training", "TFLOP/s", "of peak", "rollout", "training",
    "training GiB", "formula", "rollout GiB", "start GiB", "texts", "host GiB",
)  # fmt: skip
LEGEND = """\
images/s: of the last epoch, then of its rollout and its training alone. TFLOP/s: of the velocities, forward and
backward, counted by torch; what gradient checkpointing computes again, decoding and rewards are not in it. of peak: of
the chip's dense bfloat16, then in the rollout and in training. GiB: the most that tensors took on the device: in
training (formula: docs/models.md), in the rollout (with text encoders, if they are offloaded), and before the first
epoch (texts: the encoders' weights). host GiB: the most that the process took of main memory.
Weights are random, so images are noise; the reward is JPEGSize, on the CPU."""
SHOWN = 15
"""Kernels; the file has more."""
SPEEDS = {"80 of 80": (("base", "compile", "80gb", "80gb-compile"), 1.0), "20 of 80": (("20-of-80",), 2.0)}
"""Points that train -> cases, and images a second that the fastest of them has to reach on an H100."""
SMALL_CARD = 24e9


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a case that ran."""
    lines = [list(COLUMNS)]
    for row in rows:
        if "record" in row:
            lines.append([row["name"], *_numbers(row)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a table of numbers cannot hold: cases that failed or were skipped, and what else was found."""
    found = [f"{row['status']}: {row['name']}: {row['reason']}" for row in rows if row["status"] != "passed"]
    for row in rows:
        if "largest_difference" in row:
            difference = row["largest_difference"]
            found.append(f"{row['name']}: stopped and resumed, what trains differs by at most {difference:.3g}")
        if "kernels" in row.get("record", {}):
            found.append(f"{row['name']}: the longest kernels of an epoch, seconds, calls")
            found += [
                f"  {k['seconds']:8.3f} {k['calls']:7}  {k['name'][:90]}" for k in row["record"]["kernels"][:SHOWN]
            ]
    return found


def promises(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """What the package is to reach, as far as the cases and the card tell: `kept` for each."""
    ran, found = {row["name"]: row for row in rows if "record" in row}, []
    for points, (names, least) in SPEEDS.items():
        speeds = {name: ran[name]["images_per_second"] for name in names if name in ran}
        if speeds and "H100" in device:
            best = max(speeds, key=lambda name: speeds[name])
            text = f"at least {least} images a second with {points} points on an H100: {speeds[best]:.2f} ({best})"
            found.append({"text": text, "kept": speeds[best] >= least})
    if "24gb" in ran:
        parts = [ran["24gb"]["record"]["start"], *(p for e in ran["24gb"]["record"]["epochs"] for p in e.values())]
        most = max(part["reserved"] for part in parts)
        text = f"at most 24 GB with single_gpu_24gb.yaml: {most / 1e9:.1f} reserved"
        found.append({"text": text, "kept": most <= SMALL_CARD})
    return found


def _numbers(row: dict[str, Any]) -> list[str]:
    record = row["record"]
    speeds = [row["images_per_second"], row["rollout_images_per_second"], row["training_images_per_second"]]
    shares = [row["share_of_peak"], row["rollout_share_of_peak"], row["training_share_of_peak"]]
    peaks = [max((e[part]["peak"] or 0) for e in record["epochs"]) for part in ("training", "rollout")]
    return [
        *(f"{speed:.3g}" for speed in speeds),
        f"{row['tflops']:.3g}",
        *("-" if share is None else f"{share:.0%}" for share in shares),
        _gib(peaks[0]),
        _gib(sum(row["formula"].values())),
        _gib(peaks[1]),
        _gib(record["start"]["peak"]),
        _gib(row["texts"]),
        _gib(record["host_peak"]),
    ]


def _gib(size: int | None) -> str:
    return f"{size / GIB:.2f}" if size else "-"
