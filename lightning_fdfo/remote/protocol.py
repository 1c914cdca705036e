"""The messages between a RemoteReward and its server.

    GET  /reward                          -> Description
    POST /check   Prompts, as JSON        -> {}
    POST /scores  a safetensors file      -> Scores

The file's metadata holds a `ScoreRequest` as JSON, under the key `request`. Its tensors are the images: with the
encoding `safetensors` one, `images` [N, 3, H, W] float32 in [0, 1], exact to the bit; with `png` N of bytes, named `0`
to `N-1`, each a PNG of 8 bits a channel. An error is a status of 400 or above, and JSON: `{"detail": "what was
wrong"}`. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

SCHEMA_VERSION: Final = 1
"""Of all that is described here; both sides must have the same."""
CONTENT_TYPE = "application/octet-stream"
"""Of every request with a body: not one of those that a web page may send without asking."""
MAX_HEADER = 2**22
"""Bytes of a request's JSON: prompts, metadata, and where the tensors are."""
MAX_PROMPT = 10_000
"""Characters."""

MAX_MESSAGE = 500
"""Characters."""

Encoding = Literal["safetensors", "png"]
PromptText = Annotated[str, Field(max_length=MAX_PROMPT)]


class RefusalError(ValueError):
    """A request that is not answered; `status` is HTTP's. What a message repeats of the request is cut."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message[:MAX_MESSAGE])
        self.status = status


class Limits(BaseModel, frozen=True):
    """What a server takes in one request."""

    max_batch: int = 256
    """images"""
    max_pixels: int = 2**25
    """of all images together: 32 of 1024 x 1024"""
    max_body: int = 2**29
    """bytes; those of the JSON, at most MAX_HEADER, come on top"""


class Description(BaseModel, frozen=True):
    """What a server serves."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    schema_version: Literal[1] = SCHEMA_VERSION
    reward: str
    """its name"""
    range: tuple[float, float]
    higher_is_better: bool
    required_metadata: tuple[str, ...]
    compares: bool
    """whether it is a `PairReward`: images come in pairs then, rows 2i and 2i+1, each with the pair's prompt, and a
    score is (1 + preference) / 2"""
    checks_prompts: bool
    """whether it looks at prompts by itself, beyond `required_metadata`"""
    limits: Limits
    fingerprint: str
    """of the reward, its options and its version: a request carries it, so that no other reward answers in its place"""


class Prompts(BaseModel, extra="forbid", strict=True):
    """N prompts for a reward."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str = Field(max_length=100)
    prompts: list[PromptText]
    metadata: list[dict[str, Any]]


class ScoreRequest(Prompts):
    """N prompts, and how their images come."""

    encoding: Encoding


AnyPrompts = TypeVar("AnyPrompts", bound=Prompts)


class Scores(BaseModel):
    """A score an image: a float64 as JSON's number, which gives back the same float64."""

    scores: list[FiniteFloat]


def to_json(prompts: Prompts) -> str:
    """Prompts as JSON; raises ValueError or TypeError for metadata that JSON has no form for, NaN among them."""
    return json.dumps(prompts.model_dump(), ensure_ascii=False, allow_nan=False)


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError if the metadata would not come out of JSON as they went in.

    Example:
        >>> check_metadata({"text": "427"})
        >>> check_metadata({"size": (1, 2)})
        Traceback (most recent call last):
        ...
        ValueError: expected JSON's own types, got {'size': (1, 2)}
    """
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, RecursionError) as error:
        raise ValueError(f"expected JSON's own types: {error}") from error
    if not same:
        raise ValueError(f"expected JSON's own types, got {metadata!r}")


def parse_prompts(kind: type[AnyPrompts], text: bytes | str) -> AnyPrompts:
    """JSON as one of the models here; raises RefusalError with the first thing that is wrong."""
    if len(text) > MAX_HEADER:
        raise RefusalError(413, f"expected at most {MAX_HEADER} bytes of JSON, got {len(text)}")
    try:
        request = kind.model_validate_json(text)
    except ValidationError as error:
        raise RefusalError(400, first_problem(error)) from error
    if not len(request.prompts) == len(request.metadata) > 0:
        raise RefusalError(
            400, f"expected as many metadata as prompts, got {len(request.metadata)} and {len(request.prompts)}"
        )
    return request


def first_problem(error: ValidationError) -> str:
    """What pydantic found first, without the input."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'JSON'}: {problem['msg']}"
