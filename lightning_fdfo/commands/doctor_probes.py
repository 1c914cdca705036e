"""What the doctor tries with a loaded model: one pair is rolled out, scored, and trained on without a step.

Each probe looks at one thing and gives a finding: what it saw, and whether training can work with that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lightning_fdfo.files import format_bytes
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.guards import memory
from lightning_fdfo.guards.capacity import gradient_terms
from lightning_fdfo.guards.silent_rewards import nothing_learned
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.objective import half_differences, normalize_difference, velocity_objective
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.against import terms_that_validate
from lightning_fdfo.reward.function import as_reward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.pairs import Rollout, start_rollout
from lightning_fdfo.rollout.plan import BatchPlan
from lightning_fdfo.rollout.points import PairPoints, TrajectoryPoints, allocate_points, deal_points
from lightning_fdfo.rollout.scores import gather, weigh
from lightning_fdfo.settings import Sampling
from lightning_fdfo.training.trained_state import trainable


class Finding(NamedTuple):
    """What a probe saw."""

    ok: bool
    """whether training can work with it"""
    text: str
    """one line for the user"""


def examine(module: FDFOModule, prompt: Prompt) -> Iterator[Finding]:
    """Rolls out one pair, and looks at all that training would make of it.

    Args:
        module: attached to a trainer, its model loaded.
        prompt: of the pair.
    """
    module.to_device()
    with module.trainer.precision_plugin.forward_context():
        yield _what_trains(module)
        conditioning = module.rollout_loader([prompt]).encode([prompt])
        yield _rollout_size(module, conditioning)
        yield _memory(module, conditioning)
        rewards = _without_people(module)
        yield _without_churn(module, rewards, prompt, conditioning)
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
        rollout = _pair(module, rewards, prompt, conditioning, module.sampling)
        yield _churn(module, rollout)
        yield from _scores(module, rollout)
        if set(rewards.terms) == set(module.rewards.terms):
            yield from _teaches(module, rollout)
        points = _points(module, rollout)
        yield _replay(module, points)
        yield _gradient(module, points)
    if module.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(module.device)
        yield Finding(True, f"while one pair was rolled out and trained on, {format_bytes(peak)} were taken at most")


def _what_trains(module: FDFOModule) -> Finding:
    count = f"{sum(parameter.numel() for parameter in trainable(module).values()):,} weights train".replace(",", " ")
    if module.lora is None:
        return Finding(True, f"the whole transformer: {count}")
    layers = {name.split(".lora_")[0] for name, p in module.flow.named_parameters() if p.requires_grad}
    return Finding(bool(layers), f"LoRA of rank {module.lora.rank} bound {len(layers)} layers: {count}")


def _without_people(module: FDFOModule) -> RewardMix:
    """The rewards that can be tried here: a `PairReward` that does not validate judges in training alone."""
    judges = set(module.rewards.pair_terms) - set(terms_that_validate(module.rewards))
    if not judges:
        return module.rewards
    left = {name: term for name, term in module.rewards.terms.items() if name not in judges}
    rewards = RewardMix(left or {"none": RewardTerm(lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)), 0.0)})
    rewards.setup(module.device)
    return rewards


def _pair(
    module: FDFOModule, rewards: RewardMix, prompt: Prompt, conditioning: Conditioning, sampling: Sampling
) -> Rollout:
    return start_rollout(
        module.flow,
        rewards,
        [prompt],
        conditioning,
        [0],
        _all_points(module, sampling),
        seed=module.seed,
        epoch=0,
        sampling=sampling,
        device=module.device,
    ).result()


def _all_points(module: FDFOModule, sampling: Sampling) -> PairPoints:
    shape = module.flow.latent_shape(sampling.height, sampling.width)
    steps = sampling.num_steps
    return allocate_points([0], steps, 2 * steps, shape, seed=module.seed, epoch=0, store=sampling.store_dtype)


def _without_churn(module: FDFOModule, rewards: RewardMix, prompt: Prompt, conditioning: Conditioning) -> Finding:
    sampling = replace(module.sampling, churn=0.0, initial_churn=0.0, num_steps=min(4, module.sampling.num_steps))
    ends = _pair(module, rewards, prompt, conditioning, sampling).points.ends
    largest = half_differences(ends).abs().max().item()
    text = f"without churn the two latents of a pair differ by at most {largest:.2g}"
    if largest <= 1e-3 * ends.abs().mean().item():
        return Finding(True, text)
    return Finding(
        False, f"{text}: the velocity is not a function of its arguments; is a dropout on in the transformer?"
    )


def _churn(module: FDFOModule, rollout: Rollout) -> Finding:
    difference = half_differences(rollout.points.ends).square().mean().sqrt().item()
    size = rollout.points.ends.square().mean().sqrt().item()
    text = (
        f"with churn {module.sampling.churn} they differ by {difference / size:.1%} (root mean square, half difference)"
    )
    enough = difference > 1e-6 * size  # less is rounding
    return Finding(enough, text if enough else f"{text}: sampling.churn must be above 0")


def _scores(module: FDFOModule, rollout: Rollout) -> Iterator[Finding]:
    """A reward that raises ends the examination with its own message."""
    for name in module.rewards.terms.keys() - rollout.scores.keys():
        yield Finding(True, f"{name}: not tried, it judges in training alone")
    for name, (scores, _, routed, _) in rollout.scores.items():
        if name not in module.rewards.terms:  # what stands in where there is nothing else
            continue
        if not routed.any():
            yield Finding(True, f"{name}: not tried, the first prompt's rewards do not name it")
            continue
        low, high = as_reward(module.rewards.terms[name].reward).range
        given = ", ".join(f"{score:.4g}" for score in scores.tolist())
        slack = 1e-4 * (1 + scores.abs())
        ok = bool(scores.isfinite().all() and (scores >= low - slack).all() and (scores <= high + slack).all())
        yield Finding(ok, f"{name}: {given} for two images; its range is {low:g} … {high:g}")


def _teaches(module: FDFOModule, rollout: Rollout) -> Iterator[Finding]:
    """What `fit` would report of an epoch of this one pair; a tie is no fault yet, other pairs may differ."""
    endpoint_difference = half_differences(rollout.points.ends)
    gathered = gather(rollout, endpoint_difference, 1, lambda sums: sums)
    found = nothing_learned(weigh(gathered, list(rollout.prompts), module.rewards, 0), module.rewards, 0)
    yield from (Finding(True, f"in this one pair: {text}") for _, text in found)


def _points(module: FDFOModule, rollout: Rollout) -> TrajectoryPoints:
    """A batch as training has it, of this one pair's points, some of them several times if need be."""
    num_steps = module.sampling.num_steps
    plan = BatchPlan.derive(
        num_pairs=1, updates_per_epoch=1, num_steps=num_steps, num_points_per_pair=None, batch_size=2 * num_steps,
        world_size=1,
    )  # fmt: skip
    endpoint_difference = half_differences(rollout.points.ends)
    (batch,) = deal_points(
        rollout.points,
        rollout.sigmas,
        rollout.conditioning,
        normalize_difference(endpoint_difference, module.objective.normalization),
        torch.tensor([1.0, -1.0]),
        plan,
    )
    rows = torch.arange(module.plan.batch_size) % (2 * num_steps)
    chosen: list[Any] = [values[rows].to(module.device) for values in batch if values is not None]
    return TrajectoryPoints(*chosen)


