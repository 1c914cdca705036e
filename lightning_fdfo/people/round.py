"""A round of votes: which pair is shown to whom, and when there are enough.

    Round.next(rater) -> Ballot --shown--> Round.vote(ballot, choice) -> votes.jsonl -> Round.preference(pair)

Nothing here knows of HTTP or of time: whoever calls says what time it is, in seconds of one clock.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lightning_fdfo.people.votes import Choice, Vote, standing

REPEAT_AFTER = 4
"""Votes of the same rater before a pair may come again."""


class NotOnShowError(ValueError):
    """A vote for a pair that this rater is not being shown, or that can no longer be taken back."""


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt that are to be compared."""

    epoch: int
    number: int
    """among the pairs of the epoch that people are asked for"""
    prompt: str
    first: bytes
    """a PNG"""
    second: bytes

    @cached_property
    def images(self) -> str:
        """A hash of both: a vote is for these alone."""
        return hashlib.sha256(len(self.first).to_bytes(8, "big") + self.first + self.second).hexdigest()[:32]

    @property
    def key(self) -> tuple[int, int, str]:
        """What a vote names it by."""
        return self.epoch, self.number, self.images


@dataclass(frozen=True)
class Ballot:
    """A pair on show to one rater."""

    rater: str
    pair: Pair
    mirrored: bool
    repeat: bool
    shown: float
    """when"""
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    """that nobody can guess: images are asked for by it"""


class Rules(NamedTuple):
    """How pairs are dealt."""

    votes_per_pair: int = 1
    """of different raters"""
    repeat_share: float = 0.1
    """of the pairs that a rater has judged, which come again, mirrored"""
    patience: float = 120.0
    """seconds after which a pair that nobody has judged is given to somebody else"""
    seed: int = 0


