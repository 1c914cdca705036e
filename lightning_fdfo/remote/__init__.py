"""Rewards that live in another environment or on another machine: `RemoteReward`, `RemotePairReward`, and the server.

They need an extra: `pip install 'lightning-fdfo[remote]'`.
"""

from lightning_fdfo.errors import ConfigurationError

EXTRA = ("fastapi", "httpx", "pydantic", "tenacity", "uvicorn")
"""What the extra brings."""

try:
    import fastapi  # noqa: F401
    import tenacity  # noqa: F401
    import uvicorn  # noqa: F401

    from lightning_fdfo.remote.remote_reward import RemotePairReward, RemoteReward
except ModuleNotFoundError as error:
    if error.name not in EXTRA:
        raise
    raise ConfigurationError(
        f"remote rewards and people need {error.name}, which is not installed: pip install 'lightning-fdfo[remote]'"
    ) from error

__all__ = ["RemotePairReward", "RemoteReward"]
