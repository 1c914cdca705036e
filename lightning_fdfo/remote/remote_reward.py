"""RemoteReward and RemotePairReward: rewards that another process computes, behind `lightning-fdfo serve-reward`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import get_args

import httpx
import torch
from pydantic import ValidationError
from torch import Tensor

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.remote.access import TOKEN_VARIABLE
from lightning_fdfo.remote.client import Answer, Client, RemoteError
from lightning_fdfo.remote.codec import encode_request
from lightning_fdfo.remote.protocol import (
    SCHEMA_VERSION,
    Description,
    Encoding,
    Prompts,
    ScoreRequest,
    Scores,
    check_metadata,
    to_json,
)
from lightning_fdfo.reward.base import BaseReward, Metadata, PairReward, Reward


class _Remote(BaseReward):
    """What is the same of both kinds: the server is asked what it serves, and scores images."""

    device = "cpu"
    _compares = False
    _description: Description | None = None
    _failure: ConfigurationError | None = None
    _client: Client | None = None

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
        backoff: float = 1.0,
        encoding: Encoding = "safetensors",
    ) -> None:
        _check_url(url)
        if not 0 < timeout < math.inf or attempts < 1 or not 0 <= backoff < math.inf:
            raise ConfigurationError(
                f"{type(self).__name__}: expected timeout > 0, attempts >= 1 and backoff >= 0, "
                f"got {timeout}, {attempts} and {backoff}"
            )
        if encoding not in get_args(Encoding):
            raise ConfigurationError(f"{type(self).__name__}: expected encoding safetensors or png, got {encoding!r}")
        self.url = url.rstrip("/")
        self.reward = reward
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.encoding = encoding

    # What the server serves: asked once, when it is first needed

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]
        """That of the reward there."""
        return self._described().range

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """That of the reward there."""
        return self._described().higher_is_better

    @property
    def required_metadata(self) -> tuple[str, ...]:  # type: ignore[override]
        """That of the reward there."""
        return self._described().required_metadata

    def fetch(self) -> None:
        """Asks the server what it serves; raises ConfigurationError for no answer, or one that is not wanted."""
        self._failure = None
        self._described()

    def setup(self, device: torch.device) -> None:
        """The same: the server has its own device."""
        self._described()

    def _described(self) -> Description:
        if self._failure is not None:  # one prompt has waited for the server: the next ones need not
            raise self._failure
        if self._description is None:
            try:
                self._description = self._parse_description(self._ask("GET", "/reward"))
            except RemoteError as error:
                self._failure = ConfigurationError(f"{error}; start it there by: lightning-fdfo serve-reward NAME")
                raise self._failure from error
            except ConfigurationError as error:
                self._failure = error
                raise
        return self._description

    def _parse_description(self, answer: Answer) -> Description:
        if answer.status in (401, 403):
            raise ConfigurationError(f"{self.url}: {answer.detail} (the variable {TOKEN_VARIABLE}, on both sides)")
        try:
            said = json.loads(answer.body)
            version = said["schema_version"]
            description = Description.model_validate(said) if version == SCHEMA_VERSION else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # pydantic's is a ValueError
            raise ConfigurationError(
                f"{self.url}: expected a server of lightning-fdfo, got {answer.detail[:200]}"
            ) from error
        if description is None:
            raise ConfigurationError(
                f"{self.url}: expected schema version {SCHEMA_VERSION}, got {str(version)[:20]}: "
                "install the same lightning-fdfo on both sides"
            )
        if self.reward is not None and description.reward != self.reward:
            raise ConfigurationError(f"{self.url}: expected the reward {self.reward}, it serves {description.reward!r}")
        if description.compares != self._compares:
            other = "RemotePairReward" if description.compares else "RemoteReward"
            what = "compares two images" if description.compares else "scores single images"
            raise ConfigurationError(f"{self.url}: {description.reward} {what}: use lightning_fdfo.remote.{other}")
        return description

    def check(self, prompt: str, metadata: Metadata) -> None:
        """Raises ConfigurationError if the reward there cannot score this prompt."""
        try:
            described = self._described()
            super().check(prompt, metadata)
            check_metadata(metadata)
            request = Prompts(fingerprint=described.fingerprint, prompts=[prompt], metadata=[dict(metadata)])
            body = to_json(request).encode()
            answer = self._ask("POST", "/check", body) if described.checks_prompts else None
        except (RemoteError, ValueError) as error:  # a ConfigurationError is one, and so is pydantic's
            raise ConfigurationError(f"the prompt cannot be scored: {error}") from error
        if answer is not None and answer.status != 200:
            raise ConfigurationError(f"{self.url}: {answer.detail}")

    # Scores

    def _score_all(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch, in as many requests as it takes.

        Raises:
            RemoteError: after the last attempt, or at once if the server refuses the batch.
        """
        most = self._most_images(images)
        parts = [slice(start, start + most) for start in range(0, len(images), most)]
        return torch.cat([self._score(images[part], prompts[part], metadata[part]) for part in parts])

    def _most_images(self, images: Tensor) -> int:
        """How many images of this size the server takes at once."""
        limits, pixels = self._described().limits, images.shape[-2] * images.shape[-1]
        most, each = (
            min(limits.max_batch, limits.max_pixels // pixels, limits.max_body // (12 * pixels)),
            1 + self._compares,
        )
        if most < each:
            raise RemoteError(
                f"{self.url}: {'a pair of images' if each == 2 else 'an image'} of {pixels} pixels is more than it "
                f"takes: start it with larger --max_batch, --max_pixels or --max_body, which are {limits.max_batch}, "
                f"{limits.max_pixels} and {limits.max_body}"
            )
        return most // each * each

    def _score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        request = ScoreRequest(
            fingerprint=self._described().fingerprint,
            prompts=list(prompts),
            metadata=[dict(row) for row in metadata],
            encoding=self.encoding,
        )
        answer = self._ask("POST", "/scores", encode_request(request, images))
        if answer.status != 200:
            raise RemoteError(f"{self.url}: {answer.detail}")
        try:
            scores = torch.tensor(Scores.model_validate_json(answer.body).scores, dtype=torch.float64)
        except (ValidationError, RuntimeError) as error:
            raise RemoteError(f"{self.url}: expected scores, got {answer.detail[:200]}") from error
        if scores.shape != (len(images),) or not bool(scores.float().isfinite().all()):
            raise RemoteError(f"{self.url}: expected {len(images)} finite scores, got {scores.tolist()[:4]} …")
        return scores

    def _ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        if self._client is None:
            self._client = Client(self.url, self.timeout, self.attempts, self.backoff)
        return self._client.ask(method, path, body)


class RemoteReward(_Remote, Reward):
    """A reward that lives in another environment or on another machine.

    Before any model is loaded it asks the server what it serves: range, sign and needed metadata are those of the
    reward there, and prompts are checked by it. A batch that is more than the server takes goes in several requests.

    With `LIGHTNING_FDFO_TOKEN` in the environment, each request carries that token, to whatever host `url` names.

    Args:
        url: of the server, as it prints it: `http://HOST:PORT`.
        reward: the name that is expected there; None takes what is served.
        timeout: > 0; seconds for one call, with waiting for others' calls.
        attempts: >= 1; how often a call is tried that had no connection, no answer in time, or status 429 or 5xx.
        backoff: >= 0; seconds before the second attempt; they double each time, up to 30, and by chance last up to half
            as long again.
        encoding: of images: `safetensors`, float32, exact to the bit; or `png`, a fraction of the size, in 8 bits a
            channel: exact for a reward that rounds to 8 bits itself, as `OCR` and `JPEGSize` do.

    Raises:
        ConfigurationError: options out of range; in `fetch` and `check`: no server, another token, schema or reward.

    Example:
        >>> RemoteReward("http://127.0.0.1:8765", reward="OCR").timeout
        120.0
        >>> RemoteReward("host")
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: RemoteReward: expected a url like http://127.0.0.1:8765, got 'host'
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Scores a batch; see `Reward.__call__`.

        Raises:
            RemoteError: after the last attempt, or at once if the server refuses the batch.
        """
        return self._score_all(images, prompts, metadata)


class RemotePairReward(_Remote, PairReward):  # type: ignore[override]
    """The same for a reward that compares two images: see `RemoteReward` for its options.

    Example:
        >>> RemotePairReward("http://127.0.0.1:8765", reward="VLMPreference").attempts
        5
    """

    _compares = True

    def __call__(self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """Compares a batch of pairs; see `PairReward.__call__`.

        Raises:
            RemoteError: after the last attempt, or at once if the server refuses the batch.
        """
        twice = [(text, row) for text, row in zip(prompts, metadata, strict=True) for _ in range(2)]
        images = torch.stack([first, second], dim=1).flatten(0, 1)
        scores = self._score_all(images, [text for text, _ in twice], [row for _, row in twice])
        return 2 * scores[::2] - 1


def _check_url(url: str) -> None:
    """Raises ConfigurationError for what is no http address; a password in it would land in config.yaml."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parts = httpx.URL("")
    if parts.userinfo:
        raise ConfigurationError(f"RemoteReward: expected a url without a password, and the token in {TOKEN_VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
        raise ConfigurationError(f"RemoteReward: expected a url like http://127.0.0.1:8765, got {url!r}")
