"""The trust region: alone on functions that are known, and in runs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_fdfo import LoRA, Objective
from lightning_fdfo.training.trust_region import MAX_TRIES, TrustRegion
from tests.conftest import trainable
from tests.test_module import Recorder

BOUND = 0.02


def update(bound, drift, step=1.0):
    """A weight after a step from 0, and the region."""
    weight = nn.Parameter(torch.zeros(1))
    region = TrustRegion(bound, [weight], lambda: drift(weight.item()))
    with region.around_update():
        weight.data.fill_(step)
    return weight.item(), region


def test_a_step_within_the_bound_is_left_as_it_is():
    weight, region = update(1.0, abs, step=0.75)
    assert (weight, region.scale, region.last_drift) == (0.75, 1.0, 0.75)


@pytest.mark.parametrize("drift", [abs, lambda w: w**2, lambda w: abs(w) ** 0.5, lambda w: 100 * w**3])
def test_a_longer_one_is_scaled_back_to_the_bound(drift):
    weight, region = update(0.1, drift)
    assert 0 < weight < 1
    assert weight == pytest.approx(region.scale)
    assert drift(weight) == pytest.approx(region.last_drift)
    assert 0.07 <= region.last_drift <= 0.1


@pytest.mark.parametrize("nowhere", [torch.inf, torch.nan])
def test_a_velocity_that_is_not_finite_is_too_far(nowhere):
    weight, region = update(0.1, lambda w: w if w < 0.5 else nowhere)
    assert 0.07 <= region.last_drift <= 0.1
    assert weight == pytest.approx(region.scale)


def test_it_is_taken_back_where_no_shorter_one_will_do():
    measured = []
    weight, region = update(0.1, lambda w: measured.append(w) or 1.0)
    assert (weight, region.scale) == (0.0, 0.0)
    assert len(measured) == MAX_TRIES + 2  # the whole step first, and none in the end


@pytest.mark.parametrize("lora", [LoRA(rank=2, alpha=4, dropout=0.3), None], ids=["lora with dropout", "full"])
def test_a_run_stays_within_it(toy_module, fit, lora):
    free, bounded = Recorder(), Recorder()
    objective, options = Objective(normalization="root_mean_square"), {"lora": lora, "updates_per_epoch": 1}
    fit(toy_module(objective=replace(objective, trust_region=1e6), **options), 6, callbacks=[free])
    fit(toy_module(objective=replace(objective, trust_region=BOUND), **options), 6, callbacks=[bounded])
    assert max(epoch["train/step_drift"] for epoch in free.epochs) > 2 * BOUND
    assert all(epoch["train/step_scale"] == 1 for epoch in free.epochs)
    assert all(epoch["train/step_drift"] <= BOUND for epoch in bounded.epochs)
    assert all(0 < epoch["train/step_scale"] <= 1 for epoch in bounded.epochs)
    assert any(epoch["train/step_scale"] < 0.6 for epoch in bounded.epochs)


def test_it_is_where_the_rollout_was_not_where_the_last_update_was(toy_module, fit):
    """The second update of an epoch has no room left, and its own points, where the first may be a little further."""
    recorder = Recorder()
    objective = Objective(normalization="root_mean_square", trust_region=BOUND)
    fit(toy_module(objective=objective, updates_per_epoch=2), 6, callbacks=[recorder])
    assert all(epoch["train/step_drift"] <= 1.3 * BOUND for epoch in recorder.epochs)
    assert "train/step_scale" in recorder.epochs[0]


def test_a_wide_one_changes_no_weight(toy_module, fit):
    ends = []
    for bound in (None, 1e6):
        module = toy_module(objective=Objective(normalization="root_mean_square", trust_region=bound))
        fit(module, 2)
        ends.append(trainable(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
