"""Scores of a folder of images: one row per image, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lightning_fdfo.commands.option_values import parse_device
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import NO_TEXT, Prompt, read_prompts
from lightning_fdfo.reward.against import score_against
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.routing import routes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Row(NamedTuple):
    """An image and its scores."""

    image: str
    prompt: str
    scores: dict[str, float]


def score_folder(
    folder: Path,
    rewards: Mapping[str, Any],
    prompts_file: Path | None,
    *,
    device: str,
    batch_size: int,
    against: Path | None = None,
) -> list[Row]:
    """Scores all images of a folder.

    Args:
        folder: with image files; folders within are passed over.
        rewards: a mixture; its weights mean nothing here.
        prompts_file: a line per image, in the order of their names; objects of a .jsonl may name their `image`.
        device: for rewards that have none of their own.
        against: a folder with images of the same names and sizes, for rewards that compare two images.
        batch_size: images at once; those of one size go together.

    Returns:
        A row per image, in the order of their names.

    Raises:
        ConfigurationError: no images, a file that is none, prompts that do not fit; before any model is loaded.
    """
    if batch_size < 1:
        raise ConfigurationError(f"--batch_size: expected at least 1, got {batch_size}")
    if taken := {"image", "prompt"} & set(rewards):
        raise ConfigurationError(f"--reward: {sorted(taken)} would be two columns: give it another name")
    chosen = parse_device(device)
    mix = RewardMix(rewards)
    files = _image_files(folder)
    image_terms = [name for name in mix.terms if name not in mix.pair_terms]
    _check_against(files, against, mix.pair_terms)
    prompts = _prompts(files, prompts_file, mix)
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, file in enumerate(files):
        by_size.setdefault(_size(file), []).append(index)
    mix.fetch()
    mix.setup(chosen)
    rows: dict[int, Row] = {}
    with tqdm(total=len(files), desc="Scoring", unit="image", disable=None, dynamic_ncols=True) as bar:
        for indices in _batches(by_size, batch_size):
            texts, metadata = [prompts[i].text for i in indices], [prompts[i].metadata for i in indices]
            images = torch.stack([_read_image(files[i]) for i in indices]).to(chosen)
            scores = mix(images, texts, metadata, routes=routes(image_terms, metadata))
            if against is not None:
                others = torch.stack([_read_image(against / files[i].name) for i in indices]).to(chosen)
                scores |= score_against(mix, mix.pair_terms, images, others, texts, metadata)
            for place, index in enumerate(indices):
                own = {name: score.values[place].item() for name, score in scores.items()}
                rows[index] = Row(files[index].name, texts[place], own)
            bar.update(len(indices))
    return [rows[index] for index in range(len(files))]


def _check_against(files: Sequence[Path], against: Path | None, pair_terms: Sequence[str]) -> None:
    """Raises ConfigurationError unless there is another image for each, where and only where one is asked for."""
    if against is None:
        if pair_terms:
            raise ConfigurationError(
                f"reward {pair_terms[0]!r} compares two images: give --against FOLDER, with images of the same names"
            )
        return
    if not pair_terms:
        raise ConfigurationError(f"--against {against}: no reward here compares two images; leave it out")
    for file in files:
        other = against / file.name
        if not other.is_file():
            raise ConfigurationError(f"--against {against}: expected an image named {file.name} there as well")
        if _size(other) != _size(file):
            raise ConfigurationError(f"{other} is of another size than {file}: expected the same")


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigurationError(f"expected a folder of images, got {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ConfigurationError(f"{folder} holds no images: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    for file in files:
        if NO_TEXT.search(file.name):
            raise ConfigurationError(f"{folder}: a file's name is no text, and cannot be written: {file.name!r}")
    return files


def _prompts(files: Sequence[Path], prompts_file: Path | None, mix: RewardMix) -> list[Prompt]:
    """The prompt of each file, checked by each reward."""
    if prompts_file is None:
        for name, reward in mix.rewards.items():
            if reward.needs or reward.required_metadata:
                needs = reward.needs or f"metadata {list(reward.required_metadata)}"
                raise ConfigurationError(f"reward {name!r} needs {needs}: give --prompts FILE")
        return [Prompt("", "", {}, str(file)) for file in files]
    prompts = read_prompts(prompts_file)
    if any("image" in prompt.metadata for prompt in prompts):
        by_name = _by_image(prompts)
        missing = [file.name for file in files if file.name not in by_name]
        if missing:
            raise ConfigurationError(f"{prompts_file} has no prompt for {missing[0]} ({len(missing)} of {len(files)})")
        prompts = [by_name[file.name] for file in files]
    elif len(prompts) != len(files):
        raise ConfigurationError(
            f"{prompts_file} has {len(prompts)} prompts for {len(files)} images: expected one per image, in the order "
            'of their names, or a .jsonl whose objects have "image": "NAME"'
        )
    for prompt in prompts:
        try:
            mix.check(prompt.text, prompt.metadata)
        except ConfigurationError as error:
            raise ConfigurationError(f"{prompt.source}: {error}") from error
    return prompts


def _by_image(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        name = str(prompt.metadata.get("image"))
        if name in found:
            raise ConfigurationError(f"{prompt.source}: expected one prompt per image, got another for {name}")
        found[name] = prompt
    return found


def _batches(by_size: Mapping[tuple[int, int], Sequence[int]], batch_size: int) -> Iterator[Sequence[int]]:
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _open(file: Path) -> Image.Image:
    """A copy in memory, upright."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many kinds for a file that is broken, or too large
        raise ConfigurationError(f"{file} cannot be read as an image: {error}") from error
    if upright.mode.startswith(("I", "F")):  # Pillow would clip them to white
        raise ConfigurationError(f"{file}: expected 8 bits a channel, got Pillow's mode {upright.mode}")
    return upright


