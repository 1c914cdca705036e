import math
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fdfo_rewards import ocr, ocr_rapidocr
from lightning_fdfo_rewards.ocr import OCR
from lightning_fdfo_rewards.ocr_rapidocr import choose_model, find_lines, load_recogniser
from PIL import Image, ImageDraw, ImageFont

from lightning_fdfo import RewardMix
from lightning_fdfo.errors import ConfigurationError

FONTS = [
    f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf"
    for name in (
        "DejaVuSans-Bold",
        "DejaVuSans",
        "DejaVuSans-Oblique",
        "DejaVuSerif",
        "DejaVuSansMono-Bold",
        "STIXGeneral",
        "STIXGeneralBol",
        "cmr10",
    )
]
NAMES = "Zurich Berlin London Quebec Osaka Lima Cairo Delhi Oslo Praha Hanoi"
THINGS = (
    "apple bridge castle dragon engine forest garden harbor island jungle kettle ladder mirror needle orange pepper"
)
MORE = "quartz rocket silver tunnel umbrella violet window yellow zebra Anchor Bottle Candle Diesel Eleven"
SIGNS = "OPEN CLOSED SALE EXIT STOP COFFEE HOTEL PIZZA MUSIC BREAD 2024 1975 360 42 747 8086 Route66 K9 MP3"
WORDS = f"{NAMES} {THINGS} {MORE} {SIGNS}".split()


def draw(width, height, *items, ink=(200, 30, 30), paper=(255, 255, 255), font=FONTS[0]):
    """Items (left, top, size, text), in red on white: float [3, H, W]."""
    image = Image.new("RGB", (width, height), paper)
    for left, top, size, text in items:
        ImageDraw.Draw(image).text((left, top), text, font=ImageFont.truetype(font, size), fill=ink)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def picture(word, height=32, width=64, size=20):
    """One word, top left."""
    return draw(width, height, (4, 4, size, word))


