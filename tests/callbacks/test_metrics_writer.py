import csv
import json

import pytest

from lightning_fdfo.callbacks import MetricsWriter
from lightning_fdfo.settings import Evaluation


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return {row.pop("metric"): row for row in csv.DictReader(file)}


def test_files_and_table_hold_the_numbers(toy_module, fit, judge, tmp_path, capsys):
    trained = toy_module()
    fit(trained, 6).save_checkpoint(tmp_path / "a.ckpt")
    module = toy_module()
    judge(module, ckpt_path=str(tmp_path / "a.ckpt"), callbacks=[MetricsWriter()])
    summary, rows = (
        json.loads((tmp_path / "test/0/metrics.json").read_text()),
        read_csv(tmp_path / "test/0/metrics.csv"),
    )
    assert (summary["weights"], summary["seed"]) == ("a.ckpt", 0)
    assert (summary["num_prompts"], summary["images_per_prompt"]) == (5, 3)
    assert set(summary["metrics"]) == set(rows) == {row.name for row in module.comparison}
    for row in module.comparison:
        written, line = summary["metrics"][row.name], rows[row.name]
        for side in ("tuned", "base", "difference"):
            estimate = getattr(row, side)
            assert written[side] == {"mean": estimate.mean, "standard_error": estimate.standard_error}
            assert (float(line[side]), float(line[f"{side}_standard_error"])) == estimate
        if row.win_rate is None:
            assert "win_rate" not in written
            assert line["win_rate"] == line["win_rate_low"] == ""
        else:
            assert tuple(written["win_rate"].values()) == row.win_rate
            assert tuple(float(line[f"win_rate{end}"]) for end in ("", "_low", "_high")) == row.win_rate
    shown = capsys.readouterr().out
    reward = next(row for row in module.comparison if row.name == "reward")
    assert f"{reward.difference.mean:+.4g} ± {reward.difference.standard_error:.2g}" in shown
    assert f"{reward.win_rate.rate:.1%} (" in shown
    assert f"Written to {tmp_path / 'test/0'}" in shown.replace("\n", "")


def test_a_folder_a_call(toy_module, judge, tmp_path):
    for _ in range(2):
        judge(toy_module(), callbacks=[MetricsWriter()])
    files = [(tmp_path / "test" / number / "metrics.json").read_text() for number in ("0", "1")]
    assert files[0] == files[1]


@pytest.mark.parametrize("base", [True, False])
def test_what_there_is_not_is_null_or_empty(toy_module, judge, tmp_path, prompts_file, base):
    prompts_file.write_text("one\n")
    judge(toy_module(evaluation=Evaluation(base=base)), callbacks=[MetricsWriter()])
    text = (tmp_path / "test/0/metrics.json").read_text()
    assert "NaN" not in text
    reward = json.loads(text)["metrics"]["reward"]
    assert reward["tuned"]["standard_error"] is None
    assert ("win_rate" in reward) == base
    assert read_csv(tmp_path / "test/0/metrics.csv")["reward"]["base"] != ("" if base else None) or not base
