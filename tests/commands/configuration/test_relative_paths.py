"""Relative paths of a configuration: where they are looked up, and what is said of one that is nowhere."""

import pytest
from jsonargparse import Namespace

from lightning_fdfo.commands.configuration.relative_paths import resolve_paths
from lightning_fdfo.errors import ConfigurationError


def settings(**data):
    lora = Namespace(init_lora=data.pop("init_lora", None))
    flow = Namespace(class_path="DiffusersFlow", init_args=Namespace(pretrained=data.pop("pretrained", "tiny-digits")))
    return Namespace(data=Namespace(**data), model=Namespace(lora=lora, flow=flow))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The current folder, one with configurations, and one of an overlay."""
    for folder in ("here", "there/configs", "over"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_from_the_current_folder_then_beside_the_file_then_above_it(folders):
    files = [folders / "there/configs/base.yaml", folders / "over/overlay.yaml"]
    places = ["here/a.txt", "over/a.txt", "over/b.txt", "there/configs/b.txt", "there/configs/c.txt", "there/d.txt"]
    for place in places:
        (folders / place).write_text("x")
    (folders / "there/model").mkdir()
    config = settings(train="a.txt", val="b.txt", test="c.txt", init_lora="d.txt", pretrained="model")
    resolve_paths(config, files, "fit")
    assert config.data.train == "a.txt"
    assert config.data.val == str(folders / "over/b.txt")
    assert config.data.test == str(folders / "there/configs/c.txt")
    assert config.model.lora.init_lora == str(folders / "there/d.txt")
    assert config.model.flow.init_args.pretrained == str(folders / "there/model")


@pytest.mark.parametrize(
    ("data", "command", "key"),
    [
        ({"train": "no.txt"}, "fit", "data.train"),
        ({"val": "no.txt"}, "validate", "data.val"),
        ({"predict": "no.txt"}, "predict", "data.predict"),
        ({"init_lora": "no.safetensors"}, "test", "model.lora.init_lora"),
        ({"train": "no.txt"}, None, "data.train"),
    ],
)
def test_what_is_nowhere_is_said_with_all_places(folders, data, command, key):
    with pytest.raises(ConfigurationError, match=rf"^{key}: no\.\w+ cannot be read: No such file in ") as error:
        resolve_paths(settings(**data), [folders / "there/configs/base.yaml"], command)
    for folder in ("here", "there/configs", "there"):
        assert str(folders / folder) in str(error.value)


def test_what_the_command_does_not_need_and_names_of_models_stay(folders):
    config = settings(train="no.txt", val=None, test="/no.txt", pretrained="owner/model")
    before = config.clone()
    resolve_paths(config, [folders / "there/configs/base.yaml"], "test")
    assert config == before
    resolve_paths(Namespace(data=Namespace(train=None), model=Namespace(lora=None, flow=None)), [], "fit")
