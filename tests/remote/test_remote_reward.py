"""RemoteReward against a server: the same scores, and every way in which there are none."""

import contextlib
import json
import logging
import pickle
import random
import socket
import threading
import time

import httpx
import pytest
import torch
from fastapi import Response

from lightning_fdfo import Reward, RewardMix
from lightning_fdfo.errors import ConfigurationError, RewardError
from lightning_fdfo.remote import RemoteReward
from lightning_fdfo.remote import server as server_module
from lightning_fdfo.remote.client import RemoteError
from lightning_fdfo.remote.protocol import CONTENT_TYPE, Limits
from lightning_fdfo.reward import FunctionReward, load_reward
from lightning_fdfo.reward.term import RewardTerm
from lightning_fdfo.testing import check_reward
from lightning_fdfo.testing.reward_sample import PROMPTS, TEXTS, sample_images
from tests.remote.conftest import TOKEN

IMAGES = sample_images(48, 80)


class Darkness(Reward):
    """A cost, with all that a server must hand on."""

    range = (-1.0, 0.5)
    higher_is_better = False
    required_metadata = ("text",)

    def __call__(self, images, prompts, metadata):
        return -images.mean(dim=(1, 2, 3)) / 3


class Scripted(Reward):
    """Does what it is told, call by call."""

    def __init__(self, *acts):
        self.acts = list(acts)
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        act = self.acts.pop(0) if self.acts else None
        if isinstance(act, Exception):
            raise act
        if callable(act):
            act()
        return torch.full((len(images),), act if isinstance(act, float) else 0.25)


def remote(server, **options):
    return RemoteReward(server.url, **({"backoff": 0.01, "timeout": 20.0, "attempts": 3} | options))


def score(reward, rows=slice(None)):
    return reward(IMAGES[rows], list(PROMPTS[rows]), list(TEXTS[rows]))


# The same scores


@pytest.mark.parametrize("encoding", ["safetensors", "png"])
@pytest.mark.parametrize("name", ["JPEGSize", "OCR"])
def test_the_score_is_that_in_process_to_the_bit(name, encoding, serve):
    expected = RewardMix({name: 1.0})(IMAGES, PROMPTS, TEXTS)[name].values
    away = remote(serve(name), encoding=encoding)
    away.fetch()
    assert torch.equal(score(away), expected)
    mix = RewardMix({"away": RewardTerm(away), "here": RewardTerm(load_reward(name))})
    scores = mix(IMAGES, PROMPTS, TEXTS)
    assert torch.equal(scores["away"].values, expected)
    assert torch.equal(scores["here"].values, expected)


def test_floats_round_trip_to_the_bit(serve):
    """Colorfulness sees all digits of an image; PNG cuts them."""
    expected = load_reward("Colorfulness")(IMAGES, PROMPTS, TEXTS)
    server = serve("Colorfulness")
    assert torch.equal(score(remote(server)), expected)
    assert not torch.equal(score(remote(server, encoding="png")), expected)
    assert torch.allclose(score(remote(server, encoding="png")).float(), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["JPEGSize", "OCR"])
def test_it_keeps_the_contract(name, serve):
    check_reward(remote(serve(name)))


def test_range_sign_and_metadata_are_the_servers(serve):
    away = remote(serve(Darkness()))
    assert away.higher_is_better is False  # nobody has fetched yet
    assert away.range == (-1.0, 0.5)
    assert away.required_metadata == ("text",)
    mix = RewardMix({"away": RewardTerm(away), "here": RewardTerm(Darkness())})
    scores = mix(IMAGES, PROMPTS, TEXTS)
    assert torch.equal(mix.total(scores).values, -2 * scores["here"].values)
    with pytest.raises(ConfigurationError, match=r"needs metadata \['text'\]"):
        mix.check("a cat", {})


def test_a_question_takes_milliseconds(serve):
    """Two writes and a delayed acknowledgement would make it 40: thousands of prompts are checked before a run."""
    away = remote(serve("OCR"))
    away.fetch()
    took = []
    for _ in range(50):
        started = time.monotonic()
        away.check('a sign that says "427"', {})
        took.append(time.monotonic() - started)
    assert min(took[1:]) < 0.03


