"""The pages in docs/: their Python runs, their commands and configurations parse, what they name exists."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import lightning_fdfo.flows
from lightning_fdfo import RewardMix
from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks.pair_log import PairLog
from lightning_fdfo.cli import FDFOCLI
from lightning_fdfo.flow import FlowModel
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.registry import Adapter
from lightning_fdfo.prompts import read_prompts
from lightning_fdfo.reward_term import Gate, RewardTerm
from lightning_fdfo.routing import check_route, is_for, routes
from tests.conftest import brightness

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


COMMANDS = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def adapters(monkeypatch):
    """Classes that a page defines serve their pipelines for one test only."""
    monkeypatch.setattr(Adapter, "registered", dict(Adapter.registered))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in FDFOCLI.subcommands()])
def test_commands_parse(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_adapter_is_one(adapters):
    """The page's own test, of the page's own class."""
    namespace = {}
    for block in blocks("adapters.md", "python"):
        exec(block, namespace)
    namespace["test_it_is_a_flow_model"]()


def test_a_configuration_can_name_the_adapter(adapters, tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_flow.py").write_text(blocks("adapters.md", "python")[0], encoding="utf-8")
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(blocks("adapters.md", "yaml")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self.model.flow))
    FDFOCLI(["fit", "--config=configs/quickstart.yaml", f"--config={overlay}"])
    (flow,) = built
    wanted = yaml.safe_load(overlay.read_text(encoding="utf-8"))["model"]["flow"]
    assert f"{type(flow).__module__}.{type(flow).__name__}" == wanted["class_path"]
    assert type(DiffusersFlow("tiny-digits")) is type(flow)  # found by its pipeline, too


def test_the_hooks_are_the_base_classs():
    hooks = re.findall(r"^\| `(\w+)` \|", PAGES["adapters.md"], flags=re.MULTILINE)
    known = set(dir(DiffusersFlow)) | set(DiffusersFlow.__annotations__) | set(FlowModel.__annotations__)
    assert len(hooks) == 16
    assert set(hooks) <= known


@pytest.mark.parametrize("block", blocks("mixing.md", "yaml"))
def test_mixtures_can_be_built(block, tmp_path, monkeypatch):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(block, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self.model.rewards))
    FDFOCLI(["fit", "--config=configs/quickstart.yaml", f"--config={overlay}"])
    assert set(built[0].terms) == set(yaml.safe_load(block)["model"]["rewards"])


def test_prompts_of_the_page_go_where_it_says(tmp_path):
    (block,) = blocks("mixing.md", "json")
    path = tmp_path / "prompts.jsonl"
    path.write_text(block, encoding="utf-8")
    prompts, mix = read_prompts(path), RewardMix(yaml.safe_load(blocks("mixing.md", "yaml")[0])["model"]["rewards"])
    for prompt in prompts:
        check_route(prompt.metadata, mix.terms, mix.terms)
        mix.check(prompt.text, prompt.metadata, [name for name in mix.terms if is_for(name, prompt.metadata)])
    found = routes(mix.terms, [prompt.metadata for prompt in prompts])
    assert {name: route.nan_to_num(-1).tolist() for name, route in found.items()} == {
        "OCR": [1, -1, 1],
        "small": [0.5, 1, 1],
        "colors": [-1, -1, 1],
    }


def test_the_pages_numbers_are_logged_and_its_python_reads_the_pairs(toy_module, fit, tmp_path, monkeypatch, capsys):
    rewards = {
        "OCR": RewardTerm(brightness),
        "small": RewardTerm(lambda images, *_: -images[:, 0].mean(dim=(1, 2)), gate=Gate("OCR", above=0.4)),
    }
    trainer = fit(toy_module(rewards=rewards), 1, callbacks=[PairLog()], default_root_dir=tmp_path / "runs/mine")
    for cell in re.findall(r"^\| (`reward/[^|]+) \|", PAGES["mixing.md"], flags=re.MULTILINE):
        name, *others = re.findall(r"`([^`]+)`", cell)
        for number in (name, *(name.rsplit("/", 1)[0] + other for other in others)):
            logged = number.replace("NAME", "small").replace("/A/", "/OCR/").replace("/B", "/small")
            assert logged in trainer.callback_metrics, number
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("mixing.md", "python")
    namespace = {}
    exec(block, namespace)
    assert sum(namespace["quarrels"].values()) > 0
    assert capsys.readouterr().out.startswith("[('")


def test_files_that_the_pages_name_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|txt|md))`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (ROOT / "docs" / target).exists(), f"{page}: {target}"
        for name in re.findall(r"`class_path: (\w+)`", text):
            assert hasattr(lightning_fdfo.flows, name), f"{page}: {name}"


def test_the_evaluation_on_the_page_is_one(tmp_path, monkeypatch):
    """Laid over the quick start it is built without a network, and each value that it names arrives."""
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(blocks("evaluation.md", "yaml")[0], encoding="utf-8")
    wanted = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    FDFOCLI(["test", "--config=configs/quickstart.yaml", f"--config={overlay}"])
    (cli,) = built
    assert asdict(cli.model.evaluation) == wanted["model"]["evaluation"]
    assert set(cli.model.metrics.terms) >= {"CLIPScore"}
    assert cli.datamodule.test_path == wanted["data"]["test"]
    assert cli.datamodule.images_per_prompt == wanted["data"]["images_per_prompt"]


def test_an_image_says_how_it_was_made_as_on_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    few = ["--trainer.limit_predict_batches=1", "--data.val_batch_size=1", "--model.sampling.num_steps=1"]
    folder = f"--trainer.default_root_dir={tmp_path / 'runs/mine'}"
    main(["predict", "--config=configs/quickstart.yaml", folder, "--trainer.enable_progress_bar=false", *few])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    exec(blocks("evaluation.md", "python")[0], {})
    assert capsys.readouterr().out == '"5600" in green 0 0 0\n'
    listed = json.loads((tmp_path / "runs/mine/predict/0/images.jsonl").read_text(encoding="utf-8"))
    last = PAGES["evaluation.md"].split("```")[-1]
    for name in listed.keys() - {"file", "sha256"}:
        assert f"`{name}`" in last
