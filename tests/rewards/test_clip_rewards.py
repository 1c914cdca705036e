"""CLIPScore, PickScore and Aesthetic against transformers' own forward, on a small random CLIP."""

import numpy as np
import pytest
import torch
from lightning_fdfo_rewards.preprocessing import normalize, pad_to_square
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

PROMPTS = ["a cat", "two dogs", "", "word " * 400, "猫の写真"]


@pytest.fixture
def images():
    """Not square, and of 8 bits, which the processor rounds to."""
    pixels = torch.randint(256, (5, 3, 48, 80), generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(pixels[:, :, ::8, ::8].float(), (48, 80), mode="bilinear")
    return smooth.round() / 255


@pytest.fixture
def reference(folders, images):
    """The model, its processed pixels, and its logits."""
    model = CLIPModel.from_pretrained(folders / "clip")
    tokenizer = AutoTokenizer.from_pretrained(folders / "clip")
    processor = CLIPImageProcessorPil.from_pretrained(folders / "clip")
    arrays = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = processor(arrays, return_tensors="pt").pixel_values
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return model, output


def score(reward, images):
    reward.setup(torch.device("cpu"))
    return reward(images, PROMPTS, [{}] * 5)


def test_pick_score_is_logits_per_image(model_rewards, reference, images):
    _, output = reference
    expected = output.logits_per_image.diagonal()
    assert expected.std() > 0.1
    torch.testing.assert_close(score(model_rewards["PickScore"](), images), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(score(model_rewards["PickScore"](), images).mean(), expected.mean(), rtol=0, atol=0.03)


def test_clip_score_is_a_hundred_cosines(model_rewards, reference, images):
    model, output = reference
    expected = 100 * output.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(score(model_rewards["CLIPScore"](), images), expected, rtol=0, atol=0.5)


def test_they_are_exact_on_the_models_own_pixels(model_rewards, reference, images, monkeypatch):
    """Given the pixels that transformers' processor makes, to float32."""
    from lightning_fdfo_rewards import clip_score, pick_score

    model, _ = reference
    size = model.config.vision_config.image_size
    pixels = torch.rand(5, 3, size, size)
    with torch.no_grad():
        tokens = AutoTokenizer.from_pretrained(model.name_or_path)(
            PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        logits = model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}, pixel_values=normalize(pixels))
    expected = logits.logits_per_image.diagonal()
    for module in (clip_score, pick_score):
        monkeypatch.setattr(module, "crop_to_square", lambda images, size: images)
    torch.testing.assert_close(score(model_rewards["PickScore"](), pixels), expected, rtol=1e-4, atol=1e-4)
    scale = model.logit_scale.exp() / 100
    torch.testing.assert_close(score(model_rewards["CLIPScore"](), pixels) * scale, expected, rtol=1e-4, atol=1e-4)


def test_aesthetic_is_a_chain_of_matrices(model_rewards, folders, images, monkeypatch):
    """Written out with matrix products, on the unit embedding that transformers gives."""
    from lightning_fdfo_rewards import aesthetic

    size = 32
    pixels = torch.rand(5, 3, size, size)
    monkeypatch.setattr(aesthetic, "crop_to_square", lambda images, size: images)
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folders / "clip").get_image_features(pixel_values=normalize(pixels))
    hidden = output.pooler_output.double().numpy()
    hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    head = torch.load(folders / "head" / "aesthetic-model.pth", weights_only=True)
    for number in (0, 2, 4, 6, 7):
        weight, bias = (head[f"layers.{number}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
    expected = torch.from_numpy(hidden[:, 0]).float()
    torch.testing.assert_close(score(model_rewards["Aesthetic"](), pixels), expected, rtol=1e-4, atol=1e-4)


def test_the_official_head_is_known_by_its_digest(tmp_path, monkeypatch):
    import huggingface_hub
    from lightning_fdfo_rewards.aesthetic import Aesthetic

    from lightning_fdfo.errors import ConfigurationError

    (tmp_path / "aesthetic-model.pth").write_bytes(b"something else")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ConfigurationError, match="expected sha256 21dd590f3ccd"):
        Aesthetic().fetch()


def test_a_crop_is_not_a_pad(images):
    from lightning_fdfo_rewards.preprocessing import crop_to_square

    assert not torch.allclose(crop_to_square(images, 32), pad_to_square(images, 32), atol=0.1)
