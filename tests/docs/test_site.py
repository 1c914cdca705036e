"""The site of docs/ builds without a warning, needs no other server, and has every option and every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_fdfo
import lightning_fdfo.flows
import lightning_fdfo.testing
from lightning_fdfo import callbacks
from lightning_fdfo.commands.cli import FDFOCLI
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.reward import available_rewards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder


@pytest.fixture(scope="module")
def documented(site):
    """Dotted path of a class on the page of options -> names in its table of parameters."""
    page = (site / "options.html").read_text(encoding="utf-8")
    headings = re.split(r'<h3 id="(lightning[\w.]+)" class="doc doc-heading">', page)
    rows = re.compile(r'<tr class="doc-section-item">\s*<td>\s*<code>(\w+)</code>')
    tables = [text.partition("Parameters:")[2].partition("</table>")[0] for text in headings[2::2]]
    return {path: set(rows.findall(table)) for path, table in zip(headings[1::2], tables, strict=True)}


def documented_as(documented, name):
    (names,) = (names for path, names in documented.items() if path.rpartition(".")[2] == name)
    return names


@pytest.fixture(scope="module")
def parser():
    parsers = []

    class Options(FDFOCLI):
        def parse_arguments(self, parser, args):
            parsers.append(parser)
            raise StopIteration

    with pytest.raises(StopIteration):
        Options([])
    (parser,) = parsers
    return parser._subcommands_action._name_parser_map["fit"]


def options_of(cls):
    parser = ArgumentParser()
    parser.add_class_arguments(cls, instantiate=False)
    return {action.dest.partition(".")[0] for action in parser._actions} - {"help"}


def test_every_option_of_the_parser_is_there(parser, documented):
    groups = {
        "trainer": "Trainer",
        "model": "FDFOModule",
        "model.sampling": "Sampling",
        "model.batching": "Batching",
        "model.failures": "FailurePolicy",
        "model.objective": "Objective",
        "model.evaluation": "Evaluation",
        "data": "PromptDataModule",
    }
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    counted = 0
    for action in parser._actions:
        group, _, name = action.dest.rpartition(".")
        if action.dest in ("help", *groups) or action.dest.endswith(".help"):
            continue
        if group:
            assert name in documented_as(documented, groups[group]), action.dest
            counted += 1
        else:
            assert f"| `{name}` |" in page, name
    assert counted > 60


@pytest.mark.parametrize(
    "name",
    [
        "flows.lora.LoRA",
        "reward.term.RewardTerm",
        "reward.term.Gate",
        "flows.DiffusersFlow",
        *(f"callbacks.{name}" for name in callbacks.__all__ if options_of(getattr(callbacks, name))),
    ],
)
def test_every_argument_of_a_class_that_a_configuration_names_is_there(documented, name):
    module, _, cls = name.rpartition(".")
    owner = getattr(__import__(f"lightning_fdfo.{module}", fromlist=[cls]), cls)
    assert options_of(owner)
    assert options_of(owner) == documented_as(documented, cls)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in lightning_fdfo.flows.__all__
        if isinstance(cls := getattr(lightning_fdfo.flows, name), type) and issubclass(cls, DiffusersFlow)
    ],
)
def test_adapters_have_no_options_but_the_shared_ones(documented, name):
    assert options_of(getattr(lightning_fdfo.flows, name)) == documented_as(documented, "DiffusersFlow")


@pytest.mark.parametrize(
    "name", [name for name, entry in available_rewards().items() if entry.dist.name == "lightning-fdfo-rewards"]
)
def test_every_option_of_a_reward_is_there(documented, name):
    assert options_of(available_rewards()[name].load()) == documented_as(documented, name)


def test_public_names_are_on_a_page(site):
    pages = "".join((site / f"{page}.html").read_text(encoding="utf-8") for page in ("options", "reference"))
    for package in (lightning_fdfo, lightning_fdfo.flows, lightning_fdfo.testing):
        for name in package.__all__:
            assert re.search(rf'id="lightning_fdfo\.[\w.]+\.{name}"', pages), name


def test_examples_in_docstrings_are_shown_as_code(site):
    page = (site / "reference.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in page  # what Markdown makes of >>> and of a range >= 0
    assert page.count('<span class="gp">&gt;&gt;&gt; </span>') > 20


def test_nothing_is_fetched_from_other_servers(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        fetched += re.findall(r'<link[^>]*\bhref="([^"]+)"', text)
        assert fetched
        assert not [target for target in fetched if re.match(r"(?:https?:)?//", target)], page.name


def test_every_page_is_in_the_site(site):
    navigation = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        assert f"'{page.name}'" in navigation, page.name
    assert not list(site.glob("*.py"))
