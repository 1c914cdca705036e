"""People as a reward: a page shows the two images of a pair, and a click is a preference.

    rollout --pairs--> Booth <--Round-- page: left, right, neither --votes.jsonl--> preferences --> training

It needs an extra: `pip install 'lightning-fdfo[remote]'`.
"""

from lightning_fdfo.errors import ConfigurationError

EXTRA = ("fastapi", "httpx", "pydantic", "tenacity", "uvicorn")
"""What the extra brings."""

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401

    from lightning_fdfo.people.people import People
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    raise ConfigurationError(
        f"people as a reward need {error.name}, which is not installed: pip install 'lightning-fdfo[remote]'"
    ) from error

__all__ = ["People"]
