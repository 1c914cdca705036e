"""What is said when the hub gives no model: by a server that answers as the hub does, and by no server at all."""

from __future__ import annotations

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_fdfo.__main__ import main
from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.flows import DiffusersFlow, StableDiffusion3, resolve_pretrained
from lightning_fdfo.hub import HubFiles

ANSWERS = {
    "gated": (403, "GatedRepo"),
    "missing": (401, "RepoNotFound"),
    "unversioned": (404, "RevisionNotFound"),
    "forbidden": (403, ""),
    "broken": (503, ""),
}


class Hub(BaseHTTPRequestHandler):
    """Answers every request for OWNER/NAME by the error that NAME stands for."""

    def do_GET(self) -> None:
        status, code = next(answer for name, answer in ANSWERS.items() if f"owner/{name}" in self.path)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(cache, monkeypatch):
    """Nobody listens there."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


SAID = {
    "gated": r"owner/gated is gated\); accept its licence on https://huggingface.co/owner/gated, then `hf auth login`",
    "missing": r"the hub has no owner/missing, or it is private\); check the name, or `hf auth login`",
    "unversioned": r"owner/unversioned has no revision v7\)",
    "forbidden": r"the hub refuses access, status 403\); `hf auth login` with a token that may read it",
    "broken": r"the hub answers with status 503\); try again later by",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_refusal_of_the_hub_is_told_apart(hub, name):
    source = f"owner/{name}"
    for fetch in (
        lambda: StableDiffusion3(source, revision="v7").load(),
        lambda: DiffusersFlow(source, revision="v7"),
        lambda: StableDiffusion3(source, revision="v7").outline(),
        lambda: HubFiles(source, ("a.pt",), revision="v7").fetch(),
    ):
        with pytest.raises(ConfigurationError, match=SAID[name]) as caught:
            fetch()
        assert f": hf download {source}" in str(caught.value)
        assert "no diffusers pipeline" not in str(caught.value)


def test_no_network_is_told_at_once(no_network):
    begin = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"owner/name: its files are not in the cache .*\(no network: "):
        StableDiffusion3("owner/name").load()
    assert time.monotonic() - begin < 10


def test_offline_mode_is_named(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for fetch in (StableDiffusion3("owner/name").load, HubFiles("owner/name", ("a.pt",)).fetch):
        with pytest.raises(ConfigurationError, match=r"HF_HUB_OFFLINE=1.*then copy the cache: hf download owner/name"):
            fetch()


def test_a_cache_with_the_index_alone_is_not_a_model(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    root = cache / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    index = Path(resolve_pretrained("tiny-digits")) / "model_index.json"
    shutil.copy(index, root / "snapshots" / commit)
    flow = StableDiffusion3("owner/name")
    for use in (flow.outline, flow.load):
        with pytest.raises(ConfigurationError, match="owner/name") as caught:
            use()
        assert "hf download owner/name" in str(caught.value)


CONFIG = "configs/sd35_medium_pickscore.yaml"


def test_a_full_size_configuration_on_a_laptop(no_network, tmp_path, capsys):
    """Doctor says all that is missing, a line each; fit, on the CPU, the first of it."""
    words = ["--config", CONFIG, "--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *words])
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert stop.value.code == 1
    for fault, word in zip(faults, ("accelerator", "stable-diffusion", "PickScore"), strict=True):
        assert word in fault
    assert "set --trainer.accelerator cpu" in faults[0]
    assert all("hf download" in fault for fault in faults[1:])

    with pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--trainer.accelerator", "cpu"])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(told) == 1
    assert "stabilityai/stable-diffusion-3.5-medium" in told[0]
    assert "no network" in told[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
