"""One check for the numbers in settings: finite, and in their range."""

from __future__ import annotations

import math

from lightning_fdfo.errors import ConfigurationError


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raises ConfigurationError unless a setting is a finite number in its range.

    Args:
        name: of the setting, as a configuration names it.
        value: its value.
        above: it must be larger than this.
        at_least: it must not be smaller than this.
        below: it must be smaller than this.

    Raises:
        ConfigurationError: it is NaN, infinite or out of range.

    Example:
        >>> check_number("sampling.churn", 0.1, at_least=0)
        >>> check_number("sampling.churn", float("nan"), at_least=0)
        Traceback (most recent call last):
        ...
        lightning_fdfo.errors.ConfigurationError: sampling.churn: expected a finite number of at least 0, got nan
    """
    if math.isfinite(value) and above < value < below and value >= at_least:
        return
    bounds = [(above, "above"), (at_least, "of at least"), (below, "below")]
    said = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))
    raise ConfigurationError(f"{name}: expected a finite number{' ' * bool(said)}{said}, got {value}")
