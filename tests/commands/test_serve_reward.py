"""`lightning-fdfo serve-reward` as a process, and a whole run against it."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from lightning_fdfo.__main__ import main
from lightning_fdfo.remote import RemoteReward
from lightning_fdfo.reward.mix import RewardMix
from lightning_fdfo.testing.reward_sample import PROMPTS, TEXTS, sample_images
from tests.remote.conftest import TOKEN

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def process():
    """Starts the command; gives the process and its first line. Stops it after the test."""
    started = []

    def start(*arguments, token=None):
        environment = {key: value for key, value in os.environ.items() if key != "LIGHTNING_FDFO_TOKEN"}
        environment |= {"LIGHTNING_FDFO_TOKEN": token} if token else {}
        line = [sys.executable, "-m", "lightning_fdfo", "serve-reward", *arguments]
        one = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(one)
        return one, one.stdout.readline()

    yield start
    for one in started:
        one.kill()
        one.communicate()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["serve-reward", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_process_gives_the_same_scores_and_ends_cleanly(process, monkeypatch):
    """What it prints is the YAML that a run takes."""
    served, line = process("OCR", "--port", "0", "--init_args", "{score: edit_distance}", token=TOKEN)
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", TOKEN)
    terms = yaml.safe_load(line.partition("for model.rewards: ")[2])
    assert set(terms) == {"OCR"}
    images = sample_images(48, 80)
    here = {"here": {"reward": {"class_path": "OCR", "init_args": {"score": "edit_distance"}}}}
    mix = RewardMix(terms | here)
    mix.fetch()
    mix.setup(torch.device("cpu"))
    scores = mix(images, PROMPTS, TEXTS)
    assert torch.equal(scores["OCR"].values, scores["here"].values)
    assert mix.rewards["OCR"].range == (0.0, 1.0)
    served.send_signal(signal.SIGINT)
    said = line + "".join(served.communicate(timeout=20))
    assert served.returncode == 0, said
    assert "Traceback" not in said
    assert TOKEN not in said


def test_sigterm_lets_a_scoring_end(process, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import time, torch\ndef slow(images, prompts, metadata):\n"
        "    print('scoring', flush=True); time.sleep(1); return torch.ones(len(images))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    served, line = process("slow.slow", "--port", "0")
    url = re.search(r"http://[\d.:]+", line).group()
    reward = RemoteReward(url, attempts=1)
    reward.fetch()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(reward, sample_images(8, 8), PROMPTS, TEXTS)
        assert served.stdout.readline() == "scoring\n"
        served.send_signal(signal.SIGTERM)
        assert pending.result().tolist() == [1.0] * 4
    assert served.wait(timeout=20) == -signal.SIGTERM
    assert "Traceback" not in served.stderr.read()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "", "example.org"])
def test_others_need_a_token(host, capsys):
    said = refused(capsys, "JPEGSize", "--host", host)
    assert "there is no token" in said
    assert "export LIGHTNING_FDFO_TOKEN=" in said


def test_all_addresses_with_a_token(process):
    served, line = process("JPEGSize", "--host", "0.0.0.0", "--port", "0", token=TOKEN)
    port = re.search(r":(\d+),", line).group(1)
    assert "0.0.0.0" not in line  # nobody can call that
    assert httpx.get(f"http://127.0.0.1:{port}/reward").status_code == 401
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "node17.cluster"}
    assert httpx.get(f"http://127.0.0.1:{port}/reward", headers=headers).json()["reward"] == "JPEGSize"
    assert served.poll() is None


def test_a_port_that_is_taken(serve, capsys):
    said = refused(capsys, "JPEGSize", "--port", str(serve().port))
    assert "in use" in said
    assert "choose another --port" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Nothing"], "unknown reward 'Nothing'"),
        (["JPEGSize", "--init_args", "[1]"], "--init_args: expected a mapping"),
        (["JPEGSize", "--init_args", "{quality: 200}"], "expected quality in 1"),
        (["JPEGSize", "--max_batch", "0"], "expected numbers above 0"),
        (["JPEGSize", "--port", "99999"], "choose another --port"),
        (["JPEGSize", "--port", "x"], "invalid int value"),
        (["JPEGSize", "--device", "toaster"], "toaster"),
        (["JPEGSize", "--token", TOKEN], "unrecognized arguments"),
        ([], "required: name"),
    ],
)
def test_what_cannot_be_served(arguments, words, capsys):
    assert words in refused(capsys, *(["--port", "0"] if "--port" not in arguments else []), *arguments)


def test_a_weak_token_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", "hunter2")
    assert "hunter2" not in refused(capsys, "JPEGSize")


@pytest.mark.parametrize("missing", ["fastapi", "httpx", "tenacity", "uvicorn"])
def test_without_the_extra(missing):
    """One line on either side; the module is made missing in a fresh process."""
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from lightning_fdfo.__main__ import main\nmain(['serve-reward', 'JPEGSize'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert missing in done.stderr
    assert "pip install 'lightning-fdfo[remote]'" in done.stderr


# A run


SMALL = [
    "--trainer.max_epochs=2", "--model.batching.num_pairs=4", "--model.batching.rollout_batch_size=4",
    "--model.batching.batch_size=16",
    "--model.evaluation.metrics=null", "--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
]  # fmt: skip


def fit(folder, monkeypatch, rewards):
    """Runs the command in this process; gives what it trained."""
    overlay = folder.with_suffix(".yaml")
    overlay.write_text(yaml.safe_dump({"model": {"rewards": rewards}, "trainer": {"callbacks": None}}))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "sys.argv",
        ["lightning-fdfo", "fit", "--config=configs/quickstart.yaml", f"--config={overlay}",
         f"--trainer.default_root_dir={folder}", *SMALL],
    )  # fmt: skip
    main()
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_with_a_remote_reward_is_the_run_without(tmp_path, serve, monkeypatch, capfd):
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", TOKEN)
    here = fit(tmp_path / "here", monkeypatch, {"OCR": 1.0})
    url = serve("OCR", token=TOKEN).url
    away = {"class_path": "lightning_fdfo.remote.RemoteReward", "init_args": {"url": url}}
    there = fit(tmp_path / "away", monkeypatch, {"OCR": {"reward": away, "weight": 1.0}})
    assert here.keys() == there.keys()
    assert len(here) > 0
    for name, weight in here.items():
        assert torch.equal(there[name], weight), name
    assert any(weight.abs().sum() > 0 for name, weight in here.items() if "lora_B" in name)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_run_without_its_server_stops_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_fdfo.module.FDFOModule.configure_model", lambda self: pytest.fail("it was loaded"))
    away = {
        "class_path": "lightning_fdfo.remote.RemoteReward",
        "init_args": {"url": "http://127.0.0.1:9", "attempts": 1},
    }
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "away", monkeypatch, {"OCR": {"reward": away, "weight": 1.0}})
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9: no answer in 1 attempts" in said
    assert "start it there by: lightning-fdfo serve-reward NAME" in said
    assert not (tmp_path / "away" / "config.yaml").exists()


def test_a_prompt_that_the_reward_there_cannot_score_is_told_with_its_line(tmp_path, serve, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('"427" in red\nno quotes\n')
    monkeypatch.setattr("lightning_fdfo.module.FDFOModule.configure_model", lambda self: pytest.fail("it was loaded"))
    away = {"class_path": "lightning_fdfo.remote.RemoteReward", "init_args": {"url": serve("OCR").url}}
    monkeypatch.setitem(globals(), "SMALL", [*SMALL, f"--data.train={prompts}"])
    with pytest.raises(SystemExit):
        fit(tmp_path / "away", monkeypatch, {"OCR": {"reward": away, "weight": 1.0}})
    assert re.search(r"prompts\.txt:2: http.*OCR needs metadata", capsys.readouterr().err)
