"""A made-up pipeline with conventions of its own, as a folder, and a model family for it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.utils import BaseOutput
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3


class PostcardPipeline(DiffusionPipeline, QwenImageLoraLoaderMixin):
    """Words but no pooled vector; time runs from 0 to 1; the network points from noise to image; its own guidance."""

    _lora_loadable_modules = ("transformer",)

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.vae_scale_factor = 4
        self.image_processor = VaeImageProcessor(vae_scale_factor=4)

    def encode_prompt(self, texts, device):
        tokens = self.tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(device)).last_hidden_state

    @torch.no_grad()
    def __call__(self, prompt, avoid, strength, height, width, num_inference_steps, latents, output_type="pt"):
        words = self.encode_prompt(prompt, latents.device)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            towards = self.look(latents, timestep, words)
            if strength:
                away = self.look(latents, timestep, self.encode_prompt(avoid, latents.device))
                towards = towards + strength * (towards - away)
            latents = self.scheduler.step(-towards, timestep, latents, return_dict=False)[0]
        images = self.vae.decode(latents / 2, return_dict=False)[0]
        return BaseOutput(images=self.image_processor.postprocess(images, output_type=output_type))

    def look(self, latents, timestep, words):
        padded = torch.nn.functional.pad(words, (0, self.transformer.config.joint_attention_dim - words.shape[-1]))
        pooled = words.new_zeros(len(words), self.transformer.config.pooled_projection_dim)
        time = (1000 - timestep).expand(len(latents))
        return self.transformer(latents, padded, pooled, time, return_dict=False)[0]


def postcard_folder(folder: Path) -> Path:
    """A pipeline of this class, with parts of the model that is shipped."""
    flow = StableDiffusion3("tiny-digits")
    flow.load()
    own = flow.pipeline
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    PostcardPipeline(own.tokenizer, own.text_encoder, own.transformer, own.vae, scheduler).save_pretrained(folder)
    return folder


# The family begins here


class Postcard(DiffusersFlow):
    """PostcardPipeline."""

    pipeline_classes = ("PostcardPipeline",)
    pipeline_class = PostcardPipeline
    sequence_length = 16
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def encode_texts(self, pipeline, texts, device, negative):
        """CLIP's words."""
        return {"words": pipeline.encode_prompt(texts, device)}

    def grid(self, num_steps, num_tokens):
        """A number of steps."""
        return {"num_inference_steps": num_steps}

    def predict(self, latents, sigma, tensors, guidance_scale):
        """Minus what the network gives, at 1000 (1 - sigma)."""
        words = tensors["words"]
        config = self.transformer.config
        padded = torch.nn.functional.pad(words, (0, config.joint_attention_dim - words.shape[-1]))
        pooled = words.new_zeros(len(words), config.pooled_projection_dim)
        return -self.transformer(latents, padded, pooled, 1000 * (1 - sigma), return_dict=False)[0]

    def unscale(self, latents):
        """Half."""
        return latents / 2

    def pipeline_call(self, guidance_scale, negative_prompts):
        """Its strength is ours less 1."""
        return {"strength": guidance_scale - 1, "avoid": negative_prompts}
