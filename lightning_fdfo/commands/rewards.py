"""The commands `lightning-fdfo rewards`: list what is installed, score a folder of images, check a plugin.

On the command line:

    lightning-fdfo rewards
    lightning-fdfo rewards score --reward OCR --reward JPEGSize FOLDER --prompts prompts.txt --format csv
    lightning-fdfo rewards check MyReward
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from rich.console import Console
from rich.table import Table

from lightning_fdfo.commands.score_folder import IMAGE_SUFFIXES, output_form, parse_device, score_folder, write_scores
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import read_prompts
from lightning_fdfo.reward.base import Reward
from lightning_fdfo.reward.function import FunctionReward
from lightning_fdfo.reward.registry import available_rewards, load_reward, load_reward_class
from lightning_fdfo.testing.reward_checks import run_checks

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


def main(arguments: Sequence[str]) -> int:
    """Runs `lightning-fdfo rewards …`.

    Returns:
        The exit code: 0; 1 if a check failed.

    Raises:
        ConfigurationError, RewardError: what the user or a plugin's author can mend.
    """
    options = _parser().parse_args(arguments)
    if options.command == "check":
        return print_checks(options.name, parse_init_args(options.init_args), options.prompts, options.device)
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


class Parser(argparse.ArgumentParser):
    """Says an error in one line, as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigurationError."""
        raise ConfigurationError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lightning-fdfo rewards", description="Lists the installed rewards.")
    commands = parser.add_subparsers(dest="command", metavar="[score | check]", parser_class=Parser)
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
    weights = "\n".join(dict.fromkeys(f"{part.source} ({part.licence})" for part in cls.hub_files))
    commands = tuple(part.command for part in cls.hub_files if not part.is_cached())
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


# Check


def print_checks(name: str, init_args: Mapping[str, Any], prompts_file: str | None, device: str) -> int:
    """Runs `check_reward` and prints a line a check; returns 1 if one failed."""
    reward = load_reward(name, **init_args)
    sample: dict[str, Any] = {"device": str(parse_device(device))}
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


def parse_init_args(text: str) -> dict[str, Any]:
    """Options of a reward from the command line's `--init_args`; raises ConfigurationError for what is no mapping."""
    parsed = _yaml(text, "--init_args")
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"--init_args: expected a mapping like '{{quality: 80}}', got {text!r}")
    return parsed


def _yaml(text: str, option: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{option}: not YAML: {text!r}") from error
