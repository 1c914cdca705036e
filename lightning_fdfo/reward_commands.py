"""The commands `lightning-fdfo rewards`: list what is installed, score a folder of images, check a plugin.

lightning-fdfo rewards
lightning-fdfo rewards score --reward OCR --reward JPEGSize FOLDER --prompts prompts.txt --format csv
lightning-fdfo rewards check MyReward
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.prompts import Prompt, read_prompts
from lightning_fdfo.reward import FunctionReward, Reward, available_rewards, load_reward, load_reward_class
from lightning_fdfo.reward_mix import RewardMix
from lightning_fdfo.testing import run_checks

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("table", "csv", "json")
OFFICIAL = (
    "Aesthetic",
    "CLIPScore",
    "Colorfulness",
    "HPSv2",
    "ImageReward",
    "JPEGSize",
    "OCR",
    "PickScore",
    "VLMScore",
)
"""What `pip install lightning-fdfo-rewards` would bring."""


class Row(NamedTuple):
    """An image and its scores."""

    image: str
    prompt: str
    scores: dict[str, float]


def main(arguments: Sequence[str]) -> int:
    """Runs `lightning-fdfo rewards …`.

    Returns:
        The exit code: 0; 1 if a check failed; 2, after one line, for what the user or a plugin's author can mend.
    """
    try:
        return _run(_parser().parse_args(arguments))
    except (ConfigurationError, RewardError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "check":
        return print_checks(options.name, _init_args(options.init_args), options.prompts, options.device)
    if options.command == "score":
        output = Path(options.output) if options.output else None
        form = output_form(options.format, output)
        rows = score_folder(
            Path(options.folder),
            parse_rewards(options.reward),
            Path(options.prompts) if options.prompts else None,
            device=options.device,
            batch_size=options.batch_size,
        )
        write_scores(rows, form, output)
    else:
        list_rewards()
    return 0


class _Parser(argparse.ArgumentParser):
    """Says an error in one line, as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lightning-fdfo rewards", description="Lists the installed rewards.")
    commands = parser.add_subparsers(dest="command", metavar="[score | check]", parser_class=_Parser)
    score = commands.add_parser("score", help="score a folder of images", description="Scores a folder of images.")
    score.add_argument("folder", help=f"with images: {', '.join(IMAGE_SUFFIXES)}; taken in the order of their names")
    score.add_argument(
        "--reward", action="append", required=True, metavar="REWARD",
        help="a name, a dotted path, or as in a configuration: '{new: {reward: {class_path: HPSv2, init_args: …}}}'; "
        "may come several times",
    )  # fmt: skip
    score.add_argument("--prompts", help="a .txt with a line an image, or a .jsonl that names its `image`s")
    score.add_argument("--format", choices=FORMATS, help="table (default), csv or json")
    score.add_argument("--output", help="a new .csv or .json; otherwise standard output")
    score.add_argument("--device", default="cpu", help="default: cpu")
    score.add_argument("--batch_size", type=int, default=32, help="images at once; default: 32")
    check = commands.add_parser(
        "check", help="check that a reward keeps the contract", description="Checks that a reward keeps the contract."
    )
    check.add_argument("name", help="a name, or a dotted path")
    check.add_argument("--init_args", default="{}", help="options as YAML: '{version: \"2.0\"}'")
    check.add_argument("--prompts", help="a .txt or .jsonl with four prompts, if the sample's do not suit")
    check.add_argument("--device", default="cpu", help="default: cpu")
    return parser


# List


class Listing(NamedTuple):
    """A line of the list."""

    name: str
    distribution: str
    cells: tuple[str, ...]
    """range, needs of a prompt, weights and their licence, whether it is ready"""
    commands: tuple[str, ...]
    """that fetch what is missing"""


def list_rewards() -> None:
    """Prints a table a distribution, and what is left to fetch.

    A reward that cannot be loaded is named in a warning, and stays in the table.
    """
    listings = [_listing(name, entry) for name, entry in available_rewards().items()]
    console = Console()
    for distribution in sorted({listing.distribution for listing in listings}):
        table = Table("name", "range", "needs of a prompt", "weights (licence)", "ready", title=distribution)
        for listing in listings:
            if listing.distribution == distribution:
                table.add_row(listing.name, *listing.cells)
        console.print(table)
    commands = {command: None for listing in listings for command in listing.commands}
    if commands:
        print("A run fetches what it needs into the cache. To fetch beforehand:")
        print(*(f"  {command}" for command in commands), sep="\n")
    missing = sorted(set(OFFICIAL) - {listing.name for listing in listings})
    if missing:
        print(f"Not installed: {', '.join(missing)}: pip install lightning-fdfo-rewards")


def _listing(name: str, entry: EntryPoint) -> Listing:
    distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unnamed distribution"
    try:
        found = load_reward_class(name)
    except ConfigurationError as error:
        warnings.warn(str(error), stacklevel=3)
        return Listing(name, distribution, ("", "", "", "cannot be loaded: see the warning"), ())
    cls: type[Reward] = found if isinstance(found, type) else FunctionReward
    low, high = cls.range
    needs = cls.needs or ", ".join(f'metadata "{key}"' for key in cls.required_metadata) or "nothing"
    weights = "\n".join(dict.fromkeys(f"{part.source} ({part.licence})" for part in cls.weights))
    commands = tuple(part.command for part in cls.weights if not part.here())
    return Listing(
        name,
        distribution,
        (
            f"{low:g} … {high:g}",
            needs,
            weights or cls.packaged_weights or "none",
            "to fetch" if commands else "yes",
        ),
        commands,
    )


