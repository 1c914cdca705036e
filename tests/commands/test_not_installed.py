"""A dependency that is not installed ends a command in one line that names the command for pip."""

import builtins
import sys

import pytest

from lightning_fdfo.__main__ import main
from lightning_fdfo.commands import exit_code

QUICKSTART = ["--config", "configs/quickstart.yaml", "--trainer.default_root_dir"]


@pytest.fixture
def without(monkeypatch):
    """Makes a package as if it were not installed, for what has not been imported yet."""

    def remove(package, *importers):
        real = builtins.__import__

        def refuse(name, *arguments, **options):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, *arguments, **options)

        for name in [*sys.modules]:
            if name in importers:
                package_name, _, attribute = name.rpartition(".")
                monkeypatch.delattr(sys.modules[package_name], attribute, raising=False)  # `from … import` looks there
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", refuse)

    return remove


def ended(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_matplotlib(without, capsys, tmp_path):
    without("matplotlib", "lightning_fdfo.report.page", "lightning_fdfo.commands.report")
    line = ended(["report", str(tmp_path)], capsys)
    assert line == "error: matplotlib is not installed, and lightning-fdfo needs it: pip install matplotlib"


def test_tensorboard(monkeypatch, capsys, tmp_path):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    line = ended(["fit", *QUICKSTART, str(tmp_path)], capsys)
    assert line == "error: tensorboard is not installed, and lightning-fdfo needs it: pip install tensorboard"


def test_somebody_elses_module_keeps_its_traceback():
    assert exit_code.error_report(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert exit_code.error_report(ModuleNotFoundError("No module named 'yaml'", name="yaml")).text.endswith(
        "pip install pyyaml"
    )
