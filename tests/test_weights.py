"""Where a reward's weights come from: local files, a cache laid out by hand, and no network at all."""

import gc
import hashlib

import pytest
import torch
from huggingface_hub import constants

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.hub import HubFiles, cached_weak

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = hashlib.sha256(b"numbers").hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def keep(cache, repository, *files, revision="main"):
    """Lays a repository out as huggingface_hub does."""
    root = cache / f"models--{repository.replace('/', '--')}"
    reference = root / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    return lay(root / "snapshots" / COMMIT, *files)


def lay(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"numbers")
    return folder


# Local


def test_a_local_file_is_taken_as_it_is_whatever_its_name(tmp_path):
    file = lay(tmp_path, "mine.bin") / "mine.bin"
    weights = HubFiles(str(file), ("official.pt",))
    assert weights.fetch() == file
    assert weights.is_cached()


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lay(tmp_path / "models", "w.pt")
    assert HubFiles("~/models/w.pt", ("w.pt",)).fetch() == tmp_path / "models" / "w.pt"
    assert HubFiles("~/models", ("*.pt",)).fetch() == tmp_path / "models"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (("w.pt",), "w.pt"),
        (("w.pt", "config.json"), ""),
        (("*.pt",), ""),
        (("sub/more.json",), "sub/more.json"),
        (("*.json", "w*.pt", "sub/*.json"), ""),
    ],
)
def test_one_name_leads_to_the_file_and_anything_else_to_the_folder(tmp_path, files, found):
    folder = lay(tmp_path, "w.pt", "config.json", "sub/more.json")
    assert HubFiles(str(folder), files).fetch() == folder / found


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (("w.pt",), r"w\.pt"),
        (("config.json", "w.pt"), r"w\.pt"),
        (("*.json", "model*.safetensors"), r"model\*\.safetensors"),
    ],
)
def test_a_local_folder_that_lacks_a_file_is_told_which(tmp_path, files, missing):
    folder = lay(tmp_path, "config.json")
    with pytest.raises(ConfigurationError, match=rf"weights: {missing} of {folder} is missing; {folder} must hold it"):
        HubFiles(str(folder), files).fetch()


@pytest.mark.parametrize("source", ["w.pt", "./owner/name", "/no/such/folder", "owner/name/more", "owner/na me"])
@pytest.mark.parametrize(
    ("files", "expected"), [(("w.pt",), r"a file, a folder with w\.pt"), (("*.json",), "a folder")]
)
def test_what_is_neither_a_path_nor_a_repository_is_told(cache, source, files, expected):
    with pytest.raises(
        ConfigurationError, match=rf"weights: expected {expected} or a hub name owner/name, got '{source}'$"
    ):
        HubFiles(source, files).fetch()


def test_a_file_where_a_folder_is_wanted_is_told(tmp_path):
    file = lay(tmp_path, "w.pt") / "w.pt"
    with pytest.raises(ConfigurationError, match=rf"expected a folder or a hub name owner/name, got '{file}'"):
        HubFiles(str(file)).fetch()


# The hub, out of reach


@pytest.mark.parametrize(
    ("files", "command"),
    [
        (("a.pt", "b.json"), "hf download owner/name a.pt b.json --include '*.txt' --include '*.jinja'"),
        (("a.pt",), "hf download owner/name a.pt"),
        (
            ("*.json", "model*.safetensors"),
            "hf download owner/name --include '*.json' --include 'model*.safetensors' --include '*.txt' "
            "--include '*.jinja'",
        ),
    ],
)
def test_without_a_network_the_files_and_the_command_are_named(cache, files, command):
    weights = HubFiles("owner/name", files)
    assert weights.command == command
    assert not weights.is_cached()
    with pytest.raises(ConfigurationError, match="cannot be fetched") as caught:
        weights.fetch()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"weights owner/name ({', '.join(files)}) are not in the cache and cannot be fetched (")
    assert line.endswith(f"then copy the cache: {command}")


def test_another_revision_is_in_the_command(cache):
    weights = HubFiles("owner/name", ("a.pt",), revision="v2")
    assert weights.command == "hf download owner/name a.pt --revision v2"
    with pytest.raises(ConfigurationError, match=r"hf download owner/name a\.pt --revision v2$"):
        weights.fetch()


@pytest.mark.parametrize("source", ["owner/name", "0wner_1/na.me-v1_2"])
def test_a_cache_is_enough_offline(cache, source):
    snapshot = keep(cache, source, "a.pt", "config.json")
    one, several = HubFiles(source, ("a.pt",)), HubFiles(source, ("*.json", "a.pt"))
    assert (one.is_cached(), several.is_cached()) == (True, True)
    assert one.fetch() == snapshot / "a.pt"
    assert several.fetch() == snapshot


