"""The booth between a run and its raters, each in a thread of its own."""

import math
import threading
import time
from dataclasses import replace

import pytest

from lightning_fdfo.people.booth import Booth, Enough
from lightning_fdfo.people.round import NotOnShowError, Pair, Rules
from lightning_fdfo.people.votes import VoteFile

PAIRS = [Pair(0, index, f"prompt {index}", bytes([index, 1]), bytes([index, 2])) for index in range(12)]


class Clock:
    """Seconds that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("lightning_fdfo.people.booth.POLL", 0.01)
    return Clock()


def make(tmp_path, clock, *, rules=None, enough=None):
    return Booth(rules or Rules(repeat_share=0.0), enough or Enough(), tmp_path / "votes.jsonl", clock)


def asked(booth, pairs):
    """Asks in a thread; what it returns is a list that gets the preferences."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(booth.ask(pairs)), daemon=True)
    thread.start()
    return thread, found


def run_out(clock, thread, seconds):
    """Time passes: a second before the limit it waits still, a second after it no more."""
    clock.now = seconds - 1
    thread.join(0.1)
    assert thread.is_alive()
    clock.now = seconds + 1
    thread.join(10)
    assert not thread.is_alive()


def judge(booth, rater, number, side_of=lambda prompt: "left"):
    for _ in range(number):
        ballot = booth.next(rater)
        while ballot is None:
            time.sleep(0.005)
            ballot = booth.next(rater)
        booth.vote(ballot.name, rater, side_of(ballot), 700)


def the_first(ballot):
    return "right" if ballot.mirrored else "left"


def test_preferences_come_back_in_the_pairs_order(tmp_path, clock):
    booth = make(tmp_path, clock)
    booth.start(0, 12)
    thread, found = asked(booth, PAIRS[:6])
    raters = [threading.Thread(target=judge, args=(booth, name, 3, the_first)) for name in ("ada", "bob")]
    for rater in raters:
        rater.start()
    thread.join(10)
    assert found == [1.0] * 6
    thread, found = asked(booth, PAIRS[6:])
    judge(booth, "ada", 6, lambda ballot: "none" if ballot.pair.number % 2 else the_first(ballot))
    thread.join(10)
    assert found == [1.0, 0.0] * 3
    votes = VoteFile(tmp_path / "votes.jsonl").read()
    assert sorted(vote.pair for vote in votes) == list(range(12))
    assert {vote.milliseconds for vote in votes} == {700}
    assert all(vote.time.endswith("+00:00") for vote in votes)


def test_images_are_on_the_sides_that_the_vote_is_read_by(tmp_path, clock):
    booth = make(tmp_path, clock)
    booth.start(0, 12)
    thread, found = asked(booth, PAIRS)
    for _ in PAIRS:
        while (ballot := booth.next("ada")) is None:
            time.sleep(0.005)
        left, right = (booth.image(ballot.name, side) for side in ("left", "right"))
        assert {left, right} == {ballot.pair.first, ballot.pair.second}
        booth.vote(ballot.name, "ada", "left" if left == ballot.pair.second else "right", 1)
        assert booth.image(ballot.name, "left") is None  # it is not on show any more
    thread.join(10)
    assert found == [-1.0] * 12


def test_a_round_that_is_over_time_gives_up_the_rest(tmp_path, clock):
    booth = make(tmp_path, clock, enough=Enough(time_limit=60.0))
    booth.start(0, 12)
    thread, found = asked(booth, PAIRS)
    judge(booth, "ada", 5, the_first)
    run_out(clock, thread, 60)
    assert found[:5] == [1.0] * 5
    assert all(math.isnan(value) for value in found[5:])
    with pytest.raises(NotOnShowError):
        booth.undo("ada")


def test_only_waiting_counts_as_time_and_one_vote_of_two_is_none(tmp_path, clock):
    booth = make(tmp_path, clock, rules=Rules(votes_per_pair=2, repeat_share=0.0), enough=Enough(time_limit=60.0))
    booth.start(0, 12)
    clock.now = 1000.0  # the images are generated
    thread, found = asked(booth, PAIRS[:6])
    judge(booth, "ada", 6, the_first)
    judge(booth, "bob", 3, the_first)
    run_out(clock, thread, 1060)
    assert found[:3] == [1.0] * 3
    assert all(math.isnan(value) for value in found[3:])


def test_an_ask_that_was_given_up_ends_with_its_round_and_takes_none_of_the_nexts_time(tmp_path, clock):
    booth = make(tmp_path, clock, enough=Enough(time_limit=60.0))
    booth.start(0, 12)
    thread, found = asked(booth, PAIRS[:6])
    while booth.next("ada") is None:
        time.sleep(0.005)
    booth.start(1, 6)
    clock.now = 50.0
    thread.join(10)
    assert len(found) == 6
    assert all(map(math.isnan, found))
    assert booth._waited == 0
    thread, found = asked(booth, [replace(pair, epoch=1) for pair in PAIRS[:6]])
    judge(booth, "ada", 6, the_first)
    thread.join(10)
    assert found == [1.0] * 6


def test_a_share_of_the_votes_may_be_enough(tmp_path, clock):
    booth = make(tmp_path, clock, enough=Enough(min_share=0.5))
    booth.start(0, 12)
    thread, found = asked(booth, PAIRS)
    judge(booth, "ada", 6, the_first)
    thread.join(10)
    assert sum(map(math.isnan, found)) == 6


def test_after_a_kill_only_the_other_pairs_are_asked_for(tmp_path, clock):
    booth = make(tmp_path, clock)
    booth.start(0, 12)
    asked(booth, PAIRS)
    judge(booth, "ada", 7, the_first)
    again = make(tmp_path, clock)  # a process that knows the file alone
    again.start(0, 12)
    thread, found = asked(again, PAIRS)
    judge(again, "bob", 5, lambda ballot: "none")
    thread.join(10)
    assert found == [1.0] * 7 + [0.0] * 5


def test_what_the_page_says(tmp_path, clock):
    booth = make(tmp_path, clock, rules=Rules(repeat_share=0.99))
    assert not booth.status("ada").is_open
    for epoch in (0, 1):
        booth.start(epoch, 6)
        thread, _ = asked(booth, [replace(pair, epoch=epoch) for pair in PAIRS[:6]])
        judge(booth, "ada", 3, lambda ballot: "none" if ballot.pair.number == 0 else the_first(ballot))
        status = booth.status("ada")
        assert (status.epoch, status.is_open, status.total, status.left) == (epoch, True, 6, 3)
        while booth.status("ada").is_open or thread.is_alive():
            if (ballot := booth.next("ada")) is not None:
                booth.vote(ballot.name, "ada", "none" if ballot.pair.number == 0 else the_first(ballot), 1)
        thread.join(10)
    status = booth.status("ada")
    assert not status.is_open
    assert status.twice >= 8
    assert status.same == status.twice
    assert status.own == 12 + status.twice
    assert len(status.decided) == 2
    assert all(0.7 < share < 1 for share in status.decided)
    assert booth.status("bob").own == 0
