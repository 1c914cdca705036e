"""The commands `lightning-fdfo rewards`, run in this process as a user types them."""

import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageDraw, ImageFont

from lightning_fdfo import Reward
from lightning_fdfo.__main__ import main
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.reward import load_reward, registry

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"
SIZES = []
"""of the batches that `height` was given"""


class Dear(Reward):
    """A reward that no mistake should cost anybody to load."""

    range = (0.0, 1.0)
    packaged_weights = "a rune (public domain)"

    def fetch(self):
        raise AssertionError("fetched")

    def __call__(self, images, prompts, metadata): ...


class Coloured(Reward):
    required_metadata = ("colour",)

    def __call__(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))


def height(images, prompts, metadata):
    SIZES.append(tuple(images.shape))
    return torch.full((len(images),), float(images.shape[2]))


def told(images, prompts, metadata):
    """Of what it is told alone: a prompt's length, and its level."""
    return torch.tensor([len(p) + row.get("level", 0.0) for p, row in zip(prompts, metadata, strict=True)])


def fails(images, prompts, metadata):
    raise ZeroDivisionError("by\nnothing")


def explains(images, prompts, metadata):
    raise ConfigurationError("first\n  second")


def not_a_number(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)) * float("nan")


def one_for_all(images, prompts, metadata):
    return images.mean()


