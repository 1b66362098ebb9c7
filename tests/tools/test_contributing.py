"""CONTRIBUTING's walk-through, followed to the letter: a copy of Head Filter is a method and a node of its own."""

import asyncio
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch

from attune.patches import headfilter
from attune.tests import families
from attune.tests.families import heads_of
from attune.tools.runtime.setup import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COPIES = re.findall(r"^(\S+) → (\S+)$", TEXT, re.MULTILINE)
CODE = [(source, target) for source, target in COPIES if source.split("/")[0] in ("methods", "patches", "nodes")]


def renamed(text):
    for old, new in (("headfilter", "example"), ("HeadFilter", "Example"), ("Head Filter", "Example")):
        text = text.replace(old, new)
    return text


@pytest.fixture
def pack(tmp_path):
    """The pack as another package, with the copied files in it."""
    folder = tmp_path / "pack"
    for room in ("methods", "patches", "nodes", "language", "scoring", "server", "hunt", "demo"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "__init__.py", folder)
    for source, target in CODE:
        path = folder / target.replace("<name>", "example").replace("<Name>", "Example")
        path.write_text(renamed((ROOT / source).read_text(encoding="utf-8")), encoding="utf-8")
    listed = folder / "nodes" / "__init__.py"
    text = listed.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "HeadFilter" in line]
    for line in lines:  # "list the node in nodes/__init__.py": once imported, once in the list
        text = text.replace(line, f"{line}\n{renamed(line)}")
    listed.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        "attune_copy", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["attune_copy"] = module
    spec.loader.exec_module(module)
    yield importlib.import_module("attune_copy.nodes")
    for name in [name for name in sys.modules if name.split(".")[0] == "attune_copy"]:
        del sys.modules[name]


def test_every_file_of_the_walk_through_is_there():
    assert len(COPIES) == 7
    for source, target in COPIES:
        assert (ROOT / source).is_file(), source
        assert renamed(source) == target.replace("<name>", "example").replace("<Name>", "Example")
    assert sum(len((ROOT / source).read_text(encoding="utf-8").splitlines()) for source, _ in CODE) < 160


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`([\w./]+/[\w./]*)`", TEXT):
        if not name.startswith(".runtime/") and "RECORD" not in name:
            assert (ROOT / name).exists(), name


def test_a_copied_method_works(pack):
    nodes = asyncio.run(pack.Attune().get_node_list())
    (node,) = [n for n in nodes if n.__name__ == "AttuneExample"]
    schema = node.define_schema()
    assert schema.node_id == "AttuneExample" and schema.display_name == "Example"
    model = families.shared("sd15")
    heads = heads_of(model, "middle.0.0:0")
    values = {i.id: i.default for i in schema.inputs[2:]}
    own = importlib.import_module("attune_copy.patches.hook.sites").Heads(heads.family, heads.chosen)
    (patched,) = node.execute(model, own, **values).args
    ours = families.sample(patched)
    assert torch.equal(ours, families.sample(headfilter.apply(model, heads, **values)))
    assert not torch.equal(ours, families.sample(model))


def test_the_example_of_the_hook_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    given = {"model": families.shared("sd15")}
    exec(code, given)
    families.sample(given["patched"], size=(8, 12), steps=2)
    assert capsys.readouterr().out == "middle.0.0 4 6 torch.Size([1, 24, 7])\n"


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "folder_paths", "aiohttp", "PIL", "safetensors", "scipy", "spacy", "transformers"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
import pytest
sys.exit(pytest.main(["tests/methods", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_the_mathematics_is_tested_without_comfyui():
    made = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "methods/test_scfg.py" in made.stdout
