"""What tests of prove share."""

from __future__ import annotations

import pytest


@pytest.fixture
def folders(tmp_path, monkeypatch):
    import folder_paths

    from attune.scoring.folders import DETECTORS, SCORERS

    for kind in (SCORERS, DETECTORS):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], set()))
    return tmp_path / SCORERS, tmp_path / DETECTORS
