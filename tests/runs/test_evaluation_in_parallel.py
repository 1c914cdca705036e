"""`test` and `predict` on two processes (gloo) give what one gives, and count each image once."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests.rewards import hub_folders

WAYS = {
    "ddp": ["--trainer.devices=2", "--config=configs/ddp.yaml", "--trainer.devices=2"],
    "fsdp2": ["--config=configs/fsdp2.yaml", "--trainer.devices=2"],
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Three prompts of three images, by fours: a prompt lies on both devices, and one has a row that does not count."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "prompts.txt").write_text('"427" in red\n"12" in blue\n"909" in green\n')
    hub_folders.clip_folder(folder / "clip")
    return [
        "--config=configs/quickstart.yaml", f"--data.val={folder / 'prompts.txt'}", "--data.images_per_prompt=3",
        "--data.val_batch_size=4", "--model.rewards={Colorfulness: 1.0}", "--model.evaluation.metrics=null",
        "--model.sampling.num_steps=2", f"--model.evaluation.diversity={folder / 'clip'}",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


def trained(arguments, folder, *more):
    """A checkpoint after an epoch with large steps."""
    fit = [
        "--model.batching.num_pairs=4", "--model.batching.num_points_per_pair=null",
        "--model.batching.batch_size=8", "--trainer.max_epochs=1",
        "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=100", "--trainer.logger=false",
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 3.0}}",
    ]  # fmt: skip
    words = ["fit", *arguments, *fit, *more, "--trainer.callbacks=null", f"{ROOT_DIR}={folder / 'fit'}"]
    processes.run_checked(words)
    return folder / "fit/checkpoints/last.ckpt"


ROOT_DIR = "--trainer.default_root_dir"


def numbers(folder):
    summary = json.loads((folder / "test/0/metrics.json").read_text())
    return {
        (name, side, key): value
        for name, sides in summary["metrics"].items()
        for side, values in sides.items()
        for key, value in values.items()
    }


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ("ddp", []),
        pytest.param("fsdp2", [], marks=pytest.mark.slow),
        pytest.param("ddp", ["--model.lora=null"], marks=pytest.mark.slow),
        pytest.param("fsdp2", ["--model.lora=null"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_numbers_and_images_of_one(arguments, tmp_path, way, more):
    saved = trained(arguments, tmp_path, *more)
    for name, devices in (("one", []), ("two", WAYS[way])):
        for command in ("test", "predict"):
            options = [f"{ROOT_DIR}={tmp_path / name}", f"--ckpt_path={saved}", "--trainer.callbacks=null"]
            words = [command, *arguments, *more, *options, *devices]
            result = processes.run_checked(words, devices=1 if name == "one" else 2)
            assert result.stdout.count("Written to" if command == "test" else "9 images are in") == 1
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert abs(one["Colorfulness", "difference", "mean"]) > 1e-3, "it was trained"
    assert one["diversity", "tuned", "mean"] > 1e-5
    assert set(two) == set(one)
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-7 if "diversity" in key else 1e-4), key
    folders = [tmp_path / name / "predict/0" for name in ("one", "two")]
    assert [path.name for path in (tmp_path / "two/predict").iterdir()] == ["0"]
    first, second = ((folder / "images.jsonl").read_text() for folder in folders)
    assert first == second
    files = [json.loads(line)["file"] for line in first.splitlines()]
    assert sorted(path.name for path in folders[1].iterdir()) == sorted([*files, "images.jsonl"])
    for file in files:
        one, two = (np.asarray(Image.open(folder / file), dtype=int) for folder in folders)
        assert np.abs(one - two).max() <= 1  # rounding
