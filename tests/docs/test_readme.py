"""The README's commands parse, with its configuration; its Python runs; its pictures exist; it is short."""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from lightning_fdfo import RewardMix
from lightning_fdfo.__main__ import main
from lightning_fdfo.commands.option_values import parse_init_args
from lightning_fdfo.commands.serve_reward import serve
from lightning_fdfo.flows.lora_files import add_lora, save_lora
from lightning_fdfo.reward import as_reward, available_rewards, load_reward

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith(tuple(f"lightning-fdfo {w}" for w in ("fit", "validate", "test", "predict")))],
)
def test_commands_parse(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lightning-fdfo doctor")])
def test_the_doctor_finds_it_well(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.out
    assert "Ready to train." in output.out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lightning-fdfo rewards")])
def test_reward_commands_run(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    assert "JPEGSize" in output.out


SERVING = re.findall(r"^lightning-fdfo serve-reward .*$", (ROOT / "docs/remote_rewards.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [*SERVING, *(c for c in COMMANDS if c.startswith("lightning-fdfo serve-reward"))])
def test_rewards_that_are_served_are_there(command, monkeypatch):
    served = []

    @functools.wraps(serve)
    def load(name, init_args, **_):
        served.append(load_reward(name, **parse_init_args(init_args)))

    monkeypatch.setattr("lightning_fdfo.commands.serve_reward.serve", load)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    assert stop.value.code == 0
    assert len(served) == 1


def test_every_reward_is_in_both_readmes():
    rewards = (ROOT / "rewards/README.md").read_text()
    for name, entry in available_rewards().items():
        if entry.dist.name == "lightning-fdfo-rewards":
            assert f"| `{name}` |" in README
            assert f"| `{name}` |" in rewards


def test_mixtures_in_the_readmes_are_mixtures(monkeypatch):
    monkeypatch.setattr("lightning_fdfo.reward.term.load_reward", lambda name, **_: as_reward(lambda *batch: None))
    found = 0
    for text in (README, (ROOT / "rewards/README.md").read_text()):
        for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
            if "rewards" in (model := yaml.safe_load(block)["model"]):
                assert RewardMix(model["rewards"]).terms
                found += 1
    assert found == 2


def test_the_two_commands_are_make_targets():
    assert [command for command in COMMANDS if command.startswith("make ")][:2] == ["make quickstart", "make test"]
    for target in ("quickstart", "test", "lint", "docs"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_python_runs(tmp_path, monkeypatch):
    """In order, in one namespace, with a LoRA in the place that the README names."""
    from lightning_fdfo import LoRA
    from lightning_fdfo.flows import StableDiffusion3

    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    add_lora(flow, LoRA(), seed=0)
    save_lora(flow, tmp_path / "runs/mine/lora")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert (tmp_path / "number.png").exists()
    assert namespace["Redness"]


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_it_is_short():
    assert len(README.splitlines()) <= 180
