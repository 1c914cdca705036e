"""The booth: where pairs wait for votes, and whoever wants preferences waits for them; safe to use from threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_fdfo.people.round import Ballot, Pair, Round, Rules
from lightning_fdfo.people.votes import Choice, Vote, VoteFile, consistency, standing

Side = Literal["left", "right", "none"]
"""Of the page, where the better image is."""
POLL = 0.5
"""Seconds between two looks at the clock."""


class Enough(NamedTuple):
    """When a round ends before all pairs have their votes."""

    time_limit: float | None = None
    """seconds of waiting for votes, after which the pairs that lack some are given up"""
    min_share: float = 1.0
    """of a batch's pairs, that must have their votes; 1 waits for all, unless there is a time_limit"""


class Status(NamedTuple):
    """What the page says beside the pair."""

    epoch: int
    is_open: bool
    """whether pairs are to be judged; else the model trains"""
    total: int
    """pairs of this round"""
    left: int
    """of them without their votes"""
    own: int
    """votes of this rater in all rounds"""
    same: int
    """of the pairs that came to this rater twice, on how many both votes agree"""
    twice: int
    decided: list[float]
    """of each round with votes, the share of those that prefer an image"""


class Booth:
    """Pairs of a run that are put to the vote, epoch by epoch.

    Args:
        rules: how pairs are dealt.
        enough: when a round ends.
        file: where votes are kept.
        clock: seconds; a test may have its own.
    """

    def __init__(self, rules: Rules, enough: Enough, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self.enough = enough
        self._file = VoteFile(file)
        self._clock = clock
        self._changed = threading.Condition()
        self._votes = self._file.read()
        self._round = Round(rules, self._votes, self._keep)
        self._epoch, self._total, self._waited = -1, 0, 0.0

    # The run's side

    def start(self, epoch: int, num_pairs: int) -> None:
        """Begins a round of so many pairs, which come batch by batch."""
        with self._changed:
            self._epoch, self._total, self._waited = epoch, num_pairs, 0.0
            self._round = Round(self.rules, self._votes, self._keep)
            self._changed.notify_all()

    def ask(self, pairs: Sequence[Pair]) -> list[float]:
        """Puts pairs to the vote, and waits for it.

        Returns:
            A preference in [-1, 1] each; NaN for a pair that lacks votes, and for all if the next round has begun.
        """
        with self._changed:
            asked, since = self._round, self._clock()
            asked.add(pairs)
            self._changed.notify_all()
            while asked is self._round and not self._is_enough(pairs, self._waited + self._clock() - since):
                self._changed.wait(POLL)
            if asked is self._round:
                self._waited += self._clock() - since
            asked.close(pairs)
            return [asked.preference(pair) if asked.is_decided(pair) else math.nan for pair in pairs]

    def _is_enough(self, pairs: Sequence[Pair], waited: float) -> bool:
        limit, share = self.enough
        if limit is not None and waited >= limit:
            return True
        decided = sum(self._round.is_decided(pair) for pair in pairs)
        if decided == len(pairs):
            return not self._round.is_waiting_for_repeats(self._clock())
        return decided >= math.ceil(share * len(pairs)) and share < 1

    # A rater's side

    def next(self, rater: str) -> Ballot | None:
        """The pair that a rater is to be shown; None if there is none."""
        with self._changed:
            return self._round.next(rater, self._clock())

    def vote(self, ballot: str, rater: str, side: Side, milliseconds: int) -> None:
        """Takes a vote, and writes it down; raises NotOnShowError."""
        with self._changed:
            shown = self._round.ballot(ballot)
            mirrored = shown is not None and shown.mirrored
            choice: Choice = "none" if side == "none" else "first" if (side == "left") != mirrored else "second"
            self._round.vote(ballot, rater, choice, milliseconds, _now())
            self._changed.notify_all()

    def undo(self, rater: str) -> Ballot:
        """Takes a rater's last vote back, and shows its pair again; raises NotOnShowError."""
        with self._changed:
            return self._round.undo(rater, self._clock(), _now())

    def image(self, ballot: str, side: str) -> bytes | None:
        """The PNG on a side, `left` or `right`, of a pair that is on show."""
        with self._changed:
            found = self._round.ballot(ballot)
        if found is None:
            return None
        return found.pair.first if (side == "left") != found.mirrored else found.pair.second

    def status(self, rater: str) -> Status:
        """What a rater's page says."""
        with self._changed:
            pairs = self._round.pairs
            left = sum(not self._round.is_decided(pair) for pair in pairs)
            waiting = self._total - self._round.num_added if pairs else 0
            votes = standing(self._votes)
            own = [vote for vote in votes if vote.rater == rater]
            _, same, twice = next(consistency(own), (rater, 0, 0))
            return Status(self._epoch, bool(left), self._total, left + waiting, len(own), same, twice, _decided(votes))

    def _keep(self, vote: Vote) -> None:
        self._file.append(vote)
        self._votes.append(vote)


def _decided(votes: Sequence[Vote]) -> list[float]:
    """Of each epoch with votes, the share that prefers an image."""
    by_epoch: dict[int, list[bool]] = {}
    for vote in votes:
        by_epoch.setdefault(vote.epoch, []).append(vote.choice != "none")
    return [sum(each) / len(each) for _, each in sorted(by_epoch.items())]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
