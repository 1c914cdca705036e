"""The benchmarks compute what they say: each part at its smallest size, once. No time is held to a limit here."""

import json
import math
import re
import time
from itertools import pairwise

import pytest

from tests import processes
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import epoch_split, growth, memory, overhead, startup
from tests.benchmarks.report import ROOT, Report, Table, with_table
from tests.benchmarks.timing import Estimate, exponent, interleaved, ratio

PAGE = ROOT / "docs/performance.md"


def test_runs_go_in_turns():
    order = []
    measured = interleaved({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 3)
    assert order == [*"ababab"]
    assert measured == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_slow_phase_of_the_machine_does_not_change_a_ratio():
    slow = [1.0, 1.0, 5.0, 5.0, 1.0]
    estimate = ratio([1.1 * each for each in slow], slow)
    assert estimate.low == pytest.approx(estimate.high) == pytest.approx(1.1)


def test_the_interval_of_a_ratio_holds_it_and_is_as_wide_as_the_rounds_differ():
    near, far = (ratio([1 + width * each for each in (-1, 0, 1, 2, -2)], [1.0] * 5) for width in (0.01, 0.1))
    assert near.low <= near.value == 1.0 <= near.high
    assert far.high - far.low > 5 * (near.high - near.low) > 0


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.07])
def test_an_exponent_is_that_of_a_power_law(power):
    assert exponent({size: [0.3 * size**power] * 5 for size in (8, 16, 256)}).value == pytest.approx(power, abs=1e-5)


@pytest.mark.parametrize("batch_size", [16, 8], ids=["one batch", "accumulated"])
def test_the_bare_loop_trains_the_weights_of_fit(batch_size):
    """Four epochs, in which each weight moves by some 1e-3 an epoch; a wrong term of the loss is seen below."""
    sizes = overhead.Sizes(width=32, pairs=4, batch_size=batch_size)
    turns, difference = overhead.compare(sizes, rounds=2)
    assert difference < 2e-5
    assert len(turns.seconds("fit", slice(0, 2))) == len(turns.seconds("bare", slice(0, 2))) == 2


def test_a_bare_loop_of_other_mathematics_would_be_seen(monkeypatch):
    train = overhead.BareLoop.train
    monkeypatch.setattr(
        overhead.BareLoop, "train", lambda self, *points: train(self, *points[:3], -points[3], *points[4:])
    )
    _, difference = overhead.compare(overhead.Sizes(width=32, pairs=4, batch_size=16), rounds=0)
    assert difference > 2e-4


def test_time_belongs_to_the_innermost_part():
    meter = epoch_split.Meter()
    meter.next_epoch()
    start = time.perf_counter()
    with meter.part("sample"):
        time.sleep(0.01)
        with meter.part("noise"):
            time.sleep(0.03)
    whole = time.perf_counter() - start
    (parts,) = meter.epochs
    assert parts["noise"] >= 0.03
    assert parts["sample"] >= 0.01
    assert sum(parts.values()) == pytest.approx(whole, abs=2e-3)


def test_the_parts_of_an_epoch_add_up_and_each_is_seen():
    table = epoch_split.measure(quick=True)
    rows = {row["part"]: row for row in table.rows}
    assert [*rows][: len(epoch_split.PARTS)] == list(epoch_split.PARTS)
    (whole,) = rows["epoch"]["each"]
    assert sum(rows[part]["each"][0] for part in epoch_split.PARTS) == pytest.approx(whole)
    assert all(rows[part]["each"][0] > 0 for part in epoch_split.PARTS)
    assert rows["other"]["each"][0] < 0.5 * whole


@pytest.mark.slow
def test_growth_and_memory_have_all_rows():
    table = growth.measure(quick=True)
    assert [row["grows"] for row in table.rows][:-1] == list(growth.SERIES)
    assert all(math.isfinite(row["exponent"].value) and len(row["seconds"]) == 2 for row in table.rows)
    assert [name.split(",")[0] for name in growth.LIMITS] == ["pairs", "steps"]
    if memory.added.__globals__["STATUS"].exists():
        (row,) = memory.measure(quick=True).rows
        assert row["stored"] < row["formula"]
        assert 0.5 < row["ratio"] < 2


def test_sizes_of_growth_can_all_be_run():
    for series in growth.SERIES.values():
        assert [b > a for a, b in pairwise(series.values)] == [True] * (len(series.values) - 1)
        for value in series.values:
            sizes = series.sizes(growth.BASE, value)
            assert sizes.pairs * sizes.points % sizes.batch_size == 0
            assert 2 * sizes.steps % sizes.points == 0
    assert (growth.SERIES["pairs"].values[0], growth.SERIES["pairs"].values[-1]) == (8, 256)


@pytest.mark.parametrize("name", startup.COMMANDS)
def test_commands_of_the_start_up_work(name, tmp_path):
    words = startup.words_of(name, tmp_path)
    assert words[:2] == ["-m", "lightning_fdfo"]
    assert processes.run(words[2:]).returncode == 0
    if name in startup.LIMITS and "--config" in words:
        assert not list(tmp_path.rglob("*.ckpt"))  # it ended where the first rollout began


def test_a_report_has_all_rows_and_puts_them_into_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "seconds", lambda name: 2.0 + len(name))
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text("utf-8"), "utf-8")
    benchmarks.main(["--only", "startup", "--quick", "--out", str(tmp_path), "--page", str(page)])
    saved = json.loads((tmp_path / "benchmarks.json").read_text("utf-8"))
    (table,) = saved["tables"]
    assert [row["what"].strip("`") for row in table["rows"]] == [*startup.IMPORTS, *startup.COMMANDS]
    assert table["rows"][0]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert saved["machine"]["cores"]
    assert {"torch", "lightning", "diffusers", "transformers", "lightning-fdfo", "commit"} <= set(saved["versions"])
    for text in ((tmp_path / "benchmarks.md").read_text("utf-8"), page.read_text("utf-8")):
        assert all(row["what"] in text for row in table["rows"])
        assert saved["command"] in text
    assert page.read_text("utf-8").count("<!-- table: ") == PAGE.read_text("utf-8").count("<!-- table: ")


def test_the_page_has_a_place_for_each_part():
    assert re.findall(r"^<!-- table: (\w+) -->$", PAGE.read_text("utf-8"), flags=re.MULTILINE) == list(benchmarks.PARTS)
    with pytest.raises(ValueError, match=r"expected <!-- table: none --> and <!-- end of table -->"):
        with_table("a page", "none", "")


def test_markdown_has_a_line_for_each_row():
    rows = [{"what": "a", "ratio": Estimate(1.0, 0.9, 1.1), "hidden": [1, 2]}, {"what": "b", "ratio": 2.0}]
    table = Table("part", "Title", {"what": "what", "ratio": "ratio (95 %)"}, rows, "medians of 5 runs")
    lines = table.markdown("Here.").splitlines()
    assert lines[:4] == ["| what | ratio (95 %) |", "|---|---|", "| a | 1.000 (0.900–1.100) |", "| b | 2.000 |"]
    assert lines[-1] == "Title: medians of 5 runs. Here."
    report = Report([table], {"cpu": "X", "cores": 2, "load_before": 0.1}, benchmarks_versions(), "command", "today")
    assert "commit C" in report.where


def benchmarks_versions():
    return {"commit": "C", "python": "3", **dict.fromkeys(("torch", "lightning", "diffusers", "transformers"), "1")}
