"""What comes from elsewhere - configurations, weights, model folders, images - runs no code and writes nowhere else.

Prompt files: test_prompts.py; checkpoints: checkpoints/test_checkpoint_io.py.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file

from lightning_fdfo.__main__ import main
from lightning_fdfo.callbacks import LoRAExport
from lightning_fdfo.commands.configuration.parser import MAX_NODES
from lightning_fdfo.commands.run_record import RunRecord
from lightning_fdfo.commands.score_folder import Row, print_scores
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3, resolve_pretrained
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora, fill_lora
from lightning_fdfo.flows.text_cache import TextCache
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.prompts import read_prompts

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def exploded(tmp_path):
    """A folder that hostile code makes; at the end it must not be there."""
    yield tmp_path / "exploded"
    assert not (tmp_path / "exploded").exists()


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(exploded, path):
    """A pickle bomb in torch's format."""
    torch.save({"state_dict": Bomb(exploded), "transformer.x": Bomb(exploded)}, path)
    return path


def test_the_bombs_of_this_file_go_off(tmp_path):
    path = plant(tmp_path / "live", tmp_path / "a.pt")
    with pytest.raises(FileExistsError):  # the second one finds the folder of the first
        torch.load(path, weights_only=False)
    assert (tmp_path / "live").exists()


