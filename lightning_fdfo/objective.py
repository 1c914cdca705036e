"""Finite differences of a pair, and the velocity objective: the method's mathematics, together with sampling.py.

Two branches of one prompt end in two images. Their rewards differ by a little, and so do the images; one over the
other is the slope of the reward between them. The objective moves the velocity against the direction in image space
along which the reward rises: a velocity points from image to noise, so the image moves toward the better one.

Every function is pure. Only `half_differences` and `score_differences` look at pairs: rows 2i and 2i+1 are pair i.
They and `normalize_difference` return a row for each row that they get; `velocity_objective` and `velocity_divergence`
return one number per sample, of which `training/step.py` takes the mean. mean() in a formula is over all axes but the
batch. No gradient of the reward is needed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Normalization = Literal["mean_square", "root_mean_square"]


class VelocityObjective(NamedTuple):
    """The objective, sample by sample."""

    loss: Tensor
    """[B], float32"""
    ratio: Tensor
    """[B], float32, > 0; 1 on policy"""


def half_differences(values: Tensor) -> Tensor:
    """Own minus partner's, halved.

        d_i = (values_i - values_j) / 2        j is i's partner

    Args:
        values: [2P, ...], rewards or end latents.

    Returns:
        [2P, ...]; the two rows of a pair sum to zero.

    Raises:
        ValueError: an odd number of rows.

    Example:
        >>> import torch
        >>> half_differences(torch.tensor([3.0, 1.0, 0.0, 4.0]))
        tensor([ 1., -1., -2.,  2.])
    """
    if values.shape[0] % 2:
        raise ValueError(f"expected rows 2i and 2i+1 of pair i, an even number, got {values.shape[0]} rows")
    pairs = values.reshape(-1, 2, *values.shape[1:])
    return ((pairs - pairs.flip(1)) / 2).reshape(values.shape)


def score_differences(scores: Tensor) -> Tensor:
    """Half differences of a pair's scores, [2P], float32: subtracted in float64, on the CPU, and rounded once.

    For scores that are float32 themselves it is float32's own subtraction, bit for bit: 53 bits are more than twice 24.

    Example:
        >>> import torch
        >>> score_differences(torch.tensor([1e8 + 1, 1e8 + 2], dtype=torch.float64))
        tensor([-0.5000,  0.5000])
    """
    return half_differences(scores.double()).float()


def normalize_difference(
    endpoint_difference: Tensor, normalization: Normalization = "mean_square", *, eps: float = 1e-6
) -> Tensor:
    """The direction from a pair's middle to each of its images: their half difference, scaled.

        mean_square:       d / (mean(d^2) + eps)
        root_mean_square:  d / sqrt(mean(d^2) + eps)

    With `mean_square`, reward_difference * direction is a secant estimate of N times the reward's gradient at the
    image (N numbers in an image): it has the right size whatever the distance of the pair. With `root_mean_square`
    it keeps only the reward's own scale, which is steadier where rewards are noisy.

    Args:
        endpoint_difference: d, [2P, ...], half differences of the final latents.
        normalization: as above; `mean_square` is what was published.
        eps: > 0; a pair of equal images gets the direction 0.

    Returns:
        [2P, ...], float32.

    Raises:
        ValueError: another normalization.

    Example:
        >>> import torch
        >>> normalize_difference(torch.tensor([[3.0, 4.0]]), eps=0.0)
        tensor([[0.2400, 0.3200]])
        >>> normalize_difference(torch.tensor([[3.0, 4.0]]), "root_mean_square", eps=0.0)
        tensor([[0.8485, 1.1314]])

    Source: arXiv 2603.12893.
    """
    difference = endpoint_difference.float()
    mean_square = _mean(difference**2) + eps
    if normalization not in ("mean_square", "root_mean_square"):
        raise ValueError(f"expected normalization 'mean_square' or 'root_mean_square', got {normalization!r}")
    scale = mean_square if normalization == "mean_square" else mean_square.sqrt()
    return difference / scale.reshape(-1, *[1] * (difference.ndim - 1))


def add_gradient(
    direction: Tensor, reward_difference: Tensor, gradient: Tensor, distance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adds an exact gradient to the pull of a pair's finite difference.

        pull               = reward_difference * direction + scale * gradient
        direction_         = pull / reward_difference_
        reward_difference_ = sign(reward_difference) * rms(pull) / rms(direction)        sign(0) = 1

    The secant's pull, reward_difference * direction, is what the gradient itself is on average, where pairs differ in
    all directions alike: E[d d^T / mean(d^2)] = identity for half differences d. So with `mean_square` the scale is 1;
    with `root_mean_square` a pull is rms(d) times as long, and so is the gradient's. Written as a difference and a
    direction of the same size and sign as before, it means the same to `velocity_objective`; without a gradient, all
    stays as it was.

    Args:
        direction: [2P, ...], of `normalize_difference`.
        reward_difference: [2P], half difference of the rewards that train by theirs.
        gradient: [2P, ...], of the rewards that train by theirs, at the final latents.
        distance: [2P], rms(d), with `root_mean_square`; None with `mean_square`.

    Returns:
        direction_ [2P, ...], reward_difference_ [2P], float32. Where the images of a pair are equal, direction_
        has the size 1.

    Example:
        >>> import torch
        >>> add_gradient(torch.tensor([[3.0, 4.0]]), torch.tensor([0.0]), torch.tensor([[0.0, 2.0]]))
        (tensor([[0., 5.]]), tensor([0.4000]))
    """
    per_row = (-1, *[1] * (direction.ndim - 1))
    scale = 1.0 if distance is None else distance.float().reshape(per_row)
    pull = reward_difference.float().reshape(per_row) * direction.float() + scale * gradient.float()
    length, size = _mean(pull**2).sqrt(), _mean(direction.float() ** 2).sqrt()
    sign = (reward_difference >= 0).float() * 2 - 1
    difference = sign * length / size.where(size > 0, 1.0)
    return pull / difference.where(difference != 0, 1.0).reshape(per_row), difference


