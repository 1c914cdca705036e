import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from lightning_fdfo_rewards import ocr_tesseract
from lightning_fdfo_rewards.ocr import OCR
from lightning_fdfo_rewards.ocr_tesseract import find_data, load_tesseract

from lightning_fdfo.errors import ConfigurationError
from tests.rewards.test_ocr import HELLO_WORLD, draw, picture, score


class StubAPI:
    """Reads `texts[mode]`, and writes down what it was asked."""

    made: list["StubAPI"]
    texts: dict[str, str]

    def __init__(self, path, lang):
        self.path, self.lang, self.calls = path, lang, []
        self.made.append(self)

    def SetVariable(self, name, value):  # noqa: N802
        self.calls.append((name, value))

    def SetPageSegMode(self, mode):  # noqa: N802
        self.mode = mode

    def SetImage(self, image):  # noqa: N802
        self.calls.append((self.mode, image.size))

    def SetSourceResolution(self, resolution):  # noqa: N802
        self.resolution = resolution

    def GetUTF8Text(self):  # noqa: N802
        return self.texts[self.mode]


@pytest.fixture(autouse=True)
def fresh():
    ocr_tesseract._load.cache_clear()
    ocr_tesseract.read_alphabet.cache_clear()
    yield
    ocr_tesseract._load.cache_clear()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with data of two languages."""
    for language in ("eng", "deu"):
        (tmp_path / f"{language}.traineddata").touch()
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    return tmp_path


@pytest.fixture
def stub(data, monkeypatch):
    StubAPI.made, StubAPI.texts = [], {"auto": "HELLO\nWORLD\n", "line": "HELL0 WORLD\n"}
    module = SimpleNamespace(PyTessBaseAPI=StubAPI, PSM=SimpleNamespace(AUTO="auto", SINGLE_LINE="line"))
    monkeypatch.setitem(sys.modules, "tesserocr", module)
    return StubAPI


def options(**others):
    return {"backend": "tesseract", "score": "edit_distance", **others}


def test_the_engine_gets_languages_and_data(stub, data):
    reward = OCR(**options(languages=["eng", "deu"]))
    reward.check('"7"', {})
    assert not stub.made
    reward.setup(torch.device("cpu"))
    (api,) = stub.made
    assert (api.path, api.lang) == (str(data), "eng+deu")


def test_detection_chooses_the_mode(stub):
    image = torch.ones(3, 40, 60)
    assert score([image], ["hello world"], **options(detect=True)) == [1.0]
    assert score([image], ["hello world"], **options()) == [pytest.approx(0.9)]
    assert [call[0] for call in stub.made[0].calls] == ["debug_file", "auto", "line"]


def test_without_anything_found_the_image_is_one_line(stub):
    stub.texts["auto"] = " \n"
    assert score([torch.ones(3, 40, 60)], ["hello world"], **options(detect=True)) == [pytest.approx(0.9)]


def test_small_images_are_enlarged_large_ones_are_not(stub):
    score([torch.ones(3, 40, 60)], ["7"], **options())
    score([torch.ones(3, 300, 200)], ["7"], **options())
    assert [size for _, size in stub.made[0].calls[1:]] == [(192, 128), (200, 300)]


def test_it_is_loaded_once_for_all_rewards_and_threads(stub):
    rewards = [OCR(**options()) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda reward: reward.setup(torch.device("cpu")), rewards))
    assert len(stub.made) == 1
    OCR(**options(languages=["deu"])).setup(torch.device("cpu"))
    assert [api.lang for api in stub.made] == ["eng", "deu"]


def test_an_engine_that_refuses_its_data(stub, monkeypatch):
    def refuse(*args):
        raise RuntimeError("Failed to init API")

    monkeypatch.setattr(stub, "__init__", lambda self, path, lang: refuse())
    with pytest.raises(ConfigurationError, match=r"cannot load .*eng.*Failed to init API"):
        load_tesseract(("eng",))


def test_without_the_package_the_cure_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tesserocr", None)
    for act in (lambda reward: reward.check('"7"', {}), lambda reward: reward.setup(torch.device("cpu"))):
        with pytest.raises(ConfigurationError, match=r"pip install 'lightning-fdfo-rewards\[tesseract\]'"):
            act(OCR(**options()))


def write_data(file, characters, part=21):
    """A `.traineddata` file with the list of its characters, and a part after it."""
    lines = "".join(f"{name} 3 0,255 Latin\n" for name in ("NULL", "Joined", "|Broken|0|1", *characters))
    listed = f"{len(characters) + 3}\n{lines}".encode()
    start = 4 + 8 * 24
    offsets = [-1] * 24
    offsets[part], offsets[23] = start, start + len(listed)
    file.write_bytes(struct.pack("<I24q", 24, *offsets) + listed + b"version")


@pytest.mark.parametrize("part", [21, 1])
def test_a_character_that_its_data_lack_is_named(stub, data, part):
    write_data(data / "eng.traineddata", "0123456789abcABCé", part)
    write_data(data / "deu.traineddata", "äÄß", part)
    reward = OCR(**options(languages=["eng", "deu"]))
    reward.check('"Ab é 7 Ä-ß!"', {})
    with pytest.raises(
        ConfigurationError, match=r"tesseract's data of eng, deu does not know \['x', 'ก'\] in '7Xก'; give"
    ):
        reward.check('"7 Xก"', {})


@pytest.mark.parametrize("content", [b"", b"\x18\x00\x00\x00", b"\xff" * 400, bytes(400)])
def test_data_of_another_format_tell_nothing(stub, data, content):
    (data / "eng.traineddata").write_bytes(content)
    OCR(**options(score="exact_match")).check('"7ก"', {})


def test_narrow_images_are_enlarged_within_bounds(stub):
    score([torch.ones(3, 1, 1000)], ["7"], **options())
    (size,) = [size for _, size in stub.made[0].calls[1:]]
    assert size == (4000, 128)


def test_missing_data_are_named(stub, data):
    with pytest.raises(ConfigurationError, match=r"\['eng', 'fra'\].*found .*: deu, eng; install.*TESSDATA_PREFIX"):
        OCR(**options(languages=["eng", "fra"])).check('"7"', {})


def test_no_data_at_all(stub, monkeypatch, tmp_path):
    monkeypatch.delenv("TESSDATA_PREFIX")
    monkeypatch.setattr(ocr_tesseract, "DATA_FOLDERS", (f"{tmp_path}/nowhere/*/tessdata",))
    with pytest.raises(ConfigurationError, match=r"no folder among .*nowhere.*apt-get install tesseract-ocr-eng"):
        OCR(**options()).check('"7"', {})


def test_where_data_are_found(monkeypatch, tmp_path):
    for version, languages in {"4": ["eng", "deu"], "5": ["eng"]}.items():
        folder = tmp_path / version / "tessdata"
        folder.mkdir(parents=True)
        for language in languages:
            (folder / f"{language}.traineddata").touch()
    monkeypatch.delenv("TESSDATA_PREFIX", raising=False)
    monkeypatch.setattr(ocr_tesseract, "DATA_FOLDERS", (f"{tmp_path}/*/tessdata",))
    assert find_data(["eng"]) == tmp_path / "5" / "tessdata"
    assert find_data(["eng", "deu"]) == tmp_path / "4" / "tessdata"
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path / "4"))
    assert find_data(["eng"]) == tmp_path / "4" / "tessdata"
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path / "4" / "tessdata"))
    assert find_data(["eng"]) == tmp_path / "4" / "tessdata"


@pytest.fixture
def real():
    pytest.importorskip("tesserocr", reason="needs tesserocr")
    try:
        find_data(["eng"])
    except ConfigurationError as error:
        pytest.skip(f"needs tesseract's data: {error}")


def test_tesseract_reads(real):
    numbers = ["427", "903", "158"]
    images = [draw(128, 48, (10, 6, 30, number)) for number in numbers]
    assert score(images, numbers, **options(score="exact_match")) == [1.0] * 3
    assert score([images[0]], ["428"], **options()) == [pytest.approx(2 / 3)]
    assert OCR(**options()).range == (0.0, 1.0)


@pytest.mark.parametrize("name", ["one line", "two lines", "large"])
def test_tesseract_reads_several_words(real, name):
    assert score([HELLO_WORLD[name]], ["HELLO WORLD"], **options(detect=True)) == [1.0]


def test_tesseract_and_blank_images(real, capfd):
    for detect in (False, True):
        assert score([torch.ones(3, 64, 64), torch.zeros(3, 64, 64)], ["7"] * 2, **options(detect=detect)) == [0.0] * 2
    assert capfd.readouterr() == ("", "")


def test_tesseract_one_by_one_equals_a_batch_in_threads(real):
    images = [picture(number, 48, 96, 30) for number in ("427", "12", "903", "58")]
    targets = ["427", "13", "903", "85"]
    alone = [score([image], [target], **options())[0] for image, target in zip(images, targets, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda _: score(images, targets, **options()), range(8)))
    assert batches == [alone] * 8
    assert alone[0] == 1.0
    assert alone[1] == 0.5


def test_tesseract_knows_which_languages_are_there(real):
    with pytest.raises(ConfigurationError, match="eng"):
        OCR(**options(languages=["xyz"])).setup(torch.device("cpu"))
