"""The arithmetic of an epoch: from totals over all devices to batches on each."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fdfo.errors import ConfigurationError

MAX_TRIED = 100_000
"""Numbers that are tried as the nearest divisor of a count; enough for counts that fit in memory."""


@dataclass(frozen=True)
class BatchPlan:
    """How the points of an epoch's pairs are dealt into optimiser steps and batches.

    A pair of T steps has 2T points (two branches). Each optimiser step takes the same number of points from every
    pair, so that steps do not depend on the number of devices.

    Args:
        num_pairs: pairs per epoch, over all devices.
        updates_per_epoch: optimiser steps per epoch.
        points_per_pair: points of a pair that are trained on, of its 2T.
        batch_size: points per forward, on each device; divides those of an update.
        world_size: number of devices.

    Example:
        >>> print(BatchPlan(num_pairs=432, updates_per_epoch=4, points_per_pair=80, batch_size=54, world_size=8))
        432 pairs per epoch = 54 per device x 8; 4 updates of 8 640 points = 20 batches of 54 on each device
    """

    num_pairs: int
    updates_per_epoch: int
    points_per_pair: int
    batch_size: int
    world_size: int = 1

    @property
    def pairs_per_device(self) -> int:
        """Pairs that each device rolls out."""
        return self.num_pairs // self.world_size

    @property
    def points_per_pair_and_update(self) -> int:
        """Points that each optimiser step takes from a pair."""
        return self.points_per_pair // self.updates_per_epoch

    @property
    def batches_per_update(self) -> int:
        """Batches on each device that make one optimiser step: the accumulation count."""
        return self.pairs_per_device * self.points_per_pair_and_update // self.batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Batches on each device."""
        return self.updates_per_epoch * self.batches_per_update

    @classmethod
    def derive(
        cls,
        *,
        num_pairs: int,
        updates_per_epoch: int,
        num_steps: int,
        num_points_per_pair: int | None,
        batch_size: int,
        world_size: int,
    ) -> BatchPlan:
        """A plan in which everything divides; a batch has at most `batch_size` points, see `largest_divisor`.

        Raises:
            ConfigurationError: something does not; the message names the nearest values that do.

        Example:
            >>> BatchPlan.derive(num_pairs=48, updates_per_epoch=1, num_steps=10, num_points_per_pair=4,
            ...                  batch_size=80, world_size=1)
            BatchPlan(num_pairs=48, updates_per_epoch=1, points_per_pair=4, batch_size=64, world_size=1)
        """
        settings = {
            "num_pairs": num_pairs,
            "updates_per_epoch": updates_per_epoch,
            "num_steps": num_steps,
            "batch_size": batch_size,
        }
        for name, value in settings.items():
            if value < 1:
                raise ConfigurationError(f"{name}: expected at least 1, got {value}")
        all_points = 2 * num_steps
        points = all_points if num_points_per_pair is None else num_points_per_pair
        if points < 1 or all_points % points:
            raise ConfigurationError(
                f"num_points_per_pair={points} must divide a pair's {all_points} points (2 x num_steps={num_steps}); "
                f"nearest: {_nearest_divisors(all_points, points)}"
            )
        if points % updates_per_epoch:
            raise ConfigurationError(
                f"updates_per_epoch={updates_per_epoch} must divide the {points} points of a pair; "
                f"nearest: {_nearest_divisors(points, updates_per_epoch)}"
            )
        if num_pairs % world_size:
            below = num_pairs // world_size * world_size
            valid = [value for value in (below, below + world_size) if value]
            raise ConfigurationError(
                f"num_pairs={num_pairs} does not divide over {world_size} devices; nearest: {_words(valid)}"
            )
        points_per_update = num_pairs // world_size * (points // updates_per_epoch)
        fitting = largest_divisor(points_per_update, batch_size)
        return cls(num_pairs, updates_per_epoch, points, fitting, world_size)

    def __str__(self) -> str:
        points = f"{self.num_pairs * self.points_per_pair_and_update:,}".replace(",", " ")
        return (
            f"{self.num_pairs} pairs per epoch = {self.pairs_per_device} per device x {self.world_size}; "
            f"{self.updates_per_epoch} updates of {points} points = "
            f"{self.batches_per_update} batches of {self.batch_size} on each device"
        )


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`.

    Args:
        number: >= 1
        most: >= 1

    Example:
        >>> largest_divisor(192, 80), largest_divisor(97, 80), largest_divisor(97, 10**12)
        (64, 1, 97)
    """
    if most <= MAX_TRIED:
        return next(d for d in range(min(most, number), 0, -1) if number % d == 0)
    first = -(-number // most)  # the larger the divisor, the smaller the quotient
    return next((number // q for q in range(first, first + MAX_TRIED) if number % q == 0), 1)


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of a number next to the wanted one, below and above, as far as they are quickly found.

    Example:
        >>> _nearest_divisors(80, 7), _nearest_divisors(80, 3), _nearest_divisors(80, 100)
        ('5 or 8', '2 or 4', '80')
        >>> _nearest_divisors(80 * 10**12, 7)
        '5 or 8'
    """
    first = min(wanted - 1, number)
    below = next((d for d in range(first, max(first - MAX_TRIED, 0), -1) if number % d == 0), None)
    quotient = number // (wanted + 1)  # the larger the divisor, the smaller the quotient: where that is fewer to try
    if quotient < MAX_TRIED:
        above = next((number // q for q in range(quotient, 0, -1) if number % q == 0), None)
    else:
        above = next((d for d in range(wanted + 1, wanted + MAX_TRIED) if number % d == 0), None)
    return _words([value for value in (below, above) if value is not None])


def _words(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
