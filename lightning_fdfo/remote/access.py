"""Access to a reward server: a bearer token from the environment, and hosts that only this machine reaches."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from urllib.parse import urlsplit

from lightning_fdfo.errors import ConfigurationError

TOKEN_VARIABLE = "LIGHTNING_FDFO_TOKEN"
"""The environment variable that holds the token, on both sides. It is read where it is used and kept nowhere."""
_TOKEN = re.compile(r"[\x21-\x7e]{16,1024}")


def read_token() -> str | None:
    """The token, or None if the environment has none.

    Raises:
        ConfigurationError: it is too short to protect anything, or no header can carry it. It is not shown.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and _TOKEN.fullmatch(token) is None:
        raise ConfigurationError(
            f"{TOKEN_VARIABLE}: expected 16 to 1024 ASCII characters without spaces, got something else; "
            f'make one by: export {TOKEN_VARIABLE}="$(openssl rand -hex 32)"'
        )
    return token


def is_authorized(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries the token; the time it takes does not tell how much of it is right.

    Example:
        >>> is_authorized("Bearer 0123456789abcdef", "0123456789abcdef"), is_authorized(None, "0123456789abcdef")
        (True, False)
    """
    return hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


def named_host(header: str | None) -> str | None:
    """What a request's Host header calls this machine; None where there is none, or it is no host.

    Example:
        >>> named_host("localhost:8765"), named_host("[::1]:80"), named_host(None)
        ('localhost', '::1', None)
    """
    try:
        return urlsplit(f"//{header or ''}").hostname
    except ValueError:
        return None


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine and nobody else reaches it; a name other than `localhost` is not.

    Example:
        >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "127.0.0.1.example.org")]
        [True, True, True, False, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
