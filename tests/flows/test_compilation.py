"""`flow.compile`: the same velocities and gradients, and no graph after the first epoch.

What Dynamo captures, and when it captures anew, does not depend on the backend: quick tests take one that needs no C++
compiler. The slow ones take TorchInductor, as a run does.
"""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from lightning_fdfo import Batching, FDFOModule, Objective, Sampling
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, compilation
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.training.bind import bind
from tests.conftest import ToyFlow, brightness
from tests.flows.conftest import BY_NAME

RANK = LoRA(rank=2, alpha=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # Dynamo's own look at a block's inputs
)


@pytest.fixture(autouse=True)
def dynamo():
    """Without what earlier tests have captured; a function with too many graphs fails, and does not run uncompiled."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def captured(monkeypatch):
    """Captured as for a run, then computed by PyTorch's own kernels."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")


def bound(case, folder, lora=RANK, **options):
    """A flow whose LoRA has left its start."""
    flow = case.flow(folder, **options)
    flow.load()
    bind(flow, lora, None, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in flow.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 32)
    return flow


def velocity(flow, case, rows):
    latents = torch.randn(rows, *flow.latent_shape(*case.size), generator=torch.Generator().manual_seed(rows))
    return flow.velocity(latents, torch.linspace(0.9, 0.3, rows), flow.encode(["a cat"] * rows))


def gradient(flow, value):
    trained = [parameter for parameter in flow.transformer.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value.square().mean(), trained, allow_unused=True)
    return torch.cat([each.flatten() for each in gradients if each is not None])


def is_close(one, other):
    return bool((one - other).norm() < 1e-5 * other.norm())


def check_the_same(case, folder, how, rollouts=(4, 3), **options):
    """In a rollout, in training, and as the base model."""
    plain, compiled = (bound(case, folder, compile=each, **options) for each in ("none", how))
    assert list(compiled.transformer.state_dict()) == list(plain.transformer.state_dict())
    for rows in rollouts:
        with torch.no_grad():
            assert is_close(*(velocity(flow, case, rows) for flow in (compiled, plain)))
    values = [velocity(flow, case, 3) for flow in (compiled, plain)]
    assert is_close(*(value.detach() for value in values))
    assert is_close(*(gradient(flow, value) for flow, value in zip((compiled, plain), values, strict=True)))
    for flow in (compiled, plain):
        flow.transformer.disable_adapters()
    with torch.no_grad():
        base = [velocity(flow, case, 3) for flow in (compiled, plain)]
    assert is_close(*base)
    assert not is_close(base[1], values[1].detach())
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("captured")
def test_velocities_and_gradients_are_the_same(folder_of):
    check_the_same(BY_NAME["flux dev"], folder_of("flux dev"), "regional", rollouts=())
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("how", ["regional", "full"])
def test_velocities_and_gradients_are_the_same_in_every_family(representative, how, folder_of):
    check_the_same(representative, folder_of(representative.name), how)


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("name", ["sd3", "flux dev"])
def test_with_checkpointing_and_a_kernel_by_name_they_are_too(name, how, folder_of):
    check_the_same(BY_NAME[name], folder_of(name), how, gradient_checkpointing=True, attention="_native_math")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("name", ["flux dev", "sd3"])
def test_compiled_by_inductor_they_are_too(name, how, folder_of):
    check_the_same(BY_NAME[name], folder_of(name), how)


class Graphs(Callback):
    """How many graphs there are after each epoch, with all that is done at its end."""

    def __init__(self):
        self.at_start = {}

    def on_rollout_batch_start(self, trainer, pl_module):
        self.at_start.setdefault(trainer.current_epoch, counters["stats"]["unique_graphs"])

    def after_epochs(self):
        starts = [self.at_start[epoch] for epoch in sorted(self.at_start)]
        assert starts[0] == 0
        return [*starts[1:], counters["stats"]["unique_graphs"]]


def fit_some_epochs(fit, flow, lora, **options):
    """Rollout chunks of 3 pairs and of 1, batches of 4 points, the base model for drift and divergence."""
    graphs = Graphs()
    module = FDFOModule(
        flow,
        {"brightness": RewardTerm(brightness)},
        sampling=Sampling(num_steps=2, churn=0.1, **options),
        batching=Batching(num_pairs=4, updates_per_epoch=1, batch_size=4, rollout_batch_size=3),
        objective=Objective(kl_weight=0.1),
        lora=lora,
    )
    trainer = fit(module, 3, callbacks=[graphs])
    assert trainer.global_step == 3
    return graphs.after_epochs()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of rms_norm, compiled or not
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_after_the_first_epoch_nothing_is_compiled(precision, fit, folder_of):
    case = BY_NAME["flux dev"]
    flow = case.flow(folder_of(case.name), compile="regional")
    first, *later = fit_some_epochs(
        lambda *args, **options: fit(*args, **options, precision=precision),
        flow,
        RANK,
        height=case.size[0],
        width=case.size[1],
    )
    assert first > 0
    assert later == [first, first]


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("lora", [RANK, LoRA(rank=2, dropout=0.1)], ids=["lora", "dropout"])
def test_nor_with_three_kinds_of_blocks(how, lora, fit):
    """More graphs of a function than PyTorch's own limit: behind it training would run uncompiled."""
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0, compile=how)
    first, *later = fit_some_epochs(fit, flow, lora, height=32, width=64)
    assert first > (8 if how == "regional" else 0)
    assert later == [first, first]


@pytest.mark.parametrize("how", ["none", "regional", "full"])
def test_what_is_compiled(how, loaded_flow):
    flow = copy.deepcopy(loaded_flow("sd3"))
    flow.compilation = how
    flow.compile_transformer()
    compiled = [name for name, module in flow.transformer.named_modules() if module._compiled_call_impl is not None]
    blocks = [f"transformer_blocks.{number}" for number in range(len(flow.blocks))]
    assert compiled == {"none": [], "regional": blocks, "full": [""]}[how]


def test_off_by_default_and_none_of_a_flow_without_it():
    assert StableDiffusion3("tiny-digits").compilation == "none"
    flow = ToyFlow()
    flow.load()
    flow.compile_transformer()
    assert flow.transformer._compiled_call_impl is None


def test_another_word_is_refused():
    with pytest.raises(ConfigurationError, match=r"^flow.compile: expected one of none, regional, full, got 'yes'"):
        StableDiffusion3("tiny-digits", compile="yes")


def test_regional_without_repeated_blocks_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr(StableDiffusion3, "block_names", ())
    with pytest.raises(ConfigurationError, match=r"StableDiffusion3 has none \(block_names\); expected full or none$"):
        StableDiffusion3("tiny-digits", compile="regional").validate()
    StableDiffusion3("tiny-digits", compile="full").validate()


@pytest.mark.parametrize("how", ["regional", "full"])
def test_without_a_compiler_it_is_refused_before_anything_loads(how):
    message = rf"^flow.compile: {how} needs a C\+\+ compiler, .* install g\+\+"
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigurationError, match=message),
    ):
        StableDiffusion3("tiny-digits", compile=how).validate()
    StableDiffusion3("tiny-digits").validate()


def test_on_a_cuda_device_without_triton_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"^flow.compile: full needs Triton for a CUDA device: pip install"):
        StableDiffusion3("tiny-digits", compile="full").validate()
