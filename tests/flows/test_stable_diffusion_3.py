"""StableDiffusion3: golden numbers through it, and what plain diffusers does with the same model."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import StableDiffusion3, resolve_pretrained
from lightning_fdfo.flows.conditioning import Conditioning
from lightning_fdfo.flows.lora import LoRA
from lightning_fdfo.flows.lora_files import add_lora, save_lora
from lightning_fdfo.objective import half_differences, normalize_difference, velocity_objective
from lightning_fdfo.sampling import sample, sample_pairs
from tests import golden_case

PROMPTS = ['"427" in red', '"1234" in blue']


@pytest.fixture(params=golden_case.NAMES)
def golden(request):
    return golden_case.load(request.param)


def golden_flow(golden):
    """The family around the golden transformer."""
    flow = StableDiffusion3("golden/numbers")
    flow.transformer = SD3Transformer2DModel.from_config(golden.settings["transformer_config"])
    flow.transformer.load_state_dict(golden.group("transformer."))
    flow.transformer.requires_grad_(False).eval()
    return flow


def golden_conditioning(golden, rows):
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    return Conditioning({name: golden.tensors[name] for name in names})[rows]


def assert_close(actual, expected, relative):
    error = (actual - expected).norm() / expected.norm()
    assert error < relative, f"relative error {error:.2e}"


def pair_rows(golden):
    return [row // 2 for row in range(len(golden.tensors["rewards"]))]


def test_golden_trajectories(golden):
    flow, tensors = golden_flow(golden), golden.tensors
    conditioning = golden_conditioning(golden, pair_rows(golden))
    with torch.no_grad():
        latents, velocities = sample_pairs(
            lambda x, sigma: flow.velocity(x, sigma, conditioning, golden.settings["guidance_scale"]),
            tensors["base_latents"],
            tensors["sigmas"],
            golden.settings["churn"],
            lambda k: tensors["noise"][:, k],
        )
    assert_close(latents, tensors["latents"], 1e-5)
    assert_close(velocities, tensors["velocities"], 1e-5)


def test_golden_differences_and_objective(golden):
    tensors = golden.tensors
    endpoint_difference = half_differences(tensors["latents"][:, -1])
    reward_difference = half_differences(tensors["rewards"])
    assert_close(endpoint_difference, tensors["endpoint_difference"], 1e-5)
    assert_close(reward_difference, tensors["reward_difference"], 1e-5)
    velocity = tensors["objective_velocity"].clone().requires_grad_()
    loss, ratio = velocity_objective(
        velocity,
        tensors["objective_old_velocity"],
        normalize_difference(endpoint_difference),
        reward_difference,
        clip_range=golden.settings["clip_range"],
    )
    assert_close(ratio, tensors["objective_ratio"], 1e-5)
    assert_close(loss, tensors["objective_per_sample"], 1e-5)
    size = tensors["objective_per_sample"].abs().mean()  # the mean's own terms cancel: measure its error by theirs
    assert (loss.mean() - tensors["objective_loss"][0]).abs() < 1e-5 * size
    (gradient,) = torch.autograd.grad(loss.mean(), velocity)
    assert_close(gradient, tensors["objective_velocity_grad"], 1e-5)


def test_golden_optimiser_step(golden):
    flow, tensors, settings = golden_flow(golden), golden.tensors, golden.settings
    add_lora(flow, LoRA(rank=settings["lora"]["r"], alpha=settings["lora"]["lora_alpha"]), seed=0)
    peft_prefix = "base_model.model."
    initial = {name.removeprefix(peft_prefix): value for name, value in golden.group("lora_init.").items()}
    assert set(initial) == set(get_peft_model_state_dict(flow.transformer))
    set_peft_model_state_dict(flow.transformer, initial)
    num_steps = settings["num_steps"]
    rows = torch.arange(len(tensors["rewards"])).repeat_interleave(num_steps)
    steps = torch.arange(num_steps).repeat(len(tensors["rewards"]))
    velocity = flow.velocity(
        tensors["latents"][rows, steps],
        tensors["sigmas"][steps],
        golden_conditioning(golden, rows // 2),
        settings["guidance_scale"],
    )
    loss, _ = velocity_objective(
        velocity,
        tensors["velocities"][rows, steps],
        normalize_difference(half_differences(tensors["latents"][:, -1]))[rows],
        half_differences(tensors["rewards"])[rows],
        clip_range=settings["clip_range"],
    )
    loss.mean().backward()
    trained = {n: p for n, p in flow.transformer.named_parameters() if p.requires_grad}
    named = {n.replace(".default", ""): p for n, p in trained.items()}
    expected = {name.removeprefix(peft_prefix): value for name, value in golden.group("lora_grad.").items()}
    flat = torch.cat([named[name].grad.flatten() for name in expected])
    flat_expected = torch.cat([value.flatten() for value in expected.values()])
    assert_close(flat, flat_expected, 1e-3)
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    assert_close(norm, tensors["grad_norm"][0], 1e-3)
    torch.optim.AdamW(trained.values(), lr=settings["lr"], weight_decay=1e-4).step()
    for name, value in golden.group("lora_step.").items():
        short = name.removeprefix(peft_prefix)
        sure = expected[short].abs() > 1e-7
        assert ((named[short] - value).abs()[sure] <= 0.01 * settings["lr"]).all(), name


@pytest.fixture(scope="module")
def tiny():
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    return flow


def plain_pipeline():
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resolve_pretrained("tiny-digits"), text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def our_images(flow, latents, guidance_scale=1.0, negatives=None, num_steps=5):
    conditioning = flow.encode(PROMPTS, negatives)
    end = sample(
        lambda x, sigma: flow.velocity(x, sigma, conditioning, guidance_scale), latents, flow.sigmas(num_steps, 32, 64)
    )
    return flow.decode(end)


def their_images(pipeline, latents, **options):
    images = pipeline(
        PROMPTS,
        height=32,
        width=64,
        num_inference_steps=5,
        latents=latents,
        max_sequence_length=0,
        output_type="pt",
        **options,
    ).images
    return images.float()


@pytest.mark.parametrize(("guidance_scale", "negatives"), [(1.0, None), (3.0, ["", ""]), (3.0, ["red", '"8"'])])
def test_images_are_the_pipelines_own(tiny, guidance_scale, negatives):
    latents = torch.randn(2, *tiny.latent_shape(32, 64))
    theirs = their_images(plain_pipeline(), latents, guidance_scale=guidance_scale, negative_prompt=negatives)
    torch.testing.assert_close(our_images(tiny, latents, guidance_scale, negatives), theirs, rtol=0, atol=1e-4)


def test_guidance_needs_negative_prompts(tiny):
    with pytest.raises(ValueError, match="needs encode"):
        tiny.velocity(torch.zeros(2, 8, 8, 16), torch.tensor(1.0), tiny.encode(PROMPTS), guidance_scale=2.0)


def test_the_transformer_is_all_that_is_registered(tiny):
    assert {name.split(".")[0] for name, _ in tiny.named_parameters()} == {"transformer"}


def test_batch_equals_one_by_one(tiny):
    conditioning, latents = tiny.encode(PROMPTS), torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        together = tiny.velocity(latents, torch.tensor([0.9, 0.2]), conditioning)
        alone = tiny.velocity(latents[1:], torch.tensor(0.2), conditioning[[1]])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_the_exported_lora_gives_the_same_images_in_plain_diffusers(tmp_path):
    """At alpha != rank: a file without its alpha would load and paint other images."""
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    latents = torch.randn(2, *flow.latent_shape(32, 64))
    base = our_images(flow, latents)
    add_lora(flow, LoRA(rank=4, alpha=12), seed=0)
    torch.testing.assert_close(our_images(flow, latents), base)
    with torch.no_grad():
        for name, parameter in flow.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    ours = our_images(flow, latents)
    assert (ours - base).abs().max() > 0.1
    save_lora(flow, tmp_path)
    pipeline = plain_pipeline()
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(their_images(pipeline, latents, guidance_scale=1.0), ours, rtol=0, atol=1e-4)


def test_lora_is_float32_on_a_bfloat16_base_and_starts_from_the_seed():
    starts = []
    for seed in (1, 1, 2):
        flow = StableDiffusion3("tiny-digits", dtype="bfloat16", max_sequence_length=0)
        flow.load()
        bound = add_lora(flow, LoRA(rank=2, alpha=2), seed)
        assert len(bound) == 31
        dtypes = {(p.requires_grad, p.dtype) for p in flow.transformer.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
        starts.append(torch.cat([p.flatten() for p in flow.transformer.parameters() if p.requires_grad]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_target_that_matches_nothing_is_named():
    flow = StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    with pytest.raises(ConfigurationError, match=r"'attn.to_w' matches no linear layer.*attn.to_q"):
        add_lora(flow, LoRA(targets=("attn.to_k", "attn.to_w")), seed=0)


def test_sizes_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ConfigurationError, match="multiples of 8, got 30 x 64"):
        tiny.latent_shape(30, 64)


@pytest.mark.parametrize("content", [None, "{", '{"_class_name": "FluxPipeline"}'])
def test_a_folder_that_is_no_such_pipeline_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"is no diffusers pipeline|expected a StableDiffusion3Pipeline"):
        StableDiffusion3(str(tmp_path)).validate()


def test_a_hub_name_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"nobody/nothing: its files are not in the cache .*HF_HUB_OFFLINE=1"):
        StableDiffusion3("nobody/nothing").load()


def test_a_bfloat16_text_encoder_serves_a_float32_transformer():
    flow = StableDiffusion3("tiny-digits", dtype="bfloat16", max_sequence_length=0)
    flow.load()
    flow.train_all()
    with torch.no_grad():
        velocity = flow.velocity(torch.randn(2, 8, 8, 16), torch.tensor(0.5), flow.encode(PROMPTS))
    assert velocity.dtype == torch.float32


def test_a_hub_name_passes_and_a_missing_folder_does_not():
    StableDiffusion3("stabilityai/stable-diffusion-3.5-medium").validate()
    for name in ("tiny-digit", "./not/there", "/not/there"):
        with pytest.raises(ConfigurationError, match="none of these"):
            StableDiffusion3(name).validate()


def test_dynamic_shifting_is_the_schedulers_own(tiny):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    flow = StableDiffusion3("tiny-digits")
    flow.load()
    flow.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    reference.set_timesteps(6, mu=calculate_shift(4 * 8))
    assert torch.equal(flow.sigmas(6, 32, 64), reference.sigmas.cpu())
    static = flow.pipeline.scheduler.from_config(json.loads(json.dumps({"shift": 3.0})))
    flow.pipeline.scheduler = static
    static.set_timesteps(6)
    assert torch.equal(flow.sigmas(6, 32, 64), static.sigmas.cpu())


def test_a_vae_without_a_shift_decodes(tiny):
    """A plain AutoencoderKL's shift_factor is None."""
    vae, latents = tiny.pipeline.vae, torch.randn(1, 8, 8, 16)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    vae.register_to_config(shift_factor=None)
    try:
        assert torch.equal(tiny.unscale(latents), latents / scale)
        assert tiny.decode(latents).isfinite().all()
    finally:
        vae.register_to_config(shift_factor=shift)