class Round:
    """The pairs of an epoch, and the votes on them.

    Args:
        rules: how pairs are dealt.
        votes: all that there are, also of other rounds.
        keep: writes a vote down; called before the vote counts.
    """

    def __init__(self, rules: Rules, votes: Iterable[Vote], keep: Callable[[Vote], None]) -> None:
        self.rules = rules
        self.pairs: list[Pair] = []
        """Those on which the vote is open."""
        self.num_added = 0
        self._keep = keep
        self._by_pair: dict[tuple[int, int, str], list[Vote]] = {}
        self._by_rater: dict[str, list[Vote]] = {}
        for vote in votes:
            self._file(vote)
        self._ballots: dict[str, Ballot] = {}
        self._seen: dict[str, float] = {}

    def add(self, pairs: Sequence[Pair]) -> None:
        """Puts pairs to the vote; those that have theirs already, from before a run stopped, need no more."""
        self.pairs += pairs
        self.num_added += len(pairs)

    def close(self, pairs: Sequence[Pair]) -> None:
        """Ends the vote on some pairs: their preferences are in use."""
        over = {pair.key for pair in pairs}
        self.pairs = [pair for pair in self.pairs if pair.key not in over]
        self._ballots = {name: each for name, each in self._ballots.items() if each.pair.key not in over}

    # Votes

    def votes_on(self, pair: Pair) -> list[Vote]:
        """Those that count."""
        return standing(self._by_pair.get(pair.key, ()))

    def is_decided(self, pair: Pair) -> bool:
        """Whether a pair has all its votes."""
        return len({vote.rater for vote in self.votes_on(pair) if not vote.repeat}) >= self.rules.votes_per_pair

    def preference(self, pair: Pair) -> float:
        """The mean over raters of the mean of their votes: 1 for the first image, -1 for the second; NaN if none."""
        by_rater: dict[str, list[float]] = {}
        for vote in self.votes_on(pair):
            by_rater.setdefault(vote.rater, []).append(vote.preference)
        means = [sum(own) / len(own) for own in by_rater.values()]
        return sum(means) / len(means) if means else float("nan")

    def next(self, rater: str, now: float) -> Ballot | None:
        """What a rater is shown: the pair on show if there is one, or the next; None if there is none for them."""
        self._seen[rater] = now
        if (own := self._open(rater)) is not None:
            return own
        if (again := self._due_again(rater)) is not None:
            return self._show(rater, again, True, now)
        pair = next((pair for pair in self.pairs if self._wants(pair, rater, now)), None)
        return None if pair is None else self._show(rater, pair, False, now)

    def vote(self, name: str, rater: str, choice: Choice, milliseconds: int, time: str) -> Vote:
        """Takes a vote.

        Raises:
            NotOnShowError: this rater is not being shown such a ballot.
        """
        ballot = self._ballots.get(name)
        if ballot is None or ballot.rater != rater:
            raise NotOnShowError("this pair is not on show: it was judged already, or given to somebody else")
        vote = Vote(
            ballot.pair.epoch,
            ballot.pair.number,
            ballot.pair.images,
            ballot.pair.prompt,
            choice,
            rater,
            milliseconds,
            ballot.mirrored,
            ballot.repeat,
            time,
        )
        self._take(vote)
        del self._ballots[name]
        return vote

    def undo(self, rater: str, now: float, time: str) -> Ballot:
        """Takes a rater's last vote back, and shows the pair again.

        Raises:
            NotOnShowError: there is none, or training goes on with it already.
        """
        pairs = {pair.key: pair for pair in self.pairs}
        own = [vote for vote in standing(self._by_rater.get(rater, ())) if vote.place[:3] in pairs]
        if not own:
            raise NotOnShowError("there is no vote to take back: training goes on with the earlier ones")
        self._take(own[-1]._replace(choice=None, time=time))
        self._ballots = {name: each for name, each in self._ballots.items() if each.rater != rater}
        return self._show(rater, pairs[own[-1].place[:3]], own[-1].repeat, now)

    def is_waiting_for_repeats(self, now: float) -> bool:
        """Whether somebody who was here lately still has a pair to judge again."""
        here = [rater for rater, seen in self._seen.items() if now - seen < self.rules.patience]
        return any(self._due_again(rater) is not None for rater in here)

    def ballot(self, name: str) -> Ballot | None:
        """One that is on show."""
        return self._ballots.get(name)

    # Dealing

    def _open(self, rater: str) -> Ballot | None:
        return next((ballot for ballot in self._ballots.values() if ballot.rater == rater), None)

    def _wants(self, pair: Pair, rater: str, now: float) -> bool:
        """Whether a pair lacks a vote that this rater may give."""
        raters = {vote.rater for vote in self.votes_on(pair) if not vote.repeat}
        if rater in raters:
            return False
        on_show = {
            ballot.rater
            for ballot in self._ballots.values()
            if ballot.pair is pair and not ballot.repeat and now - ballot.shown < self.rules.patience
        }
        return len(raters | on_show) < self.rules.votes_per_pair

    def _due_again(self, rater: str) -> Pair | None:
        """The first pair that a rater is to judge again."""
        for pair in self.pairs:
            votes = [vote for vote in self.votes_on(pair) if vote.rater == rater]
            chosen = self._chance(pair, rater, "repeat") < self.rules.repeat_share
            if chosen and len(votes) == 1 and not votes[0].repeat and self._since(rater, pair) >= REPEAT_AFTER:
                return pair
        return None

    def _since(self, rater: str, pair: Pair) -> int:
        """Votes of a rater after the one on a pair."""
        own = [vote.place[:3] for vote in standing(self._by_rater.get(rater, ()))]
        return len(own) - 1 - own.index(pair.key)

    def _show(self, rater: str, pair: Pair, repeat: bool, now: float) -> Ballot:
        mirrored = (self._chance(pair, rater, "mirror") < 0.5) != repeat
        ballot = Ballot(rater, pair, mirrored, repeat, now)
        self._ballots[ballot.name] = ballot
        return ballot

    def _chance(self, pair: Pair, rater: str, what: str) -> float:
        """In [0, 1): a function of seed, epoch, pair and rater."""
        words = f"{self.rules.seed} {pair.epoch} {pair.number} {what} {rater}"
        return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64

    def _take(self, vote: Vote) -> None:
        self._keep(vote)
        self._file(vote)

    def _file(self, vote: Vote) -> None:
        self._by_pair.setdefault(vote.place[:3], []).append(vote)
        self._by_rater.setdefault(vote.rater, []).append(vote)
