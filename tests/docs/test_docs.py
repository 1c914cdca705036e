"""The pages in docs/: their Python runs, their commands and configurations parse, what they name exists."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import lightning_fdfo.flows
from lightning_fdfo import LoRA, RewardMix
from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks.pair_log import PairLog
from lightning_fdfo.commands.cli import FDFOCLI
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3
from lightning_fdfo.flows.base import FlowModel
from lightning_fdfo.flows.lora_files import add_lora, save_lora
from lightning_fdfo.flows.registry import FlowFamily
from lightning_fdfo.prompts import read_prompts
from lightning_fdfo.reward.routing import check_route, is_for, routes
from lightning_fdfo.reward.term import Gate, RewardTerm
from tests.conftest import brightness

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "json", "python", "yaml", "toml", "text"}
"""Of which text is not run: it is a formula, or needs machines that are not here."""


def blocks(page, language):
    return [code for kind, _, code in FENCE.findall(PAGES[page]) if kind == language]


COMMANDS = [
    line.split("  #")[0].strip()
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line.strip()
]
OVERLAYS = [(page, number) for page in PAGES for number in range(len(blocks(page, "yaml")))]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes the Python blocks of a page that have a file's name into a package that can be imported."""

    def write(page):
        for _, title, code in FENCE.findall(PAGES[page]):
            if title:
                path = tmp_path / title
                path.parent.mkdir(exist_ok=True)
                path.write_text(code, encoding="utf-8")
                (path.parent / "__init__.py").touch()
        return tmp_path

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")  # a check looks for a reward in a fresh process, too
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def run(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    words = shlex.split(command)
    if words[0].startswith("PYTHONPATH="):
        monkeypatch.syspath_prepend(ROOT / words.pop(0).removeprefix("PYTHONPATH="))
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    return stop.value.code


@pytest.fixture
def families(monkeypatch):
    """Classes that a page defines serve their pipelines for one test only."""
    monkeypatch.setattr(FlowFamily, "registered", dict(FlowFamily.registered))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if re.search(f"lightning-fdfo ({'|'.join(FDFOCLI.subcommands())})", c)]
)
def test_commands_parse(command, monkeypatch, capsys):
    assert run(f"{command} --print_config", monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("lightning-fdfo (doctor|rewards)", c)])
def test_commands_that_train_nothing_run(command, package, monkeypatch, capsys):
    package("write_a_reward.md")
    assert run(command, monkeypatch) == 0, capsys.readouterr()


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("lightning-fdfo (report|export)", c)])
def test_commands_about_a_run_have_the_options_that_they_are_given(command, monkeypatch, capsys):
    _, name, _, *options = shlex.split(command)
    assert run(f"lightning-fdfo {name} --help", monkeypatch) == 0
    told = capsys.readouterr().out
    assert all(option in told for option in options if option.startswith("--"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lightning-fdfo " not in c])
def test_other_commands_exist(command):
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert arguments[0] == "install"
        for name in [word.partition("[")[0] for word in arguments[1:] if word != "-e"]:
            assert (ROOT / name / "pyproject.toml").exists()
    else:
        assert program == "tensorboard"
        assert shutil.which(program, path=Path(sys.executable).parent)


def test_every_block_says_what_it_is():
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(FENCE.findall(text)), page
        assert {kind for kind, _, _ in FENCE.findall(text)} <= LANGUAGES, page


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if page not in ("model_families.md", "evaluation.md", "mixing.md") and blocks(page, "python")
    ],
)
def test_python_runs(page, package, tmp_path, monkeypatch):
    """In order, in one namespace; with a LoRA in the place that the first run leaves one, and a reward's weights."""
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    add_lora(flow, LoRA(), seed=0)
    save_lora(flow, tmp_path / "runs/mine/lora")
    save_file({"line": torch.tensor([1.0, 0.0, 0.0])}, tmp_path / "taste.safetensors")
    package(page)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(block, namespace)
    for name in [name for name in namespace if name.startswith("test_")]:
        namespace[name]()
    if page == "first_run.md":
        assert (tmp_path / "number.png").exists()
    if page == "write_a_reward.md":
        red, blue = torch.zeros(2, 3, 4, 4).unbind()
        red[0], blue[2] = 1, 1
        images, rows = torch.stack([red, blue]), [{"colour": [1.0, 0.0, 0.0]}] * 2
        taste = namespace["Taste"](source="taste.safetensors")
        for reward in (namespace["Redness"](gain=2.0), namespace["ColourMatch"](), taste):
            reward.setup(torch.device("cpu"))
            first, second = reward(images, ["", ""], rows)
            lowest, highest = reward.range
            assert lowest <= second < first <= highest
        assert namespace["brightness"](images, [], []).tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize(("page", "number"), [pair for pair in OVERLAYS if pair[0] != "model_families.md"])
def test_configurations_can_be_built(page, number, package, tmp_path, monkeypatch):
    """Added after the quick start's; a model of the hub is built as the family that has its name."""
    package(page)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(blocks(page, "yaml")[number], encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self.model))
    FDFOCLI(["fit", "--config=configs/quickstart.yaml", f"--config={overlay}"])
    (model,) = built
    wanted = yaml.safe_load(overlay.read_text(encoding="utf-8")).get("model", {})
    assert set(model.rewards.terms) == set(wanted.get("rewards", {"OCR"}))
    if "flow" in wanted:
        assert model.flow.pretrained == wanted["flow"]["pretrained"]


def test_the_package_is_the_examples():
    (block,) = blocks("write_a_reward.md", "toml")
    assert block in (ROOT / "examples/custom_reward/pyproject.toml").read_text(encoding="utf-8")


def test_the_family_is_one(families):
    """The page's own test, of the page's own class."""
    namespace = {}
    for block in blocks("model_families.md", "python"):
        exec(block, namespace)
    namespace["test_it_is_a_flow_model"]()


def test_a_configuration_can_name_the_family(families, tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_flow.py").write_text(blocks("model_families.md", "python")[0], encoding="utf-8")
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(blocks("model_families.md", "yaml")[0], encoding="utf-8")
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
    hooks = re.findall(r"^\| `(\w+)` \|", PAGES["model_families.md"], flags=re.MULTILINE)
    known = set(dir(DiffusersFlow)) | set(FlowFamily.__annotations__) | set(FlowModel.__annotations__)
    assert len(hooks) == 18
    assert set(hooks) <= known


def test_prompts_of_the_page_go_where_it_says(tmp_path):
    (block,) = blocks("mixing.md", "json")
    path = tmp_path / "prompts.jsonl"
    path.write_text(block, encoding="utf-8")
    prompts, mix = read_prompts(path), RewardMix(yaml.safe_load(blocks("mixing.md", "yaml")[0])["model"]["rewards"])
    for prompt in prompts:
        check_route(prompt.metadata, mix.terms, mix.terms)
        mix.check(prompt.text, prompt.metadata, [name for name in mix.terms if is_for(name, prompt.metadata)])
    found = routes(mix.terms, [prompt.metadata for prompt in prompts])
    assert {name: route.multiplier.where(route.routed, -1).tolist() for name, route in found.items()} == {
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
    assert sum(namespace["disagreements"].values()) > 0
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
    ours = asdict(cli.model.evaluation)
    assert {name: ours[name] for name in wanted["model"]["evaluation"]} == wanted["model"]["evaluation"]
    assert set(cli.model.evaluator.metrics.terms) >= {"CLIPScore"}
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
