"""What the tests of several studies share."""

import runpy

import pytest


@pytest.fixture
def python(monkeypatch, request):
    """Runs a script of the test's `STUDY` as `python SCRIPT WORDS` does."""

    def run(script, *words):
        monkeypatch.setattr("sys.argv", [script, *map(str, words)])
        return runpy.run_path(str(request.module.STUDY / script), run_name="__main__")

    return run