def _replay(module: FDFOModule, points: TrajectoryPoints) -> Finding:
    """The ratio is what training sees of a difference: it must stay well inside the clip range."""
    with torch.no_grad():
        velocity = module.velocity(points)
    ratio = velocity_objective(velocity, points.old_velocity, points.direction, points.reward_difference).ratio
    largest = (velocity - points.old_velocity).abs().max().item()
    off = (ratio - 1).abs().max().item()
    text = (
        f"replayed in {module.trainer.precision}, the velocity of {len(velocity)} stored points differs from the "
        f"rollout's by at most {largest:.2g}: ratios leave 1 by {off:.2g}, clip_range is {module.objective.clip_range}"
    )
    return Finding(off <= module.objective.clip_range / 10, text)


def _gradient(module: FDFOModule, points: TrajectoryPoints) -> Finding:
    """By autograd.grad: no gradient is left behind, and no strategy's hooks are called."""
    loss, _ = velocity_objective(
        module.velocity(points), points.old_velocity, points.direction, points.reward_difference
    )
    parameters = list(trainable(module).values())
    gradients = [
        gradient for gradient in torch.autograd.grad(loss.mean(), parameters, allow_unused=True) if gradient is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
    reached = f"{len(gradients)} of {len(parameters)} tensors"
    text = f"a batch of {len(loss)} points gives a gradient of norm {norm:.3g} to {reached}"
    return Finding(0 < norm < float("inf"), text)


def _rollout_size(module: FDFOModule, conditioning: Conditioning) -> Finding:
    sampling, plan = module.sampling, module.plan
    latent = torch.Size(module.flow.latent_shape(sampling.height, sampling.width)).numel()
    row = sum(tensor[0].nbytes for tensor in conditioning.tensors.values())
    points, store = plan.points_per_pair, sampling.store_dtype.itemsize
    added = memory.added_latents(points, gradient_terms(module), module.algorithm is not None)
    size = memory.rollout_bytes(plan.pairs_per_device, points, latent, row, store, added)
    return Finding(True, f"an epoch's rollout takes {format_bytes(size)} of main memory, for each device")


def _memory(module: FDFOModule, conditioning: Conditioning) -> Finding:
    """The estimate, held against what a CUDA device has."""
    parts = estimate(module, conditioning)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    text = f"estimated memory of a device, rewards left out: {format_bytes(total)} ({listed})"
    if module.device.type != "cuda":
        return Finding(True, text)
    available = torch.cuda.get_device_properties(module.device).total_memory
    return Finding(total <= available, f"{text}, of {format_bytes(available)}")


def estimate(module: FDFOModule, conditioning: Conditioning) -> dict[str, int]:
    """Bytes on a device by what takes them, while training; for a flow of diffusers.

    Args:
        module: loaded.
        conditioning: of one prompt.
    """
    training = list(trainable(module).values())
    trained = {id(parameter) for parameter in training}
    frozen = [p for p in module.flow.transformer.parameters() if id(p) not in trained]
    parts = {
        "frozen weights": sum(p.nbytes for p in frozen),
        "what trains": memory.training_state_bytes(sum(p.numel() for p in training)),
    }
    if isinstance(module.flow, DiffusersFlow):
        pipeline = module.flow.pipeline
        parts["VAE"] = sum(p.nbytes for p in pipeline.vae.parameters())
        if module.flow.text_encoders == "keep":
            parts["text encoders"] = sum(p.nbytes for part in module.flow.text_modules for p in part.parameters())
        sampling = module.sampling
        parts["activations of a batch"] = memory.activation_bytes(
            len(module.flow.blocks),
            module.plan.batch_size * (2 if module.flow.uses_negatives(sampling.guidance_scale) else 1),
            module.flow.num_tokens(sampling.height, sampling.width, conditioning),
            module.flow.width,
            bytes_per_value=4 if module.trainer.precision == "32-true" else 2,
            checkpointing=module.flow.gradient_checkpointing,
        )
    return parts
