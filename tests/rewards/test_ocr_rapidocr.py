import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import torch
from lightning_fdfo_rewards import ocr_rapidocr
from lightning_fdfo_rewards.ocr import OCR
from lightning_fdfo_rewards.ocr_lines import as_line, reading_order
from lightning_fdfo_rewards.ocr_rapidocr import choose_model, find_lines, load_recogniser
from rapidocr import RapidOCR
from rapidocr.utils.download_file import DownloadFile

from lightning_fdfo.errors import ConfigurationError
from tests.rewards.test_ocr import draw, picture


def test_the_engine_is_as_we_left_it():
    """Fails when rapidocr moves the names that ocr_rapidocr.py touches."""
    recogniser = load_recogniser(("en",))
    assert recogniser.characters[0] == "blank"
    assert len(recogniser.characters) == 18710
    output = recogniser.probabilities([as_line((picture("427") * 255).byte())])
    assert output.shape == (1, 12, 18710)
    torch.testing.assert_close(output.sum(-1), torch.ones(1, 12), rtol=0, atol=1e-3)
    assert recogniser.decode(output[0].argmax(-1)) == "427"


def test_all_languages_of_the_packaged_recogniser_choose_it():
    languages = RapidOCR.list_supported_langs("rec", "PP-OCRv6", "small")
    assert {"en", "de", "fr", "ch", "japan"} < set(languages)
    assert choose_model(tuple(languages)).key == choose_model(("en",)).key == "multi_PP-OCRv6_rec_small"


@pytest.mark.parametrize(
    ("languages", "key"),
    [
        (("zh", "ja"), "multi_PP-OCRv6_rec_small"),
        (("EN",), "multi_PP-OCRv6_rec_small"),
        (("ko",), "korean_PP-OCRv5_rec_mobile"),
        (("ko", "korean"), "korean_PP-OCRv5_rec_mobile"),
        (("cyrillic",), "cyrillic_PP-OCRv5_rec_mobile"),
        (("el",), "el_PP-OCRv5_rec_mobile"),
        (("ka",), "ka_PP-OCRv4_rec_mobile"),
    ],
)
def test_the_model_of_languages(languages, key):
    assert choose_model(languages).key == key


def test_languages_of_several_recognisers_are_refused_with_a_list():
    with pytest.raises(ConfigurationError, match=r"reads together.*en: multi_PP-OCRv6.*el: el_PP-OCRv5"):
        OCR(score="exact_match", languages=["en", "el"]).check('"7"', {})


def test_unknown_languages_are_named():
    with pytest.raises(ConfigurationError, match=r"no recogniser for languages \['klingon'\].*; it knows .*korean"):
        OCR(score="exact_match", languages=["en", "klingon"]).check('"7"', {})


def test_arabic_is_refused():
    with pytest.raises(ConfigurationError, match=r"right to left.*tesseract"):
        OCR(languages=["ar"]).setup(torch.device("cpu"))


def test_a_recogniser_that_cannot_be_downloaded_is_named_with_its_address(monkeypatch):
    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(DownloadFile, "_should_skip_download", lambda *args: False)
    monkeypatch.setattr(requests, "get", no_network)
    reward = OCR(languages=["th"])
    with pytest.raises(
        ConfigurationError, match=r"https://\S+/th_PP-OCRv5_rec_mobile.onnx\); put that file into \S+models"
    ):
        reward.fetch()
    with pytest.raises(ConfigurationError, match="cannot be downloaded"):
        reward.setup(torch.device("cpu"))


def test_a_recogniser_is_loaded_once_also_from_several_threads(monkeypatch):
    loaded = []

    def load(model):
        time.sleep(0.05)
        loaded.append((model.key, threading.get_ident()))
        return object()

    monkeypatch.setattr(ocr_rapidocr, "_RECOGNISERS", {})
    monkeypatch.setattr(ocr_rapidocr, "_load", load)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_recogniser, [("en",), ("de",), ("ja", "fr"), ("ko",)] * 3))
    assert sorted(key for key, _ in loaded) == ["korean_PP-OCRv5_rec_mobile", "multi_PP-OCRv6_rec_small"]


@pytest.mark.parametrize(
    "text", ["東京", "北京欢迎你", "ひらがな", "カタカナ", "Straße", "İğış", "Łódź", "don't", "50%"]
)
def test_the_packaged_alphabet_has(text):
    recogniser = load_recogniser(("en",))
    assert "".join(recogniser.characters[index] for index in recogniser.encode(text)) == text


@pytest.mark.parametrize("text", ["Привет", "안녕", "مرحبا"])
def test_the_packaged_alphabet_has_not(text):
    with pytest.raises(ConfigurationError, match="languages"):
        OCR().check(f'"{text}"', {})


def boxes(*rows):
    return np.array(rows)


@pytest.mark.parametrize(
    ("found", "order"),
    [
        (boxes([60, 0, 100, 20], [0, 8, 50, 28]), [1, 0]),  # one line, the left one lower
        (boxes([0, 8, 50, 28], [60, 0, 100, 20], [120, 9, 150, 29]), [0, 1, 2]),
        (boxes([60, 0, 100, 60], [0, 35, 50, 55]), [1, 0]),  # small beside large
        (boxes([0, 16, 50, 36], [60, 0, 100, 20]), [1, 0]),  # two lines, the boxes touch
        (boxes([0, 0, 40, 20], [50, 9, 90, 29], [100, 18, 140, 38]), [0, 1, 2]),  # a slope
        (boxes([0, 0, 40, 90], [60, 0, 100, 40], [65, 45, 100, 90]), [0, 1, 2]),  # one beside two lines
        (boxes([50, 40, 90, 60], [50, 0, 90, 20], [0, 0, 40, 20], [0, 40, 40, 60]), [2, 1, 3, 0]),
        (np.zeros((0, 4)), []),
    ],
)
def test_reading_order(found, order):
    assert reading_order(found) == order


def test_lines_are_found_in_order():
    image = (draw(240, 160, (4, 4, 36, "HELLO"), (4, 76, 36, "WORLD")) * 255).byte()
    upper, lower = find_lines(image)
    recogniser = load_recogniser(("en",))
    read = [recogniser.decode(recogniser.probabilities([as_line(piece)])[0].argmax(-1)) for piece in (upper, lower)]
    assert read == ["HELLO", "WORLD"]


def test_an_image_without_text_is_one_line():
    image = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    (line,) = find_lines(image)
    assert line.equal(image)


def test_a_line_is_padded_with_its_last_column():
    image = torch.arange(4, dtype=torch.uint8).expand(3, 4, 4) * 60
    line = as_line(image, min_columns=20)
    assert line.shape == (3, 48, 160)
    assert as_line(image).shape == (3, 48, 96)
    torch.testing.assert_close(line[:, :, 48:], torch.full((3, 48, 112), 180 / 127.5 - 1))
