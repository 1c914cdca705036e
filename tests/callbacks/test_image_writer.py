import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_fdfo import Evaluation
from lightning_fdfo.callbacks import ImageWriter
from lightning_fdfo.callbacks.pictures import pixels
from lightning_fdfo.randomness import Stream, generator
from lightning_fdfo.sampling import sample


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": '../../a "café" / 猫', "negative_prompt": "flou, ü"},
        {"prompt": "猫"},
        {"prompt": "CON " + "very " * 100 + "long"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def written(toy_module, judge, tmp_path):
    """Predicts twice with one module, and once with another seed; gives the folders."""
    for seed in (0, 0, 1):
        judge(toy_module(seed=seed), "predict", callbacks=[ImageWriter()], images_per_prompt=2)
    return [tmp_path / "predict" / str(number) for number in range(3)]


def test_each_image_says_how_it_was_made(written, toy_module):
    module = toy_module()
    module.flow.load()
    listed = [json.loads(line) for line in (written[0] / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["index"], row["repeat"]) for row in listed] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for row in listed:
        with Image.open(written[0] / row["file"]) as image:
            text, array = image.text, np.asarray(image)
        assert text["prompt"] == row["prompt"]
        read = {key: value if isinstance(row[key], str) else json.loads(value) for key, value in text.items()}
        assert read == {key: value for key, value in row.items() if key != "file"}
        # What it says is enough to paint it anew.
        random = generator(Stream.VALIDATION, read["seed"], read["repeat"], read["index"])
        latents = torch.randn(1, 3, 2, 2, generator=random)
        conditioning = module.flow.encode([read["prompt"]])
        with torch.no_grad():
            end = sample(
                lambda x, sigma, given=conditioning: module.flow.velocity(x, sigma, given),
                latents,
                torch.tensor(read["sigmas"]),
            )
        difference = pixels(module.flow.decode(end))[0].astype(int) - array
        assert np.abs(difference).max() <= 1  # rounding
    assert listed[0]["negative_prompt"] == "flou, ü"
    assert (listed[0]["base"], listed[0]["weights"]) == ("ToyFlow", "the base model's")
    assert listed[0]["num_steps"] == 4
    assert listed[0]["guidance_scale"] == 1
    assert re.fullmatch(r"lightning-fdfo [\d.]+", listed[0]["software"])


def test_a_folder_a_call_and_the_same_images(written):
    first, second, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in written)
    assert first == second
    assert set(first) == set(other)
    assert all(other[name] != data for name, data in first.items())
    assert len(first) == 7


def test_names_sort_and_are_safe(written):
    names = sorted(path.name for path in written[0].glob("*.png"))
    listed = [json.loads(line)["file"] for line in (written[0] / "images.jsonl").read_text().splitlines()]
    assert names == listed
    assert names[0] == "000000-00-a_caf.png"
    assert names[2] == "000001-00.png"
    assert all(re.fullmatch(r"[a-z0-9_-]+\.png", name) and len(name) < 60 for name in names)


def test_a_checkpoint_is_named_with_its_hash(toy_module, fit, judge, tmp_path):
    import hashlib

    path = tmp_path / "mine.ckpt"
    train = tmp_path / "prompts.jsonl"
    assert train.exists()
    fit(toy_module(), 1).save_checkpoint(path)
    judge(toy_module(), "predict", str(path), callbacks=[ImageWriter()])
    row = json.loads((tmp_path / "predict/0/images.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["weights"] == "mine.ckpt"
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_of_somebody_elses_is_left_alone(toy_module, judge, tmp_path):
    for name in ("7", "mine"):
        (tmp_path / "predict" / name).mkdir(parents=True)
    (tmp_path / "predict/7/kept.txt").write_text("kept")
    judge(toy_module(), "predict", callbacks=[ImageWriter()])
    assert sorted(path.name for path in (tmp_path / "predict").iterdir()) == ["7", "8", "mine"]
    assert [path.name for path in (tmp_path / "predict/7").iterdir()] == ["kept.txt"]


def test_steps_are_those_of_the_evaluation(toy_module, judge, tmp_path):
    judge(toy_module(evaluation=Evaluation(num_steps=7)), "predict", callbacks=[ImageWriter()])
    first, *_ = (tmp_path / "predict/0/images.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["num_steps"] == 7
    assert len(json.loads(first)["sigmas"]) == 8
