"""Tiny models that several tests share: each pipeline is written once a session, and loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fdfo.flows import DiffusersFlow
from lightning_fdfo.flows.conditioning import Conditioning
from tests.flows.all_flows import ALL_FLOWS, Case

BY_NAME = {case.name: case for case in ALL_FLOWS}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """From a case's name to its folder."""
    folders: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("flows") / "model"
            BY_NAME[name].build(folders[name])
        return folders[name]

    return build


@pytest.fixture(scope="session")
def loaded_flow(folder_of):
    """From a case's name to its loaded flow; a test leaves it as it was."""
    flows: dict[str, DiffusersFlow] = {}

    def load(name: str) -> DiffusersFlow:
        if name not in flows:
            flows[name] = BY_NAME[name].flow(folder_of(name))
            flows[name].load()
        return flows[name]

    return load


@pytest.fixture(params=ALL_FLOWS, ids=lambda case: case.name)
def case(request) -> Case:
    """Each model in turn."""
    return request.param


@pytest.fixture(params=[case for case in ALL_FLOWS if case.representative], ids=lambda case: case.name)
def representative(request) -> Case:
    """Each model in turn, of variants that load and encode alike one."""
    return request.param


@pytest.fixture(scope="session")
def conditioning(loaded_flow) -> Conditioning:
    """Of the LoRA tests' prompts, by the shipped model."""
    return loaded_flow("sd3").encode(['"427" in red', '"1234" in blue'])
