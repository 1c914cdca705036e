"""Scores the golden prompts and images with the original packages `hpsv2` 1.2.0 and `image-reward` 1.5.

Neither package can be installed beside this project, so this script imports nothing of it and runs in an environment
of its own (README.md beside this file). All that it replaces in a package is the size of the model: preprocessing,
tokenizer, network, loading and scoring are the package's own code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOLERANCE = 1e-5
FAINT = 2.0**-10
"""What the embeddings are multiplied by in the faint checkpoints: it makes a wrong epsilon of a layer norm visible."""
EMBEDDINGS = {
    "hpsv2": (
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.conv1.",
        "token_embedding.",
        "positional",
    ),
    "image_reward": tuple(f"blip.visual_encoder.{name}" for name in ("cls_token", "pos_embed", "patch_embed.")),
}


class Reference(NamedTuple):
    """A package's model at the golden sizes, loaded."""

    score: Callable[[str, Image.Image], float]
    image_encoder: nn.Module  # its first input is the preprocessed image, [1, 3, H, W]
    text_encoder: nn.Module  # its first input is the token ids, [1, L]
    ids_name: str  # what the golden file calls the token ids


def randomize(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's state with noise on every weight, so that no part of it is 0 or 1 and every part moves the score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.add_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.state_dict()


def load_hpsv2(metadata: dict[str, str], checkpoint: Path, seed: int | None) -> Reference:
    """Has `hpsv2.img_score` score with a small model in place of ViT-H-14."""
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    img_score.device = "cpu"  # also where there is a GPU, on which the package would score in half precision
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "golden.json")  # the registry names a model after its file
        config.write_text(metadata["open_clip_config"], encoding="utf-8")
        open_clip.add_model_config(config)
        # light_augmentation chooses the preprocessing that pads; the package scores with it.
        torch.manual_seed(seed or 0)
        model, _, preprocess = open_clip.create_model_and_transforms(
            "golden", light_augmentation=True, output_dict=True
        )
    # Where it finds a model here, `img_score` does not download and build its own.
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    if seed is not None:
        torch.save({"state_dict": randomize(model, seed)}, checkpoint)

    def score(prompt: str, image: Image.Image) -> float:
        return float(img_score.score(image, prompt, cp=str(checkpoint))[0])

    return Reference(score, model.visual, model.token_embedding, "tokens")


@contextlib.contextmanager
def small_image_reward(metadata: dict[str, str]) -> Iterator[Path]:
    """Has ImageReward's class build the golden sizes, where its own are constants; gives the path of `med_config`."""
    module = importlib.import_module("ImageReward.ImageReward")  # the package hides it behind the class of that name
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    vision, med_config = json.loads(metadata["vision"]), json.loads(metadata["med_config"])

    def create_vit(*_: object) -> tuple[nn.Module, int]:
        width = vision["hidden_size"]
        encoder = vit.VisionTransformer(
            img_size=vision["image_size"],
            patch_size=vision["patch_size"],
            embed_dim=width,
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / width,
        )
        return encoder, width

    head = module.MLP(med_config["hidden_size"])  # the package's own, whose width is the constant 768 there
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.object(blip, "create_vit", create_vit),
        mock.patch.object(module, "MLP", return_value=head),
    ):
        # The package asks for "bert-base-uncased"; a folder of that name goes before the hub.
        Path("bert-base-uncased").mkdir()
        Path("bert-base-uncased", "vocab.txt").write_text(metadata["vocab"], encoding="utf-8")
        Path("med_config.json").write_text(metadata["med_config"], encoding="utf-8")
        yield Path("med_config.json").absolute()


