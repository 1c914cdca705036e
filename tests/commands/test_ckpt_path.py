"""What `--ckpt_path` may name for `validate`, `test` and `predict`: as a user types it, on the shipped model."""

import json
import re
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from PIL.ImageChops import difference
from safetensors.torch import load_file, save_file

from lightning_fdfo import LoRA
from lightning_fdfo.__main__ import main
from lightning_fdfo.commands.ckpt_path import find_lora
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3
from lightning_fdfo.flows.lora_contents import lora_in_file
from lightning_fdfo.flows.lora_files import add_lora, adopt_lora, save_lora
from lightning_fdfo.hub import HubFiles

ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"
SMALL = [
    "--config=configs/quickstart.yaml",
    "--model.rewards={Colorfulness: 1.0}",
    "--model.evaluation.metrics=null",
    "--model.sampling.num_steps=2",
    "--trainer.enable_progress_bar=false",
]
FIT = [
    "--model.batching.num_pairs=4", "--model.batching.num_points_per_pair=null", "--model.batching.batch_size=8",
    "--trainer.check_val_every_n_epoch=1000", "--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=1",
    "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 3.0}}", "--trainer.logger=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-fdfo"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder after one epoch with large steps; its prompts lie beside it."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    (folder.parent / "prompts.txt").write_text('"427" in red\n"12" in blue\n"909" in green\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["lightning-fdfo"])
        main(["fit", *SMALL, *FIT, f"--trainer.default_root_dir={folder}"])
    return folder


def judge(command, run, *more):
    prompts = run.parent / "prompts.txt"
    data = [f"--data.val={prompts}", "--data.images_per_prompt=2"]
    main([command, *SMALL, f"--trainer.default_root_dir={run}", *data, *more])


def last_metrics(run):
    folders = sorted((run / "test").iterdir(), key=lambda path: int(path.name))
    return json.loads((folders[-1] / "metrics.json").read_text())


def numbers(summary):
    return {
        (name, side, key): value
        for name, sides in summary["metrics"].items()
        for side, values in sides.items()
        for key, value in values.items()
    }


def test_a_lora_file_and_its_checkpoint_are_the_same(run):
    """To 1e-6; also where the configuration's LoRA has another rank."""
    judge("test", run, "--ckpt_path=last")
    saved = last_metrics(run)
    assert saved["weights"] == "last.ckpt"
    assert abs(saved["metrics"]["Colorfulness"]["difference"]["mean"]) > 1e-3, "it was trained"
    for path, more in (
        (run / "lora" / LORA, []), (run / "lora", ["--model.lora.rank=3"]), (run / "lora", ["--model.lora=null"]),
    ):  # fmt: skip
        judge("test", run, f"--ckpt_path={path}", *more)
        found = last_metrics(run)
        assert found["weights"] == LORA
        assert numbers(found) == pytest.approx(numbers(saved), abs=1e-6)
    judge("test", run)
    assert last_metrics(run)["metrics"]["Colorfulness"]["difference"] == {"mean": 0, "standard_error": 0}
    assert len(list((run / "test").iterdir())) == 5
    assert not list(run.glob("events*")), "nothing goes into the run's logs"


def test_predict_writes_the_loras_images(run):
    for path in (run / "checkpoints/last.ckpt", run / "lora"):
        judge("predict", run, f"--ckpt_path={path}")
    (one, two) = (sorted((run / "predict" / number).glob("*.png")) for number in ("0", "1"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 6
    listed = [json.loads((run / "predict" / n / "images.jsonl").read_text().splitlines()[0]) for n in ("0", "1")]
    assert [row["weights"] for row in listed] == ["last.ckpt", LORA]
    assert all(re.fullmatch(r"[0-9a-f]{64}", row["sha256"]) for row in listed)
    assert listed[0]["base"] == "tiny-digits"
    judge("predict", run)
    base = sorted((run / "predict/2").glob("*.png"))

    def largest(first, second):
        return max(
            high for a, b in zip(first, second, strict=True)
            for _, high in difference(Image.open(a), Image.open(b)).getextrema()
        )  # fmt: skip

    assert largest(one, two) <= 1  # rounding
    assert largest(one, base) > 3


@pytest.mark.parametrize("name", ["owner/lora", "owner/lora/nested/mine.safetensors"])
def test_a_hub_name_is_fetched(run, monkeypatch, tmp_path, name):
    asked = []
    file = tmp_path / ("nested/mine.safetensors" if "nested" in name else LORA)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((run / "lora" / LORA).read_bytes())

    def snapshot_download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_lora(name) == file
    assert asked == [("owner/lora", [str(file.relative_to(tmp_path))])]
    judge("predict", run, f"--ckpt_path={name}")


@pytest.fixture
def files(run, tmp_path):
    """Things that are no weights."""
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    return tmp_path


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/none.ckpt", r"--ckpt_path: expected a checkpoint's file, or last, or a LoRA: .*got .*none\.ckpt"),
        ("{tmp}/none.safetensors", r"--ckpt_path: expected a checkpoint's file, or last, or a LoRA"),
        ("{tmp}/broken.safetensors", r"--ckpt_path: expected a \.safetensors file .*broken\.safetensors"),
        ("{tmp}/broken.ckpt", r"checkpoint .*broken\.ckpt cannot be loaded: it is cut short"),
        ("{tmp}/foreign.ckpt", r"checkpoint .*foreign\.ckpt cannot be loaded: it is no Lightning checkpoint"),
        ("{tmp}/empty", r"empty holds no pytorch_lora_weights\.safetensors"),
        ("{run}", r"did you mean .*run/lora/pytorch_lora_weights\.safetensors or .*run/checkpoints/last\.ckpt\?"),
        ("last", r"--ckpt_path last: .*elsewhere holds no checkpoint"),
        ("owner/lora", r"owner/lora is no file or folder here; on the hub, .*hf download owner/lora pytorch_lora_w"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")  # Lightning says it before we do
def test_what_is_not_there_or_broken_is_told_before_a_model_loads(
    files, run, monkeypatch, capsys, command, path, message
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusersFlow, "load_pipeline", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments = [f"--ckpt_path={path.format(tmp=files, run=run)}", f"--trainer.default_root_dir={files}/elsewhere"]
    with pytest.raises(SystemExit) as stop:
        main([command, *SMALL, *arguments, f"--data.val={run.parent / 'prompts.txt'}"])
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error), error
    assert not [path for path in files.glob("elsewhere/**/*") if path.is_file() and "tfevents" not in path.name]


def test_fit_goes_on_from_checkpoints_alone(run, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, *FIT, f"--trainer.default_root_dir={run}", f"--ckpt_path={run / 'lora' / LORA}"])
    assert "start from a LoRA by --model.lora.init_lora" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "option"), [("test", "data.test"), ("predict", "data.predict")])
def test_prompts_are_needed(run, capsys, command, option):
    with pytest.raises(SystemExit):
        main([command, *SMALL, f"--trainer.default_root_dir={run}", "--data.val=null"])
    assert f"{option}: expected a prompt file, got none" in capsys.readouterr().err


def test_predict_needs_no_reward(run, monkeypatch):
    """Neither its weights nor prompts that it can score."""
    prompts = run.parent / "free.txt"
    prompts.write_text("a red cat\n")
    monkeypatch.setattr(HubFiles, "fetch", lambda self: pytest.fail("weights were asked for"))
    more = ["--model.rewards={OCR: 1.0, PickScore: 1.0}", f"--data.predict={prompts}"]
    judge("predict", run, *more)


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=2), LoRA(rank=3, alpha=9, rslora=True, targets=("to_q",))])
def test_a_file_says_what_its_lora_is(tmp_path, lora):
    flow, other = (StableDiffusion3("tiny-digits", max_sequence_length=0) for _ in range(2))
    flow.load()
    bound = add_lora(flow, lora, seed=0)
    torch.manual_seed(0)
    for name, parameter in flow.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_lora(flow, tmp_path)
    other.load()
    found = adopt_lora(other, tmp_path / LORA)
    assert (found.rank, found.alpha, found.rslora) == (lora.rank, lora.rank, False)  # the scale lies in the weights
    assert sorted(found.targets) == sorted(bound)
    latents, sigma = torch.randn(1, 8, 8, 16), torch.tensor(0.5)
    with torch.no_grad():
        ours, theirs = (each.velocity(latents, sigma, each.encode(['"427" in red'])) for each in (flow, other))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_file_of_several_ranks_or_none_is_refused(run, tmp_path):
    state = load_file(run / "lora" / LORA)
    name = next(name for name in state if name.endswith("lora_A.weight"))
    with pytest.raises(ConfigurationError, match=r"of the ranks \[2, 32\]"):
        lora_in_file(state | {name: state[name][:2]}, {}, tmp_path / "mine.safetensors")
    save_file({"transformer.x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"expected transformer\.LAYER\.lora_A.*found 1 weights, first transformer\.x"
    ):
        lora_in_file(load_file(tmp_path / "none.safetensors"), {}, tmp_path / "none.safetensors")
