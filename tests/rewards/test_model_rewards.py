"""What holds for every reward that a model computes; each against its own reference stands in its own file."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors
import torch
from lightning_fdfo_rewards.aesthetic import Aesthetic
from lightning_fdfo_rewards.clip_score import CLIPScore
from lightning_fdfo_rewards.hpsv2 import HPSv2
from lightning_fdfo_rewards.image_reward import ImageReward
from lightning_fdfo_rewards.vlm_score import VLMScore
from safetensors.torch import load_file, save_file

from lightning_fdfo import RewardMix
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.reward import available_rewards, load_reward_class
from lightning_fdfo.testing import check_reward
from lightning_fdfo.testing.reward_sample import sample_images

NAMES = ("Aesthetic", "CLIPScore", "HPSv2", "ImageReward", "PickScore", "VLMScore-2.5", "VLMScore-3")
PROMPTS = ["a photo of a cat", "", "word " * 400, "猫の写真 🐈, фото кошки"]
CPU = torch.device("cpu")


def score(reward, images, prompts=PROMPTS):
    reward.setup(CPU)
    return reward(images, prompts, [{}] * len(prompts))


def test_every_one_of_them_is_tested(model_rewards):
    known = {name.partition("-")[0] for name in model_rewards}
    assert known | {"Colorfulness", "JPEGSize", "OCR", "VLMPreference"} == {
        name for name, entry in available_rewards().items() if entry.value.startswith("lightning_fdfo_rewards.")
    }
    assert set(NAMES) == set(model_rewards)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(model_rewards, name):
    """Among it: one by one equals a batch, images that are not square, pickling by configuration."""
    check_reward(model_rewards[name]())


@pytest.mark.parametrize("name", NAMES)
def test_any_prompt_has_a_score_whatever_stands_beside_it(model_rewards, name):
    images = sample_images(40, 64)
    reward = model_rewards[name](batch_size=3)
    together = score(reward, images)
    alone = torch.cat([score(reward, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Aesthetic"])
def test_the_prompt_matters(model_rewards, name):
    images = sample_images(40, 64)[[0, 0]]
    one, other = score(model_rewards[name](), images, ["a cat", "two dogs and a boat"])
    assert abs(one - other) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(model_rewards, name):
    """To 5 % of the spread that float32 finds between images and prompts, or of the score."""
    images = sample_images(40, 64)
    exact, rounded = (score(model_rewards[name](dtype=dtype), images) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).abs().max() < 0.05 * max(exact.std().item(), exact.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_no_checkpoint_is_read_twice(model_rewards, name, monkeypatch):
    """Two instances, each set up twice, and a fit's mixtures: `rewards` and `metrics`."""
    gc.collect()  # models of other tests
    read = []

    def counting(function):
        def count(file, *arguments, **options):
            read.append(str(file))
            return function(file, *arguments, **options)

        return count

    real_open = safetensors.safe_open
    for module in list(sys.modules.values()):  # transformers imports the function by name
        if getattr(module, "safe_open", None) is real_open:
            monkeypatch.setattr(module, "safe_open", counting(real_open))
    monkeypatch.setattr(torch, "load", counting(torch.load))
    make = model_rewards[name]
    mixes = [RewardMix({"a": {"reward": make()}, "b": {"reward": make()}}) for _ in range(2)]
    for mix in [*mixes, *mixes]:
        mix.setup(CPU)
        mix(sample_images(32, 32), PROMPTS, [{}] * 4)
    weights = [file for file in read if Path(file).suffix in (".safetensors", ".pt", ".pth")]
    assert weights
    assert len(weights) == len(set(weights))


def test_weights_are_freed_with_their_last_reward(model_rewards):
    reward = model_rewards["CLIPScore"]()
    reward.setup(CPU)
    model = weakref.ref(reward.model.model)
    del reward
    gc.collect()
    assert model() is None


def test_a_score_before_set_up_is_refused(model_rewards):
    with pytest.raises(RewardError, match=r"CLIPScore: call setup\(device\)"):
        model_rewards["CLIPScore"]()(sample_images(8, 8), PROMPTS, [{}] * 4)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"batch_size": 0}, {"batch_size": 1.5}])
def test_options_out_of_range(model_rewards, options):
    for make in model_rewards.values():
        with pytest.raises(ConfigurationError, match=r"expected (dtype float32 or bfloat16|batch_size >= 1)"):
            make(**options)


