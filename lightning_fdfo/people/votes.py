"""Votes: what a person said of a pair, a line each, in a file that only grows.

A line is a `Vote` as JSON, on the disk before anything follows from it. A vote that is taken back is a further line,
with null as its choice.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

Choice = Literal["first", "second", "none"]
"""Which image of the pair is better, in the pair's own order, whichever side it was shown on."""
PREFERENCES: Final = {"first": 1.0, "none": 0.0, "second": -1.0}


class Vote(NamedTuple):
    """What a person said of a pair."""

    epoch: int
    pair: int
    """its number among the pairs of the epoch that people are asked for"""
    images: str
    """a hash of both images: a vote is for these alone"""
    prompt: str
    choice: Choice | None
    """None: taken back"""
    rater: str
    """the name that they gave"""
    milliseconds: int
    """from when the pair was shown"""
    mirrored: bool
    """whether the first image was shown on the right"""
    repeat: bool
    """whether the rater had seen the pair before"""
    time: str
    """when, in UTC"""

    @property
    def place(self) -> tuple[int, int, str, str, bool]:
        """What a later vote replaces: one of the same rater on the same images, the first time or the second."""
        return self.epoch, self.pair, self.images, self.rater, self.repeat

    @property
    def preference(self) -> float:
        """1 for the first image, -1 for the second, 0 for neither."""
        return 0.0 if self.choice is None else PREFERENCES[self.choice]


class VoteFile:
    """A file of votes.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, vote: Vote) -> None:
        """Writes a line, and waits until the disk has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(vote._asdict(), ensure_ascii=False) + "\n"
        with self.path.open("a+b") as file:
            if file.tell():  # a line that a crash cut short ends here
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Vote]:
        """All lines, in their order; one that is no vote is left out, with a warning."""
        if not self.path.exists():
            return []
        votes = []
        lines = self.path.read_bytes().split(b"\n")  # str.splitlines would split inside some prompts
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                votes.append(_parse(line.decode(errors="replace")))
            except (ValueError, TypeError, KeyError) as error:
                warnings.warn(f"{self.path}:{number}: left out, for it is no vote: {error}", stacklevel=2)
        return votes


def standing(votes: Iterable[Vote]) -> list[Vote]:
    """The votes that count: the last of each rater on a pair, unless it was taken back.

    Example:
        >>> vote = Vote(0, 1, "5f", "a cat", "first", "ada", 900, False, False, "")
        >>> standing([vote, vote._replace(choice="second"), vote._replace(pair=2), vote._replace(pair=2, choice=None)])
        [Vote(epoch=0, pair=1, images='5f', prompt='a cat', choice='second', rater='ada', ...)]
    """
    last: dict[object, Vote] = {}
    for vote in votes:
        last.pop(vote.place, None)  # the order is that of the last ones
        last[vote.place] = vote
    return [vote for vote in last.values() if vote.choice is not None]


def consistency(votes: Iterable[Vote]) -> Iterator[tuple[str, int, int]]:
    """How often each rater said the same of a pair that came twice: name, times the same, pairs that came twice.

    Example:
        >>> vote = Vote(0, 1, "5f", "a cat", "first", "ada", 900, False, False, "")
        >>> list(consistency([vote, vote._replace(repeat=True), vote._replace(pair=2)]))
        [('ada', 1, 1)]
    """
    by_place = {vote.place: vote for vote in standing(votes)}
    raters = dict.fromkeys(vote.rater for vote in by_place.values())
    for rater in raters:
        again = [vote for vote in by_place.values() if vote.rater == rater and vote.repeat]
        before = [by_place.get((*vote.place[:-1], False)) for vote in again]
        same = [one.choice == two.choice for one, two in zip(before, again, strict=True) if one is not None]
        yield rater, sum(same), len(same)


def _parse(line: str) -> Vote:
    row = json.loads(line)
    vote = Vote(**{name: row[name] for name in Vote._fields})
    kinds = Vote.__annotations__
    for name, kind in (("epoch", int), ("pair", int), ("images", str), ("prompt", str), ("rater", str)):
        if type(getattr(vote, name)) is not kind:
            raise ValueError(f"expected {kinds[name]} as {name}, got {getattr(vote, name)!r}")
    if type(vote.repeat) is not bool or type(vote.mirrored) is not bool or type(vote.milliseconds) is not int:
        raise ValueError("expected repeat and mirrored to be true or false, and milliseconds an integer")
    if vote.choice is not None and vote.choice not in get_args(Choice):
        raise ValueError(f"expected first, second, none or null as choice, got {vote.choice!r}")
    return vote
