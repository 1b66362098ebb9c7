"""Layouts of heads without weights: of published models, of files by their headers, and of a loaded model."""

import json

import folder_paths
import pytest
import torch
from comfy.ldm.flux.model import FluxParams
from safetensors.torch import save_file

from attune.nodes.heads import AttuneHeads
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import select
from attune.patches.softpag import default_heads
from attune.server import layouts
from attune.server import routes as browser
from attune.tests import families


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [
        ("sd15", 16, 128),
        ("sdxl", 70, 1300),
        ("sd3", 24, 576),
        ("flux", 57, 1368),
        ("flux2", 56, 2688),
        ("flux2_klein", 25, 600),
        ("qwen_image", 60, 1440),
        ("qwen_image21", 32, 1024),
        ("z_image", 30, 900),
        ("wan", 40, 1600),
        ("lumina2", 26, 624),
        ("chroma", 57, 1368),
        ("krea2", 28, 1344),
        ("cosmos_predict2", 28, 448),
        ("anima", 28, 448),
    ],
)
def test_a_published_architecture_has_its_heads(name, layers, heads):
    if name not in layouts.PRESETS:
        with pytest.raises(ValueError, match="this ComfyUI does not know"):
            layouts.preset(name)
        return
    found = layouts.preset(name)
    assert (len(found["layers"]), sum(count for _, count in found["layers"])) == (layers, heads)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_layout_is_the_loaded_models(name):
    base, numbers = families.CONFIGS[name]
    kind = type(base.__name__, (base,), {"unet_config": numbers, "unet_extra_config": {}})
    family, sites = model_sites(families.shared(name))
    assert layouts.of_config(kind, numbers, "") == layouts.layout(sites, family)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A folder that ComfyUI takes for that of its checkpoints."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors", ".ckpt"}))
    folder_paths.filename_list_cache.pop("checkpoints", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("checkpoints", None)


@pytest.mark.parametrize(
    "name", [name for name in layouts.PRESETS if name not in ("flux2",)]
)  # 32 GB cannot be mapped everywhere
def test_a_file_tells_its_layout_by_its_header(name, checkpoints):
    """A file of the real size, with the real names and shapes, and holes where the weights would be."""
    _, base, numbers = layouts.PRESETS[name]
    if name == "flux2_klein" and "txt_ids_dims" not in FluxParams.__dataclass_fields__:
        pytest.skip("this ComfyUI takes every FLUX.2 for dev")
    config = base(dict(numbers))
    config.set_inference_dtype(torch.float16, None)
    header, size = {}, 0
    for key, weight in config.get_model({}, "", device=torch.device("meta")).state_dict().items():
        header[f"model.{key}"] = {
            "dtype": "F8_E4M3",
            "shape": list(weight.shape),
            "data_offsets": [size, size + weight.numel()],
        }
        size += weight.numel()
    text = json.dumps(header).encode()
    with (checkpoints / "big.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert layouts.of_file("checkpoints", "big.safetensors") == {**layouts.preset(name), "title": "big"}


def test_a_file_that_cannot_tell_is_refused_in_words(checkpoints, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    save_file({"a": torch.zeros(1)}, checkpoints / "other.safetensors")
    (checkpoints / "broken.safetensors").write_bytes(b"nothing of the kind")
    (checkpoints / "old.ckpt").write_bytes(b"")
    for name, sentence in {
        "missing.safetensors": "there is no “missing.safetensors”",
        f"../{outside.parent.name}/secret.safetensors": "there is no “../",
        str(outside): "there is no “/",
        "other.safetensors": "can only be seen when it is loaded",
        "broken.safetensors": "cannot be read as a safetensors file",
        "old.ckpt": "can only be seen when it is loaded",
        "elsewhere.gguf": "can only be seen when it is loaded",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            layouts.of_file("checkpoints", name)
    found, status = browser.answer(browser.ask_layout, {"folder": "checkpoints", "file": "other.safetensors"})
    assert status == 200 and found["untold"].startswith("The layers of “other.safetensors” can only be seen")


def test_select_heads_tells_the_picker():
    family, sites = model_sites(families.shared("flux"))
    chosen = select("double.*:0", sites, family)
    told = layouts.shown(sites, family, chosen)["attune_layout"][0]
    assert told["layers"] == [["double.0", 4], ["double.1", 4], ["single.0", 4], ["single.1", 4], ["single.2", 4]]
    assert told["chosen"] == chosen.text


def test_scores_for_the_pickers_colours():
    told = layouts.scores({"double.0": torch.tensor([0.5, 1.0])}, "round 1")
    assert told == {"attune_scores": [{"title": "round 1", "sites": {"double.0": [0.5, 1.0]}}]}


@pytest.mark.parametrize("name", [*families.NAMES, *families.MORE])
def test_select_heads_default_is_on_every_model(name):
    model = families.shared(name)
    family, sites = model_sites(model)
    (default,) = (entry.default for entry in AttuneHeads.define_schema().inputs if entry.id == "selection")
    heads, summary = AttuneHeads.execute(model, default).args
    assert heads == default_heads(family, sites) and heads.text in summary
    assert {name: len(heads) for name, heads in heads.chosen} == {
        s.name: s.heads for s in sites if s.name in dict(heads.chosen)
    }
