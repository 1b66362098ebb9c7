"""Files of a search: names on every system, head files from anybody, writing at once and to links, and what cannot be written."""

import errno
import json
import os
import sqlite3
import threading

import folder_paths
import numpy as np
import pytest

from attune.hunt import files, head_files, log
from attune.hunt.files import file_name, write_whole
from attune.hunt.log import Evaluation, Log
from attune.nodes.heads import AttuneLoadHeads
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import select
from attune.tests import families


@pytest.fixture
def user(tmp_path, monkeypatch):
    """ComfyUI's user folder."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def saved(user):
    """A head file, and what it was made of."""
    family, sites = model_sites(families.shared("sd15"))
    heads = select("middle.0.0:1", sites, family)
    return head_files.save(heads, sites, family, "mine"), heads, sites, family


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CON", "Windows"),
        ("nul", "Windows"),
        ("com1.txt", "Windows"),
        ("Lpt9 .x.y", "Windows"),
        ("ends with a dot.", "letters"),
        ("\U0001f600" * 100, "too long"),
        ("é" * 101, "too long"),
        ("half \ud83d", "letters"),
        ("bell\x07", "letters"),
    ],
)
def test_names_that_some_system_refuses(name, words):
    with pytest.raises(ValueError, match=words) as told:
        file_name(name)
    str(told.value).encode()  # the sentence can be shown
    assert "cannot be a file's name" in str(told.value)


def test_names_that_every_system_takes():
    for name in ("my heads", "control", "nullify", "com10", "größe 3", "日本語", "v1.2", "\U0001f600" * 50):
        assert file_name(f" {name} ") == name


def test_the_pickers_list_has_no_names_that_an_editor_cannot_be_told(saved):
    path = saved[0]
    (path.parent / os.fsdecode(b"broken\xff.json")).write_text("{}")
    assert head_files.names() == sorted({"mine", *(p.stem for p in head_files.PRESETS.glob("*.json"))})


@pytest.mark.parametrize(
    "heatmap",
    [
        '{"middle.0.0": [NaN, 1, 2, 3]}',
        '{"middle.0.0": [Infinity, 1, 2, 3]}',
        '{"middle.0.0": [1e999, 1, 2, 3]}',
        '{"middle.0.0": [' + "9" * 5000 + ", 1, 2, 3]}",
        "[" * 100_000 + "]" * 100_000,
        "[" * 500 + "]" * 500,
        '"half \\ud83d"',
    ],
)
def test_head_files_that_no_editor_could_be_told_of(saved, heatmap):
    path, _, sites, family = saved
    text = path.read_text()
    path.write_text(f'{text.rstrip().removesuffix("}")}, "heatmap": {heatmap}}}')
    with pytest.raises(ValueError, match="is not a head set of Attune"):
        head_files.load("mine", sites, family)


def test_a_number_too_large_for_a_colour_is_no_score(saved):
    path, heads, sites, family = saved
    data = {**json.loads(path.read_text()), "heatmap": {"middle.0.0": [10**400, 1, 2, 3]}}
    path.write_text(json.dumps(data))
    assert "heatmap" not in head_files.load("mine", sites, family).about
    shown = AttuneLoadHeads.execute(families.shared("sd15"), "mine")
    assert shown.result[0].chosen == heads.chosen and shown.ui is None
    path.write_text(json.dumps({**data, "layers": {"middle.0.0": 10**400}}))
    with pytest.raises(ValueError, match="for another model"):
        head_files.load("mine", sites, family)
    path.write_bytes(b"[" + b" " * head_files.LARGEST + b"]")
    with pytest.raises(ValueError, match="is not a head set"):
        head_files.load("mine", sites, family)
    path.write_bytes(b'{"heads": "\xff"}')
    with pytest.raises(ValueError, match="is not a head set"):
        head_files.load("mine", sites, family)


def test_many_savers_at_once(saved):
    path, heads, sites, family = saved
    failed = []

    def save():
        for _ in range(30):
            try:
                head_files.save(heads, sites, family, "mine")
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert head_files.load("mine", sites, family).chosen == heads.chosen
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]


def test_links_are_replaced_and_never_followed(saved):
    path, heads, sites, family = saved
    target = path.parent.parent / "somebody elses"
    target.write_text("untouched")
    for link in (path, path.with_suffix(".part")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    head_files.save(heads, sites, family, "mine")
    assert target.read_text() == "untouched" and not path.is_symlink()
    assert head_files.load("mine", sites, family).chosen == heads.chosen


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "right to read and write"), (errno.EIO, "Look at")]
)
def test_what_cannot_be_written_says_what_to_do(tmp_path, monkeypatch, number, words):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(ValueError, match=rf"Save Heads: .*x\.json: .*{words}"):
        write_whole("Save Heads", path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- the log --------------------------------------------------------------------------------------------------------------


def evaluations(path):
    return Log(path).evaluations([({"settings": 1}, np.zeros(2, np.float32))])


def test_a_locked_log_is_called_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "WAIT", 0.05)
    path = tmp_path / "log.sqlite"
    held = evaluations(path)
    other = sqlite3.connect(path)
    other.execute("begin exclusive")
    for use in (lambda: Log(path), lambda: held.add([Evaluation("", 0, (1.0,))]), lambda: held.has("", [0])):
        with pytest.raises(ValueError, match="in use by another search"):
            use()
    other.rollback()
    held.add([Evaluation("", 0, (1.0,))])
    assert held.scores("", 1) == [1.0]


def test_a_damaged_log_and_one_of_another_program(tmp_path):
    path = tmp_path / "log.sqlite"
    evaluations(path).add([Evaluation("x", i, (1.0,), b"picture" * 1000) for i in range(4)])
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * 5000 + whole[5100:])
    with pytest.raises(ValueError, match=r"damaged .*move it away, or search under another name"):
        evaluations(path).scores("x", 4)
    for script in ("create table evaluations (a)", "create table searches (id)", "pragma user_version = 99"):
        path.unlink()
        sqlite3.connect(path).executescript(script)
        with pytest.raises(ValueError, match="another version of Attune, or by another program"):
            Log(path)


def test_a_log_of_before_formats_were_numbered_goes_on(tmp_path):
    path = tmp_path / "log.sqlite"
    evaluations(path).add([Evaluation("x", 0, (1.5,))])
    base = sqlite3.connect(path)
    base.execute("pragma user_version = 0")
    base.close()
    assert evaluations(path).scores("x", 1) == [1.5]
    assert sqlite3.connect(path).execute("pragma user_version").fetchone() == (log.FORMAT,)


def test_a_log_that_cannot_be_opened_or_grow(tmp_path):
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(ValueError, match="Give ComfyUI's user the right to write"):
        Log(tmp_path / "folder.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Look at what is in"):
        Log(tmp_path / "file" / "log.sqlite")
    held = evaluations(tmp_path / "log.sqlite")
    held.base.execute("pragma max_page_count = 5")
    with pytest.raises(ValueError, match=r"the disk is full\. Make room"):
        held.add([Evaluation("x", i, (1.0,), b"picture" * 1000) for i in range(99)])
    held.base.execute("pragma max_page_count = 1000000")
    assert not held.has("x", [0])
    held.base.execute("pragma query_only = 1")
    with pytest.raises(ValueError, match="cannot be written"):
        held.add([Evaluation("x", 0, (1.0,))])


def test_scores_of_several_scorers(tmp_path):
    identity = np.zeros(2, np.float32)
    path = tmp_path / "log.sqlite"
    both = Log(path).evaluations([({"scorer": "a"}, identity), ({"scorer": "b"}, identity)])
    both.add([Evaluation("x", i, (1.0 + i, 5.0), b"small") for i in range(2)])
    assert both.means("x", 2) == (1.5, 5.0) and both.has("x", [0, 1]) and not both.has("x", [2])
    assert both.pictures("x") == [b"small"] * 2
    alone = Log(path).evaluations([({"scorer": "b"}, identity)])
    assert alone.means("x", 2) == (5.0,) and alone.of_others() == 2
    more = Log(path).evaluations([({"scorer": "a"}, identity), ({"scorer": "c"}, identity)])
    assert not more.has("x", [0, 1])
    more.add([Evaluation("x", i, (1.0 + i, 7.0)) for i in range(2)])
    assert more.means("x", 2) == (1.5, 7.0)
