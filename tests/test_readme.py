"""The README's commands parse, its Python runs, its file tree is the repository's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lightning_fdfo.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith(("lightning-fdfo fit", "lightning-fdfo validate"))]
)
def test_commands_parse(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_two_commands_are_make_targets():
    assert [command for command in COMMANDS if command.startswith("make ")][:2] == ["make quickstart", "make test"]
    for target in ("quickstart", "test", "lint"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_python_runs(tmp_path, monkeypatch):
    """In order, in one namespace, with a LoRA in the place that the README names."""
    from lightning_fdfo import LoRA
    from lightning_fdfo.flows import StableDiffusion3

    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    flow.add_lora(LoRA(), seed=0)
    flow.save_lora(tmp_path / "runs/mine/lora")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert (tmp_path / "number.png").exists()
    assert namespace["Redness"]


def test_the_file_tree_is_the_repositorys():
    (tree,) = [block for block in blocks("text") if "objective.py" in block]
    for path in (ROOT / "lightning_fdfo").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.name}\s", tree), f"{path.name} is not in the README's tree"
    for name in re.findall(r"[\w./-]+\.(?:py|yaml|toml|txt)\b", tree):
        assert list(ROOT.rglob(f"{name}")), f"{name} is in the README's tree only"


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("http") or (ROOT / path).exists(), path