def test_unbounded_ranges(serve):
    away = remote(serve("OCR"))
    assert away.range == (float("-inf"), 0.0)


def test_the_reward_there_checks_prompts(serve):
    away = remote(serve("OCR"))
    away.check('a sign that says "427"', {})
    with pytest.raises(ConfigurationError, match='OCR needs metadata "text" or text in quotes'):
        away.check("a cat", {})


@pytest.mark.parametrize(
    "metadata",
    [{"a": (1, 2)}, {"a": float("nan")}, {1: 2}, {"a": {1, 2}}, {"a": object()}],
    ids=["tuple", "nan", "number as key", "set", "object"],
)
def test_metadata_that_json_cannot_hold(metadata, serve):
    with pytest.raises(ConfigurationError, match="the prompt cannot be scored"):
        remote(serve()).check("a cat", metadata)


@pytest.mark.parametrize("prompt", ["\ud800", "a" * 10_001])
def test_prompts_that_cannot_go(prompt, serve):
    with pytest.raises(ConfigurationError, match="the prompt cannot be scored"):
        remote(serve()).check(prompt, {})


@pytest.mark.parametrize(
    "limits", [Limits(max_batch=3), Limits(max_pixels=48 * 80 * 2), Limits(max_body=48 * 80 * 12)], ids=repr
)
def test_a_large_batch_goes_in_several_requests(limits, serve):
    expected = load_reward("JPEGSize")(IMAGES, PROMPTS, TEXTS)
    assert torch.equal(score(remote(serve(limits=limits))), expected)


@pytest.mark.parametrize("limits", [Limits(max_pixels=48 * 80 - 1), Limits(max_body=48 * 80 * 12 - 1)], ids=repr)
def test_an_image_over_the_limits(limits, serve):
    with pytest.raises(
        RemoteError, match="3840 pixels is more than it takes: start it with larger --max_batch, --max_p"
    ):
        score(remote(serve(limits=limits)))


def test_it_pickles_without_connection_or_token(serve, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", TOKEN)
    away = remote(serve(token=TOKEN))
    first = score(away)
    pickled = pickle.dumps(away)
    assert TOKEN.encode() not in pickled
    assert TOKEN not in repr(vars(away)) + repr(away) + repr(vars(away._client))
    assert torch.equal(score(pickle.loads(pickled)), first)


# Who may ask


def test_the_right_token(serve, monkeypatch):
    server = serve(token=TOKEN)
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", TOKEN)
    assert score(remote(server)).shape == (4,)


@pytest.mark.parametrize("token", [None, TOKEN + "x", TOKEN[:-1] + "X"])
def test_another_token_or_none(token, serve, monkeypatch, caplog, capfd):
    if token is not None:
        monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", token)
    server = serve(token=TOKEN)
    away = remote(server)
    started = time.monotonic()
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ConfigurationError, match=r"status 401.*LIGHTNING_FDFO_TOKEN") as e,
    ):
        away.fetch()
    assert time.monotonic() - started < 2  # not tried again
    with httpx.Client() as client:
        for path in ("/check", "/scores"):
            assert client.post(server.url + path, content=b"x").status_code == 401
    told = str(e.value) + repr(e.value) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in told
    assert token is None or token not in told


@pytest.mark.parametrize(
    "token", ["short", "with spaces in the middle of it", "naïve-token-of-length", "a" * 20 + "\n"]
)
def test_a_token_that_is_none(token, serve, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", token)
    with pytest.raises(ConfigurationError, match="expected 16 to 1024 ASCII characters") as error:
        remote(serve()).fetch()
    assert token.strip() not in str(error.value)


def test_a_page_that_leads_its_name_here(serve):
    server = serve()
    with httpx.Client() as client:
        for host in ("evil.example.org", "localhost.evil.example.org", "evil_host.example.org", "[", "[::1", ""):
            assert client.get(server.url + "/reward", headers={"Host": host}).status_code in (400, 403), host
        answer = client.post(server.url + "/scores", content=b"x", headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415
        for host in ("localhost:1", "127.0.0.1", "[::1]:8765"):
            assert client.get(server.url + "/reward", headers={"Host": host}).status_code == 200


def test_a_url_with_a_password_is_refused():
    with pytest.raises(ConfigurationError, match="without a password") as error:
        RemoteReward("http://me:hunter2@host:1")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["", "host:1", "ftp://host", "http://", "http://h/?a=b", "http://h#x", None])
def test_urls_that_are_none(url):
    with pytest.raises(ConfigurationError, match="expected a url"):
        RemoteReward(url)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("inf")}, {"attempts": 0}, {"backoff": -1}, {"encoding": "jpeg"}]
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigurationError, match="RemoteReward: expected"):
        RemoteReward("http://host", **options)


