"""docs/models.md: its counts and its memory are computed here again, from the models' configurations and ours."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from torch import nn

import lightning_fdfo.flows
from lightning_fdfo.flows.lora_files import add_lora
from lightning_fdfo.flows.quantization import BYTES
from lightning_fdfo.guards.memory import activation_bytes, rollout_bytes, training_state_bytes, weight_bytes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
GIB = 1024**3
PICK_SCORE, SLACK = 3.7, 2.0
"""GiB: the reward of every configuration, and what the page says that the allocator and CUDA keep."""

KL = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DC = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}
SD35 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "out_channels": 16, "qk_norm": "rms_norm"}


def t5():
    sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, d_kv=64, **sizes))


def clip(width, layers, heads):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return transformers.CLIPTextModelWithProjection(config)


def qwen3():
    config = transformers.Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config)


def gemma2():
    return transformers.Gemma2Model(transformers.Gemma2Config())


def qwen25_vl():
    config = transformers.Qwen2_5_VLConfig()
    config.text_config.update(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        }
    )
    config.vision_config.update({"out_hidden_size": 3584, "hidden_size": 1280, "intermediate_size": 3420})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@dataclass
class Model:
    """A model as it is published, and what its images and texts come to at 512 pixels."""

    config: str
    transformer: Any
    options: dict[str, Any]
    vae: Any
    vae_options: dict[str, Any]
    encoders: tuple[Any, ...]
    tokens: int
    """of an image and its text, as they go through the blocks"""
    latent: int
    """numbers"""
    conditioning: int
    """bytes of a row"""


def clips():
    return (lambda: clip(768, 12, 12), lambda: clip(1280, 32, 20))


MODELS = [
    Model(
        "sd35_medium_pickscore",
        diffusers.SD3Transformer2DModel,
        {
            **SD35,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
        diffusers.AutoencoderKL,
        KL,
        (t5, *clips()),
        1024 + 205,
        16 * 64 * 64,
        (205 * 4096 + 2048) * 2,
    ),
    Model(
        "sd35_large",
        diffusers.SD3Transformer2DModel,
        {
            **SD35,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        diffusers.AutoencoderKL,
        KL,
        (t5, *clips()),
        1024 + 205,
        16 * 64 * 64,
        (205 * 4096 + 2048) * 2,
    ),
    Model(
        "flux_dev",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        diffusers.AutoencoderKL,
        KL,
        (t5, clips()[0]),
        1024 + 512,
        16 * 64 * 64,
        (512 * 4096 + 768) * 2,
    ),
    Model(
        "flux2_klein",
        diffusers.Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        diffusers.AutoencoderKLFlux2,
        {},
        (qwen3,),
        1024 + 512,
        32 * 64 * 64,
        512 * 7680 * 2,
    ),
    Model(
        "qwen_image",
        diffusers.QwenImageTransformer2DModel,
        {},
        diffusers.AutoencoderKLQwenImage,
        {},
        (qwen25_vl,),
        1024 + 64,
        16 * 64 * 64,
        64 * 3584 * 2,
    ),
    Model(
        "z_image",
        diffusers.ZImageTransformer2DModel,
        {},
        diffusers.AutoencoderKL,
        KL,
        (qwen3,),
        1024 + 64,
        16 * 64 * 64,
        64 * 2560 * 2,
    ),
    Model(
        "sana",
        diffusers.SanaTransformer2DModel,
        {},
        diffusers.AutoencoderDC,
        DC,
        (gemma2,),
        256,
        32 * 16 * 16,
        300 * 2304 * 2,
    ),
]


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def count(module):
    """Weights, tables of positions that are stored with them among these."""
    return sum(tensor.numel() for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values())


def settings(name):
    return yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))


def lora_weights(transformer, targets, rank):
    """rank * (inputs + outputs) of each linear layer whose name ends in a target."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    )


def rows(model):
    """What the page says of a model: the row of each of its two tables, from the second cell on."""
    given = settings(model.config)["model"]
    flow = getattr(lightning_fdfo.flows, given["flow"]["class_path"])(given["flow"]["init_args"]["pretrained"])
    flow.transformer = on_meta(model.transformer, **model.options)
    weights = count(flow.transformer)
    lora = lora_weights(flow.transformer, flow.lora_targets, given["lora"]["rank"])
    encoders = sum(count(on_meta(encoder)) for encoder in model.encoders)
    rest = training_state_bytes(lora) + weight_bytes(count(on_meta(model.vae, **model.vae_options)), 2)

    def total(overlay, bytes_per_weight):
        points = settings(overlay)["model"]["batching"]["batch_size"]
        return (
            weight_bytes(weights, bytes_per_weight)
            + rest
            + activation_bytes(len(flow.blocks), points, model.tokens, flow.width)
        )

    sizes = [
        weight_bytes(encoders, 2),
        total("single_gpu_24gb", BYTES["nf4"]),
        total("single_gpu_24gb", 2),
        total("single_gpu_80gb", 2),
    ]
    rollout = rollout_bytes(
        given["batching"]["num_pairs"],
        given["batching"].get("num_points_per_pair") or 2 * given["sampling"]["num_steps"],
        model.latent,
        model.conditioning,
    )
    cells = [f"{size / GIB:.1f}" for size in sizes]
    first = [given["flow"]["init_args"]["pretrained"], f"{weights / 1e9:.2f}", f"{lora / 1e6:.1f}", model.config]
    return first, [*cells, f"{rollout / GIB:.1f}"]


def tables():
    """Cells of the page's rows, by the table's number and the row's first cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        lines = [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append({line[0]: line[1:] for line in lines[2:]})
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.config)
def test_the_page_says_what_is_counted(model):
    (pretrained, weights, lora, config), memory = rows(model)
    models, sizes, *_ = tables()
    said = models[pretrained]
    assert said[:2] == [weights, lora]
    assert f"configs/{config}.yaml" in said[2]
    assert sizes[config] == memory
    texts, training = (float(size) for size in memory[:2])
    fits = max(training + PICK_SCORE, texts) <= 24 - SLACK
    assert said[3] == ("either" if fits else "80 GB")


def test_every_configuration_is_on_a_page():
    pages = PAGE + "".join(
        (ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("scaling", "mixing", "estimator", "people")
    )
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.stem in pages or path.stem in ("quickstart", "legible_and_small"), path.name


def test_a_lora_of_a_real_model_has_as_many_weights():
    from lightning_fdfo import LoRA

    flow = lightning_fdfo.flows.StableDiffusion3("tiny-digits", max_sequence_length=0)
    flow.load()
    said = lora_weights(flow.transformer, flow.lora_targets, 4)
    add_lora(flow, LoRA(rank=4), seed=0)
    assert sum(p.numel() for p in flow.transformer.parameters() if p.requires_grad) == said