@pytest.fixture
def fit_refused(monkeypatch, capsys, tmp_path):
    """Runs `fit` of the quick start with more arguments, and returns the one line that refuses it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])

    def run(*arguments):
        folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0")
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "configs/quickstart.yaml", folder, *quiet, *map(str, arguments)])
        assert stop.value.code == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return error

    return run


# Configurations


def laughs(inside):
    """A list of nine lists of nine lists …"""
    lines = [f"{inside}a: &a [l, l, l, l, l, l, l, l, l]"]
    lines += [f"{inside}{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: !!python/object/apply:os.mkdir [EXPLODED]", "python/object/apply:os.mkdir"),
        ("model: {rewards: !!python/object/apply:os.mkdir [EXPLODED]}", "python/object/apply:os.mkdir"),
        ("model: !!python/object/new:os.mkdir [EXPLODED]", "python/object/new:os.mkdir"),
        ("model: {rewards: {a: !!python/name:os.mkdir }}", "python/name:os.mkdir"),
        (laughs(""), f"expected at most {MAX_NODES} values"),
        ("model:\n  rewards:\n" + laughs("    "), f"expected at most {MAX_NODES} values"),
        ("model: &a {rewards: *a}", f"expected at most {MAX_NODES} values"),
        ("model: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("model: \0", "control characters are not allowed"),
        (b"# \xff\nmodel: {}\n", "can't decode byte 0xff"),
    ],
    ids=["apply", "within", "new", "name", "laughs", "laughs within", "cycle", "deep", "NUL", "latin"],
)
def test_a_hostile_configuration_is_refused(fit_refused, exploded, tmp_path, content, message):
    text = content if isinstance(content, bytes) else content.replace("EXPLODED", str(exploded)).encode()
    (tmp_path / "hostile.yaml").write_bytes(text)
    assert message in fit_refused("--config", tmp_path / "hostile.yaml")


def test_python_tags_on_the_command_line_are_refused(fit_refused, exploded):
    fit_refused(f"--model.rewards=!!python/object/apply:os.mkdir [{exploded}]")


def test_python_tags_in_rewards_options_are_refused(exploded, capsys):
    for option in ("--reward", "--init_args"):
        words = ["check", "JPEGSize"] if option == "--init_args" else ["score", "."]
        with pytest.raises(SystemExit):
            main(["rewards", *words, option, f"!!python/object/apply:os.mkdir [{exploded}]"])
        assert f"error: {option}: not YAML" in capsys.readouterr().err


def test_python_tags_in_metadata_are_text(exploded, tmp_path):
    tag = f"!!python/object/apply:os.mkdir [{exploded}]"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "text": tag, "py/object": "os.mkdir"}))
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert prompt.metadata == {"text": tag, "py/object": "os.mkdir"}


def test_aliases_are_welcome(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: &file x.txt, val: *file}\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", f"--config={tmp_path / 'c.yaml'}", "--print_config"])
    assert stop.value.code in (0, None)
    assert "  val: x.txt" in capsys.readouterr().out


# Pickles


def test_a_bomb_as_a_checkpoint(fit_refused, exploded, tmp_path):
    path = plant(exploded, tmp_path / "bomb.ckpt")
    message = rf"checkpoint {path} cannot be loaded: it holds (posix|nt)\.mkdir, which only code of its own could load"
    assert re.search(message, fit_refused(f"--ckpt_path={path}"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_code_in_checkpoints_cannot_be_allowed(fit_refused, exploded, tmp_path):
    """Sharded strategies read checkpoints by themselves, as `weights_only` says."""
    path = plant(exploded, tmp_path / "bomb.ckpt")
    assert "--weights_only: expected true" in fit_refused(f"--ckpt_path={path}", "--weights_only=false")


def test_a_checkpoint_configures_nothing(fit_refused, exploded, tmp_path, monkeypatch):
    """Its `hyper_parameters` would be taken into the configuration, and a configuration names code."""
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(exploded)!r})\ndef reward(*_): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    hostile = {"rewards": {"x": {"reward": "evil.reward"}}}
    checkpoint = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": hostile}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    rewards = ("--model.rewards={JPEGSize: 1.0}", "--model.evaluation.metrics=null")
    line = fit_refused(f"--ckpt_path={tmp_path / 'a.ckpt'}", *rewards)
    assert "holds weights only" in line


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.safetensors"])
def test_a_bomb_as_a_lora(fit_refused, exploded, tmp_path, name):
    path = plant(exploded, tmp_path / name)
    assert f"expected a .safetensors file by diffusers' save_lora_weights, got {path}" in fit_refused(
        f"--model.lora.init_lora={path}"
    )


def test_a_bomb_as_a_lora_is_not_run_by_the_flow_either(exploded, tmp_path):
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    add_lora(flow, LoRA(rank=2), seed=0)
    with pytest.raises(Exception, match=r"."):
        fill_lora(flow, plant(exploded, tmp_path / "lora.bin"))


LOADERS = {
    "aesthetic": lambda module, path: module._load_head(path, CPU),
    "hpsv2": lambda module, path: module._load_model(path, (1, 1), "float32", CPU),
    "image_reward": lambda module, path: module._load_model(path, path, 1, "float32", CPU),
}


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("reward", LOADERS)
def test_a_bomb_as_a_rewards_weights(exploded, tmp_path, reward, how):
    module = pytest.importorskip(f"lightning_fdfo_rewards.{reward}")
    path = tmp_path / "weights.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(exploded)))
    else:
        torch.save({"state_dict": Bomb(exploded)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ConfigurationError, match=rf"{re.escape(str(path))} is no "):
        LOADERS[reward](module, path)


# Model folders


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(resolve_pretrained("tiny-digits"), tmp_path / "model"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def own_module(model):
    edit(model / "model_index.json", transformer=["evil", "Evil"])


def climbing(model):
    edit(model / "model_index.json", transformer=["../evil", "Evil"])


def absolute(model):
    edit(model / "model_index.json", transformer=[str(model / "evil"), "Evil"])


def own_pipeline(model):
    edit(model / "model_index.json", _class_name=["pipeline", "Evil"])


def own_pipeline_class(model):
    edit(model / "model_index.json", _class_name="Evil")


def standard_library(model):
    edit(model / "model_index.json", transformer=["subprocess", "Popen"])


def own_text_encoder(model):
    edit(model / "model_index.json", text_encoder=["transformers", "AutoModel"])
    edit(model / "text_encoder/config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})


def own_tokenizer(model):
    edit(model / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    edit(model / "tokenizer/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": "evil.Evil"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        *(own_module, climbing, absolute, own_pipeline, own_pipeline_class),
        *(standard_library, own_text_encoder, own_tokenizer),
    ],
)
def test_code_in_a_models_folder_does_not_run(model, exploded, monkeypatch, change):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a hasty user would answer
    code = f"import os\nos.mkdir({str(exploded)!r})\nclass Evil: pass\n"
    for folder in (".", "transformer", "text_encoder", "tokenizer"):
        for name in ("evil.py", "pipeline.py", "Evil.py"):
            (model / folder / name).write_text(code)
    change(model)
    with pytest.raises((ValueError, OSError)):
        DiffusersFlow(str(model)).load()


def test_code_beside_a_fine_model_does_not_run(model, exploded):
    for name in ("pipeline.py", "transformer/modeling.py", "__init__.py", "StableDiffusion3Pipeline.py"):
        (model / name).write_text(f"import os\nos.mkdir({str(exploded)!r})\n")
    DiffusersFlow(str(model)).load()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("weights", "bomb"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.bin"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    ],
)
def test_a_bomb_as_a_models_weights(model, exploded, weights, bomb):
    (model / weights).unlink()
    plant(exploded, model / bomb)
    with pytest.raises(Exception, match=r"."):
        DiffusersFlow(str(model)).load()


# Paths


@pytest.mark.parametrize("subfolder", ["../lora", "/lora", "a/../../lora", "..", ".", ""])
def test_a_lora_stays_in_the_runs_folder(toy_module, fit, tmp_path, subfolder):
    with pytest.raises(ConfigurationError, match=r"LoRAExport: expected a subfolder of the run's folder"):
        fit(toy_module(), 1, callbacks=[LoRAExport(subfolder)], default_root_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start(toy_module, fit, tmp_path):
    """Starts `fit` with a ModelCheckpoint, as the command would, up to the record's set-up."""

    def run(ckpt_path=None, **options):
        saving = ModelCheckpoint(**({"dirpath": tmp_path / "run" / "c"} | options))
        record = RunRecord(parser=None, config={"ckpt_path": ckpt_path}, save_to_log_dir=False)
        record.on_fit_start = lambda *_: None
        settings = {"enable_checkpointing": True, "default_root_dir": tmp_path / "run"}
        fit(toy_module(), 1, ckpt_path=ckpt_path, callbacks=[saving, record], **settings)

    return run


