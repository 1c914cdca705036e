"""Makes the small model `tiny-digits` from nothing: a StableDiffusion3Pipeline that generates the number in its prompt.

    python examples/pretrain_tiny/pretrain.py --output tiny-digits

Two stages, on two CPU cores: an AutoencoderKL on drawn pictures, then the transformer and both text encoders
together by flow matching on its latents. Every stage is a function of the seed. The folder it writes is in
diffusers' own format. What is left out: a T5 encoder, a decaying learning rate (an EMA of the weights does its work,
and lets `--steps` be chosen after a look), and any use of OCR: no reward is in the base model.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from digits import WIDTH, draw_many
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 16
T5_TOKENS = (
    0  # a pipeline without T5 pads the text with this many zero vectors; its default, 256, would cost 6 times as much
)


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose tokens are the printable ASCII characters, alone and at a word's end."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Two CLIP layers of width 48."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=192,
            projection_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_pipeline() -> StableDiffusion3Pipeline:
    """The pipeline with random weights: 1.3 M parameters in the transformer, 0.2 M in the autoencoder."""
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=WIDTH,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=96,
        caption_projection_dim=96,
        pooled_projection_dim=96,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer),
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Mean square error and a little KL divergence; then measures the latents' shift and scale."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        pixels = to_pixels(images[torch.randint(len(images), (32,))])
        posterior = vae.encode(pixels).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, pixels)
        loss = error + 1e-4 * posterior.kl().mean() / pixels[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"autoencoder step {step}: mean square error {error.item():.4f}", flush=True)
    vae.requires_grad_(False)
    latents = encode_images(vae, images[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents of uint8 images, [N, 8, 8, 16], unscaled."""
    return torch.cat([vae.encode(to_pixels(chunk)).latent_dist.mean for chunk in images.split(256)])


def flow_matching_loss(pipeline: StableDiffusion3Pipeline, latents: Tensor, prompts: list[str]) -> Tensor:
    """Mean square error of the velocity noise - x0 at logit-normal sigmas; a tenth of the prompts are left empty."""
    kept = [
        prompt if keep else "" for prompt, keep in zip(prompts, (torch.rand(len(prompts)) > 0.1).tolist(), strict=True)
    ]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        kept, kept, kept, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    noise = torch.randn_like(latents)
    sigma = torch.randn(len(latents)).sigmoid()
    weight = sigma[:, None, None, None]
    velocity = pipeline.transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents)


def train_flow(
    pipeline: StableDiffusion3Pipeline, images: Tensor, prompts: list[str], steps: int, save_every: int, output: Path
) -> None:
    """Trains the transformer and both text encoders; ends with the exponential moving average of their weights."""
    modules = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    average = copy.deepcopy(modules).requires_grad_(False)
    vae = pipeline.vae
    latents = (encode_images(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01)
    start, running = time.perf_counter(), 1.0
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 200)
        rows = torch.randint(len(latents), (64,))
        loss = flow_matching_loss(pipeline, latents[rows], [prompts[row] for row in rows.tolist()])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), modules.parameters(), strict=True):
                slow.lerp_(fast, 1 - min(0.998, step / (step + 10)))
        running += 0.01 * (loss.item() - running)
        if step % 100 == 0:
            print(
                f"flow step {step}: loss {running:.4f}, {(time.perf_counter() - start) / step:.3f} s a step", flush=True
            )
        if save_every and step % save_every == 0:
            save(pipeline, average, output / f"step-{step}")
    save(pipeline, average, output)


def save(pipeline: StableDiffusion3Pipeline, average: nn.ModuleList, folder: Path) -> None:
    """Writes the pipeline with the averaged weights, in diffusers' format."""
    transformer, text_encoder, text_encoder_2 = average
    components = pipeline.components | {
        "transformer": transformer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    StableDiffusion3Pipeline(**components).save_pretrained(folder)


def main() -> None:
    """Command line; the defaults made the model that is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=3500, help="steps of the flow model, batch 64")
    parser.add_argument("--autoencoder_steps", type=int, default=1200, help="steps of the autoencoder, batch 32")
    parser.add_argument("--num_images", type=int, default=30_000, help="pictures drawn for training")
    parser.add_argument("--save_every", type=int, default=0, help="also write step-N folders to choose from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    torch.manual_seed(arguments.seed)
    array, prompts = draw_many(arguments.num_images, arguments.seed)
    images = torch.from_numpy(array)
    pipeline = make_pipeline()
    train_autoencoder(pipeline.vae, images, arguments.autoencoder_steps)
    train_flow(pipeline, images, prompts, arguments.steps, arguments.save_every, arguments.output)


if __name__ == "__main__":
    main()