def noise(image, amount, seed=0):
    return (image + amount * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def random_scene(word, seed):
    """A word somewhere in an image of 64 to 512 pixels, in some font and two colours, with noise."""
    rng = random.Random(seed)
    width, height = (rng.choice([64, 64, 96, 96, 128, 128, 192, 256, 384, 512]) for _ in range(2))
    dark, light = tuple(rng.randrange(90) for _ in range(3)), tuple(rng.randrange(170, 256) for _ in range(3))
    ink, paper = rng.choice([(dark, light), (light, dark)])
    font = FONTS[seed % len(FONTS)]
    share, size = rng.uniform(0.6, 0.9), 8

    def box(size):
        return ImageFont.truetype(font, size).getbbox(word)

    while box(size + 1)[2] < share * width and box(size + 1)[3] < share * height:
        size += 1
    left, top = rng.uniform(0, width - box(size)[2]), rng.uniform(0, height - box(size)[3])
    return noise(draw(width, height, (left, top, size, word), ink=ink, paper=paper, font=font), 0.06, seed)


def score(images, targets, **options):
    return OCR(**options)(torch.stack(images), [f'"{target}"' for target in targets], [{}] * len(targets)).tolist()


def three_scores(image, target, **options):
    return [
        score([image], [target], score=name, **options)[0] for name in ("likelihood", "edit_distance", "exact_match")
    ]


def test_sixty_words_are_read():
    scenes = [random_scene(word, seed) for seed, word in enumerate(WORDS)]
    assert len(scenes) == 60
    assert len({scene.shape for scene in scenes}) > 20
    pairs = zip(scenes, WORDS, strict=True)
    assert sum(score([scene], [word], score="exact_match", detect=True)[0] for scene, word in pairs) >= 58


def test_clean_text_is_read():
    numbers = ["427", "12", "903", "58"]
    images = [picture(number) for number in numbers]
    assert score(images, numbers, score="exact_match") == [1.0] * 4
    assert score(images, numbers, score="edit_distance") == [1.0] * 4
    assert min(score(images, numbers)) > -0.1


def degraded(image, level, seed):
    """Level 0 is the image, level 6 is hardly more than noise; the noise is the same one at every level."""
    if level:
        taps = torch.exp(-0.5 * (torch.arange(-6, 7) / (0.45 * level)) ** 2)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        image = F.conv2d(F.pad(image[:, None], (6,) * 4, mode="replicate"), kernel[None, None])[:, 0]
    return noise(image, 0.08 * level, seed)


def spearman(one, other):
    """Of two lists without ties."""
    ranks = torch.tensor([one, other]).argsort(dim=-1).argsort(dim=-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def test_the_likelihood_falls_with_every_level_of_degradation():
    words = ["427", "HELLO", "Berlin", "coffee", "Route66", "quartz"]
    levels = range(7)
    curves = []
    for seed, word in enumerate(words):
        image = draw(24 * len(word), 40, (6, 4, 26, word))
        curves.append(score([degraded(image, level, seed) for level in levels], [word] * 7))
        assert spearman(curves[-1], [-level for level in levels]) >= 0.9, (word, curves[-1])
    mean = torch.tensor(curves).mean(0)
    assert spearman(mean.tolist(), [-level for level in levels]) >= 0.9
    assert mean[0] > -0.1
    assert mean[-1] < -2


def test_likelihood_tells_apart_what_the_edit_distance_does_not():
    clear, faint = picture("427"), 0.8 + 0.2 * picture("427")
    noisy = noise(clear, 0.3)
    for score_name in ("edit_distance", "exact_match"):
        assert len(set(score([clear, faint], ["427"] * 2, score=score_name))) == 1
    assert len(set(score([clear, faint, noisy], ["427"] * 3))) == 3


def test_a_wrong_digit_costs():
    image = picture("428")
    right, wrong = score([image, image], ["428", "427"])
    assert right > wrong
    assert score([image], ["427"], score="edit_distance") == [pytest.approx(2 / 3)]
    assert score([image], ["427"], score="exact_match") == [0.0]


def test_one_by_one_equals_a_batch():
    images = [picture(number) for number in ("427", "12", "903", "58", "61")]
    targets = ["427", "13", "903", "58", "61"]
    together = score(images, targets, batch_size=2)
    alone = [score([image], [target])[0] for image, target in zip(images, targets, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", ["likelihood", "edit_distance"])
def test_one_by_one_equals_a_batch_with_detection(name):
    texts = ["HELLO WORLD", "STOP", "A LINE", "", "OPEN TODAY"]
    images = [draw(192, 96, *((8, 6 + 44 * i, 28, word) for i, word in enumerate(text.split()))) for text in texts]
    images = [noise(image, 0.05, seed) for seed, image in enumerate(images)]
    targets = ["HELLO WORLD", "SHOP", "A LINE", "NOTHING", "OPEN"]
    alone = [score([i], [t], score=name, detect=True)[0] for i, t in zip(images, targets, strict=True)]
    assert score(images, targets, score=name, detect=True, batch_size=3) == pytest.approx(alone, abs=1e-4)
    assert alone[0] > alone[1] > alone[3]


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 20), (48, 160, 34), (160, 96, 36), (33, 77, 22)])
def test_other_shapes(height, width, size):
    detect = height > 64
    assert three_scores(picture("427", height, width, size), "427", detect=detect) == [
        pytest.approx(0, abs=0.1),
        1.0,
        1.0,
    ]


def test_a_narrow_image_still_has_a_finite_likelihood():
    (likelihood,) = score([torch.rand(3, 64, 16)], ["12345678"])
    assert math.isfinite(likelihood)


@pytest.mark.parametrize("image", [torch.ones(3, 32, 64), torch.zeros(3, 64, 64), torch.full((3, 128, 40), 0.5)])
def test_blank_images_are_scores_not_failures(image):
    for detect in (False, True):
        likelihood, similarity, match = three_scores(image, "427", detect=detect)
        assert math.isfinite(likelihood)
        assert likelihood < -1
        assert similarity == match == 0


HELLO_WORLD = {
    "one line": draw(320, 96, (10, 30, 36, "HELLO WORLD")),
    "one line, the second smaller and lower": draw(320, 96, (10, 24, 36, "HELLO"), (200, 38, 26, "WORLD")),
    "one line, the second larger and higher": draw(320, 96, (10, 38, 26, "HELLO"), (140, 20, 40, "WORLD")),
    "two lines": draw(240, 160, (4, 4, 36, "HELLO"), (4, 76, 36, "WORLD")),
    "two lines, the first further right": draw(256, 256, (130, 10, 30, "HELLO"), (4, 150, 60, "WORLD")),
    "large": draw(448, 320, (20, 20, 80, "HELLO"), (40, 180, 90, "WORLD")),
}


@pytest.mark.parametrize("name", HELLO_WORLD)
def test_two_words_with_detection(name):
    image = noise(HELLO_WORLD[name], 0.03)
    assert three_scores(image, "HELLO WORLD", detect=True) == [pytest.approx(0, abs=0.05), 1.0, 1.0]
    swapped = three_scores(image, "WORLD HELLO", detect=True)
    assert swapped[0] < -1
    assert swapped[1] < 0.6
    assert swapped[2] == 0


def test_four_words_of_four_sizes():
    image = draw(320, 200, (10, 10, 40, "BIG"), (180, 26, 36, "SALE"), (10, 120, 26, "TODAY"), (180, 110, 36, "ONLY"))
    assert len(find_lines((image * 255).byte())) == 4
    assert three_scores(image, "BIG SALE TODAY ONLY", detect=True) == [pytest.approx(0, abs=0.05), 1.0, 1.0]


def test_a_letter_that_ends_one_piece_and_starts_the_next():
    image = draw(200, 140, (8, 8, 40, "ball"), (8, 76, 40, "loop"))
    assert len(find_lines((image * 255).byte())) == 2
    assert three_scores(image, "ball loop", detect=True) == [pytest.approx(0, abs=0.05), 1.0, 1.0]


def test_detection_helps_where_the_image_is_no_line():
    image = HELLO_WORLD["two lines"]
    assert score([image], ["HELLO WORLD"], score="exact_match") == [0.0]
    assert score([image], ["HELLO WORLD"], detect=True)[0] > score([image], ["HELLO WORLD"])[0] + 1


def test_a_space_in_the_image_costs_nothing():
    image = draw(300, 44, (6, 2, 32, "HELLO  WORLD"))
    read = OCR(score="exact_match")._texts((image * 255).byte()[None], ["HELLO WORLD"])[0]
    assert "HELLO WORLD" in " ".join(read.split())
    assert score([image], ["HELLO WORLD"])[0] > -0.05


def test_a_missing_word_costs():
    both, one = HELLO_WORLD["two lines"], draw(240, 160, (4, 4, 36, "HELLO"))
    assert score([one], ["HELLO WORLD"], score="edit_distance", detect=True) == [0.5]
    assert score([one], ["HELLO WORLD"], detect=True)[0] < score([both], ["HELLO WORLD"], detect=True)[0] - 1


@pytest.mark.parametrize("word", ["Zürich", "Café", "Łódź", "Ångström", "mañana"])
def test_accents(word):
    image = draw(26 * len(word), 48, (6, 2, 30, word), font=FONTS[1])
    assert three_scores(image, word) == [pytest.approx(0, abs=0.2), 1.0, 1.0]


def test_both_ways_to_write_an_accent_are_one_target():
    image = draw(104, 48, (6, 2, 30, "Café"))
    assert three_scores(image, "Cafe\u0301") == three_scores(image, "Caf\u00e9")


def test_a_long_prompt_with_quotes():
    prompt = " ".join(["word"] * 200 + ['a sign with "427" and "12" on it'] + ["word"] * 192)
    assert len(prompt.split()) == 400
    reward = OCR()
    reward.check(prompt, {})
    assert reward(picture("427")[None], [prompt], [{}]).item() > -0.1


def test_a_long_quote_is_a_target():
    prompt = f'"{" ".join(WORDS * 2)}"'
    reward = OCR(detect=True)
    reward.check(prompt, {})
    assert -math.inf < reward(HELLO_WORLD["two lines"][None], [prompt], [{}]).item() < -5


def test_unknown_characters_are_named():
    with pytest.raises(ConfigurationError, match=r"the recogniser does not know .*ue000.*give `languages` that have"):
        OCR().check('"7\ue000"', {})
    OCR(score="edit_distance").check('"7\ue000"', {})  # which compares letters and digits only
    for name in ("likelihood", "edit_distance", "exact_match"):
        with pytest.raises(ConfigurationError, match=r"the recogniser does not know \['ก'\] in '7ก'"):
            OCR(score=name).check('"7ก"', {})


@pytest.mark.parametrize(("height", "width", "name"), [(1, 1000, "likelihood"), (1000, 1, "edit_distance")])
def test_narrow_images_are_enlarged_within_bounds(height, width, name, monkeypatch):
    """1 x 1000 pixels would become 128 x 128 000 for the detector, and 48 x 48 000 for the recogniser."""
    sizes = []
    monkeypatch.setattr(ocr_rapidocr, "_detector", detector_spy(ocr_rapidocr._detector, sizes))
    monkeypatch.setattr(ocr, "load_recogniser", recogniser_spy(load_recogniser, sizes))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    for detect in (True, False):
        assert math.isfinite(score([image], ["7"], score=name, detect=detect)[0])
    assert sizes
    assert all(height * width < 2**20 for height, width in sizes)


def detector_spy(load, sizes):
    """Writes down the sizes to which the engine enlarges."""

    def call(image, **options):
        enlarged = max(1.0, 128 / min(image.shape[:2]))
        sizes.append([side * enlarged for side in image.shape[:2]])
        return load()(image, **options)

    return lambda: call


def recogniser_spy(load, sizes):
    """Writes down the sizes of lines."""

    def wrapped(languages):
        recogniser = load(languages)
        session = recogniser.session
        return recogniser._replace(session=lambda lines: sizes.append(lines.shape[-2:]) or session(lines))

    return wrapped


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("rapidocr", {}),
        ("onnxruntime", {}),
        ("rapidocr", {"score": "exact_match"}),
        ("rapidfuzz", {"score": "edit_distance"}),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_any_model_is_loaded(missing, options, monkeypatch):
    choose_model.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError, match=f"OCR needs {missing}, which .*pip install {missing}, or .*-rewards"):
        RewardMix({"OCR": {"reward": {"class_path": "OCR", "init_args": options}}}).check('"7"', {})
    choose_model.cache_clear()