def velocity_objective(
    velocity: Tensor,
    old_velocity: Tensor,
    direction: Tensor,
    reward_difference: Tensor,
    *,
    clip_range: float = 0.03,
) -> VelocityObjective:
    """The loss of a velocity against the rollout's, with a quadratic penalty for moving far.

        delta     = velocity - old_velocity
        log_ratio = -mean(delta^2) - 2 * mean(delta * direction)
        ratio     = exp(log_ratio)
        loss      = -r * ratio + |r| / (2 * clip_range) * (ratio - 1)^2        r = reward_difference

    log_ratio is mean((old_velocity - target)^2) - mean((velocity - target)^2) for target = old_velocity - direction,
    multiplied out, so that close pairs lose no digits. On policy (delta = 0) the gradient is

        d loss / d velocity = (2 / N) * r * direction        N = numbers in a sample

    and its minimum for a fixed direction lies at ratio = 1 + clip_range * sign(r): a ratio further out is pulled back.

    Args:
        velocity: [B, ...], the model's now, with gradient.
        old_velocity: [B, ...], the rollout's.
        direction: [B, ...], of `normalize_difference`.
        reward_difference: [B], half difference of the rewards.
        clip_range: > 0.

    Returns:
        VelocityObjective(loss [B], ratio [B]), float32.

    Raises:
        ValueError: shapes that do not go together, which broadcasting would hide.

    Example:
        >>> import torch
        >>> v = torch.zeros(1, 2, requires_grad=True)
        >>> loss, ratio = velocity_objective(v, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.tensor([0.5]))
        >>> ratio.item(), loss.item()
        (1.0, -0.5)
        >>> torch.autograd.grad(loss.sum(), v)[0]
        tensor([[ 0.5000, -0.5000]])

    Source: arXiv 2603.12893; the quadratic penalty is that of simple policy optimization (arXiv 2401.16025).
    """
    _check_shapes(velocity, old_velocity, direction, reward_difference)
    delta = velocity.float() - old_velocity.float()
    log_ratio = -_mean(delta**2) - 2 * _mean(delta * direction.float())
    ratio = log_ratio.exp()
    reward_difference = reward_difference.float()
    penalty = reward_difference.abs() / (2 * clip_range) * (ratio - 1) ** 2
    return VelocityObjective(penalty - reward_difference * ratio, ratio)


def _check_shapes(velocity: Tensor, old_velocity: Tensor, direction: Tensor, reward_difference: Tensor) -> None:
    shape = velocity.shape
    if old_velocity.shape == direction.shape == shape and reward_difference.shape == shape[:1]:
        return
    raise ValueError(
        f"expected velocity, old_velocity and direction of one shape [B, ...] and reward_difference [B], got velocity "
        f"{list(shape)}, old_velocity {list(old_velocity.shape)}, direction {list(direction.shape)} and "
        f"reward_difference {list(reward_difference.shape)}"
    )


def velocity_divergence(velocity: Tensor, base_velocity: Tensor) -> Tensor:
    """How far the velocity has left the base model's: mean((v - v_base)^2), [B], float32, >= 0.

    Raises:
        ValueError: the two have different shapes, which broadcasting would hide.

    Example:
        >>> import torch
        >>> velocity_divergence(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor([5.])
    """
    if velocity.shape != base_velocity.shape:
        raise ValueError(
            f"expected velocity and base_velocity of one shape [B, ...], got velocity {list(velocity.shape)} and "
            f"base_velocity {list(base_velocity.shape)}"
        )
    return _mean((velocity.float() - base_velocity.float()) ** 2)


def _mean(values: Tensor) -> Tensor:
    """The mean over all but the batch: [B, ...] -> [B]."""
    return values.flatten(1).mean(dim=1) if values.ndim > 1 else values