def load_image_reward(metadata: dict[str, str], checkpoint: Path, seed: int | None) -> Reference:
    """Loads the checkpoint with `ImageReward.load`."""
    import ImageReward

    with small_image_reward(metadata) as med_config:
        if seed is not None:
            torch.manual_seed(seed)
            torch.save(randomize(ImageReward.ImageReward(str(med_config)), seed), checkpoint)
        model = ImageReward.load(str(checkpoint), device="cpu", med_config=str(med_config))
    # The package loads with strict=False and tells nobody what was missing.
    mismatch = model.state_dict().keys() ^ torch.load(checkpoint, weights_only=True).keys()
    if mismatch:
        raise ValueError(f"Model and {checkpoint} should have the same names; only one has {sorted(mismatch)}")
    return Reference(model.score, model.blip.visual_encoder, model.blip.text_encoder, "token_ids")


LOADERS = {"hpsv2": load_hpsv2, "image_reward": load_image_reward}


def record_inputs(module: nn.Module) -> list[Tensor]:
    """A list to which every call of the module adds its first input."""
    inputs: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    return inputs


def score_all(reference: Reference, prompts: list[str], images: list[Tensor]) -> dict[str, Tensor]:
    """Scores every prompt with every image.

    Args:
        reference: The package's model.
        prompts: P prompts.
        images: N images, uint8 [3, H, W] each.

    Returns:
        `scores` [P, N], token ids [P, L] and `pixels` [1, 3, H, W] of image 2, the last two as the model got them.
    """
    pixels, ids = record_inputs(reference.image_encoder), record_inputs(reference.text_encoder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        scores = torch.tensor([[reference.score(prompt, picture) for picture in pictures] for prompt in prompts])
    return {"scores": scores, reference.ids_name: torch.cat(ids[:: len(images)]), "pixels": pixels[2]}


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    return (got.double() - expected.double()).abs().max().item() if got.shape == expected.shape else float("inf")


def make_faint(package: str, checkpoint: Path, target: Path) -> Path:
    """Writes the checkpoint with faint embeddings of images (and, of HPSv2, of texts)."""
    saved = torch.load(checkpoint, weights_only=True)
    tensors = saved.get("state_dict", saved)
    for name in tensors:
        if name.startswith(EMBEDDINGS[package]):
            tensors[name] = tensors[name] * FAINT
    torch.save(saved, target)
    return target


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=LOADERS)
    parser.add_argument(
        "--golden", type=Path, default=Path(__file__).parent.parent / "golden" / "rewards", help="folder"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the scores to this new .safetensors file")
    parser.add_argument(
        "--weights",
        choices=["golden", "faint", "random"],
        default="golden",
        help="faint: the golden ones with faint embeddings; random: new ones, written beside FILE with the ending .pt",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    if arguments.weights == "random" and (arguments.write is None or arguments.write.suffix != ".safetensors"):
        parser.error("--weights random needs --write FILE.safetensors, to keep the weights with their scores")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    golden = (arguments.golden / f"{arguments.package}_public.safetensors").resolve()
    with safe_open(golden, "pt") as file:
        metadata, expected = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prompts = json.loads(metadata["prompts"])
    images = [expected[f"image_{i}"] for i in range(expected["scores"].shape[1])]

    random = arguments.weights == "random"
    checkpoint = arguments.write.resolve().with_suffix(".pt") if random else golden.with_suffix(".pt")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.weights == "faint":
            checkpoint = make_faint(arguments.package, checkpoint, Path(folder, "faint.pt"))
            expected["scores"] = load_file(arguments.golden / "faint_scores.safetensors")[arguments.package]
        reference = LOADERS[arguments.package](metadata, checkpoint, arguments.seed if random else None)
        got = score_all(reference, prompts, images)

    for prompt, row in zip(prompts, got["scores"].tolist(), strict=True):
        print(*(f"{score:9.6f}" for score in row), prompt[:60])
    # New weights have new scores; what the model is given stays the same.
    differences = {name: difference(got[name], expected[name]) for name in got if not (random and name == "scores")}
    for name, value in differences.items():
        print(f"{name}: largest difference from {golden.name} is {value:.2g}")
    if arguments.write is not None:
        save_file({name: got.get(name, tensor) for name, tensor in expected.items()}, arguments.write, metadata)
    return 0 if all(value <= TOLERANCE for value in differences.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
