"""What a run has trained, given away: it paints what the run paints, its card says what it is, and nothing is lost."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from safetensors.torch import load_file

from lightning_fdfo.__main__ import main
from lightning_fdfo.commands import export as command
from lightning_fdfo.export.model_card import base_licence, cell, loading_code, shareable
from lightning_fdfo.flows import StableDiffusion3, resolve_pretrained
from tests.commands.test_cli import SMALL

ROOT = Path(__file__).parent.parent.parent
LORA_FILE = "pytorch_lora_weights.safetensors"
QUIET = ["--trainer.max_epochs=1", "--trainer.logger=false"]


def fit(folder, monkeypatch, *more):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-fdfo"])
    config = ["--config", "configs/quickstart.yaml", f"--trainer.default_root_dir={folder}"]
    main(["fit", *config, *SMALL, *QUIET, "--model.optimizer.init_args.lr=0.05", *more])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a LoRA that has moved, and made-up pictures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = fit(tmp_path_factory.mktemp("lora") / "my_run", monkeypatch)
    for name in ("before.png", "after.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def export(*words):
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, words)])
    return stop.value.code


def painted(pipeline, prompt='"427" in red'):
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0}
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline(prompt, generator=generator, output_type="np", **options).images)


def base():
    folder = resolve_pretrained("tiny-digits")
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def test_the_merged_pipeline_paints_what_base_and_lora_paint(run, tmp_path):
    assert export(run, "--output", tmp_path / "out", "--merge") == 0
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out/pipeline", text_encoder_3=None, tokenizer_3=None)
    plain = base()
    before = painted(plain)
    plain.load_lora_weights(tmp_path / "out")
    after = painted(plain)
    assert (painted(merged) - after).abs().max() < 1e-4
    assert (before - after).abs().max() > 0.01
    assert not [name for name in merged.transformer.state_dict() if "lora" in name]


def test_the_lora_is_the_runs_and_that_of_its_checkpoint(run, tmp_path):
    assert export(run, "--output", tmp_path / "end") == 0
    assert export(run, "--output", tmp_path / "last", "--ckpt_path", run / "checkpoints/last.ckpt") == 0
    ended, last, own = (load_file(path / LORA_FILE) for path in (tmp_path / "end", tmp_path / "last", run / "lora"))
    assert set(ended) == set(last) == set(own)
    assert all(torch.equal(value, last[name]) and torch.equal(value, ended[name]) for name, value in own.items())


def test_the_card_says_what_it_is_and_its_python_paints(run, tmp_path, monkeypatch):
    assert export(run, "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["README.md", "config.yaml", LORA_FILE, "before.png", "after.png"]
    )
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.license == "apache-2.0"
    assert {"lora", "text-to-image", "arxiv:2603.12893"} <= set(card.data.tags)
    assert "# my\\_run" in card.text
    assert "| JPEGSize | JPEGSize | 1.0 | std | none |" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    with Image.open("image.png") as picture:
        assert picture.size == (64, 32)


@pytest.mark.parametrize(("evaluation", "expected"), [({}, 3), ({"num_steps": None}, 3), ({"num_steps": 7}, 7)])
def test_its_python_takes_as_many_steps_as_evaluation_does(run, evaluation, expected):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"evaluation": evaluation, "sampling": config["model"]["sampling"] | {"num_steps": 3}}
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    assert f"num_inference_steps={expected}," in loading_code(config, flow, None, has_lora=True)


def test_nothing_of_the_machine_is_given_away(run, tmp_path):
    assert export(run, "--output", tmp_path / "out") == 0
    for name in ("README.md", "config.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert str(run) not in text
        assert str(ROOT) not in text
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["batching"]["num_pairs"] == 4


def test_a_number_that_there_is_not_leaves_its_cell_empty(run, tmp_path):
    """As `test` writes a reward that was to score no prompt."""
    none = {"tuned": {"mean": None}, "base": {"mean": None}, "win_rate": {"rate": None}}
    test = run / "test/0/metrics.json"
    test.parent.mkdir(parents=True)
    test.write_text(json.dumps({"num_prompts": 4, "images_per_prompt": 1, "metrics": {"OCR": none}}))
    try:
        assert export(run, "--output", tmp_path / "out") == 0
    finally:
        shutil.rmtree(run / "test")
    assert "| OCR |  |  |  |" in (tmp_path / "out/README.md").read_text()


def test_full_fine_tuning_is_a_whole_pipeline(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    ema = {"class_path": "lightning_fdfo.callbacks.EMA", "init_args": {"decay": 0.5}}
    own.write_text(yaml.safe_dump({"model": {"lora": None}, "trainer": {"callbacks": [ema]}}))
    run = fit(tmp_path / "full", monkeypatch, "--config", str(own), "--model.optimizer.init_args.lr=0.001")
    assert export(run) == 0
    given = StableDiffusion3Pipeline.from_pretrained(run / "export", text_encoder_3=None, tokenizer_3=None)
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    (average,) = (state["average"] for state in saved["callbacks"].values() if "average" in state)
    weights = given.transformer.state_dict()
    assert all(torch.equal(value, weights[name.removeprefix("flow.transformer.")]) for name, value in average.items())
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in average.items())
    assert "lora" not in ModelCard.load(run / "export/README.md").data.tags
    assert not (run / "export" / LORA_FILE).exists()


def test_what_is_there_is_not_overwritten(run, tmp_path, capsys):
    mine = tmp_path / "out" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert export(run, "--output", mine.parent) == 2
    assert "is there already: remove it, or choose another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_mistakes_end_in_one_line_and_leave_nothing(run, tmp_path, capsys):
    assert export(tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    assert export(run, "--output", tmp_path / "a", "--ckpt_path", tmp_path / "none.ckpt") == 2
    assert "none.ckpt is not there" in capsys.readouterr().err
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:1000])
    assert export(run, "--output", tmp_path / "a", "--ckpt_path", broken) == 2
    assert "cut short" in capsys.readouterr().err
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_text((run / "config.yaml").read_text())
    assert export(half) == 2
    assert "the run has not ended, or had no LoRAExport" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.ckpt", "half"]
    assert [path.name for path in half.iterdir()] == ["config.yaml"]


# The hub


class Hub:
    """What HfApi is asked for."""

    asked: list
    logged_in = True

    def whoami(self):
        if not self.logged_in:
            raise LocalTokenNotFoundError("no token")

    def create_repo(self, repository, private, exist_ok):
        self.asked.append(("create", repository, private, exist_ok))

    def upload_folder(self, folder_path, repo_id, commit_message):
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    monkeypatch.setattr(command, "HfApi", Hub)
    return Hub


def test_a_push_uploads_the_folder_whose_card_loads_from_there(run, tmp_path, hub, capsys):
    assert export(run, "--output", tmp_path / "out", "--push_to_hub", "me/numbers", "--private") == 0
    names = sorted(["README.md", "after.png", "before.png", "config.yaml", LORA_FILE])
    assert hub.asked == [("create", "me/numbers", True, True), ("upload", "me/numbers", names)]
    assert "pipeline.load_lora_weights('me/numbers')" in (tmp_path / "out/README.md").read_text()
    assert "https://huggingface.co/me/numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repository", "logged_in", "message"),
    [("me/numbers", False, "run `hf auth login`"), ("me/num bers!", True, "expected owner/name, got me/num bers!")],
)
def test_who_cannot_push_is_told_before_anything_is_done(
    run, tmp_path, hub, monkeypatch, capsys, repository, logged_in, message
):
    monkeypatch.setattr(Hub, "logged_in", logged_in)
    assert export(run, "--output", tmp_path / "out", "--push_to_hub", repository) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert hub.asked == []


# Parts


def test_cells_hold_no_markup():
    assert cell("a|b\n<img src=x> `c` [d](e)") == "a\\|b \\<img src=x\\> \\`c\\` \\[d\\](e)"


def test_paths_of_the_machine_are_cut():
    assert shareable({"a": ["/x/y/z.txt", "~/b"], "c": "x/y", "d": 1}) == {"a": ["z.txt", "b"], "c": "x/y", "d": 1}


def test_a_licence_is_the_bases_own(tmp_path):
    assert base_licence(resolve_pretrained("tiny-digits")) == "apache-2.0"
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_licence(str(tmp_path)) == "mit"
