"""`python -m tests.gpu`: what the package does on a GPU, in one command: nothing else is needed, and no hub.

python -m tests.gpu                      all cases; gpu.json has all numbers
python -m tests.gpu --list               their names
python -m tests.gpu --only base 24gb     some of them
python -m tests.gpu --dry-run            all cases with toy models on the CPU: tries this program, measures nothing
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers

from lightning_fdfo.files import format_bytes, write_text
from tests.gpu.cases import CASES
from tests.gpu.run import Device, Session
from tests.gpu.table import LEGEND, promises, remarks, table


def main(words: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if one of them failed, 2 without a GPU."""
    options = _options(words)
    if options.list:
        print(*(f"{case.name:18}{' + '.join((case.model, *case.overlays))}" for case in CASES), sep="\n")
        return 0
    device = _cpu() if options.dry_run else _gpu()
    if device is None:
        print("no CUDA device here; --dry-run tries all cases with toy models on the CPU", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.only or case.name in options.only]
    rows: list[dict[str, Any]] = []
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    print(f"{device.name}, {format_bytes(device.memory)}; torch {torch.__version__}", flush=True)
    with ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        session = Session(folder, device, options.dry_run, options.t5_layers)
        for case in cases:
            rows.append(session.run(case))
            print(f"{case.name}: {rows[-1]['status']}", flush=True)
            report = {"device": asdict(device), "torch": torch.__version__, "dry_run": options.dry_run}
            report |= {"t5_layers": options.t5_layers, "cases": rows, "promises": promises(rows, device.name)}
            write_text(options.json, json.dumps(report, indent=2))
    print(f"\n{table(rows)}\n\n{LEGEND}\n", *remarks(rows), sep="\n")
    for promise in promises(rows, device.name):
        print(f"{'kept' if promise['kept'] else 'NOT KEPT'}: {promise['text']}")
    return int(any(row["status"] == "failed" for row in rows))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    summary, _, lines = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tests.gpu", description=summary, epilog=lines, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help="cases to run; the others are left out"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and run none")
    parser.add_argument("--dry-run", action="store_true", help="toy models on the CPU")
    parser.add_argument("--folder", help="where models and runs are kept; without it, a temporary one, up to 55 GB")
    parser.add_argument("--json", default="gpu.json", help="the file for all numbers (%(default)s)")
    parser.add_argument("--t5-layers", type=int, help="of its 24: less disk; memory while encoding is then another")
    return parser.parse_args(words)


def _cpu() -> Device:
    return Device(f"CPU {platform.machine()}", psutil.virtual_memory().total, cuda=False)


def _gpu() -> Device | None:
    """The first card, asked by a process that ends: this one takes none of its memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(describe_card).result()


def describe_card() -> Device | None:
    """The first card, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Device(properties.name, properties.total_memory, cuda=True)


if __name__ == "__main__":
    sys.exit(main())
