"""Empty model folders, and no network."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty models folder for scorers and one for detectors."""
    import folder_paths

    from attune.scoring import folders

    for kind in (folders.SCORERS, folders.DETECTORS):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], set()))
    return tmp_path / folders.SCORERS


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
