"""The arithmetic of memory, against counts made another way: real tensors' bytes, and plain sums."""

import pytest
import torch

from lightning_fdfo import LoRA, Sampling
from lightning_fdfo.files import format_bytes
from lightning_fdfo.flows import StableDiffusion3
from lightning_fdfo.flows.generate import encode_prompts
from lightning_fdfo.flows.lora_files import add_lora
from lightning_fdfo.flows.quantization import BYTES
from lightning_fdfo.guards.memory import activation_bytes, rollout_bytes, training_state_bytes, weight_bytes
from lightning_fdfo.objective import half_differences, normalize_difference
from lightning_fdfo.prompts import Prompt
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.rollout.pairs import start_rollout
from lightning_fdfo.rollout.points import allocate_points
from tests.conftest import brightness

NUM_PAIRS, NUM_STEPS = 3, 5


@pytest.fixture(scope="module")
def flow():
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    return flow


@pytest.mark.parametrize(("num_points", "store"), [(10, torch.float32), (2, torch.float32), (10, torch.bfloat16)])
def test_a_rollout_at_rest_takes_what_it_is_said_to_take(flow, num_points, store):
    sampling = Sampling(num_steps=NUM_STEPS, height=32, width=64)
    prompts = [Prompt(f'"{number}" in red', "", {}, "") for number in range(NUM_PAIRS)]
    conditioning = encode_prompts(flow, prompts, 1.0, NUM_PAIRS)
    shape = flow.latent_shape(32, 64)
    points = allocate_points(range(NUM_PAIRS), NUM_STEPS, num_points, shape, seed=0, epoch=0, store=store)
    rollout = start_rollout(
        flow,
        RewardMix({"brightness": RewardTerm(brightness)}),
        prompts,
        conditioning,
        range(NUM_PAIRS),
        points,
        seed=0,
        epoch=0,
        sampling=sampling,
        device=torch.device("cpu"),
    ).result()
    difference = half_differences(rollout.points.ends)
    tensors = [points.latents, points.velocities, points.ends, difference, normalize_difference(difference)]
    tensors += rollout.conditioning.tensors.values()
    row = sum(tensor[0].nbytes for tensor in rollout.conditioning.tensors.values())
    size = rollout_bytes(NUM_PAIRS, num_points, torch.Size(shape).numel(), row, store.itemsize)
    assert sum(tensor.nbytes for tensor in tensors) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights(flow, dtype):
    tensors = [torch.empty(p.shape, dtype=dtype) for p in flow.transformer.parameters()]
    number = sum(tensor.numel() for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == weight_bytes(number, dtype.itemsize)


def test_quantised_weights():
    assert [weight_bytes(1000, BYTES[name]) for name in ("nf4", "int8", "int8_torchao")] == [500, 1000, 1000]


def test_what_trains_takes_itself_its_gradient_and_two_moments():
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    add_lora(flow, LoRA(rank=4), seed=0)
    trainable = [p for p in flow.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = sum(t.nbytes for p in trainable for t in (p, p.grad)) + sum(t.nbytes for t in moments)
    assert held == training_state_bytes(sum(p.numel() for p in trainable))


def kept_values(mixed, checkpointing):
    """Of a forward with a LoRA: what autograd keeps beside weights, in units of points x tokens x width values."""
    dtype = "bfloat16" if mixed else "float32"
    flow = StableDiffusion3("tiny-digits", dtype, max_sequence_length=0, gradient_checkpointing=checkpointing)
    flow.load()
    add_lora(flow, LoRA(rank=8, alpha=16), seed=0)
    conditioning = flow.encode(['"427" in red'] * 4)
    weights = {p.untyped_storage().data_ptr() for p in flow.transformer.parameters()}
    alive = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    latents = torch.randn(4, *flow.latent_shape(32, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        velocity = flow.velocity(latents, torch.tensor(0.5), conditioning)
    assert velocity.requires_grad
    config = flow.transformer.config
    tokens = (latents[0, 0].numel() // config.patch_size**2) + conditioning.tensors["prompt_embeds"].shape[1]
    values = 4 * tokens * config.num_attention_heads * config.attention_head_dim
    return sum(size for size, _ in alive.values()) / (values * (2 if mixed else 4)), len(flow.blocks)


@pytest.mark.parametrize("mixed", [False, True])
def test_activations_are_what_a_transformer_keeps(mixed):
    """The rule of thumb never says too little for a LoRA, and at most two and a half times too much."""
    unit = {"points": 1, "tokens": 1, "width": 1, "bytes_per_value": 1}
    kept, num_blocks = kept_values(mixed, checkpointing=False)
    said = activation_bytes(num_blocks, **unit, checkpointing=False)
    assert kept <= said <= 2.5 * kept
    inputs, _ = kept_values(mixed, checkpointing=True)
    assert inputs + kept / num_blocks <= activation_bytes(num_blocks, **unit) <= 2.5 * (inputs + kept / num_blocks)


def test_activations_grow_as_they_should():
    once = activation_bytes(10, 1, 100, 64)
    assert once == (10 + 34) * 100 * 64 * 2
    assert activation_bytes(10, 3, 100, 64) == 3 * once
    assert activation_bytes(10, 1, 100, 64, bytes_per_value=4) == 2 * once
    assert activation_bytes(10, 1, 100, 64, checkpointing=False) == 10 * 34 * 100 * 64 * 2


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (80 * 1024**3, "80.0 GiB"), (3 * 1024**5, "3072.0 TiB")],
)
def test_bytes_for_people(size, text):
    assert format_bytes(size) == text
