"""The kept help of Lightning's commands: what the parser prints, and shown for nothing else."""

import json
import re
from pathlib import Path

import pytest

from lightning_fdfo.commands import kept_help
from lightning_fdfo.commands.cli import FDFOCLI
from tests import processes

ROOT = Path(__file__).parents[2]
RENEW = "renew the kept texts: python -m lightning_fdfo.commands.kept_help"


def contents(folder):
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def test_it_is_what_the_parser_prints(tmp_path):
    """In a process without the classes that tests define: a text lists known callbacks."""
    process = processes.FORKS.Process(target=kept_help.write, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    kept, printed = contents(kept_help.FOLDER), contents(tmp_path)
    assert set(printed) == {*(f"{command}.txt" for command in FDFOCLI.subcommands()), kept_help.MADE_WITH}
    if kept[kept_help.MADE_WITH] != printed[kept_help.MADE_WITH]:
        pytest.skip(f"made with {kept[kept_help.MADE_WITH]}: with other versions the parser is asked")
    assert kept == printed, RENEW


def test_it_is_made_with_the_tested_versions():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    made_with = json.loads((kept_help.FOLDER / kept_help.MADE_WITH).read_text())
    assert {name: made_with[name] for name in kept_help.DESCRIBED if name in pinned} == {
        name: pinned[name] for name in ("jsonargparse", "lightning", "torch")
    }, RENEW


@pytest.fixture
def made_with(monkeypatch):
    """The kept texts' versions are the installed ones, but for those that are named."""
    monkeypatch.setattr(kept_help, "version", lambda name: versions[name])
    versions = json.loads((kept_help.FOLDER / kept_help.MADE_WITH).read_text())
    return versions


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_it_is_shown_for_the_bare_question(made_with, command, word):
    made_with["torch"] += "+cpu"
    text = kept_help.find([command, word])
    assert text.startswith(f"usage: lightning-fdfo [options] {command} ")
    assert "--model.sampling.num_steps" in text


@pytest.mark.parametrize(
    "words",
    [[], ["fit"], ["--help"], ["doctor", "--help"], ["fit", "--config=x", "--help"], ["fit", "--model.flow.help"]],
    ids=" ".join,
)
def test_other_questions_are_the_parsers(made_with, words):
    assert kept_help.find(words) is None


@pytest.mark.parametrize("name", kept_help.DESCRIBED)
def test_other_versions_ask_the_parser(made_with, name):
    made_with[name] += ".1"
    assert kept_help.find(["fit", "--help"]) is None


def test_a_variable_that_changes_the_parser_asks_it(made_with, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    assert kept_help.find(["fit", "--help"]) is None


def test_what_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise kept_help.PackageNotFoundError(name)

    monkeypatch.setattr(kept_help, "version", missing)
    assert set(kept_help.versions().values()) == {None}
    assert kept_help.find(["fit", "--help"]) is None
