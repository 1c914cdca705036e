import pytest

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.rollout.plan import BatchPlan

PAPER = {
    "num_pairs": 432,
    "updates_per_epoch": 4,
    "num_steps": 40,
    "num_points_per_pair": None,
    "batch_size": 54,
    "world_size": 8,
}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 160), (2, 80), (8, 20)])
def test_totals_do_not_depend_on_the_number_of_devices(world_size, accumulation):
    plan = BatchPlan.derive(**PAPER | {"world_size": world_size})
    assert plan.batches_per_update == accumulation
    assert plan.batches_per_epoch == 4 * accumulation
    assert plan.batches_per_epoch * plan.batch_size * world_size == 432 * 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 7}, "num_pairs=432 does not divide over 7 devices; nearest: 427 or 434"),
        ({"updates_per_epoch": 3}, "updates_per_epoch=3 must divide the 80 points of a pair; nearest: 2 or 4"),
        ({"num_points_per_pair": 7}, "num_points_per_pair=7 must divide a pair's 80 points .* nearest: 5 or 8"),
        ({"num_points_per_pair": 160}, "num_points_per_pair=160 must divide .* nearest: 80"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_pairs": 4}, "num_pairs=4 does not divide over 8 devices; nearest: 8"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_values(change, message):
    with pytest.raises(ConfigurationError, match=message):
        BatchPlan.derive(**PAPER | change)


@pytest.mark.parametrize(
    ("asked", "devices", "taken"), [(54, 8, 54), (50, 8, 45), (10**12, 8, 1080), (1080, 8, 1080), (7, 1, 6), (1, 8, 1)]
)
def test_a_batch_has_at_most_as_many_points_as_asked_for_and_all_batches_the_same(asked, devices, taken):
    plan = BatchPlan.derive(**PAPER | {"batch_size": asked, "world_size": devices})
    assert plan.batch_size == taken == max(d for d in range(1, min(asked, 8640) + 1) if 8640 // devices % d == 0)
    assert plan.batches_per_update * plan.batch_size * devices == 8640
