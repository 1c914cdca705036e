"""One value of a mixture, changed on the command line: as a user types it, through LightningCLI."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_fdfo.commands.cli import FDFOCLI, main
from lightning_fdfo.commands.configuration.mixture_arguments import changed, split_arguments

ROOT = Path(__file__).parents[3]
LONG = {
    "OCR": {"reward": "OCR", "weight": 1.0, "scale": "std", "clip": 3},
    "small": {
        "reward": {"class_path": "JPEGSize", "init_args": {"sign": -1}},
        "weight": {0: 1.0, 20: 0.3},
        "scale": "std",
        "gate": {"reward": "OCR", "above": -0.5},
    },
}


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """The terms and the recorded configuration that arguments give, laid over a long form or over the quick start."""
    monkeypatch.chdir(ROOT)
    overlay = tmp_path / "long.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"rewards": LONG}}))
    built = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: built.append(self))

    def build(*arguments, long=True):
        files = ["--config=configs/quickstart.yaml", *([f"--config={overlay}"] if long else [])]
        monkeypatch.setattr("sys.argv", ["lightning-fdfo", "fit", *files, *arguments])
        main()
        record = built[-1].config.fit.model.as_dict()["rewards"]
        assert yaml.safe_load(yaml.safe_dump(record)) == record
        return built[-1].model.rewards.terms, record

    return build


@pytest.mark.parametrize("form", [["--model.rewards.{}", "0.3"], ["--model.rewards.{}=0.3"]])
@pytest.mark.parametrize("path", ["OCR", "OCR.weight"])
@pytest.mark.parametrize("long", [True, False])
def test_a_number_moves_the_weight_and_leaves_the_rest(mixture, form, path, long):
    terms, record = mixture(*(part.format(path) for part in form), long=long)
    assert terms["OCR"].weight == 0.3
    assert (terms["OCR"].scale, terms["OCR"].clip) == (("std", 3) if long else ("none", None))
    if long:
        assert record == LONG | {"OCR": LONG["OCR"] | {"weight": 0.3}}


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["--model.rewards.small", "{0: 2, 5: 0.5}"], "small", {"weight": {0: 2.0, 5: 0.5}, "scale": "std"}),
        (["--model.rewards.small.weight", "1e-3"], "small", {"weight": 0.001, "scale": "std"}),
        (["--model.rewards.small.scale=2", "--model.rewards.small.clip=1"], "small", {"scale": 2.0, "clip": 1.0}),
        (["--model.rewards.small.gate=null"], "small", {"gate": None}),
        (["--model.rewards.OCR={reward: OCR, weight: 2}"], "OCR", {"weight": 2.0, "scale": "none", "clip": None}),
        (["--model.rewards.JPEGSize", "0.1"], "JPEGSize", {"weight": 0.1}),
    ],
)
def test_other_values(mixture, arguments, name, expected):
    terms, _ = mixture(*arguments)
    assert {key: getattr(terms[name], key) for key in expected} == expected
    assert {"OCR", "small"} <= set(terms)


def test_values_below_values(mixture):
    terms, _ = mixture("--model.rewards.small.gate.above=0.9", "--model.rewards.small.reward.init_args.sign", "1")
    assert (terms["small"].gate.reward, terms["small"].gate.above) == ("OCR", 0.9)
    assert terms["small"].reward.sign == 1
    assert terms["small"].weight == {0: 1.0, 20: 0.3}


def test_options_of_a_short_form(mixture):
    terms, _ = mixture("--model.rewards.OCR.reward.init_args.detect=true", "--model.rewards.OCR.scale=std", long=False)
    assert (terms["OCR"].weight, terms["OCR"].scale, terms["OCR"].reward.detect) == (1.0, "std", True)


def test_schedules_survive_the_record(mixture, tmp_path):
    _, record = mixture("--model.rewards.OCR.weight={0: 1, 7: 2.5}")
    assert record["OCR"]["weight"] == {0: 1, 7: 2.5}
    assert record["small"]["weight"] == {0: 1.0, 20: 0.3}


def test_metrics_are_changed_in_the_same_way(mixture, monkeypatch):
    seen = []
    monkeypatch.setattr(FDFOCLI, "_run_subcommand", lambda self, subcommand: seen.append(self.model))
    with pytest.raises(IndexError):  # nothing is built by the fixture
        mixture("--model.evaluation.metrics.exact_match.reward.init_args.score=edit_distance", long=False)
    assert seen[0].evaluator.metrics.terms["exact_match"].reward.score == "edit_distance"


def test_what_is_printed_is_what_is_run(mixture, capsys):
    with pytest.raises(SystemExit):
        mixture("--model.rewards.OCR=0.25", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["rewards"] == LONG | {"OCR": LONG["OCR"] | {"weight": 0.25}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.rewards.smal.weight=1"],
            "--model.rewards.smal.weight: there is no 'smal' to change, only OCR, small",
        ),
        (["--model.rewards.smal=1"], "rewards.smal: unknown reward 'smal'"),
        (["--model.rewards.small.wieght=1"], "rewards.small: expected a weight or"),
        (["--model.rewards.small.weight.high=1"], "rewards.small: expected a number as weight"),
        (["--model.rewards.small.scale.high=1"], "--model.rewards.small.scale.high: expected options below scale"),
        (["--model.rewards.small.weight={0: 1"], "--model.rewards.small.weight: not YAML: '{0: 1'"),
        (["--model.rewards.small.weight"], "--model.rewards.small.weight: expected a value after it"),
        (["--model.reward.small=1"], "model.reward"),
    ],
)
def test_the_wrong_one_is_told(mixture, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        mixture(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_dotted_names_are_names():
    terms = {"my_package.my_module.redness": 1.0, "my_package": 2.0}
    assert changed(terms, "my_package.my_module.redness", 3.0) == {**terms, "my_package.my_module.redness": 3.0}
    assert changed({}, "my_package.my_module.redness", 3.0) == {"my_package.my_module.redness": 3.0}
    assert changed(terms, "my_package.my_module.redness.clip", 3)["my_package.my_module.redness"]["clip"] == 3
    assert terms["my_package.my_module.redness"] == 1.0


def test_other_arguments_are_left_alone():
    line = ["fit", "--config", "a.yaml", "--model.rewards={OCR: 1}", "--model.batching.num_pairs", "4", "--data.val=b"]
    assert split_arguments(line) == (line, [])
    assert sys.argv  # and the process's own are not touched
