"""Diversity by hand, and the embedders that it rests on."""

import sys
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.evaluation.diversity import Diversity, diversity
from lightning_fdfo.evaluation.embedders import CLIPEmbedder, named_embedder
from tests.rewards import hub_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "clip"
    hub_folders.clip_folder(folder)
    return folder


@pytest.fixture
def images():
    """Not square, smooth, and of 8 bits, to which the processor rounds."""
    pixels = torch.randint(256, (4, 3, 6, 10), generator=torch.Generator().manual_seed(0)).float()
    return torch.nn.functional.interpolate(pixels, (48, 80), mode="bilinear").round() / 255


def test_it_is_the_mean_of_all_pairs_distances():
    random = np.random.default_rng(0)
    embeddings, prompts = random.normal(size=(9, 6)), np.array([5, 2, 5, 2, 5, 5, 2, 9, 9])
    found = diversity(torch.from_numpy(prompts), torch.from_numpy(embeddings))
    assert found.prompts.tolist() == [2, 5, 9]
    for prompt, distance in zip(found.prompts.tolist(), found.distances.tolist(), strict=True):
        pairs = [
            1 - first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            for first, second in combinations(embeddings[prompts == prompt], 2)
        ]
        assert distance == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_prompt_of_one_image_is_left_out():
    found = diversity(torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert found.prompts.tolist() == [1]
    assert found.distances.tolist() == [1.0]


def test_a_prompts_images_may_come_in_several_batches():
    prompts, embeddings = torch.arange(3).repeat_interleave(4), torch.randn(12, 5)
    metric = Diversity()
    for rows in (slice(0, 6), slice(6, 6), slice(6, 12)):
        metric.update(prompts[rows], embeddings[rows])
    assert torch.equal(metric.compute().distances, diversity(prompts, embeddings).distances)


def test_the_clip_is_transformers_own(clip, images):
    embedder = named_embedder(str(clip))
    embedder.fetch()
    embedder.setup(CPU)
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    arrays = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        expected = model.get_image_features(**processor(arrays, return_tensors="pt")).pooler_output
    ours = embedder(images)
    assert expected.std(dim=0).mean() > 1e-3, "the images are told apart"
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02 * expected.std().item())


def test_folders_that_hold_no_clip_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match=r"evaluation\.diversity: weights: .* is missing"):
        CLIPEmbedder(str(tmp_path)).fetch()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigurationError, match=r"evaluation\.diversity: .* holds no CLIP model"):
        CLIPEmbedder(str(tmp_path)).setup(CPU)


def test_dreamsim_is_the_packages(monkeypatch, tmp_path):
    """A stand-in for the package, which brings torchvision: what is asked is that it is called as it wants to be."""
    with pytest.raises(ConfigurationError, match="pip install dreamsim, or name a CLIP"):
        named_embedder("dreamsim").fetch()
    called = []

    class Model(torch.nn.Module):
        def embed(self, images):
            assert images.shape[1:] == (3, 224, 224)
            return images.mean(dim=(2, 3)).double()

    package = ModuleType("dreamsim")
    package.dreamsim = lambda **options: called.append(options) or (Model(), None)
    package.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    monkeypatch.setenv("HOME", str(tmp_path))
    embedder = named_embedder("dreamsim")
    embedder.fetch()
    embedder.setup(CPU)
    assert called == [
        {"pretrained": True, "device": "cpu", "cache_dir": str(tmp_path / ".cache/lightning_fdfo/dreamsim")}
    ]
    images = torch.full((2, 3, 8, 16), 0.5)
    torch.testing.assert_close(embedder(images), torch.full((2, 3), 0.5))