# No server, or another one


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_nobody_is_there(caplog):
    away = RemoteReward(f"http://127.0.0.1:{free_port()}", attempts=3, backoff=0.01)
    with pytest.raises(ConfigurationError, match=r"no answer in 3 attempts, at last ConnectError.*serve-reward NAME"):
        away.fetch()
    assert [record.getMessage().split(":")[3].strip() for record in caplog.records] == [
        "attempt 1 of 3",
        "attempt 2 of 3",
    ]
    caplog.clear()
    with pytest.raises(ConfigurationError, match=r"the prompt cannot be scored: http://127.0.0.1:\d+: no answer"):
        away.check("a cat", {})  # not asked for again for every prompt
    assert not caplog.records


def test_a_server_that_is_started_later(serve):
    port = free_port()
    away = RemoteReward(f"http://127.0.0.1:{port}", attempts=1)
    with pytest.raises(ConfigurationError):
        away.fetch()
    serve(port=port)
    away.fetch()
    assert score(away).shape == (4,)


def test_another_schema(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(
        type(server.service.description), "model_dump_json", lambda self: json.dumps({"schema_version": 2, "new": 1})
    )
    with pytest.raises(ConfigurationError, match="expected schema version 1, got 2: install the same lightning-fdfo"):
        remote(server).fetch()


def test_another_reward(serve):
    with pytest.raises(ConfigurationError, match="expected the reward OCR, it serves 'JPEGSize'"):
        remote(serve(), reward="OCR").fetch()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"schema_version": 1}', b"[" * 10_000, b"\xff", b"null"])
def test_something_else_answers(body, answering):
    with pytest.raises(ConfigurationError, match="expected a server of lightning-fdfo"):
        RemoteReward(answering(body), attempts=1).fetch()


@pytest.mark.parametrize(
    "scores", ["[0.1]", "[NaN, 1, 1, 1]", "[1e400, 1, 1, 1]", "[1e39, 1, 1, 1]", '["x"]', "[null, 1, 1, 1]", "{}", "1"]
)
def test_an_answer_that_is_no_scores_is_an_error(scores, serve, monkeypatch):
    away = remote(serve())
    away.fetch()
    monkeypatch.setattr(server_module, "_json", lambda text: Response(f'{{"scores": {scores}}}'))
    with pytest.raises(RemoteError, match="scores"):
        score(away)


def test_a_message_cannot_steer_the_terminal(answering):
    body = json.dumps({"detail": "\x1b[2Jgone\nnew line"}).encode()
    with pytest.raises(ConfigurationError) as error:
        RemoteReward(answering(body, status=404), attempts=1).fetch()
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_endless_answer(answering):
    with pytest.raises(ConfigurationError, match="at most 4194304 bytes"):
        RemoteReward(answering(b"x" * (2**22 + 1)), attempts=1).fetch()


