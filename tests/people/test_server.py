"""What the page's server lets through, and what not."""

import threading
import time

import httpx
import pytest
import uvicorn

from lightning_fdfo.people.booth import Booth, Enough
from lightning_fdfo.people.round import Pair, Rules
from lightning_fdfo.people.server import MAX_BODY, create_app
from lightning_fdfo.people.votes import VoteFile
from lightning_fdfo.remote.listener import bind

PAIRS = [Pair(0, number, f"prompt {number}", b"first" + bytes([number]), b"second") for number in range(4)]
TOKEN = "a-token-of-some-length"


@pytest.fixture
def serve(tmp_path):
    """Starts a booth with four pairs, and its server; gives a client."""
    servers = []

    def start(token=None, headers=None):
        booth = Booth(Rules(repeat_share=0.0), Enough(), tmp_path / "votes.jsonl")
        booth.start(0, len(PAIRS))
        threading.Thread(target=booth.ask, args=(PAIRS,), daemon=True).start()
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(create_app(booth, token, tmp_path), log_level="warning", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", headers=headers, trust_env=False
        )
        servers.append((server, thread, client))
        return client

    yield start
    for server, thread, client in servers:
        client.close()
        server.should_exit = True
        thread.join(10)


def vote(client, name, **change):
    body = {"ballot": name, "rater": "ada", "side": "left", "milliseconds": 900} | change
    return client.post("/vote", json=body)


def test_from_the_page_to_a_line_in_the_file(serve, tmp_path):
    client = serve()
    page = client.get("/")
    assert page.status_code == 200
    assert "Which image is better?" in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    ballot = client.post("/next", json={"rater": "ada"}).json()["ballot"]
    images = [client.get(f"/images/{ballot['name']}/{side}.png") for side in ("left", "right")]
    assert {image.content for image in images} == {PAIRS[0].first, PAIRS[0].second}
    answer = vote(client, ballot["name"]).json()
    assert answer["ballot"]["prompt"] == "prompt 1"
    assert answer["status"]["left"] == 3
    (line,) = VoteFile(tmp_path / "votes.jsonl").read()
    assert (line.pair, line.rater, line.milliseconds) == (0, "ada", 900)
    assert line.choice == ("first" if images[0].content == PAIRS[0].first else "second")
    again = client.post("/undo", json={"rater": "ada"}).json()
    assert again["ballot"]["prompt"] == "prompt 0"
    assert again["status"]["left"] == 4


def test_the_token_is_asked_for_everywhere_but_at_images(serve):
    client = serve(TOKEN)
    for method, path in (("GET", "/"), ("POST", "/next"), ("POST", "/vote"), ("POST", "/undo"), ("GET", "/curve.png")):
        for headers in ({}, {"X-Token": "wrong"}, {"X-Token": TOKEN[:-1]}):
            assert client.request(method, path, headers=headers, json={"rater": "ada"}).status_code == 401
    assert client.get(f"/?token={TOKEN}").status_code == 200
    found = client.post("/next", json={"rater": "ada"}, headers={"X-Token": TOKEN}).json()
    assert client.get(f"/images/{found['ballot']['name']}/left.png").status_code == 200


def test_a_page_whose_name_was_made_to_lead_here_is_refused(serve):
    assert serve(headers={"Host": "evil.example"}).post("/next", json={"rater": "ada"}).status_code == 403


@pytest.mark.parametrize(
    "change",
    [{"ballot": "no such"}, {"ballot": "../../votes.jsonl"}, {"rater": "bob"}],
)
def test_a_vote_for_a_pair_that_is_not_on_show_is_refused(serve, tmp_path, change):
    client = serve()
    ballot = client.post("/next", json={"rater": "ada"}).json()["ballot"]["name"]
    assert vote(client, ballot, **change).status_code == 409
    assert VoteFile(tmp_path / "votes.jsonl").read() == []


def test_a_vote_twice_is_refused(serve, tmp_path):
    client = serve()
    ballot = client.post("/next", json={"rater": "ada"}).json()["ballot"]["name"]
    assert vote(client, ballot).status_code == 200
    refused = vote(client, ballot)
    assert refused.status_code == 409
    assert "not on show" in refused.json()["detail"]
    assert len(VoteFile(tmp_path / "votes.jsonl").read()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"side": "first"}, {"milliseconds": -1}, {"milliseconds": "9"}, {"rater": ""}, {"rater": "x" * 61}, {"more": 1},
        {"ballot": 3},
    ],
)  # fmt: skip
def test_what_is_no_vote_is_refused(serve, change):
    client = serve()
    ballot = client.post("/next", json={"rater": "ada"}).json()["ballot"]["name"]
    assert vote(client, ballot, **change).status_code == 422


@pytest.mark.parametrize(
    "path", ["/images/x/left.png", "/images/..%2f..%2fvotes.jsonl/left.png", "/images/x/votes.jsonl", "/votes.jsonl"]
)
def test_no_path_leads_to_anything_else(serve, path):
    assert serve().get(path).status_code == 404


def test_a_huge_body_is_refused(serve):
    client = serve()
    assert client.post("/next", content=b"x" * (MAX_BODY + 1)).status_code == 413
    stream = iter([b"x" * 1000] * 100)
    assert client.post("/next", content=stream).status_code == 413


def test_another_sites_page_is_refused(serve, tmp_path):
    client = serve()
    body = b'{"rater": "ada"}'
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "application/json", "Origin": str(client.base_url)}, 200),
    ):
        assert client.post("/next", content=body, headers=headers).status_code == status


def test_a_name_that_cannot_be_written_is_refused(serve):
    body = b'{"rater": "\\ud800"}'
    answer = serve().post("/next", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


def test_the_curve_is_the_runs(serve, tmp_path):
    client = serve()
    assert client.get("/curve.png").status_code == 404
    (tmp_path / "reward_curve.png").write_bytes(b"png")
    assert client.get("/curve.png").content == b"png"
