"""ImageWriter: the images of `predict`, as files that say how they were made."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from lightning_fdfo.callbacks.pictures import pixels, save_image
from lightning_fdfo.callbacks.provenance import describe_weights
from lightning_fdfo.checkpoints.run_folder import numbered_folder, run_folder
from lightning_fdfo.files import write_text
from lightning_fdfo.module import FDFOModule
from lightning_fdfo.prompts import IndexedPrompt

LISTING = "images.jsonl"
"""One JSON object for each image, in order: its file's name, and the text chunks of the file."""
MAX_WORDS = 40
"""Characters of a prompt in a file's name."""


class ImageWriter(Callback):
    """Writes each image as a PNG into `predict/0`, `predict/1`, … of the run's folder, and a list of them.

    The PNG's text chunks hold prompt, negative prompt, seed, index (of the prompt in its file), repeat (which of
    its images), size, sigmas, guidance, base model, the evaluated weights with their SHA-256, and the version of
    this package. Seed, index and repeat alone give the latents. The command line adds it to `predict`.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self._settings: dict[str, Any] = {}
        self._listed: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes a new folder, the same for all devices."""
        module = cast(FDFOModule, pl_module)
        made = str(numbered_folder(run_folder(trainer) / "predict")) if trainer.is_global_zero else ""
        self.folder = Path(trainer.strategy.broadcast(made))
        self._listed = []
        sampling = module.evaluation.sampling(module.sampling)
        self._settings = {
            "seed": module.seed,
            "height": sampling.height,
            "width": sampling.width,
            "num_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "sigmas": [
                round(sigma, 6)
                for sigma in module.flow.sigmas(sampling.num_steps, sampling.height, sampling.width).tolist()
            ],
            **describe_weights(trainer, module),
            "software": f"lightning-fdfo {version('lightning-fdfo')}",
        }

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Writes a batch's images."""
        for row, array in zip(outputs["rows"], pixels(outputs["images"]), strict=True):
            facts = self._facts(row)
            name = file_name(row)
            save_image(
                Image.fromarray(array), self.folder / name, {key: as_text(value) for key, value in facts.items()}
            )
            self._listed.append(json.dumps({"file": name, **facts}, ensure_ascii=False))

    def _facts(self, row: IndexedPrompt) -> dict[str, Any]:
        own = {"prompt": row.prompt.text, "negative_prompt": row.prompt.negative}
        return own | {"index": row.prompt_index, "repeat": row.repeat} | self._settings

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the list: each process lists its own images, and the first one joins the lists."""
        lists = [self.folder / f".{LISTING}.{rank}" for rank in range(trainer.world_size)]
        write_text(lists[trainer.global_rank], "".join(f"{line}\n" for line in self._listed))
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        write_text(self.folder / LISTING, "".join(path.read_text(encoding="utf-8") for path in lists))
        for path in lists:
            path.unlink()
        print(f"{len((self.folder / LISTING).read_text(encoding='utf-8').splitlines())} images are in {self.folder}")


def file_name(row: IndexedPrompt) -> str:
    """Sorts by prompt, then by image, and is safe on every file system.

    Example:
        >>> from lightning_fdfo.prompts import IndexedPrompt, Prompt
        >>> file_name(IndexedPrompt(7, Prompt('../"427" in red', "", {}, ""), repeat=1))
        '000007-01-427_in_red.png'
    """
    words = re.sub(r"[^a-z0-9]+", "_", row.prompt.text.lower())[:MAX_WORDS].strip("_")
    return f"{row.prompt_index:06d}-{row.repeat:02d}{'-' * bool(words)}{words}.png"


def as_text(value: Any) -> str:
    """A value in a PNG's text chunk: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
