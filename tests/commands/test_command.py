"""The command by itself: what it lists, what help costs, its version, and words that are no command."""

import subprocess
import sys

import pytest

from lightning_fdfo.__main__ import COMMANDS, SUMMARIES, main, overview
from lightning_fdfo.commands import kept_help


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["predict", "-h"]], ids=" ".join)
def test_help_is_shown_without_the_heavy_libraries(words):
    code = (
        "import sys; from lightning_fdfo.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'jsonargparse', 'lightning', 'torch', 'transformers', 'diffusers', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    line = [sys.executable, "-c", code, *words]
    result = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.rstrip() == (kept_help.find(words) or overview()).rstrip()


def test_all_commands_are_listed():
    listed = [line.split()[0] for line in overview().splitlines() if line.startswith("  ")]
    assert listed == list(SUMMARIES)
    assert set(COMMANDS) < set(SUMMARIES)


def test_lightnings_own_commands_are_among_them():
    from lightning_fdfo.commands.cli import FDFOCLI

    assert set(SUMMARIES) - set(COMMANDS) == set(FDFOCLI.subcommands())


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ([], 2, "", "serve-reward"),
        (["-h"], 0, "serve-reward", ""),
        (["--version"], 0, "lightning-fdfo 0.", ""),
        (["doktor"], 2, "", "error: unknown command 'doktor': did you mean 'doctor'?"),
        (["serve_reward", "OCR"], 2, "", "did you mean 'serve-reward'?"),
        (["quux"], 2, "", "expected one of fit, validate"),
    ],
)
def test_what_is_no_command_is_said(capsys, words, code, out, err):
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert (stop.value.code or 0) == code
    for expected, text in ((out, said.out), (err, said.err)):
        assert expected in text
        assert bool(text) == bool(expected)
    if words and code:
        assert said.err.count("\n") == 1
