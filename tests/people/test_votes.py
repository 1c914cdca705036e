"""The file of votes: nothing in it is lost, and what is no vote is told."""

import json

import pytest

from lightning_fdfo.people.votes import Vote, VoteFile, consistency, standing

VOTE = Vote(3, 17, "5f0c", 'a "cat", 猫', "first", "ada", 2140, False, False, "2026-11-27T22:08:38+00:00")


def test_votes_come_back_as_they_were(tmp_path):
    file = VoteFile(tmp_path / "new/votes.jsonl")
    assert file.read() == []
    votes = [
        VOTE,
        VOTE._replace(choice=None),
        VOTE._replace(prompt="a\u2028b\u0085c\x0cd"),
        VOTE._replace(rater="bob", choice="none", repeat=True),
    ]
    for vote in votes:
        file.append(vote)
    assert file.read() == votes
    assert [json.loads(line)["rater"] for line in file.path.read_text().split("\n")[:-1]] == ["ada"] * 3 + ["bob"]


def test_a_line_that_a_crash_cut_short_costs_only_itself(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(VOTE)
    with file.path.open("a") as cut:
        cut.write('{"epoch": 3, "pair": 1')
    file.append(VOTE._replace(pair=18))
    with pytest.warns(UserWarning, match=r"votes\.jsonl:2: left out, for it is no vote"):
        assert [vote.pair for vote in file.read()] == [17, 18]


@pytest.mark.parametrize(
    "change",
    [{"choice": "left"}, {"epoch": "3"}, {"pair": True}, {"mirrored": 1}, {"milliseconds": 2.5}, {"rater": None}],
)
def test_what_is_no_vote_is_told(tmp_path, change):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.path.write_text(json.dumps(VOTE._asdict() | change) + "\n" + json.dumps([1]) + "\n")
    with pytest.warns(UserWarning, match=r"votes\.jsonl:\d: left out"):
        assert file.read() == []


def test_the_last_vote_on_the_same_images_counts():
    other = VOTE._replace(images="77")  # the pair of another model: another vote
    votes = [VOTE, other, VOTE._replace(choice="second"), other._replace(choice=None), VOTE._replace(rater="bob")]
    assert standing(votes) == [VOTE._replace(choice="second"), VOTE._replace(rater="bob")]


def test_consistency_is_over_pairs_that_came_twice():
    votes = [VOTE, VOTE._replace(pair=1), VOTE._replace(pair=2), VOTE._replace(rater="bob")]
    votes += [VOTE._replace(repeat=True), VOTE._replace(pair=1, repeat=True, choice="second")]
    votes += [VOTE._replace(pair=2, repeat=True, choice=None)]
    assert list(consistency(votes)) == [("ada", 1, 2), ("bob", 0, 0)]
