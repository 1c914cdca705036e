"""WarmupDecay, against PyTorch's own pieces."""

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, SequentialLR

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.training.learning_rate import WarmupDecay


def rates(build, number=30):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, found = build(optimizer), []
    for _ in range(number):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "total", "end"), [(4, 20, 0.1), (1, 2, 0.0), (4, 40, 0.5)])
def test_it_is_two_straight_lines(warmup, total, end):
    def pieces(optimizer):
        rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        fall = LinearLR(optimizer, 1.0, end, total_iters=total - warmup)
        return SequentialLR(optimizer, [rise, fall], [warmup])

    own = rates(lambda optimizer: WarmupDecay(optimizer, total, warmup, end))
    assert own == pytest.approx(rates(pieces), rel=1e-6, abs=1e-9)


def test_without_a_warmup_it_falls_from_the_start():
    assert rates(lambda optimizer: WarmupDecay(optimizer, 3), 5) == pytest.approx([0.3, 0.2, 0.1, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 3, "warmup_steps": 3}, "total_steps: expected a finite number above 3, got 3"),
        ({"total_steps": 3, "warmup_steps": -1}, "warmup_steps: expected a finite number of at least 0, got -1"),
        ({"total_steps": 3, "end_factor": -1}, "end_factor: expected a finite number of at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ConfigurationError, match=f"WarmupDecay: {message}"):
        WarmupDecay(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **options)
