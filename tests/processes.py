"""The command in processes of its own, without their seconds of imports: forked from a process that has imported all.

A forked process is a new one that runs `lightning_fdfo.__main__.main`: with its own folder, environment, arguments,
output and exit code, and signals reach it alone. It differs from `python -m lightning_fdfo` in two things: the imports
have been made, and two devices are two such processes, as a cluster starts them, in place of one that starts the other.
Tests of the start itself (options of Python, imports, what Lightning launches) run a real one, by `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])


class Result(NamedTuple):
    """What a command has left; of several processes the outputs one after the other, and the first code but 0."""

    returncode: int
    stdout: str
    stderr: str


def _command(words: Sequence[str], environment: Mapping[str, str], folder: Path, outputs: Sequence[str]) -> None:
    """The new process: everything that a shell would have set up, then the command."""
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        stream.flush()
        os.dup2(target, stream.fileno())
        os.close(target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["lightning-fdfo", *words]
    from lightning_fdfo.__main__ import main

    main()


def start(words: Sequence[str], outputs: Sequence[str | Path], **environment: str) -> BaseProcess:
    """Starts `lightning-fdfo WORDS` in the repository's root.

    Args:
        words: of the command line.
        outputs: files for what goes to standard output and standard error.
        environment: variables beside those of this process.
    """
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # when the first one starts: two devices' threads would wait
        arguments = (list(map(str, words)), {**os.environ, **environment}, ROOT, list(map(str, outputs)))
        process = FORKS.Process(target=_command, args=arguments)
        process.start()
    return process


def run(words: Sequence[str], devices: int = 1, timeout: float = 300, **environment: str) -> Result:
    """Runs `lightning-fdfo WORDS`, as one process a device, and waits for its end.

    Raises:
        TimeoutError: it takes longer; its processes are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"out-{rank}"), Path(folder, f"err-{rank}")) for rank in range(devices)]
        ranks: list[dict[str, str]] = [{}]
        if devices > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
            ranks = [meeting | {"LOCAL_RANK": str(rank)} for rank in range(devices)]
        started = [start(words, o, **(environment | rank)) for o, rank in zip(outputs, ranks, strict=True)]
        try:
            for process in started:
                process.join(timeout)
                if process.exitcode is None:
                    raise TimeoutError(f"{words} still runs after {timeout} s")
        finally:
            for process in started:
                process.kill()
        out, err = ("".join(pair[stream].read_text("utf-8") for pair in outputs) for stream in (0, 1))
    return Result(next((p.exitcode for p in started if p.exitcode), 0), out, err)


def run_checked(words: Sequence[str], devices: int = 1, **environment: str) -> Result:
    """The same, for a command that must end with 0."""
    result = run(words, devices, **environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