def _size(file: Path) -> tuple[int, int]:
    return _open(file).size


def _read_image(file: Path) -> Tensor:
    """[3, H, W], float32 in [0, 1]."""
    image = _open(file)
    if image.has_transparency_data:  # on white, as a page would show it
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def output_form(form: str | None, output: Path | None) -> str:
    """What to write: `form`, or what the file's ending says; asked before hours of scoring.

    Raises:
        ConfigurationError: a file that exists or has no folder, or an ending that is neither .csv nor .json.
    """
    if output is None:
        return form or "table"
    form = form or output.suffix.removeprefix(".")
    if form not in ("csv", "json"):
        raise ConfigurationError(
            f"--output: expected a file that ends in .csv or .json, or --format csv or json, got {output}"
        )
    if output.exists() or not output.parent.is_dir():
        problem = "exists already" if output.exists() else "is in a folder that does not exist"
        raise ConfigurationError(f"--output: expected a new file, but {output} {problem}")
    return form


def write_scores(rows: Sequence[Row], form: str, output: Path | None) -> None:
    """Writes a table, CSV or JSON to standard output, or CSV or JSON to a new file.

    Raises:
        ConfigurationError: a file that exists or cannot be written.
    """
    if output is None:
        print_scores(rows) if form == "table" else sys.stdout.write(_text(rows, form))
        return
    try:
        with output.open("x", encoding="utf-8", newline="") as file:
            file.write(_text(rows, form))
    except OSError as error:
        raise ConfigurationError(f"--output: {output} cannot be written: {error.strerror}") from error
    print(f"{len(rows)} rows are in {output}")


def _text(rows: Sequence[Row], form: str) -> str:
    records = [{"image": row.image, "prompt": row.prompt, **row.scores} for row in rows]
    if form == "json":
        return json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def print_scores(rows: Sequence[Row]) -> None:
    """Prints a table, with the means at its foot."""
    names = list(rows[0].scores)
    means = [f"{np.mean([row.scores[name] for row in rows]):.4f}" for name in names]
    table = Table(show_footer=True)
    table.add_column("image", footer=f"mean of {len(rows)}", overflow="fold")
    table.add_column("prompt")
    for name, mean in zip(names, means, strict=True):
        table.add_column(name, footer=mean, justify="right")
    for row in rows:
        table.add_row(escape(row.image), escape(row.prompt), *(f"{row.scores[name]:.4f}" for name in names))
    Console().print(table)
