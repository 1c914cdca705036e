"""Small models that several reward tests share; made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from lightning_fdfo import Reward
from tests.rewards import hub_folders


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """No bars and no remarks about models of a few numbers."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, qwen2/, qwen3/, image_reward/ and head/ with models of a few thousand numbers."""
    root = tmp_path_factory.mktemp("hub")
    hub_folders.clip_folder(root / "clip")
    hub_folders.qwen_folder(root / "qwen2", generation=2)
    hub_folders.qwen_folder(root / "qwen3", generation=3)
    (root / "head").mkdir()
    hub_folders.aesthetic_head(root / "head" / "aesthetic-model.pth")
    return root


@pytest.fixture(scope="session")
def model_rewards(folders: Path) -> dict[str, Callable[..., Reward]]:
    """Name -> maker of each reward that a model computes, on a small one; keyword arguments are its options."""
    from lightning_fdfo_rewards.aesthetic import Aesthetic
    from lightning_fdfo_rewards.clip_score import CLIPScore
    from lightning_fdfo_rewards.hpsv2 import HPSv2
    from lightning_fdfo_rewards.image_reward import ImageReward
    from lightning_fdfo_rewards.pick_score import PickScore
    from lightning_fdfo_rewards.vlm_score import VLMScore

    clip, qwen2, qwen3 = (str(folders / name) for name in ("clip", "qwen2", "qwen3"))
    image_reward = hub_folders.image_reward_files(folders / "image_reward")
    hub_folders.clip_tokenizer(folders / "clip_tokenizer", num_tokens=49408)
    hpsv2 = {
        "checkpoint": str(hub_folders.GOLDEN / "hpsv2_public.pt"),
        "tokenizer": str(folders / "clip_tokenizer"),
        "num_heads": (2, 2),
    }
    return {
        "Aesthetic": lambda **o: Aesthetic(str(folders / "head" / "aesthetic-model.pth"), clip, **o),
        "CLIPScore": lambda **o: CLIPScore(clip, **o),
        "HPSv2": lambda **o: HPSv2(**hpsv2, **o),
        "ImageReward": lambda **o: ImageReward(**image_reward, **o),
        "PickScore": lambda **o: PickScore(clip, clip, **o),
        "VLMScore-2.5": lambda **o: VLMScore(qwen2, image_size=56, **({"dtype": "float32"} | o)),
        "VLMScore-3": lambda **o: VLMScore(qwen3, image_size=64, **({"dtype": "float32"} | o)),
    }
