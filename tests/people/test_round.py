"""Rounds: each pair is judged as often as asked for, by whom it can be, and nothing that was said is lost."""

import math
from dataclasses import replace

import pytest

from lightning_fdfo.people.round import NotOnShowError, Pair, Round, Rules

PAIRS = [Pair(2, index, f"prompt {index}", bytes([index, 1]), bytes([index, 2])) for index in range(20)]


def start(votes=(), pairs=PAIRS, **rules):
    kept = []
    found = Round(Rules(**({"repeat_share": 0.0} | rules)), votes, kept.append)
    found.add(pairs)
    return found, kept


def judge(round_, rater, choice="first", now=0.0):
    ballot = round_.next(rater, now)
    return round_.vote(ballot.name, rater, choice, 900, "")


def test_each_pair_comes_once_in_order():
    round_, kept = start()
    for _ in PAIRS:
        judge(round_, "ada")
    assert [vote.pair for vote in kept] == list(range(20))
    assert round_.next("ada", 0.0) is None
    assert all(round_.is_decided(pair) and round_.preference(pair) == 1 for pair in PAIRS)


def test_sides_are_shuffled_and_the_choice_is_the_pairs():
    round_, kept = start()
    for _ in PAIRS:
        judge(round_, "ada", "second")
    assert {vote.mirrored for vote in kept} == {True, False}
    assert all(round_.preference(pair) == -1 for pair in PAIRS)
    again, kept_again = start()
    for _ in PAIRS:
        judge(again, "ada")
    assert [vote.mirrored for vote in kept_again] == [vote.mirrored for vote in kept]  # a function of the seed
    other, kept_other = start(seed=1)
    for _ in PAIRS:
        judge(other, "ada")
    assert [vote.mirrored for vote in kept_other] != [vote.mirrored for vote in kept]


def test_two_raters_never_see_the_same_pair():
    round_, kept = start()
    shown = [round_.next("ada", 0.0), round_.next("bob", 0.0)]
    assert [ballot.pair.number for ballot in shown] == [0, 1]
    assert round_.next("ada", 1.0) is shown[0]  # a page that is loaded again
    round_.vote(shown[1].name, "bob", "none", 10, "")
    assert round_.next("bob", 2.0).pair.number == 2
    assert round_.preference(PAIRS[1]) == 0
    assert math.isnan(round_.preference(PAIRS[0]))
    assert len(kept) == 1


def test_a_pair_that_is_left_goes_to_another():
    round_, _ = start(patience=60.0)
    left = round_.next("ada", 0.0)
    assert round_.next("bob", 59.0).pair.number == 1
    assert round_.next("cyd", 61.0).pair.number == 0
    round_.vote(left.name, "ada", "first", 10, "")  # she comes back: her vote counts too
    assert round_.preference(PAIRS[0]) == 1


def test_several_votes_a_pair_are_of_several_raters():
    round_, _ = start(votes_per_pair=2)
    judge(round_, "ada", "first")
    assert not round_.is_decided(PAIRS[0])
    assert round_.next("ada", 0.0).pair.number == 1
    judge(round_, "bob", "none")
    assert round_.is_decided(PAIRS[0])
    assert round_.preference(PAIRS[0]) == 0.5


def test_some_come_again_mirrored_and_not_at_once():
    round_, kept = start(repeat_share=0.5)
    while round_.next("ada", 0.0) is not None:
        judge(round_, "ada")
    repeats = [number for number, vote in enumerate(kept) if vote.repeat]
    assert 4 <= len(repeats) <= 16
    late = [number for number, vote in enumerate(kept) if not vote.repeat][-1]
    for number in repeats:
        before = next(place for place, vote in enumerate(kept) if vote.pair == kept[number].pair)
        assert kept[number].mirrored != kept[before].mirrored
        assert number - before > 4
    assert any(number < late for number in repeats)
    assert not round_.is_waiting_for_repeats(0.0)