DEAR = f"{__name__}.Dear"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `lightning-fdfo rewards …`: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "250")
    SIZES.clear()

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["rewards", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    return command


@pytest.fixture
def fine(run):
    """Runs a command that ends well, and returns its standard output."""

    def command(*arguments):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return out

    return command


@pytest.fixture
def refused(run):
    """Runs a command that is refused in one line, and returns that."""

    def command(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return command


def picture(height, width, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Five images of three sizes, and two things that are none."""
    images = tmp_path / "images"
    (images / "folder.png").mkdir(parents=True)
    (images / "notes.txt").write_text("not an image")
    picture(24, 16, seed=1).save(images / "e.png")
    picture(32, 32, seed=2).save(images / "b.PNG", format="png")
    picture(24, 16, "RGBA", seed=3).save(images / "c.png")
    picture(20, 40, seed=4).save(images / "d.jpeg")
    picture(24, 16, seed=5).save(images / "a.png")
    return images


NAMES = ["a.png", "b.PNG", "c.png", "d.jpeg", "e.png"]


def direct(name, file, prompt="", **options):
    """A reward's score of a file, without the command."""
    pixels = np.array(Image.open(file)).astype(np.float32)
    if pixels.shape[-1] == 4:  # over white
        alpha = pixels[..., 3:] / 255
        pixels = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    return load_reward(name, **options)(image, [prompt], [{}]).item()


def records(text):
    """CSV's rows: strings."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


# List


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def plugins(monkeypatch):
    """Replaces all installed rewards: name -> (module:attribute, distribution)."""

    class Distribution:
        def __init__(self, name):
            self.name, self.version = name, "4.5.6"

    def install(**entries):
        found = [
            EntryPoint(name, value, registry.ENTRY_POINT_GROUP)._for(Distribution(distribution))
            for name, (value, distribution) in entries.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)

    return install


def line_of(name, text):
    """The line of the list that begins with a name."""
    (line,) = [line for line in text.splitlines() if re.match(rf"\W*{name}\b", line)]
    return line


def test_the_list_tells_what_each_reward_is_and_needs(cache, fine):
    out = fine()
    assert f"lightning-fdfo-rewards {version('lightning-fdfo-rewards')}" in out
    assert "0 … inf" in line_of("JPEGSize", out)
    assert "nothing" in line_of("JPEGSize", out)
    assert 'metadata "text", or text in quotes in the prompt' in line_of("OCR", out)
    assert re.search(r"openai/clip-vit-large-patch14 \(MIT\)", line_of("CLIPScore", out))
    assert re.search(r"xswu/HPSv2 \(Apache-2\.0\)", line_of("HPSv2", out))
    assert "Not installed" not in out


def test_the_list_ends_with_the_commands_that_fetch_what_is_missing_each_once(cache, fine):
    out = fine()
    commands = [line.strip() for line in out.splitlines() if line.startswith("  hf download ")]
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in commands
    assert len(commands) == len(set(commands))
    assert "to fetch" in line_of("HPSv2", out)
    assert "yes" in line_of("JPEGSize", out)
    assert "to fetch" not in line_of("JPEGSize", out)


def test_what_is_in_the_cache_is_not_to_be_fetched(cache, fine):
    for repository, names in {
        "xswu/HPSv2": ["HPS_v2.1_compressed.pt"],
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ["tokenizer.json"],
    }.items():
        root = cache / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("c0ffee")
        (root / "snapshots" / "c0ffee").mkdir(parents=True)
        for name in names:
            (root / "snapshots" / "c0ffee" / name).touch()
    out = fine()
    assert "to fetch" not in line_of("HPSv2", out)
    assert "hf download xswu/HPSv2" not in out
    assert "to fetch" in line_of("ImageReward", out)


def test_rewards_of_every_distribution_are_listed_also_plain_functions(plugins, fine):
    plugins(
        Rune=(f"{__name__}:Dear", "runes"),
        Height=(f"{__name__}:height", "measures"),
        Hue=(f"{__name__}:Coloured", "measures"),
    )
    out = fine()
    assert out.index("measures 4.5.6") < line_place("Height", out) < out.index("runes 4.5.6") < line_place("Rune", out)
    assert "a rune (public domain)" in line_of("Rune", out)
    assert "-inf … inf" in line_of("Height", out)
    assert 'metadata "colour"' in line_of("Hue", out)
    assert "hf download" not in out


def line_place(name, text):
    return text.index(line_of(name, text))


def test_official_rewards_that_are_not_installed_are_named_with_the_cure(plugins, fine):
    plugins(JPEGSize=("lightning_fdfo_rewards.jpeg_size:JPEGSize", "lightning-fdfo-rewards"))
    (line,) = [line for line in fine().splitlines() if line.startswith("Not installed: ")]
    assert {"OCR", "HPSv2", "PickScore"} <= set(re.findall(r"\w+", line))
    assert "JPEGSize" not in line
    assert line.endswith(": pip install lightning-fdfo-rewards")


def test_without_any_plugin_the_list_still_helps(plugins, fine):
    plugins()
    assert fine().startswith("Not installed: Aesthetic, ")


def test_a_broken_plugin_stays_in_the_list_with_a_warning(plugins, run):
    plugins(Broken=("no_such_module_here:A", "broken-rewards"), Height=(f"{__name__}:height", "measures"))
    with pytest.warns(UserWarning, match=r"'Broken' of broken-rewards cannot be imported.*no_such_module_here"):
        code, out, _ = run()
    assert code == 0
    assert "cannot be loaded" in line_of("Broken", out)
    assert "broken-rewards 4.5.6" in out
    assert "yes" in line_of("Height", out)


# Score


def test_scores_are_those_of_calling_the_rewards_in_the_order_of_the_names(folder, fine):
    rows = json.loads(fine("score", folder, "--reward", "JPEGSize", "--reward", "Colorfulness", "--format", "json"))
    assert [row["image"] for row in rows] == NAMES
    for row in rows:
        assert list(row) == ["image", "prompt", "JPEGSize", "Colorfulness"]
        for name in ("JPEGSize", "Colorfulness"):
            assert row[name] == pytest.approx(direct(name, folder / row["image"]), rel=1e-3)
    assert len({row["JPEGSize"] for row in rows}) > 1


def test_csv_and_json_say_the_same(folder, fine):
    arguments = ("score", folder, "--reward", "JPEGSize", "--format")
    wanted = [{key: str(value) for key, value in row.items()} for row in json.loads(fine(*arguments, "json"))]
    assert records(fine(*arguments, "csv")) == wanted


def test_the_table_has_a_row_an_image_and_the_mean(folder, fine):
    out = fine("score", folder, "--reward", "JPEGSize")
    scores = [direct("JPEGSize", folder / name) for name in NAMES]
    for name, score in zip(NAMES, scores, strict=True):
        assert f"{score:.4f}" in line_of(name, out)
    assert f"{np.mean(scores):.4f}" in line_of("mean of 5", out)


def test_a_table_is_what_comes_by_default(folder, fine):
    arguments = ("score", folder, "--reward", "JPEGSize")
    assert fine(*arguments) == fine(*arguments, "--format", "table")


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [
        (32, [(3, 3, 24, 16), (1, 3, 32, 32), (1, 3, 20, 40)]),
        (2, [(2, 3, 24, 16), (1, 3, 24, 16), (1, 3, 32, 32), (1, 3, 20, 40)]),
    ],
)
def test_images_of_one_size_go_together(folder, fine, batch_size, batches):
    out = fine(
        "score", folder, "--reward", f"{__name__}.height", "--batch_size", batch_size, "--format", "json"
    )  # fmt: skip
    assert [row[f"{__name__}.height"] for row in json.loads(out)] == [24.0, 32.0, 24.0, 20.0, 24.0]
    assert batches == SIZES


def test_a_camera_held_upright_is_seen(tmp_path, fine):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 40).save(tmp_path / "upright.jpg", exif=exif)
    (row,) = json.loads(
        fine("score", tmp_path, "--reward", f"{{h: {{reward: {__name__}.height}}}}", "--format", "json")
    )
    assert row == {"image": "upright.jpg", "prompt": "", "h": 40.0}


def test_one_class_may_come_several_times_and_weights_mean_nothing(folder, fine):
    out = fine(
        "score", folder, "--format", "json", "--reward", "JPEGSize", "--reward",
        "{small: {reward: {class_path: JPEGSize, init_args: {quality: 10, sign: -1}}, weight: 0, scale: std}, "
        "Colorfulness: 0.5}",
    )  # fmt: skip
    for row in json.loads(out):
        file = folder / row["image"]
        assert list(row)[2:] == ["JPEGSize", "small", "Colorfulness"]
        assert row["JPEGSize"] == pytest.approx(direct("JPEGSize", file))
        assert row["small"] == pytest.approx(direct("JPEGSize", file, quality=10, sign=-1))
        assert row["Colorfulness"] == pytest.approx(direct("Colorfulness", file), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [((), "scores.csv"), ((), "scores.json"), (("--format", "json"), "scores.txt"), (("--format", "csv"), "s.json")],
)
def test_output_goes_to_a_new_file_as_it_would_go_to_the_screen(folder, tmp_path, fine, options, name):
    output = tmp_path / name
    form = options[1] if options else output.suffix[1:]
    arguments = ("score", folder, "--reward", "JPEGSize")
    assert fine(*arguments, *options, "--output", output) == f"5 rows are in {output}\n"
    assert output.read_bytes().decode() == fine(*arguments, "--format", form)


# Prompts


def scores(fine, folder, prompts):
    out = fine(
        "score", folder, "--reward", f"{{told: {{reward: {__name__}.told}}}}", "--prompts", prompts, "--format", "json"
    )
    return [(row["image"], row["prompt"], row["told"]) for row in json.loads(out)]


def test_a_line_an_image_in_the_order_of_the_names(folder, tmp_path, fine):
    (tmp_path / "prompts.txt").write_text("a\n\nbé\nccc\ndddd\neeeee\n", encoding="utf-8")
    lines = ["a", "bé", "ccc", "dddd", "eeeee"]
    assert scores(fine, folder, tmp_path / "prompts.txt") == [
        (name, line, number) for name, line, number in zip(NAMES, lines, range(1, 6), strict=True)
    ]


def test_json_keeps_the_letters_of_every_script(folder, tmp_path, fine):
    (tmp_path / "prompts.txt").write_text("東京\n" * 5, encoding="utf-8")
    out = fine("score", folder, "--reward", "JPEGSize", "--prompts", tmp_path / "prompts.txt", "--format", "json")
    assert out.count('"東京"') == 5


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
@pytest.mark.parametrize("named", [True, False])
def test_objects_may_name_their_image_and_bring_metadata(folder, tmp_path, fine, named, order):
    rows = [{"prompt": "p" * (place + 1), "level": 10 * place} for place in range(5)]
    if named:
        rows = [row | {"image": name} for row, name in zip(rows, NAMES, strict=True)]
        rows.append({"image": "of another folder.png", "prompt": "x"})
    order = [*order, 5] if named else order
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(rows[place]) + "\n" for place in order))
    found = scores(fine, folder, tmp_path / "prompts.jsonl")
    places = range(5) if named else order
    assert found == [(name, "p" * (place + 1), 11 * place + 1) for name, place in zip(NAMES, places, strict=True)]


def write(folder, *words):
    """Images, each with a word."""
    folder.mkdir()
    for number, word in enumerate(words):
        image = Image.new("RGB", (160, 48), "white")
        ImageDraw.Draw(image).text((8, 6), word, font=ImageFont.truetype(FONT, 30), fill=(200, 30, 30))
        image.save(folder / f"{number}.png")
    return folder


def test_ocr_reads_what_the_prompts_want(tmp_path, fine):
    folder = write(tmp_path / "words", "HELLO", "HOTEL")
    (tmp_path / "prompts.txt").write_text('a sign, "HELLO"\na sign, "PIZZA"\n')
    out = fine(
        "score", folder, "--prompts", tmp_path / "prompts.txt", "--format", "csv", "--reward", "OCR", "--reward",
        "{read: {reward: {class_path: OCR, init_args: {score: exact_match}}}}",
    )  # fmt: skip
    right, wrong = records(out)
    assert (right["prompt"], right["read"], wrong["read"]) == ('a sign, "HELLO"', "1.0", "0.0")
    assert float(wrong["OCR"]) < -1 < float(right["OCR"])
    assert float(right["OCR"]) == pytest.approx(direct("OCR", folder / "0.png", 'a sign, "HELLO"'), abs=1e-4)


# Mistakes


@pytest.fixture
def files(folder, tmp_path):
    """What mistakes are made with."""
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "five.txt").write_text('"1"\n"2"\nthree\n"4"\n"5"\n')
    rows = [json.dumps({"prompt": "p", "image": name}) + "\n" for name in NAMES]
    (tmp_path / "lacking.jsonl").write_text("".join(rows[:2] + rows[4:]))
    (tmp_path / "twice.jsonl").write_text("".join([*rows, rows[1]]))
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "there.csv").write_text("years of work\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"lightning-fdfo rewards score: the following arguments are required: --reward; see .* --help"),
        (f"--reward {DEAR} --batch_sise 3", r"unrecognized arguments: --batch_sise 3"),
        (f"--reward {DEAR} --batch_size 0", r"--batch_size: expected at least 1, got 0"),
        (f"--reward {DEAR} --batch_size two", r"--batch_size: invalid int value: 'two'"),
        (f"--reward {DEAR} --format yaml", r"--format: invalid choice: 'yaml'"),
        (f"--reward {DEAR} --device gpu", r"--device: expected one like cpu or cuda, got 'gpu'"),
        (f"--reward {DEAR} --device cuda:99", r"--device: expected one like cpu or cuda, got 'cuda:99'"),
        (f"--reward {DEAR} --reward JPEGsize", r"unknown reward 'JPEGsize' \(did you mean 'JPEGSize'\?\)"),
        (f"--reward {DEAR} --reward {DEAR}", r"--reward: \['\S*Dear'\] comes twice; give one another name: \{NAME"),
        (f"--reward {DEAR} --reward {{", r"--reward: not YAML: '\{'"),
        (f"--reward {DEAR} --reward 3", r"--reward: expected a name or \{NAME: \{reward: …\}\}, got '3'"),
        (f"--reward {DEAR} --reward [JPEGSize]", r"--reward: expected a name or .*, got '\[JPEGSize\]'"),
        (f'--reward {DEAR} --reward {{"3":1,3:1}}', r"--reward: expected a name or"),
        ("--reward {}", r"rewards: expected at least one"),
        (f'--reward {DEAR} --reward {{"j":JPEGSize}}', r"rewards\.j: expected a weight or .*, got 'JPEGSize'"),
        (f'--reward {DEAR} --reward {{"image":{{"reward":JPEGSize}}}}', r"\['image'\] would be two columns"),
        (f'--reward {DEAR} --reward {{"prompt":{{"reward":JPEGSize}}}}', r"\['prompt'\] would be two columns"),
        (f"--reward {DEAR} --reward OCR", r"reward 'OCR' needs metadata \"text\", or .* give --prompts FILE"),
        (f"--reward {__name__}.Coloured", r"'\S*Coloured' needs metadata \['colour'\]: give --prompts FILE"),
        (f"--reward {DEAR} --reward OCR --prompts {{tmp}}/five.txt", r"five\.txt:3: OCR needs .*, got 'three'"),
        (f"--reward {DEAR} --prompts {{tmp}}/three.txt", r"three\.txt has 3 prompts for 5 images: .*\"image\": \"NAME"),
        (f"--reward {DEAR} --prompts {{tmp}}/lacking.jsonl", r"lacking\.jsonl has no prompt for c\.png \(2 of 5\)"),
        (f"--reward {DEAR} --prompts {{tmp}}/twice.jsonl", r"twice\.jsonl:6: .* got another for b\.PNG"),
        (f"--reward {DEAR} --prompts {{tmp}}/broken.jsonl", r"broken\.jsonl:1: not JSON"),
        (f"--reward {DEAR} --prompts {{tmp}}/none.txt", r"none\.txt cannot be read: No such file"),
        (f"--reward {DEAR} --output {{tmp}}/there.csv", r"--output: .*there\.csv exists already"),
        (f"--reward {DEAR} --output {{tmp}}/no/new.csv", r"--output: .*new\.csv is in a folder that does not exist"),
        (f"--reward {DEAR} --output {{tmp}}/new.txt", r"--output: expected a file that ends in \.csv or \.json"),
        (f"--reward {DEAR} --format table --output {{tmp}}/new.csv", r"--output: expected .*--format csv or json"),
    ],
)
def test_mistakes_end_in_one_clear_line_before_anything_is_loaded(files, refused, arguments, message):
    """`Dear` says so if it is fetched: then the message is another."""
    words = [word.replace("{tmp}", str(files)) for word in arguments.split()]
    assert re.search(message, refused("score", files / "images", *words))
    assert (files / "there.csv").read_text() == "years of work\n"
    assert not list(files.glob("new.*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"empty holds no images: expected files that end in \.png, "),
        ("missing", r"expected a folder of images, got \S*missing$"),
        ("three.txt", r"expected a folder of images, got \S*three\.txt$"),
    ],
)
def test_a_folder_without_images_is_told(files, refused, name, message):
    assert re.search(message, refused("score", files / name, "--reward", DEAR))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A file of a few bytes that says that it is so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut(image, form):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (cut(picture(24, 16), "png"), "truncated|cannot be read"),
        (cut(picture(24, 16), "jpeg"), "truncated|cannot be read"),
        (b"", "cannot identify image file"),
        (b"not an image", "cannot identify image file"),
        (png(60_000, 60_000), "decompression bomb"),
        (png(8, 8), "cannot be read"),
    ],
    ids=["cut PNG", "cut JPEG", "empty", "text", "huge", "without pixels"],
)
def test_a_file_that_is_no_whole_image_is_named_before_anything_is_loaded(folder, refused, content, reason):
    (folder / "c.png").write_bytes(content)
    line = refused("score", folder, "--reward", DEAR)
    assert f"{folder / 'c.png'} cannot be read as an image: " in line
    assert re.search(reason, line)


def test_sixteen_bits_a_channel_are_refused_not_made_white(tmp_path, refused):
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert re.search(r"deep\.png: expected 8 bits a channel", refused("score", tmp_path, "--reward", DEAR))


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("fails", r"failed on images on cpu: ZeroDivisionError\('by\\nnothing'\)"),
        ("not_a_number", r"score nan for prompt ''"),
        ("one_for_all", r"expected \[3\] scores, got shape \[\]"),
    ],
)
def test_a_reward_that_fails_is_named_and_nothing_is_written(folder, tmp_path, run, scorer, message):
    output = tmp_path / "scores.csv"
    code, out, err = run("score", folder, "--reward", f"{__name__}.{scorer}", "--output", output)
    line, *frames = err.splitlines()
    assert (code, out) == (3, "")
    assert line.startswith("error: ")
    assert f"`lightning-fdfo rewards check {__name__}.{scorer}`" in line
    files = [frame for frame in frames if frame.startswith("  File ")]
    assert len(files) == (scorer == "fails")
    assert all(__file__ in file for file in files)
    assert f"reward '{__name__}.{scorer}' ({scorer} of the module {__name__})" in line
    assert re.search(message, line)
    assert not output.exists()


def test_an_explanation_of_several_lines_becomes_one(folder, refused):
    assert refused("score", folder, "--reward", f"{__name__}.explains") == "error: first second"


def test_an_unknown_command_is_told_in_one_line(refused):
    assert re.search(r"lightning-fdfo rewards: .*invalid choice: 'scores'", refused("scores"))


# Check


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module with a reward, where this process and its children find it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "gaining.py").write_text(
        "def gained(images, prompts, metadata, gain=1.0):\n"
        "    assert all(len(prompt) > 4 for prompt in prompts)\n"
        "    return gain * images.mean(dim=(1, 2, 3))\n"
    )
    yield "gaining.gained"
    del sys.modules["gaining"]


def test_check_prints_a_line_a_check(fine):
    *lines, last = fine("check", "JPEGSize", "--init_args", "{quality: 80}").splitlines()
    assert last == "JPEGSize keeps the contract"
    assert len(lines) == 13
    assert all(line.startswith("ok ") for line in lines)


def test_check_tells_what_is_broken_and_exits_with_one(plugin, run):
    code, out, err = run("check", plugin, "--init_args", "{gain: .nan}")
    assert (code, err) == (1, "")
    *passed, failed, last = out.splitlines()
    assert all(line.startswith("ok ") for line in passed)
    assert failed.startswith("FAILED gives one finite number an image, or a pair: got [nan, nan, nan, nan]")
    assert last == "gaining.gained breaks the contract"


def test_check_takes_prompts_of_ones_own(plugin, tmp_path, run):
    (tmp_path / "short.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "coloured.jsonl").write_text('{"prompt": "a house", "colour": "red"}\n' * 4)
    assert run("check", plugin, "--prompts", tmp_path / "short.txt")[0] == 1
    assert run("check", plugin, "--prompts", tmp_path / "coloured.jsonl")[0] == 0
    coloured = f"{__name__}.Coloured"
    assert "needs metadata ['colour']" in run("check", coloured)[1]
    accepted = run("check", coloured, "--prompts", tmp_path / "coloured.jsonl")[1]
    assert re.search(r"^ok +accepts the sample's prompts and metadata$", accepted, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["JPEGsize"], r"unknown reward 'JPEGsize'"),
        (["no_such_module_here.A"], r"'no_such_module_here\.A' cannot be imported: ModuleNotFoundError"),
        (["JPEGSize", "--init_args", "{quality: 400}"], r"quality in 1 … 95 and sign 1 or -1, got 400"),
        (["JPEGSize", "--init_args", "{qualitie: 40}"], r"reward JPEGSize.*unexpected keyword argument 'qualitie'"),
        (["JPEGSize", "--init_args", "quality"], r"--init_args: expected a mapping like '\{quality: 80\}', got 'qual"),
        (["JPEGSize", "--init_args", "{"], r"--init_args: not YAML: '\{'"),
        (["JPEGSize", "--device", "gpu"], r"--device: expected one like cpu or cuda, got 'gpu'"),
        (["JPEGSize", "--prompts", "{tmp}/three.txt"], r"three\.txt: expected four prompts, got 3"),
        ([], r"the following arguments are required: name"),
    ],
)
def test_check_refuses_mistakes_in_one_line(files, refused, arguments, message):
    assert re.search(message, refused("check", *(word.replace("{tmp}", str(files)) for word in arguments)))


# What it costs


def test_scoring_a_folder_imports_no_heavy_package(folder):
    """Listing them is in tests/commands/test_imports.py."""
    script = (
        "import sys\nfrom lightning_fdfo.__main__ import main\n"
        "try:\n    main(['rewards', 'score', '--reward', 'JPEGSize', sys.argv[1]])\n"
        "finally:\n    print(sorted({'diffusers', 'lightning', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "JPEGSize" in done.stdout
