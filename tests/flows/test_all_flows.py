"""What holds for every family, tried on a tiny random model of each variant."""

import pytest
import torch

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.testing import check_flow_model
from tests.flows.tiny_models import check_cached_texts, check_missing_tensor, check_outline, effects


def test_it_does_what_the_pipeline_does(case, folder_of):
    check_flow_model(case.flow(folder_of(case.name)), sizes=case.sizes, num_steps=case.num_steps)


def test_the_tiny_model_sees_its_inputs(representative, loaded_flow):
    seen = effects(loaded_flow(representative.name), representative.size)
    guidance = seen.pop("guidance")
    assert min(seen.values()) > 0.01, seen
    assert (guidance > 0.01) == (representative.guidance != "none")


def test_guidance_is_the_models_own_and_decides_on_negative_prompts(representative, loaded_flow):
    flow = loaded_flow(representative.name)
    assert flow.guidance == representative.guidance
    assert flow.uses_negatives(3.0) == (representative.guidance == "classifier-free")
    assert not flow.uses_negatives(1.0)


def test_sizes_that_do_not_fit_are_refused(representative, loaded_flow):
    flow, (height, width), multiple = loaded_flow(representative.name), representative.size, representative.multiple
    assert flow.latent_shape(height, width) == representative.latent_shape
    wrong = width - multiple // 2
    with pytest.raises(ConfigurationError, match=f"multiples of {multiple}, got {height} x {wrong}"):
        flow.latent_shape(height, wrong)


def test_pretrained_alone_finds_it(representative, folder_of):
    assert type(DiffusersFlow(str(folder_of(representative.name)))) is representative.family


def test_in_bfloat16_the_velocity_is_float32(representative, folder_of):
    flow = representative.flow(folder_of(representative.name), dtype="bfloat16")
    flow.load()
    with torch.no_grad():
        texts = flow.encode(["a cat", "two dogs"], ["", "blurry, and far too dark"])
        latents = torch.randn(2, *flow.latent_shape(*representative.size))
        velocity = flow.velocity(latents, torch.tensor(0.5), texts, 4.0)
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()
    assert texts.tensors["prompt_embeds"].dtype == torch.bfloat16


def test_cached_texts_give_the_same_images(representative, folder_of, tmp_path, monkeypatch):
    check_cached_texts(
        representative.flow, folder_of(representative.name), representative.size, tmp_path / "texts", monkeypatch
    )


def test_what_is_known_before_it_is_loaded(representative, folder_of, tmp_path):
    folder = folder_of(representative.name)
    check_outline(representative.flow(folder), representative.size)
    check_missing_tensor(representative.flow, folder, tmp_path / "copy")