def test_a_redirect_is_not_followed(answering, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FDFO_TOKEN", TOKEN)
    other = answering(b"never", seen := [])
    with pytest.raises(ConfigurationError):
        RemoteReward(answering(b"", status=307, headers=f"Location: {other}\r\n"), attempts=1).fetch()
    assert not seen


@pytest.fixture
def answering():
    """Starts a server of one answer, whatever is asked."""
    listeners, threads = [], []

    def start(body, seen=None, status=200, headers="", delay=0.0):
        listener = socket.create_server(("127.0.0.1", 0))

        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    request = connection.recv(65536)
                    if not request:
                        return
                    if seen is not None:
                        seen.append(request)
                    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
                    with contextlib.suppress(OSError):  # the client may have hung up
                        connection.sendall(head.encode())
                        for piece in [body] if not delay else [body[i : i + 1] for i in range(len(body))]:
                            if delay:
                                time.sleep(delay)
                            connection.sendall(piece)

        listeners.append(listener)
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener, thread in zip(listeners, threads, strict=True):
        with socket.create_connection(listener.getsockname()):
            pass  # ends its loop
        thread.join(timeout=5)
        listener.close()


# What fails during a run


def test_a_failed_reward_is_told_and_not_tried_again(serve):
    reward = Scripted(*[ZeroDivisionError("of my own")] * 9)
    away = remote(serve(reward))
    with pytest.raises(RewardError, match=r"reward 'away'.*status 422: prompt .*of my own") as error:
        RewardMix({"away": RewardTerm(away)})(IMAGES, PROMPTS, TEXTS)
    assert error.value.row == 0
    assert reward.calls == 4  # here and there, a batch and then its first image


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_a_failure(value, serve):
    with pytest.raises(RemoteError, match=r"status 422: .*score (nan|inf|-inf)"):
        score(remote(serve(Scripted(*[value] * 9))))


def test_a_server_that_dies_and_comes_back(serve):
    first = serve("JPEGSize")
    away = remote(first, attempts=30, backoff=0.05)
    expected = score(away)
    first.stop()
    revived = []
    timer = threading.Timer(0.3, lambda: revived.append(serve("JPEGSize", port=first.port)))
    timer.start()
    assert torch.equal(score(away), expected)
    timer.join()
    assert revived


def test_a_server_that_stays_dead(serve):
    server = serve()
    away = remote(server, attempts=2)
    away.fetch()
    server.stop()
    with pytest.raises(
        RewardError, match=rf"reward 'away'.*{server.url}: no answer in 2 attempts, at last ConnectError"
    ):
        RewardMix({"away": RewardTerm(away)})(IMAGES, PROMPTS, TEXTS)


@pytest.mark.parametrize("change", [{"reward": "Colorfulness"}, {"configuration": "another quality"}])
def test_another_reward_that_comes_back_is_not_taken(change, serve):
    first = serve("JPEGSize")
    away = remote(first)
    score(away)
    first.stop()
    serve(**({"reward": "JPEGSize", "port": first.port} | change))
    with pytest.raises(RemoteError, match=r"status 409.*not the reward that was asked for at first"):
        score(away)


def test_a_call_has_a_time_limit(serve, caplog):
    slow = Scripted(*[lambda: time.sleep(0.6)] * 2)
    away = remote(serve(slow), timeout=0.2, attempts=2, backoff=0.01)
    away.fetch()
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"no answer in 2 attempts, at last ReadTimeout with timeout 0\.2 s"):
        score(away)
    assert time.monotonic() - started < 1.0
    assert "attempt 1 of 2" in caplog.text


def test_an_answer_that_trickles_is_not_waited_for(answering):
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match="ReadTimeout"):
        RemoteReward(answering(b"x" * 30, delay=0.1), timeout=0.4, attempts=1).fetch()
    assert time.monotonic() - started < 1.5


def test_no_proxy_on_the_way_to_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    remote(serve(), attempts=1).fetch()


def test_a_slow_call_is_tried_again(serve):
    away = remote(serve(Scripted(lambda: time.sleep(0.5))), timeout=0.4, attempts=5, backoff=0.2)
    away.fetch()
    assert score(away).tolist() == [0.25] * 4


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_status_that_may_pass_is_tried_again(status, answering):
    seen = []
    with pytest.raises(ConfigurationError, match=f"no answer in 3 attempts, at last status {status}: wait"):
        RemoteReward(answering(b'{"detail": "wait"}', seen, status), attempts=3, backoff=0.01).fetch()
    assert len(seen) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422])
def test_a_status_that_stays_is_not(status, answering):
    seen = []
    with pytest.raises(ConfigurationError):
        RemoteReward(answering(b'{"detail": "no"}', seen, status), attempts=3, backoff=0.01).fetch()
    assert len(seen) == 1