def test_repeats_are_waited_for_while_their_rater_is_here():
    round_, _ = start(repeat_share=1.0, patience=60.0, pairs=PAIRS[:5])
    for number in range(5):
        assert not round_.is_waiting_for_repeats(20.0)  # fewer than four other votes lie between
        judge(round_, "ada", now=10.0 + number)
    assert all(round_.is_decided(pair) for pair in PAIRS[:5])
    assert round_.is_waiting_for_repeats(20.0)
    assert not round_.is_waiting_for_repeats(75.0)
    again = round_.next("ada", 20.0)
    assert (again.pair, again.repeat) == (PAIRS[0], True)


def test_each_rater_counts_once_in_a_preference():
    round_, _ = start(repeat_share=1.0, votes_per_pair=2, pairs=PAIRS[:5])
    for rater, choice in (("ada", "first"), ("bob", "second")):
        for _ in range(5):
            judge(round_, rater, choice)
    judge(round_, "ada", "first")  # again
    assert round_.preference(PAIRS[0]) == 0


def test_undo_shows_the_last_pair_again():
    round_, kept = start()
    judge(round_, "ada")
    first = judge(round_, "ada")
    shown = round_.next("ada", 0.0)
    again = round_.undo("ada", 1.0, "")
    assert (again.pair.number, again.mirrored) == (1, first.mirrored)
    assert round_.next("ada", 2.0) is again
    assert kept[-1] == first._replace(choice=None)
    assert not round_.is_decided(PAIRS[1])
    with pytest.raises(NotOnShowError, match="not on show"):
        round_.vote(shown.name, "ada", "first", 1, "")
    round_.vote(again.name, "ada", "second", 1, "")
    assert round_.preference(PAIRS[1]) == -1
    round_.undo("ada", 3.0, "")
    round_.undo("ada", 3.0, "")
    with pytest.raises(NotOnShowError, match="no vote to take back"):
        round_.undo("ada", 3.0, "")


def test_what_is_in_use_is_over():
    round_, _ = start()
    judge(round_, "ada")
    shown = round_.next("bob", 0.0)
    round_.close(PAIRS[:2])
    with pytest.raises(NotOnShowError, match="training goes on"):
        round_.undo("ada", 0.0, "")
    with pytest.raises(NotOnShowError, match="not on show"):
        round_.vote(shown.name, "bob", "first", 1, "")
    assert round_.next("bob", 0.0).pair.number == 2


@pytest.mark.parametrize("name", ["", "no such", None])
def test_a_vote_for_what_is_not_on_show_is_refused(name):
    round_, kept = start()
    ballot = round_.next("ada", 0.0)
    with pytest.raises(NotOnShowError):
        round_.vote(name, "ada", "first", 1, "")
    with pytest.raises(NotOnShowError):
        round_.vote(ballot.name, "bob", "first", 1, "")
    round_.vote(ballot.name, "ada", "first", 1, "")
    with pytest.raises(NotOnShowError):  # twice
        round_.vote(ballot.name, "ada", "first", 1, "")
    assert len(kept) == 1


def test_a_round_goes_on_with_the_votes_that_there_are():
    round_, kept = start()
    for _ in range(7):
        judge(round_, "ada")
    round_.undo("ada", 0.0, "")
    again, _ = start(votes=kept)
    assert [again.is_decided(pair) for pair in PAIRS] == [True] * 6 + [False] * 14
    assert again.next("bob", 0.0).pair.number == 6
    others = [replace(pair, first=b"another model's") for pair in PAIRS]
    assert not any(start(votes=kept, pairs=others)[0].is_decided(pair) for pair in others)


def test_a_vote_counts_only_once_it_is_written():
    def full(vote):
        raise OSError("no space left on device")

    round_ = Round(Rules(), [], full)
    round_.add(PAIRS)
    ballot = round_.next("ada", 0.0)
    with pytest.raises(OSError, match="no space"):
        round_.vote(ballot.name, "ada", "first", 1, "")
    assert not round_.is_decided(PAIRS[0])
    assert round_.next("ada", 0.0) is ballot