# Score


def parse_rewards(specs: Sequence[str]) -> dict[str, Any]:
    """A mixture from the command line's `--reward`s.

    Raises:
        ConfigurationError: no YAML, or one name twice.

    Example:
        >>> parse_rewards(["OCR", "{small: {reward: JPEGSize}}"])
        {'OCR': {'reward': 'OCR'}, 'small': {'reward': 'JPEGSize'}}
    """
    terms: dict[str, Any] = {}
    for spec in specs:
        parsed = _yaml(spec, "--reward")
        more = {parsed: {"reward": parsed}} if isinstance(parsed, str) else parsed
        if not isinstance(more, dict) or not all(isinstance(name, str) for name in more):
            raise ConfigurationError(f"--reward: expected a name or {{NAME: {{reward: …}}}}, got {spec!r}")
        if twice := set(more) & set(terms):
            raise ConfigurationError(
                f"--reward: {sorted(twice)} comes twice; give one another name: {{NAME: {{reward: …}}}}"
            )
        terms |= more
    return terms


def score_folder(
    folder: Path, rewards: Mapping[str, Any], prompts_file: Path | None, *, device: str, batch_size: int
) -> list[Row]:
    """Scores all images of a folder.

    Args:
        folder: with image files; folders within are passed over.
        rewards: a mixture; its weights mean nothing here.
        prompts_file: a line an image, in the order of their names; objects of a .jsonl may name their `image`.
        device: for rewards that have none of their own.
        batch_size: images at once; those of one size go together.

    Returns:
        A row an image, in the order of their names.

    Raises:
        ConfigurationError: no images, a file that is none, prompts that do not fit; before any model is loaded.
    """
    if batch_size < 1:
        raise ConfigurationError(f"--batch_size: expected at least 1, got {batch_size}")
    if taken := {"image", "prompt"} & set(rewards):
        raise ConfigurationError(f"--reward: {sorted(taken)} would be two columns: give it another name")
    chosen = _device(device)
    mix = RewardMix(rewards)
    files = _image_files(folder)
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
            scores = mix(images, texts, metadata)
            for place, index in enumerate(indices):
                own = {name: score[place].item() for name, score in scores.items()}
                rows[index] = Row(files[index].name, texts[place], own)
            bar.update(len(indices))
    return [rows[index] for index in range(len(files))]


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigurationError(f"expected a folder of images, got {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ConfigurationError(f"{folder} holds no images: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
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
            f"{prompts_file} has {len(prompts)} prompts for {len(files)} images: expected one an image, in the order "
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
            raise ConfigurationError(f"{prompt.source}: expected one prompt an image, got another for {name}")
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
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{file} cannot be read as an image: {error}") from error
    if upright.mode.startswith(("I", "F")):  # Pillow would clip them to white
        raise ConfigurationError(f"{file}: expected 8 bits a channel, got Pillow's mode {upright.mode}")
    return upright


def _size(file: Path) -> tuple[int, int]:
    return _open(file).size


def _read_image(file: Path) -> Tensor:
    """[3, H, W], float32 in [0, 1]."""
    return torch.from_numpy(np.array(_open(file).convert("RGB"))).permute(2, 0, 1).float() / 255


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
        table.add_row(row.image, row.prompt, *(f"{row.scores[name]:.4f}" for name in names))
    Console().print(table)


# Check


def print_checks(name: str, init_args: Mapping[str, Any], prompts_file: str | None, device: str) -> int:
    """Runs `check_reward` and prints a line a check; returns 1 if one failed."""
    reward = load_reward(name, **init_args)
    sample: dict[str, Any] = {"device": str(_device(device))}
    if prompts_file is not None:
        prompts = read_prompts(prompts_file)
        if len(prompts) != 4:
            raise ConfigurationError(f"{prompts_file}: expected four prompts, got {len(prompts)}")
        sample |= {"prompts": [p.text for p in prompts], "metadata": [p.metadata for p in prompts]}
    failed = 0
    for check, problem in run_checks(reward, **sample):
        failed += problem is not None
        print(f"{'FAILED' if problem else 'ok    '} {check}{f': {problem}' if problem else ''}")
    print(f"{name} breaks the contract" if failed else f"{name} keeps the contract")
    return int(failed > 0)


def _init_args(text: str) -> dict[str, Any]:
    parsed = _yaml(text, "--init_args")
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"--init_args: expected a mapping like '{{quality: 80}}', got {text!r}")
    return parsed


def _device(text: str) -> torch.device:
    """The device, if it is here."""
    try:
        return torch.empty(0, device=text).device
    except Exception as error:  # torch raises RuntimeError, AssertionError and others of its own
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"--device: expected one like cpu or cuda, got {text!r}: {reason}") from error


def _yaml(text: str, option: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{option}: not YAML: {text!r}") from error
