"""One reading of a batch for all OCR rewards that score it, and another one for whatever differs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning_fdfo_rewards import ocr
from lightning_fdfo_rewards.ocr import OCR
from lightning_fdfo_rewards.ocr_rapidocr import LastReading, load_recogniser

from lightning_fdfo import RewardMix
from tests.rewards.test_ocr import draw, picture

WORDS = ["427", "12", "9", "428"]
IMAGES = torch.stack([picture(word) for word in ["427", "13", "9", "4Z8"]])


@pytest.fixture
def forwards(monkeypatch):
    """The numbers of lines that the recogniser was given, one a forward; it has read nothing yet."""
    calls = []
    recogniser = load_recogniser(("en",))
    counting = recogniser._replace(
        session=lambda lines: calls.append(len(lines)) or recogniser.session(lines), last=LastReading()
    )
    monkeypatch.setattr(ocr, "load_recogniser", lambda languages: counting)
    return calls


def score(images, words, **options):
    return OCR(**options)(images, [f'"{word}"' for word in words], [{}] * len(words))


def test_two_terms_of_a_mixture_read_a_batch_once(forwards):
    rewards = {
        "legible": {"reward": "OCR"},
        "exact": {"reward": {"class_path": "OCR", "init_args": {"score": "exact_match"}}},
    }
    mix = RewardMix(rewards)
    mix.setup(torch.device("cpu"))
    forwards.clear()
    scores = mix(IMAGES, [f'"{word}"' for word in WORDS], [{}] * 4)
    assert forwards == [4]
    assert scores["exact"].values.tolist() == [1, 0, 1, 0]
    assert scores["legible"].values[0] > scores["legible"].values[1]


@pytest.mark.parametrize("detect", [False, True])
@pytest.mark.parametrize("names", [("likelihood", "exact_match"), ("edit_distance", "likelihood", "exact_match")])
def test_a_shared_reading_changes_no_bit(forwards, names, detect):
    alone = {}
    for name in names:
        score(IMAGES.flip(0), WORDS)
        alone[name] = score(IMAGES, WORDS, score=name, detect=detect)
    forwards.clear()
    score(IMAGES.flip(0), WORDS)
    for name in names:
        again = score(IMAGES.clone(memory_format=torch.channels_last), WORDS, score=name, detect=detect)
        assert torch.equal(again, alone[name])
    assert sum(forwards) == 8


OTHER = IMAGES.clone()
OTHER[3, 0, 5, 5] += 1 / 255 if OTHER[3, 0, 5, 5] < 0.5 else -1 / 255


@pytest.mark.parametrize(
    ("images", "words", "options"),
    [
        (OTHER, WORDS, {}),
        (IMAGES.flip(3), WORDS, {}),
        (IMAGES[:3], WORDS[:3], {}),
        (IMAGES[[1, 0, 2, 3]], ["12", "427", "9", "428"], {}),
        (IMAGES, ["427", "13", "9", "428"], {}),
        (IMAGES, WORDS, {"detect": True}),
        (IMAGES, WORDS, {"batch_size": 4}),
    ],
    ids=["pixel", "mirrored", "rows", "order", "target", "detect", "batch_size"],
)
def test_what_differs_is_read_anew(forwards, images, words, options):
    score(IMAGES, WORDS)
    score(images, words, **options)
    assert sum(forwards) == 4 + len(images)
    score(images, words, score="exact_match", **options)
    assert sum(forwards) == 4 + len(images)
    score(IMAGES, WORDS)
    assert sum(forwards) == 8 + len(images), "one batch is kept"


def test_a_line_that_a_long_target_widens_is_another_reading(forwards):
    """The likelihood needs columns for all characters; what is read is of the image as it is."""
    image = draw(64, 64, (2, 20, 12, "Anchor"))[None]
    alone = score(image, ["Anchored"], score="edit_distance")
    score(image, ["Anchored"])
    assert torch.equal(score(image, ["Anchored"], score="edit_distance"), alone)
    assert len(forwards) == 3


def test_two_threads_read_once(forwards):
    together = threading.Barrier(2)

    def one(name):
        together.wait()
        return score(IMAGES, WORDS, score=name)

    with ThreadPoolExecutor(2) as pool:
        likelihoods, matches = pool.map(one, ["likelihood", "exact_match"])
    assert forwards == [4]
    assert matches.tolist() == [1, 0, 1, 0]
    assert torch.equal(likelihoods, score(IMAGES, WORDS))


def test_a_reading_that_fails_is_not_kept():
    last = LastReading()
    assert last.get("one", lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        last.get("two", lambda: 1 / 0)
    assert last.get("two", lambda: 2) == 2
    assert last.get("two", lambda: 3) == 2
    assert last.get("one", lambda: 4) == 4
