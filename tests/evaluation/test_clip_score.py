"""The metric CLIPScore, per image, against torchmetrics' own on the same model."""

import importlib

import pytest
import torch
from torchmetrics.functional.multimodal import clip_score
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from tests.evaluation.test_comparison import PROMPTS, by_hand, rows
from tests.rewards import hub_folders


class Unwrapped(torch.nn.Module):
    """What torchmetrics 1.9 expects of a CLIP: embeddings as tensors, as transformers 4 gave them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids, attention_mask):
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


@pytest.fixture
def clip(tmp_path):
    return hub_folders.clip_folder(tmp_path / "clip")


def theirs(clip, images, texts):
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(clip), AutoTokenizer.from_pretrained(clip))
    bytes_ = list((images * 255).round().byte())
    made = lambda: (Unwrapped(CLIPModel.from_pretrained(clip)), processor)  # noqa: E731
    update = importlib.import_module("torchmetrics.functional.multimodal.clip_score")._clip_score_update
    each, _ = update(bytes_, texts, *made())
    mean = clip_score(bytes_, texts, made)
    return each, mean


def test_it_is_torchmetrics_own(clip, toy_module, judge):
    """`test` with the metric; torchmetrics sees the same images rounded to 8 bits, and cuts its mean at 0."""
    metric = {"reward": {"class_path": "CLIPScore", "init_args": {"pretrained": str(clip)}}}
    module = toy_module(metrics={"CLIPScore": metric})
    judge(module)
    images, texts = by_hand(module), [prompt.text for prompt in PROMPTS for _ in range(3)]
    with torch.no_grad():
        each, mean = theirs(clip, images, texts)
    ours = module.evaluator.metrics(images, texts, [{}] * 15)["CLIPScore"].values
    assert each.std() > 3
    torch.testing.assert_close(ours.float(), each, rtol=0, atol=0.05)
    found = rows(module)["CLIPScore"]
    assert found.tuned == found.base
    assert found.tuned.mean == pytest.approx(each.mean().item(), abs=0.02)
    assert mean.item() == pytest.approx(max(found.tuned.mean, 0.0), abs=0.02)
    assert found.win_rate == (0.5, 0.5, 0.5)
