"""A learning rate that rises at first, then falls in a straight line."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fdfo.settings import check_number


class WarmupDecay(LRScheduler):
    """Multiplies the optimiser's learning rate by a factor that rises to 1, then falls to `end_factor`.

        factor(n) = (n + 1) / (warmup_steps + 1)                                                n < warmup_steps
                  = 1 - (1 - end_factor) * (n - warmup_steps) / (total_steps - warmup_steps)    then, until total_steps
                  = end_factor                                                                  after that

    n counts updates. An AdamW's first steps are as long as its learning rate says, in every weight, whatever the
    gradient: a warm-up keeps them short while there is little to average.

    Args:
        optimizer: whose rates they are.
        total_steps: > warmup_steps; a run's updates, max_epochs * updates_per_epoch.
        warmup_steps: >= 0.
        end_factor: >= 0.

    Raises:
        ConfigurationError: a number is out of range.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler, rates = WarmupDecay(sgd, total_steps=4, warmup_steps=1, end_factor=0.1), []
        >>> for _ in range(6):
        ...     rates.append(round(scheduler.get_last_lr()[0], 2))
        ...     sgd.step()
        ...     scheduler.step()
        >>> rates
        [0.5, 1.0, 0.7, 0.4, 0.1, 0.1]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, end_factor: float = 0.0) -> None:
        check_number("WarmupDecay: warmup_steps", warmup_steps, at_least=0)
        check_number("WarmupDecay: total_steps", total_steps, above=warmup_steps)
        check_number("WarmupDecay: end_factor", end_factor, at_least=0)
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.end_factor = end_factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates after as many updates as there were."""
        done, rise, total = self.last_epoch, self.warmup_steps, self.total_steps
        if done < rise:
            factor = (done + 1) / (rise + 1)
        else:
            factor = 1 - (1 - self.end_factor) * min(1.0, (done - rise) / (total - rise))
        return [rate * factor for rate in self.base_lrs]