def test_an_empty_batch_has_no_scores(model_rewards):
    assert score(model_rewards["CLIPScore"](), torch.zeros(0, 3, 8, 8), []).shape == (0,)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda f: CLIPScore(str(f / "qwen2")), "no complete CLIP model|no CLIP model"),
        (lambda f: CLIPScore(str(f / "partial")), "no complete CLIP model"),
        (lambda f: Aesthetic(str(f / "clip" / "config.json"), str(f / "clip")), "no aesthetic head"),
        (lambda f: Aesthetic(str(f / "wide.pth"), str(f / "clip")), "takes embeddings of 24 numbers, CLIP gives 16"),
        (lambda f: HPSv2(checkpoint=str(f / "wide.pth"), tokenizer=str(f / "clip_tokenizer")), "no HPSv2 checkpoint"),
        (lambda f: HPSv2(checkpoint=str(f / "bomb.pt"), tokenizer=str(f / "clip_tokenizer")), "no HPSv2 checkpoint"),
        (lambda f: HPSv2(checkpoint=str(f / "bomb.pt"), tokenizer=str(f / "clip")), "is not CLIP's tokenizer"),
        (
            lambda f: ImageReward(str(f / "wide.pth"), str(f / "clip" / "config.json"), str(f / "clip")),
            "no ImageReward checkpoint",
        ),
        (lambda f: VLMScore(str(f / "clip")), "no model like Qwen2.5-VL"),
        (lambda f: VLMScore(str(f / "qwen2"), image_size=100), r"multiple of 28 .*got 100; nearest: 112"),
        (
            lambda f: VLMScore(str(f / "qwen2"), image_size=56, yes="Yes!"),
            "expected an answer of one token, got 'Yes!'",
        ),
        (lambda f: CLIPScore("nobody/nothing"), "fetch them where there is a network.*hf download nobody/nothing"),
        (lambda f: CLIPScore("./missing"), "expected a folder or a hub name owner/name, got './missing'"),
        (
            lambda f: HPSv2(checkpoint="missing.pt"),
            "expected a file, a folder with HPS_v2.1_compressed.pt or a hub name",
        ),
    ],
)
def test_what_is_no_such_model_is_named(folders, model_rewards, monkeypatch, tmp_path, reward, message):
    import huggingface_hub.constants

    from tests.rewards.hub_folders import aesthetic_head

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    aesthetic_head(folders / "wide.pth", width=24)
    torch.save({"state_dict": pytest.raises}, folders / "bomb.pt")  # a pickled function
    partial = folders / "partial"
    if not partial.exists():
        partial.mkdir()
        for file in (folders / "clip").glob("*.json"):
            (partial / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folders / "clip" / "model.safetensors")
        tensors.pop("visual_projection.weight")
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=message):
        reward(folders).setup(CPU)


def test_the_version_may_come_as_a_number_and_must_exist():
    assert HPSv2(version=2.1).hub_files[0].files == ("HPS_v2.1_compressed.pt",)
    with pytest.raises(ConfigurationError, match=r"expected version 2.0 or 2.1, got '3'"):
        HPSv2(version="3")


def test_importing_them_is_cheap():
    """Under 0.3 s of processor time beyond torch, in the best of three processes, and nothing heavy."""
    script = (
        "import sys, time, torch; start = time.process_time(); import {modules}; "
        "print(time.process_time() - start, *({heavy} & set(sys.modules)))"
    )
    heavy = {"transformers", "onnxruntime", "rapidocr", "diffusers", "lightning", "torchvision", "open_clip", "timm"}
    classes = [load_reward_class(name) for name in available_rewards()]
    modules = sorted({cls.__module__ for cls in classes if cls.__module__.startswith("lightning_fdfo_rewards")})
    line = script.format(modules=", ".join(modules), heavy=heavy)
    best = ["inf"]
    for _ in range(3):
        words = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout.split()
        best = min(best, words, key=lambda words: float(words[0]))
        if float(best[0]) < 0.3:
            break
    assert best[1:] == []
    assert float(best[0]) < 0.3


@pytest.mark.parametrize("name", ["CLIPScore", "HPSv2", "ImageReward", "PickScore"])
def test_prompts_that_it_cuts_are_told_in_one_warning(model_rewards, name):
    mix = RewardMix({"looks": {"reward": model_rewards[name](), "weight": 1.0}})
    long = ["a cat " * 100, "a dog " * 100]
    for prompt in [*long, *long, "a cat", "", "two dogs"]:
        mix.check(prompt, {})
    with pytest.warns(UserWarning, match=rf"'looks' \({name} of .*: 2 of 5 different prompts are longer") as caught:
        mix.setup(CPU)
    mix.setup(CPU)  # a second warning would be an error
    assert len(caught) == 1
    tokens = 35 if name == "ImageReward" else 77
    assert f"{tokens} tokens are read" in str(caught[0].message)


@pytest.mark.parametrize("name", ["Aesthetic", "CLIPScore", "HPSv2", "ImageReward", "PickScore", "VLMScore-2.5"])
def test_prompts_that_it_reads_whole_draw_no_warning(model_rewards, name):
    mix = RewardMix({"looks": {"reward": model_rewards[name](), "weight": 1.0}})
    for prompt in ["a cat", "", "a dog " * (100 if name in ("Aesthetic", "VLMScore-2.5") else 3)]:
        mix.check(prompt, {})
    mix.setup(CPU)  # any warning is an error
