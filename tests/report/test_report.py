"""The page of a run: what is on it, that it needs nothing else, and what it says of folders that hold no run."""

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import spearmanr

from lightning_fdfo.__main__ import main
from lightning_fdfo.commands.report import write_report
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.report.page import MAX_PICTURES, correlations, render_page
from lightning_fdfo.report.run_files import RunFiles

TEST = {
    "num_prompts": 4,
    "metrics": {
        "a": {
            "tuned": {"mean": 0.25, "standard_error": 0.03125},
            "base": {"mean": 0.125, "standard_error": None},
            "win_rate": {"rate": 0.75, "low": 0.5, "high": 1.0},
        }
    },
}
EVIL = '<script>document.title = "evil"</script>'


def rows(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        writer.writeheader()
        writer.writerows(table)


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 30), (shade, 0, 255 - shade)).save(path)


def pair(number, prompt, a, b):
    return {
        "epoch": 1, "pair": number, "prompt": prompt,
        "a/first": a[0], "a/second": a[1], "b/first": b[0], "b/second": b[1],
    }  # fmt: skip


PAIRS = [
    pair(number, f"line\n{EVIL}", scores[:2], scores[2:])
    for number, scores in enumerate(np.random.default_rng(0).normal(size=(12, 4)).tolist())
]


@pytest.fixture
def folder(tmp_path):
    """Of a run that was gone on with once, with everything in it."""
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text("seed_everything: 0\n")
    config = {
        "seed_everything": 7,
        "model": {"batching": {"num_pairs": 48}, "rewards": {"a": 1.0, EVIL: {"reward": "OCR"}}},
    }
    (run / "config-1.yaml").write_text(yaml.safe_dump(config))
    rows(run / "csv/version_0/metrics.csv", [{"epoch": e, "step": e, "reward/mean": e, "val/a": ""} for e in range(4)])
    later = [{"epoch": e, "step": e, "reward/mean": 10 + e, "val/a": 5.0 if e == 3 else ""} for e in range(2, 5)]
    rows(run / "csv/version_1/metrics.csv", later)
    (run / "before_after.json").write_text(json.dumps({"before": {"a": 1.5}, "after": {"a": 2.0}, "after_epoch": 4}))
    for epoch in (0, 2, 11):
        picture(run / f"samples/epoch={epoch:03d}.png", 20 * epoch)
    picture(run / "pairs/epoch=000.png", 0)
    rows(run / "pairs/epoch=001.csv", PAIRS)
    alarm = {"epoch": 3, "number": "image/saturation", "value": 0.9, "start": 0.3, "kind": "times", "lowest": None}
    alarms = [alarm | {"highest": 2.0, "last_good_checkpoint": 1}]
    (run / "reward_hacking.json").write_text(json.dumps({"start": {}, "events": alarms}))
    (run / "test/0").mkdir(parents=True)
    (run / "test/0/metrics.json").write_text(json.dumps(TEST))
    return run


def test_what_a_later_start_has_logged_takes_the_place_of_the_earlier(folder):
    history = RunFiles.read(folder).history
    assert history["reward/mean"] == [(1, 0.0), (2, 1.0), (3, 12.0), (4, 13.0), (5, 14.0)]
    assert history["val/a"] == [(0, 1.5), (4, 5.0)]


def test_everything_is_on_the_page(folder):
    text = write_report(folder).read_text()
    assert "<title>my run</title>" in text
    for words in (
        "after epoch 4", "+0.5", "image/saturation", "times −∞ … 2.0", "the checkpoint of epoch 1",
        "0.25 ± 0.031", "75.0% (50.0% to 100.0%)",
    ):  # fmt: skip
        assert words in text
    assert re.search(r"<th>Seed</th><td>7</td>", text)
    assert len(re.findall("<svg", text)) == 2
    shown = re.findall(r'data-epoch="(\d+)" src="data:image/webp;base64,([^"]+)"( hidden)?', text)
    assert [(epoch, bool(hidden)) for epoch, _, hidden in shown] == [
        ("0", True),
        ("2", True),
        ("11", False),
        ("0", False),
    ]
    assert base64.b64decode(shown[0][1])[8:12] == b"WEBP"


