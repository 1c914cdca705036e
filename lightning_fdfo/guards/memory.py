"""An estimate of a run's memory: on the device that trains, plus CPU memory for the stored rollout.

    device = weights + training state + VAE + activations of one training forward
    CPU    = an epoch's rollout

Estimates to choose a batch size by. The allocator's slack, a library's workspace, the rewards' models and the moment
in which texts are encoded come on top. Attention is taken to be fused: no tokens x tokens matrix is kept.
"""

from __future__ import annotations

FLOAT32 = 4
BRANCHES, PER_BRANCH = 2, 3
"""Of a pair; tensors of a branch's size: final latents, half differences, directions."""
VALUES_A_BLOCK = 34
"""Numbers a token and a unit of width that a block keeps for its backward pass: a rule of thumb for training a LoRA.
Counted on a small SD3: 14 in float32, 21 in mixed precision; to train the whole transformer, 25 and 48."""
VALUES_A_WEIGHT = 4
"""What trains, its gradient, and AdamW's two moments."""


def weight_bytes(parameters: int, bytes_per_weight: float) -> int:
    """Frozen weights: parameters * bytes_per_weight.

    Args:
        parameters: their number.
        bytes_per_weight: 4 in float32, 2 in bfloat16, 1 in int8, 0.5 in nf4 (whose scales, about 0.016, are left out).

    Example:
        >>> from lightning_fdfo.files import format_bytes
        >>> format_bytes(weight_bytes(12_000_000_000, 2)), format_bytes(weight_bytes(12_000_000_000, 0.5))
        ('22.4 GiB', '5.6 GiB')
    """
    return round(parameters * bytes_per_weight)


def training_state_bytes(trainable: int) -> int:
    """What trains, with gradient and AdamW's two moments, all in float32: 16 * trainable.

    Args:
        trainable: number of weights that train.

    Example:
        >>> from lightning_fdfo.files import format_bytes
        >>> training_state_bytes(1000)
        16000
    """
    return FLOAT32 * VALUES_A_WEIGHT * trainable


def activation_bytes(
    num_blocks: int, points: int, tokens: int, width: int, bytes_per_value: int = 2, checkpointing: bool = True
) -> int:
    """What one training forward keeps for its backward pass.

        with checkpointing: (num_blocks + 34) * points * tokens * width * bytes_per_value
        without:             num_blocks * 34  * points * tokens * width * bytes_per_value

    With checkpointing each block's input is stored, and one block at a time is computed again, with all its own values.

    Args:
        num_blocks: of the transformer.
        points: of the batch; twice as many with classifier-free guidance.
        tokens: of an image and its text together, where both go through the blocks.
        width: of a token.
        bytes_per_value: 2 in bfloat16 and in mixed precision, 4 in float32.
        checkpointing: whether gradient checkpointing is on.

    Example:
        >>> from lightning_fdfo.files import format_bytes
        >>> format_bytes(activation_bytes(24, 8, 1229, 1536))
        '1.6 GiB'
        >>> format_bytes(activation_bytes(24, 8, 1229, 1536, checkpointing=False))
        '23.0 GiB'
    """
    kept = num_blocks + VALUES_A_BLOCK if checkpointing else num_blocks * VALUES_A_BLOCK
    return kept * points * tokens * width * bytes_per_value


def added_latents(points_per_pair: int, gradient_terms: int, algorithm: bool) -> int:
    """Latents of a pair in float32 that an epoch keeps beside FDFO's own, at its peak.

        2 * (2 * gradient_terms + 4)        with terms that train by their gradient: it, its pull, and four of the sum
        5 * points_per_pair                 with another algorithm: its targets, and what they are made of

    Example:
        >>> added_latents(80, gradient_terms=1, algorithm=False), added_latents(4, gradient_terms=0, algorithm=True)
        (12, 20)
    """
    gradients = BRANCHES * (2 * gradient_terms + 4) if gradient_terms else 0
    return gradients + (5 * points_per_pair if algorithm else 0)


def rollout_bytes(
    pairs: int,
    points_per_pair: int,
    latent_numel: int,
    conditioning_bytes: int,
    velocity_bytes: int = FLOAT32,
    added: int = 0,
) -> int:
    """An epoch's rollout on the CPU: each point's latents and velocity, and three tensors of a branch.

        pairs * (points_per_pair * (4 + velocity_bytes) + 2 * 3 * 4 + 4 * added) * latent_numel
            + pairs * conditioning_bytes

    The three are the final latents, their half differences, and the directions.

    Args:
        pairs: on this device.
        points_per_pair: that are trained on; at most 2T, two branches of T steps.
        latent_numel: numbers of one latent.
        conditioning_bytes: of one prompt's conditioning, which both branches share.
        velocity_bytes: of a number of a velocity, see `sampling.store`.
        added: latents of a pair that gradients or another algorithm keep, see `added_latents`.

    Example:
        >>> from lightning_fdfo.files import format_bytes
        >>> sizes = {"latent_numel": 16 * 64 * 64, "conditioning_bytes": 1_683_456}
        >>> format_bytes(rollout_bytes(pairs=54, points_per_pair=80, **sizes))
        '2.3 GiB'
        >>> format_bytes(rollout_bytes(pairs=54, points_per_pair=10, **sizes))
        '437.7 MiB'
    """
    numbers = points_per_pair * (FLOAT32 + velocity_bytes) + (BRANCHES * PER_BRANCH + added) * FLOAT32
    return pairs * (numbers * latent_numel + conditioning_bytes)
