import numpy as np
import pytest
import torch

from lightning_fdfo.evaluation.prompt_mean import PromptMean, prompt_mean


def test_with_as_many_images_of_each_prompt_it_is_the_mean_of_prompts_means():
    values = np.random.default_rng(0).normal(size=(12, 5, 2)) + np.arange(12)[:, None, None]
    prompts = torch.arange(12).repeat_interleave(5)
    mean, error = prompt_mean(prompts, torch.from_numpy(values).flatten(0, 1))
    means = values.mean(axis=1)
    np.testing.assert_allclose(mean, means.mean(axis=0))
    np.testing.assert_allclose(error, means.std(axis=0, ddof=1) / 12**0.5)


def test_the_standard_error_is_the_deviation_of_the_mean():
    """2000 draws of 20 prompts, whose images share two thirds of their variance; seed 0, 5 %."""
    random = np.random.default_rng(0)
    prompts, means, errors = torch.arange(20).repeat_interleave(4), [], []
    for _ in range(2000):
        values = 2**0.5 * random.normal(size=(20, 1)) + random.normal(size=(20, 4))
        mean, error = prompt_mean(prompts, torch.from_numpy(values).reshape(-1, 1))
        means.append(mean.item())
        errors.append(error.item() ** 2)
    assert np.mean(errors) ** 0.5 == pytest.approx(np.std(means), rel=0.05)


def test_what_is_not_counted_is_left_out_column_by_column():
    nan = torch.nan
    values = torch.tensor([[1.0, nan, nan], [3.0, 5.0, nan], [5.0, 7.0, nan]])
    mean, error = prompt_mean(torch.tensor([0, 1, 2]), values, values.isfinite())
    torch.testing.assert_close(mean, torch.tensor([3.0, 6.0, nan], dtype=torch.float64), equal_nan=True)
    expected = torch.tensor([2 / 3**0.5, 1.0, nan], dtype=torch.float64)
    torch.testing.assert_close(error, expected, equal_nan=True)


def test_one_prompt_has_no_standard_error():
    mean, error = prompt_mean(torch.tensor([4, 4]), torch.tensor([[1.0], [2.0]]))
    assert mean.item() == 1.5
    assert error.isnan().all()


def test_batches_are_one():
    prompts, values = torch.tensor([0, 0, 1, 1, 2]), torch.arange(10.0).view(5, 2) ** 2
    metric = PromptMean()
    for rows in (slice(0, 3), slice(3, 3), slice(3, 5)):
        metric.update(prompts[rows], values[rows])
    for ours, expected in zip(metric.compute(), prompt_mean(prompts, values), strict=True):
        assert torch.equal(ours, expected)