def test_nothing_of_a_run_is_code_on_the_page(folder):
    text = write_report(folder).read_text()
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert len(re.findall("<script", text)) == 1


def test_correlations_are_scipys(folder):
    names, table = correlations(RunFiles.read(folder).pairs)
    differences = [[row[f"{name}/first"] - row[f"{name}/second"] for row in PAIRS] for name in "ab"]
    assert names == ["a", "b"]
    assert table[0][1] == table[1][0] == pytest.approx(spearmanr(*differences).statistic, abs=1e-6)
    assert [table[0][0], table[1][1]] == [1, 1]


def test_cells_without_a_number_and_ties_correlate_with_nothing():
    table = [{"a/first": str(n), "a/second": "0", "b/first": "" if n else "1", "b/second": "1"} for n in range(5)]
    assert correlations(table)[1] == [[1.0, None], [None, None]]
    assert correlations([]) == ([], [])


def test_of_many_epochs_some_are_shown(folder):
    for epoch in range(200):
        picture(folder / f"samples/epoch={epoch:03d}.png", 0)
    shown = re.findall(r'alt="Validation prompts, epoch (\d+)"', render_page(RunFiles.read(folder)))
    assert len(shown) == MAX_PICTURES
    assert (shown[0], shown[-1]) == ("0", "199")


def test_a_bare_run_has_a_page_too(tmp_path):
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    text = write_report(tmp_path).read_text()
    for words in ("no CSVLogger", "no PairLog", "neither SampleStrip nor PairGallery", "No validation before"):
        assert words in text.replace("the run had ", "")


def test_a_report_is_written_anew_and_another_file_is_not(folder, capsys):
    main_code(folder)
    (folder / "before_after.json").write_text('{"before": {"a": 1}, "after": {"a": 9}, "after_epoch": 5}')
    main_code(folder)
    assert "after epoch 5" in (folder / "report.html").read_text()
    mine = folder / "mine.html"
    mine.write_text("<p>a page of mine</p>")
    assert main_code(folder, "--output", str(mine)) == 2
    assert "mine.html exists and is no report" in capsys.readouterr().err
    assert mine.read_text() == "<p>a page of mine</p>"


def main_code(folder, *more):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder), *more])
    return stop.value.code


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "holds no run: expected the folder of a `lightning-fdfo fit`"),
        ("config-1.yaml", "a: [", "config-1.yaml cannot be read"),
        ("before_after.json", "{", "before_after.json cannot be read"),
        ("before_after.json", "[]", "before_after.json cannot be read: expected a mapping, got list"),
        ("config-1.yaml", "", "config-1.yaml cannot be read: expected a mapping, got NoneType"),
        ("config-1.yaml", "!!python/object/apply:os.system [touch evil]", "config-1.yaml cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told(folder, capsys, name, content, message):
    if content is None:
        for path in folder.glob("config*"):
            path.unlink()
    else:
        (folder / name).write_text(content)
    assert main_code(folder) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    with pytest.raises(ConfigurationError):
        write_report(folder)


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, folder, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(Path(write_report(folder)).as_uri())
    assert page.title() == "my run"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    gallery = page.locator(".gallery").first
    shown = gallery.locator("img:visible")
    assert shown.get_attribute("data-epoch") == "11"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    slider = gallery.get_by_role("slider")
    slider.press("ArrowLeft")
    assert shown.get_attribute("data-epoch") == gallery.locator("output").text_content() == "2"
    slider.fill("0")
    assert shown.get_attribute("data-epoch") == "0"
    assert page.locator(".gallery").last.locator("img:visible").count() == 1
    assert float(page.evaluate("getComputedStyle(document.querySelector('td')).fontSize").removesuffix("px")) >= 14
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