@pytest.mark.parametrize(
    "options",
    [
        {"score": "best"},
        {"batch_size": 0},
        {"backend": "easyocr"},
        {"languages": []},
        {"languages": "en"},
        {"languages": ["en", False]},
        {"backend": "tesseract"},
        {"backend": "tesseract", "score": "likelihood"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="expected"):
        OCR(**options)


def test_it_runs_on_the_cpu_and_pickles_by_its_options():
    reward = OCR("edit_distance", detect=True, languages=["de", "en"], batch_size=7)
    reward.setup(torch.device("cpu"))
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__getstate__() == reward.__getstate__()
    assert set(copy.__getstate__()) == {"score", "detect", "languages", "backend", "batch_size", "range"}
    assert (copy.device, copy.range, copy.languages) == ("cpu", (0.0, 1.0), ("de", "en"))
    assert copy(picture("427")[None], ['"427"'], [{}]).tolist() == [1.0]


def test_rewards_in_several_threads_do_not_disturb_each_other():
    images = [noise(HELLO_WORLD["two lines"], amount) for amount in (0.03, 0.3)]
    cases = [
        (image, name, detect) for image in images for name in ("likelihood", "exact_match") for detect in (True, False)
    ]

    def one(case):
        image, name, detect = case
        return score([image], ["HELLO WORLD"], score=name, detect=detect)[0]

    alone = [one(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, cases)) == pytest.approx(alone, abs=1e-4)


def test_importing_it_imports_no_engine():
    code = "import sys, lightning_fdfo_rewards.ocr; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "lightning_fdfo_rewards" in loaded
    assert not {
        name for name in ("onnxruntime", "rapidocr", "transformers", "rapidfuzz", "tesserocr") if f"'{name}'" in loaded
    }
