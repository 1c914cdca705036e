"""Gradients of the rewards that are differentiable: those of their scores, in float64 on small models."""

import pytest
import torch
from torch import nn

from lightning_fdfo.reward import load_reward, load_reward_class
from tests.rewards.test_model_rewards import NAMES

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "two red dogs"]


@pytest.fixture
def float64(monkeypatch):
    """Turns a reward's models to float64 for a test, and what they make float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    changed = []

    def turn(loaded):
        for part in loaded if isinstance(loaded, tuple) else (loaded,):
            if isinstance(part, nn.Module):
                changed.append(part.double())
            elif isinstance(part, tuple):
                turn(part)

    yield turn
    monkeypatch.undo()
    for model in changed:  # other tests share it
        model.float()


@pytest.mark.parametrize("name", [*NAMES, "Colorfulness"])
def test_the_gradient_is_that_of_the_score(model_rewards, float64, name):
    reward = load_reward(name) if name == "Colorfulness" else model_rewards[name]()
    assert reward.differentiable
    reward.setup(CPU)
    float64(vars(reward).get("_loaded", (None, None))[1])
    images = (0.3 + 0.4 * torch.rand(2, 3, 24, 36, dtype=torch.float64)).requires_grad_()
    steps = {"eps": 3e-3, "atol": 0.02, "rtol": 0.02} if name.startswith("VLM") else {}  # its norms stay float32
    assert torch.autograd.gradcheck(lambda pixels: reward(pixels, PROMPTS, [{}, {}]), images, fast_mode=True, **steps)
    assert not any(
        p.requires_grad for part in vars(reward).values() if isinstance(part, nn.Module) for p in part.parameters()
    )


@pytest.mark.parametrize(("name", "differentiable"), [("OCR", False), ("JPEGSize", False), ("PickScore", True)])
def test_which_say_so(name, differentiable):
    assert load_reward_class(name).differentiable is differentiable