@pytest.mark.parametrize("filename", ["../../x", "/x", "{epoch}/../../../x"])
def test_a_checkpoints_name_stays_in_its_folder(start, tmp_path, filename):
    with pytest.raises(ConfigurationError, match="ModelCheckpoint: expected a filename below dirpath"):
        start(filename=filename)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_name_below_the_folder_is_fine(start, tmp_path):
    start(filename="best/{epoch}", save_last=True)
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.ckpt")} == {
        "run/c/best/epoch=0.ckpt",
        "run/c/last.ckpt",
        "run/checkpoints/last.ckpt",
    }


def test_last_is_no_link(start):
    """Lightning removes the old link, and the file that it leads to, before there is a new one."""
    with pytest.raises(ConfigurationError, match="expected save_last: true, got link"):
        start(save_last="link")


@pytest.mark.parametrize("torn", [b"", b"PK\3\4 cut short", "half"])
def test_a_checkpoint_that_cannot_be_read_is_told_before_any_model_is_loaded(start, tmp_path, torn, monkeypatch):
    """Also where weights are sharded: Lightning's strategy for that reads files by itself."""
    start(dirpath=tmp_path / "run/checkpoints")
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2] if torn == "half" else torn)
    (tmp_path / "run/config.yaml").touch()
    monkeypatch.setattr(FDFOModule, "configure_model", None)
    with pytest.raises(ConfigurationError, match=r"last\.ckpt cannot be loaded: it is cut short.*epoch=0"):
        start(ckpt_path=str(last))


CLIMBING = {"../../x": torch.ones(2), "/x": torch.ones(2), "transformer.../../x.lora_A.weight": torch.ones(2)}


