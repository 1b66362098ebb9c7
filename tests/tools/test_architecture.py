"""The rooms of the code: imports go one way, nothing goes round in a circle, and CONTRIBUTING shows what is there."""

import ast
import re
import sys

import pytest

from attune.tools import architecture
from attune.tools.runtime.setup import ROOT


def test_imports_go_down_and_never_in_a_circle():
    assert architecture.faults() == []


def test_the_picture_in_contributing_is_of_this_code():
    page = architecture.PAGE.read_text(encoding="utf-8")
    assert architecture.written(page) == page, "run 'python3 run.py architecture'"


def test_every_folder_says_what_it_is_for():
    for folder in architecture.packages():
        line = architecture.purpose(folder)
        assert line.endswith("."), folder
    for folder in architecture.FOLDERS:
        assert (ROOT / folder).is_dir()


def test_the_mathematics_needs_torch_numpy_and_kornia_only():
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert outside <= {"torch", "numpy", "kornia"}, path


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from . import other", {"nodes.other"}),
        ("from ..patches.hook import sites", {"patches.hook.sites"}),
        ("def later():\n    from ..patches.hook.sites import select", {"patches.hook.sites"}),
        ("import attune.patches.hook.sites", {"patches.hook.sites"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import other", set()),
        ("import torch", set()),
    ],
)
def test_imports_are_found(code, found, tmp_path):
    known = {"nodes.other": tmp_path, "patches.hook": tmp_path, "patches.hook.sites": tmp_path}
    path = tmp_path / "some.py"
    path.write_text(code)
    assert set(architecture.imported("nodes.some", path, known)) == found


def test_a_circle_and_a_way_up_are_seen():
    assert architecture.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert architecture.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert architecture.upwards({"methods.scfg": {"nodes.scfg"}}) == ["methods.scfg imports nodes.scfg"]


def test_what_is_installed_is_every_room_but_the_tools():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"(attune[\w.]*)"', re.search(r"^packages = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1])
    rooms = [".".join(("attune", *folder.relative_to(ROOT).parts)) for folder in architecture.packages()]
    assert sorted(listed) == sorted(["attune", *(name for name in rooms if not name.startswith("attune.tools"))])


def test_the_registrys_package_has_no_tool_but_the_runtime():
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    for path in (ROOT / "tools").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "runtime"):
            assert f"/tools/{path.name}{'/' if path.is_dir() else ''}" in left_out
