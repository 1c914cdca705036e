"""People: a PairReward whose judge is a person."""

from __future__ import annotations

import io
import weakref
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.people.booth import Booth, Enough
from lightning_fdfo.people.round import Pair, Rules
from lightning_fdfo.reward.base import Metadata, PairReward
from lightning_fdfo.settings import check_number

VOTES = "votes.jsonl"
"""In the run's folder."""


class People(PairReward):
    """Shows each pair to a person, on a page, and takes the click as the preference.

    At the start of training it prints a link. Whoever opens it gives a name, and judges pair after pair: left, right,
    or neither; between rounds the page says that the model trains, and goes on by itself. Several people can judge at
    once. Left and right are shuffled. Each vote is a line of `votes.jsonl` in the run's folder, on the disk before it
    counts: a run that is stopped or killed in the middle of a round and goes on by `--ckpt_path last` shows the pairs
    alone that have no vote yet.

        preference = mean over raters of the mean of their votes
        vote       = 1 for the first image, -1 for the second, 0 for neither

    It does not judge in validation and `test`.

    Args:
        host: where the page is; any other than a loopback address puts a token into the link: the environment's
            LIGHTNING_FDFO_TOKEN if there is one, else a new one.
        port: 0 takes a free one.
        votes_per_pair: >= 1, of different people.
        repeat_share: in [0, 1): of the pairs that a person has judged, which come to them again, mirrored. The page
            tells how often both votes agree.
        patience: > 0; seconds after which a pair that nobody has judged is given to somebody else.
        time_limit: > 0; seconds of a round's waiting, after which pairs that lack votes are dropped; None waits on.
        min_share: in (0, 1]: of a rollout batch's pairs, that must have their votes; the others are dropped.
        seed: of sides and repeats.

    Dropping pairs needs `failures.on_reward_error: drop_pair`, and a `failures.max_dropped` that allows it.

    Raises:
        ConfigurationError: an option out of range, an address that cannot be had; several processes.

    Example:
        >>> People(votes_per_pair=2).votes_per_pair
        2
    """

    device = "cpu"
    validates = False
    _booth: Booth | None = None
    _folder: Path | None = None
    _next_pair = 0

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8600,
        votes_per_pair: int = 1,
        repeat_share: float = 0.1,
        patience: float = 120.0,
        time_limit: float | None = None,
        min_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_number("People: votes_per_pair", votes_per_pair, at_least=1)
        check_number("People: repeat_share", repeat_share, at_least=0, below=1)
        check_number("People: patience", patience, above=0)
        check_number("People: min_share", min_share, above=0)
        if min_share > 1:
            raise ConfigurationError(f"People: min_share: expected a number in (0, 1], got {min_share:g}")
        if time_limit is not None:
            check_number("People: time_limit", time_limit, above=0)
        self.host = host
        self.port = port
        self.votes_per_pair = votes_per_pair
        self.repeat_share = repeat_share
        self.patience = patience
        self.time_limit = time_limit
        self.min_share = min_share
        self.seed = seed

    def start_epoch(self, epoch: int, pairs: Sequence[int], num_pairs: int, folder: Path) -> None:
        """Begins a round; the first one opens the page."""
        if len(pairs) != num_pairs:
            raise ConfigurationError("People: expected one process, which all pairs are on: set trainer.devices to 1")
        if self._booth is None or self._folder != folder:
            self._booth, self._folder = self._open(folder), folder
        self._booth.start(epoch, num_pairs)
        self._epoch, self._next_pair = epoch, pairs[0]

    def fetch(self) -> None:
        """Raises ConfigurationError if what serves the page is not installed."""
        import_module("lightning_fdfo.remote")

    def _open(self, folder: Path) -> Booth:
        """The booth, and a thread that serves its page as long as this object lives."""
        from lightning_fdfo.people.server import serve

        rules = Rules(self.votes_per_pair, self.repeat_share, self.patience, self.seed)
        booth = Booth(rules, Enough(self.time_limit, self.min_share), folder / VOTES)
        server, link = serve(booth, folder, self.host, self.port)
        weakref.finalize(self, setattr, server, "should_exit", True)
        print(f"Judge the pairs at {link}", flush=True)
        return booth

    def __call__(self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Waits for people; see `PairReward.__call__`."""
        if self._booth is None:
            raise ConfigurationError("People judge in training alone: there is nobody to ask here")
        index = range(self._next_pair, self._next_pair + len(prompts))
        self._next_pair = index.stop
        shown = zip(index, prompts, first, second, strict=True)
        pairs = [Pair(self._epoch, number, prompt, _png(one), _png(two)) for number, prompt, one, two in shown]
        return torch.tensor(self._booth.ask(pairs))


def _png(image: Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as a file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
