"""The commands `lightning-fdfo rewards`: list what is installed, score a folder of images, check a plugin.

On the command line:

    lightning-fdfo rewards
    lightning-fdfo rewards score --reward OCR --reward JPEGSize FOLDER --prompts prompts.txt --format csv
    lightning-fdfo rewards check MyReward
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from lightning_fdfo.commands.function_parser import FunctionParser, run_function
from lightning_fdfo.commands.option_values import parse_device, parse_init_args, parse_yaml
from lightning_fdfo.commands.score_folder import output_form, score_folder, write_scores
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import read_prompts
from lightning_fdfo.reward.base import BaseReward, PairReward
from lightning_fdfo.reward.function import FunctionReward
from lightning_fdfo.reward.registry import available_rewards, load_reward, load_reward_class
from lightning_fdfo.testing.reward_checks import run_checks

OFFICIAL = (
    "Aesthetic",
    "CLIPScore",
    "Colorfulness",
    "HPSv2",
    "ImageReward",
    "JPEGSize",
    "OCR",
    "PickScore",
    "VLMPreference",
    "VLMScore",
)
"""What `pip install lightning-fdfo-rewards` would bring."""


def main(arguments: Sequence[str]) -> int:
    """Runs `lightning-fdfo rewards …`.

    Returns:
        The exit code: 0; 1 if a check failed.

    Raises:
        ConfigurationError, RewardError: what the user or a plugin's author can fix.
    """
    word, prog = next(iter(arguments), ""), "lightning-fdfo rewards"
    if word == "score":
        run_function(score, f"{prog} score", arguments[1:])
        return 0
    if word == "check":
        return run_function(check, f"{prog} check", arguments[1:])
    parser = FunctionParser(prog=prog, description="Lists the installed rewards.")
    commands = parser.add_subcommands(required=False, metavar="[score | check]", description=None)
    commands.add_subcommand("score", FunctionParser(), help="score a folder of images")
    commands.add_subcommand("check", FunctionParser(), help="check that a reward keeps the contract")
    parser.parse_args(arguments)
    list_rewards()
    return 0


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
    cls: type[BaseReward] = found if isinstance(found, type) else FunctionReward
    low, high = cls.range
    needs = cls.needs or ", ".join(f'metadata "{key}"' for key in cls.required_metadata) or "nothing"
    weights = "\n".join(dict.fromkeys(f"{part.source} ({part.licence})" for part in cls.hub_files))
    commands = tuple(part.command for part in cls.hub_files if not part.is_cached())
    return Listing(
        name,
        distribution,
        (
            f"{low:g} … {high:g}{' of a pair' if issubclass(cls, PairReward) else ''}",
            needs,
            weights or cls.packaged_weights or "none",
            "to fetch" if commands else "yes",
        ),
        commands,
    )


# Score


def score(
    folder: Path,
    *,
    reward: list[str],
    prompts: Path | None = None,
    against: Path | None = None,
    format: Literal["table", "csv", "json"] | None = None,
    output: Path | None = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> None:
    """Scores a folder of images.

    Args:
        folder: with images: .png, .jpg, .jpeg, .webp, .bmp; taken in the order of their names
        reward: a name, a dotted path, or as in a configuration:
            '{new: {reward: {class_path: HPSv2, init_args: …}}}'; may come several times
        prompts: a .txt with a line per image, or a .jsonl that names its `image`s
        against: a folder with images of the same names, for rewards that compare two: 1 is won against it, 0 lost
        format: table (default), csv or json
        output: a new .csv or .json; otherwise standard output
        device: of rewards that have none of their own
        batch_size: images at once
    """
    form = output_form(format, output)
    rows = score_folder(folder, parse_rewards(reward), prompts, device=device, batch_size=batch_size, against=against)
    write_scores(rows, form, output)


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
        parsed = parse_yaml(spec, "--reward")
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


def check(name: str, *, init_args: str = "{}", prompts: Path | None = None, device: str = "cpu") -> int:
    """Checks that a reward keeps the contract.

    Args:
        name: a name, or a dotted path
        init_args: options as YAML: '{version: "2.0"}'
        prompts: a .txt or .jsonl with four prompts, if the sample's do not suit
        device: where the reward runs

    Returns:
        1 if one of the checks failed, of which each prints a line; else 0.
    """
    reward = load_reward(name, **parse_init_args(init_args))
    sample: dict[str, Any] = {"device": str(parse_device(device))}
    if prompts is not None:
        four = read_prompts(prompts)
        if len(four) != 4:
            raise ConfigurationError(f"{prompts}: expected four prompts, got {len(four)}")
        sample |= {"prompts": [prompt.text for prompt in four], "metadata": [prompt.metadata for prompt in four]}
    failed = 0
    for what, problem in run_checks(reward, **sample):
        failed += problem is not None
        print(f"{'FAILED' if problem else 'ok    '} {what}{f': {problem}' if problem else ''}")
    print(f"{name} breaks the contract" if failed else f"{name} keeps the contract")
    return int(failed > 0)