def test_waits_double(monkeypatch, answering):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    with pytest.raises(ConfigurationError):
        RemoteReward(answering(b"{}", status=503), attempts=8, backoff=1.0).fetch()
    assert len(waits) == 7
    for wait, least in zip(waits, [1, 2, 4, 8, 16, 30, 30], strict=True):
        assert least <= wait <= 1.5 * least


def test_jitter_draws_no_global_random_numbers(monkeypatch, answering):
    before = random.getstate()
    with pytest.raises(ConfigurationError):
        RemoteReward(answering(b"{}", status=503), attempts=3, backoff=0.01).fetch()
    assert random.getstate() == before


# The server's own limits, asked by hand


def post(server, content, path="/scores", **headers):
    with httpx.Client(timeout=10) as client:
        return client.post(server.url + path, content=content, headers={"Content-Type": CONTENT_TYPE} | headers)


def test_a_body_is_counted_as_it_comes(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_HEADER", 1000)
    server = serve(limits=Limits(max_body=100_000))
    sent = []

    def endless():  # chunked: no Content-Length says what comes
        for _ in range(2000):
            sent.append(bytes(65536))
            yield sent[-1]

    answer = post(server, endless())
    assert answer.status_code == 413
    assert answer.json() == {"detail": "expected a body of at most 101008 bytes"}
    assert len(sent) < 2000
    assert score(remote(server), slice(0, 2)).shape == (2,)  # it goes on


@pytest.mark.parametrize("path", ["/scores", "/check"])
def test_garbage_is_refused_and_the_server_goes_on(path, serve):
    server = serve()
    for content in (b"", b"\x80\x04\x95", pickle.dumps(RemoteReward), b"{}", b"[" * 100_000, b"\xff" * 100):
        answer = post(server, content, path)
        assert answer.status_code == 400
        assert answer.json()["detail"]
    assert score(remote(server)).shape == (4,)


def test_there_is_nothing_else(serve):
    server = serve()
    with httpx.Client() as client:
        for path in ("/", "/docs", "/openapi.json", "/redoc", "/../etc/passwd"):
            assert client.get(server.url + path).status_code == 404
        assert client.get(server.url + "/scores").status_code == 405


def test_one_at_a_time_and_not_too_many(serve):
    running, most = [], []

    def work():
        running.append(1)
        most.append(len(running))
        time.sleep(0.3)  # longer than eight requests take to arrive on a busy machine
        running.pop()

    server = serve(Scripted(*[work] * 40), max_waiting=3)
    away = [remote(server, attempts=1) for _ in range(8)]
    for one in away:
        one.fetch()
    outcomes = []

    def ask(one):
        try:
            outcomes.append(score(one).shape == (4,))
        except RemoteError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask, args=(one,)) for one in away]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert outcomes.count(True) >= 3
    refused = [outcome for outcome in outcomes if outcome is not True]
    assert refused
    assert all("503: 3 requests are here already" in outcome for outcome in refused)


def test_nothing_runs_for_who_has_hung_up(serve):
    reward = Scripted(lambda: time.sleep(0.5))
    server = serve(reward)
    first, second = remote(server), remote(server, timeout=0.1, attempts=1)
    second.fetch()
    thread = threading.Thread(target=lambda: score(first))
    thread.start()
    time.sleep(0.2)
    with pytest.raises(RemoteError, match="ReadTimeout"):
        score(second)
    thread.join()
    time.sleep(0.2)
    assert reward.calls == 1


def test_a_body_that_stops_half_way(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_UPLOAD_SECONDS", 0.2)
    server = serve(max_waiting=1)
    head = f"POST /scores HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode() + b"x")
        assert b" 408 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode() + b"x")
    time.sleep(0.1)
    assert score(remote(server, attempts=5, backoff=0.1)).shape == (4,)  # the place is free again


def test_large_scores_keep_their_signal_on_the_wire(serve):
    def large(images, prompts, metadata):
        return 1e8 + images.mean(dim=(1, 2, 3)).double()

    away = remote(serve(FunctionReward(large)))
    assert torch.equal(score(away), large(IMAGES, PROMPTS, TEXTS))