def test_names_in_safetensors_are_no_paths(tmp_path):
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    save_file(CLIMBING, home / "x.safetensors", metadata={"keys": json.dumps(["../../x"])})
    before = set(tmp_path.rglob("*"))
    cache = TextCache(home)
    assert cache.missing(["../../x", "/x"]) == ["../../x", "/x"]
    cache.write(["../../x"], Conditioning({"../../x": torch.ones(1, 2)}))
    assert list(cache.read(["../../x"]).tensors) == ["../../x"]
    (made,) = set(tmp_path.rglob("*")) - before
    assert made.parent == home
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    add_lora(flow, LoRA(rank=2), seed=0)
    with pytest.raises(Exception, match=r"."):
        fill_lora(flow, home / "x.safetensors")
    assert set(tmp_path.rglob("*")) - before == {made}
    assert not Path("/x").exists()


# Images to score


def picture(path):
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def text_bomb(path):
    """A PNG whose comment unpacks to 100 MB."""
    data = picture(path).read_bytes()
    packed = b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    path.write_bytes(data[:33] + chunk + data[33:])


def broken_exif(path):
    exif = b"Exif\0\0MM\0*" + b"\xff" * 64
    Image.new("RGB", (8, 8)).save(path, exif=exif)


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize(("make", "name"), [(text_bomb, "b.png"), (broken_exif, "b.jpg")])
def test_images_that_are_bombs_end_in_a_line_or_a_score(tmp_path, capsys, make, name):
    picture(tmp_path / "a.png")
    make(tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        main(["rewards", "score", str(tmp_path), "--reward", "JPEGSize", "--format", "csv"])
    out, err = capsys.readouterr()
    if stop.value.code:
        assert f"error: {tmp_path / name} cannot be read as an image: " in err
    else:
        assert len(out.splitlines()) == 3


@pytest.mark.parametrize("name", [b"\xff.png", b"a\x1b[2J.png"])
def test_a_files_name_that_is_no_text_is_told_before_anything_is_scored(tmp_path, capsys, name):
    picture(os.path.join(os.fsencode(tmp_path), name))
    with pytest.raises(SystemExit) as stop:
        main(["rewards", "score", str(tmp_path), "--reward", "JPEGSize", "--output", str(tmp_path / "out.csv")])
    assert stop.value.code == 2
    assert "a file's name is no text" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_names_and_prompts_are_no_markup(capsys):
    print_scores([Row("[red]a.png", "a [/b] [link=x]cat", {"score": 1.0})])
    out = capsys.readouterr().out
    assert "[red]a.png" in out
    assert "a [/b] [link=x]cat" in out


@pytest.mark.parametrize("output", ["../out.csv", "exists.csv", "link.csv"])
def test_scores_go_to_a_new_file_alone(tmp_path, monkeypatch, capsys, output):
    """A path that the user names may be anywhere; nothing that is there is written over, a link least of all."""
    (tmp_path / "exists.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "elsewhere.csv")
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images" / "a.png")
    monkeypatch.chdir(tmp_path / "images")
    line = [
        "rewards",
        "score",
        ".",
        "--reward",
        "JPEGSize",
        "--output",
        f"../{output}" if "/" not in output else output,
    ]
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert (stop.value.code == 0) == (output == "../out.csv")
    assert (tmp_path / "exists.csv").read_text() == "mine"
    assert not (tmp_path / "elsewhere.csv").exists()


def test_the_package_never_unpickles_by_itself():
    """Each `torch.load` says weights_only=True, and `pickle.loads` is for the conformance check's own bytes."""
    sources = [*ROOT.glob("lightning_fdfo/**/*.py"), *ROOT.glob("rewards/**/*.py"), *ROOT.glob("examples/**/*.py")]
    for file in sources:
        text = file.read_text(encoding="utf-8")
        for call in re.findall(r"torch\.load\((.*)", text):
            assert "weights_only=True" in call, file
        if file.name != "reward_checks.py":
            assert not re.search(r"pickle\.loads?\(|allow_pickle=True|trust_remote_code=True|yaml\.load\(", text), file