@pytest.mark.parametrize("files", [("b.pt",), ("a.pt", "b.pt"), ("a.pt", "b*.pt")])
def test_an_incomplete_cache_is_not_enough(cache, files):
    keep(cache, "owner/name", "a.pt")
    weights = HubFiles("owner/name", files)
    assert not weights.is_cached()
    with pytest.raises(ConfigurationError, match=r"weights: b\S*pt of owner/name is missing; fetch it by: hf download"):
        weights.fetch()


def test_optional_files_may_be_missing_from_the_cache(cache):
    snapshot = keep(cache, "owner/name", "config.json", "model.safetensors")
    assert HubFiles("owner/name").is_cached()
    assert HubFiles("owner/name").fetch() == snapshot


def test_revisions_are_kept_apart_in_the_cache(cache):
    snapshot = keep(cache, "owner/name", "a.pt", revision="v2")
    assert HubFiles("owner/name", ("a.pt",), revision="v2").fetch() == snapshot / "a.pt"
    assert HubFiles("owner/name", ("a.pt",), revision=COMMIT).fetch() == snapshot / "a.pt"
    assert not HubFiles("owner/name", ("a.pt",)).is_cached()


def test_a_local_folder_of_a_repositorys_name_comes_first(cache, tmp_path, monkeypatch):
    keep(cache, "owner/name", "a.pt")
    lay(tmp_path / "owner" / "name", "a.pt")
    monkeypatch.chdir(tmp_path)
    assert HubFiles("owner/name", ("a.pt",)).fetch().resolve() == tmp_path / "owner" / "name" / "a.pt"


# Digests


def sources(cache, tmp_path, *files):
    """The hub's cache, a local folder, and, of a single file, the file itself under another name."""
    keep(cache, "owner/name", *files)
    folder = lay(tmp_path / "folder", *files)
    return ["owner/name", str(folder), *([str(lay(tmp_path, "mine.pt") / "mine.pt")] if len(files) == 1 else [])]


@pytest.mark.parametrize(
    ("files", "checked"),
    [(("a.pt",), "a.pt"), (("sub/a.pt",), "sub/a.pt"), (("a.pt", "*.json"), "a.pt"), (("sub/*.pt", "b"), "sub/a.pt")],
)
def test_a_digest_is_checked_wherever_the_file_comes_from(cache, tmp_path, files, checked):
    present = files if len(files) == 1 else (checked, "b", "config.json")
    for source in sources(cache, tmp_path, *present):
        HubFiles(source, files, sha256={checked: DIGEST}).fetch()
        wrong = HubFiles(source, files, sha256={checked: "0" * 64})
        with pytest.raises(
            ConfigurationError, match=rf"not the official file: expected sha256 {'0' * 64}, got {DIGEST}; delete it"
        ):
            wrong.fetch()
    assert not HubFiles("owner/name", files, sha256={checked: "0" * 64}).is_cached()


def test_a_file_that_only_a_digest_names_must_be_there(tmp_path):
    """As where somebody has split the official file into several."""
    folder = lay(tmp_path, "config.json", "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors of .* is missing"):
        HubFiles(str(folder), sha256={"model.safetensors": DIGEST}).fetch()


# Shared


@pytest.fixture
def load():
    """A shared loader that counts what it loads in `load.loaded`."""
    loaded = []

    def linear(width, bias):
        """Numbers."""
        loaded.append((width, bias))
        return torch.nn.Linear(width, 1, bias=bias)

    once = cached_weak(linear)
    once.loaded = loaded
    return once


def test_equal_arguments_share_an_object_and_different_ones_do_not(load):
    first, again, wider, bare = load(2, True), load(2, True), load(3, True), load(2, False)
    assert first is again
    assert len({id(model) for model in (first, wider, bare)}) == 3
    assert load.loaded == [(2, True), (3, True), (2, False)]
    assert (load.__name__, load.__doc__) == ("linear", "Numbers.")


def test_what_nobody_holds_is_let_go_and_loaded_again(load):
    model = load(2, True)
    held = model
    del model
    gc.collect()
    assert load(2, True) is held
    del held
    gc.collect()
    load(2, True)
    assert load.loaded == [(2, True)] * 2


def test_a_load_that_fails_is_tried_again():
    answers = [OSError("a slow disk"), torch.nn.Linear(1, 1)]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    once = cached_weak(load)
    with pytest.raises(OSError, match="a slow disk"):
        once()
    assert isinstance(once(), torch.nn.Linear)
