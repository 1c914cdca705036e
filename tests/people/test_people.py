"""Runs that learn from clicks: a rater over HTTP, who prefers what everybody can see."""

import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.people import People
from lightning_fdfo.people.votes import VoteFile, standing
from lightning_fdfo.reward import load_reward
from lightning_fdfo.reward.term import RewardTerm
from tests.conftest import brightness, trainable
from tests.test_module import Recorder

ROOT = Path(__file__).parents[2]


def mean(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image, dtype=float).mean()


class Rater(threading.Thread):
    """Judges by a number of an image, until it is stopped."""

    def __init__(self, url, name="ada", judge=mean, most=10**9):
        super().__init__(daemon=True)
        self.client = httpx.Client(base_url=url, trust_env=False)
        self.rater, self.judge, self.most = name, judge, most
        self.stopped = threading.Event()
        self.votes = 0

    def run(self):
        while not self.stopped.is_set() and self.votes < self.most:
            try:
                answer = self.client.post("/next", json={"rater": self.rater}).json()
                ballot = answer["ballot"]
                if ballot is None:
                    time.sleep(0.02)
                    continue
                images = [self.client.get(f"/images/{ballot['name']}/{side}.png").content for side in ("left", "right")]
                left, right = map(self.judge, images)
                side = "none" if left == right else "left" if left > right else "right"
                body = {"ballot": ballot["name"], "rater": self.rater, "side": side, "milliseconds": 300}
                self.votes += self.client.post("/vote", json=body).status_code == 200
            except httpx.TransportError:
                time.sleep(0.05)

    def stop(self):
        self.stopped.set()
        self.join(10)
        self.client.close()


@pytest.fixture
def rater(capsys, monkeypatch):
    """Reads the link that a run prints, and judges in a thread of its own; gives the raters."""
    started = []
    announce = People._open

    def opened(self, folder):
        booth = announce(self, folder)
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", capsys.readouterr().out)
        started.append(Rater(url))
        started[-1].start()
        return booth

    monkeypatch.setattr(People, "_open", opened)
    yield started
    for one in started:
        one.stop()


def test_a_run_learns_what_a_rater_likes(toy_module, fit, rater, tmp_path):
    recorder = Recorder()
    rewards = {"people": RewardTerm(People(port=0)), "bright": RewardTerm(brightness, 0.0)}
    fit(toy_module(rewards=rewards, rollout_batch_size=5), 15, callbacks=[recorder])
    means = [row["reward/bright/mean"] for row in recorder.epochs]
    assert means[-1] > means[0] + 0.05
    votes = VoteFile(tmp_path / "votes.jsonl").read()
    assert {(vote.epoch, vote.pair) for vote in votes} == {(epoch, pair) for epoch in range(15) for pair in range(16)}
    assert rater[0].votes == len(votes)


def test_a_run_that_ends_in_a_round_goes_on_without_asking_again(toy_module, fit, rater, tmp_path):
    """The votes are kept; the pairs are the same; and so are the weights."""
    whole = toy_module(rewards={"people": RewardTerm(People(port=0, repeat_share=0.0))})
    fit(whole, 2)
    number = len(VoteFile(tmp_path / "votes.jsonl").read())
    assert number == 32
    again = toy_module(rewards={"people": RewardTerm(People(port=0, repeat_share=0.0))})
    fit(again, 2)  # in the same folder, from the start: all pairs have their votes
    assert rater[1].votes == 0
    assert len(VoteFile(tmp_path / "votes.jsonl").read()) == number
    for name, value in trainable(whole).items():
        assert value.equal(trainable(again)[name])


def test_pairs_without_votes_are_dropped(toy_module, fit, rater, monkeypatch):
    monkeypatch.setattr("lightning_fdfo.people.booth.POLL", 0.02)
    people = RewardTerm(People(port=0, min_share=0.5, repeat_share=0.0))
    recorder = Recorder()
    module = toy_module(rewards={"people": people}, on_reward_error="drop_pair", max_dropped=0.6)
    with pytest.warns(UserWarning, match="'people' has no preference on"):
        fit(module, 2, callbacks=[recorder])
    assert 0 < recorder.epochs[0]["reward/dropped"] <= 0.5
    with pytest.raises(RewardError, match=r"no preference on .*drop_pair"):
        fit(toy_module(rewards={"people": RewardTerm(People(port=0, min_share=0.1))}, seed=1), 1)


def test_options_out_of_range():
    for options, message in (
        ({"votes_per_pair": 0}, "votes_per_pair: expected a finite number of at least 1, got 0"),
        ({"repeat_share": 1.0}, "repeat_share: expected a finite number of at least 0 and below 1, got 1"),
        ({"min_share": 1.5}, r"min_share: expected a number in \(0, 1\], got 1.5"),
        ({"time_limit": 0}, "time_limit: expected a finite number above 0, got 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            People(**options)
    with pytest.raises(ConfigurationError, match="expected one process"):
        People().start_epoch(0, range(8, 16), 16, Path("run"))


def test_it_is_registered_and_judges_in_training_alone(toy_module, judge):
    assert isinstance(load_reward("People", port=0), People)
    module = toy_module(rewards={"people": RewardTerm(People(port=0)), "bright": RewardTerm(brightness)})
    (found,) = judge(module, "validate")
    assert "val/people" not in found


def test_other_machines_need_the_token_of_the_link(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LIGHTNING_FDFO_TOKEN", raising=False)
    people = People(host="0.0.0.0", port=0)
    people.start_epoch(0, range(4), 4, tmp_path)
    (port, token) = re.findall(r"http://[^/]+:(\d+)/\?token=([\w-]{20,})", capsys.readouterr().out)[0]
    url = f"http://127.0.0.1:{port}/"
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(f"{url}?token={token}", trust_env=False).status_code == 200


@pytest.mark.slow
def test_a_kill_in_a_round_loses_no_vote(tmp_path):
    """The shipped model, by the command: killed after some votes, and resumed."""
    words = [
        *(sys.executable, "-u", "-m", "lightning_fdfo", "fit"),
        *("--config=configs/quickstart.yaml", "--config=configs/people.yaml"),
        *(f"--model.rewards.people.reward.init_args.{option}=0" for option in ("port", "repeat_share")),
        *(f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_epochs=2"),
        *("--model.batching.num_pairs=8", "--model.batching.batch_size=32", "--trainer.num_sanity_val_steps=0"),
    ]

    def start(name, *more):
        log = tmp_path / name
        with log.open("w") as out:
            process = subprocess.Popen([*words, *more], cwd=ROOT, stdout=out)
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None
            time.sleep(0.05)
        return process, found[0]

    process, url = start("first.log")
    first = Rater(url, most=11)  # into the second round
    first.start()
    first.join(120)
    first.stop()
    process.kill()
    process.wait()
    file = VoteFile(tmp_path / "run/votes.jsonl")
    assert len(standing(file.read())) == 11
    process, url = start("second.log", "--ckpt_path=last")
    second = Rater(url, "bob")
    second.start()
    assert process.wait(180) == 0
    second.stop()
    votes = standing(file.read())
    assert len(votes) == 16
    assert [vote.rater for vote in votes].count("bob") == second.votes == 5
