"""Model folders that are meant to do harm, and large models in several files."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from attune.nodes.scorers import AttuneClipScorer
from attune.scoring import folders
from attune.scoring.scorers import ClipScorer, PreferenceScorer
from attune.tests.helpers import some_pictures
from attune.tests.scoring.tiny import tiny_folder


class Program:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def in_parts(path, **named):
    """Put a model's weights into two files with an index; ``named`` renames them in it."""
    weights = load_file(path / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[i % 2] for i, key in enumerate(sorted(weights))}
    for name in names:
        save_file({k: v for k, v in weights.items() if where[k] == name}, path / name, {"format": "pt"})
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {k: named.get(v[6:11], v) for k, v in where.items()}}
    (path / folders.INDEX).write_text(json.dumps(index))
    return path


def test_a_model_in_several_files_scores_as_in_one(home):
    one = ClipScorer(tiny_folder(home / "one").name)
    several = ClipScorer(in_parts(tiny_folder(home / "several")).name)
    images = some_pictures()
    torch.testing.assert_close(several.scores(images, ["a cat"]), one.scores(images, ["a cat"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("legacy", [True, False], ids=["old format", "new format"])
@pytest.mark.parametrize("decoy", [True, False])
def test_a_program_in_weights_is_never_run(home, legacy, decoy, monkeypatch):
    """The index of a folder with safetensors in it names a pickle."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    path = in_parts(tiny_folder(home / "tiny"), **{"00002": "weights.bin"})
    if legacy:
        (path / "weights.bin").write_bytes(pickle.dumps(Program(home / "run")))
    else:
        torch.save(Program(home / "run"), path / "weights.bin")
    if decoy:
        save_file({"x": torch.ones(1)}, path / "decoy.safetensors")
    for make in (ClipScorer, PreferenceScorer):
        with pytest.raises(ValueError, match=r"names “weights\.bin”.*Only safetensors files in the folder itself"):
            make("tiny")
    assert not (home / "run").exists()


def test_a_pickle_that_is_called_safetensors_is_not_run(home):
    path = in_parts(tiny_folder(home / "tiny"))
    (path / "model-00002-of-00002.safetensors").write_bytes(pickle.dumps(Program(home / "run")))
    with pytest.raises(ValueError, match="cannot be read"):
        ClipScorer("tiny")
    assert not (home / "run").exists()


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "sub/model.safetensors", "..\\other\\model.safetensors", "", "a.safetensors.pt", 7]
)
def test_an_index_names_only_files_of_its_folder(home, name):
    tiny_folder(home / "other")
    tiny_folder(home / "tiny" / "sub")
    in_parts(tiny_folder(home / "tiny"), **{"00001": name})
    with pytest.raises(ValueError, match=r"Only safetensors files in the folder itself are read|cannot be read"):
        ClipScorer("tiny")


def test_absolute_names_are_refused(home):
    other = tiny_folder(home / "other")
    in_parts(tiny_folder(home / "tiny"), **{"00001": str(other / "model.safetensors")})
    with pytest.raises(ValueError, match="Only safetensors files in the folder itself"):
        ClipScorer("tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(home, name):
    other, path = tiny_folder(home / "other"), tiny_folder(home / "tiny")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(other / (name if name != "head.safetensors" else "model.safetensors"))
    with pytest.raises(ValueError, match=rf"“{name}” in the model folder “tiny” is a link to a file outside"):
        ClipScorer("tiny")


def test_links_in_a_circle_are_a_sentence(home):
    path = tiny_folder(home / "tiny")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "loop.safetensors")
    (path / "loop.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        ClipScorer("tiny")
    assert AttuneClipScorer.fingerprint_inputs("tiny")


def test_the_folder_itself_may_be_a_link(home):
    tiny_folder(home.parent / "elsewhere")
    (home / "linked").symlink_to(home.parent / "elsewhere")
    assert ClipScorer("linked").scores(some_pictures(1), ["a cat"]).shape == (1, 1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000, "\udcff"])
def test_a_broken_index_is_a_sentence(home, text):
    path = in_parts(tiny_folder(home / "tiny"))
    (path / folders.INDEX).write_text(text, errors="surrogateescape")
    with pytest.raises(
        ValueError, match=r"index\.json in the model folder “tiny” cannot be read|the weights in “tiny” are not complete"
    ):
        ClipScorer("tiny")


def test_a_missing_part_is_named(home):
    path = in_parts(tiny_folder(home / "tiny"))
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"“model-00002-of-00002\.safetensors” is missing"):
        ClipScorer("tiny")


def test_every_file_that_is_read_is_in_the_key(home):
    path = in_parts(tiny_folder(home / "tiny"))
    seen = [(ClipScorer("tiny").key, AttuneClipScorer.fingerprint_inputs("tiny"))]
    for name in sorted(f.name for f in path.iterdir()):
        if name.endswith(".safetensors"):
            weights = load_file(path / name)
            next(iter(weights.values())).add_(0.25)
            save_file(weights, path / name, {"format": "pt"})
        else:
            (path / name).write_text((path / name).read_text() + "\n")
        seen.append((ClipScorer("tiny").key, AttuneClipScorer.fingerprint_inputs("tiny")))
    assert len(set(seen)) == len(seen) >= 6 and len({key for key, _ in seen}) == len(seen)


def test_an_adapter_beside_the_model_is_not_loaded(home):
    path = tiny_folder(home / "tiny")
    before = ClipScorer("tiny").scores(some_pictures(1), ["a cat"])
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(home / "other")}))
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Program(home / "run")))
    torch.testing.assert_close(ClipScorer("tiny").scores(some_pictures(1), ["a cat"]), before, atol=1e-6, rtol=0)
    assert not (home / "run").exists()
