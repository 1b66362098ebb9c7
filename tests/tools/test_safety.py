"""What runs inside ComfyUI never runs what it reads: no pickles, no code from text, no programs, no pip."""

import ast
from collections.abc import Iterator

import pytest

from attune.tools.runtime.setup import ROOT

CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "os.system", "os.popen", "os.startfile",
    "os.execv", "os.spawnv", "builtins.eval", "builtins.exec",
}  # fmt: skip
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "subprocess",
    "pip",
    "ensurepip",
    "code",
}
# run.py and its tools start programs, in an environment of their own; they may not read pickles or run text either.
COMMANDS = {"tools", "run.py"}
IGNORED = [line.strip("/\n") for line in (ROOT / ".comfyignore").read_text().splitlines() if line.startswith("/")]


def dangers(source: str, programs: bool = False) -> Iterator[str]:
    """Calls and imports in a module by which something that was read could be run; ``programs``: starting others is all right."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)] if not node.level else []
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Name):
            names = [node.id] if node.id in CALLS else []
        elif isinstance(node, ast.keyword):
            names = ["trust_remote_code"] if node.arg == "trust_remote_code" and ast.unparse(node.value) != "False" else []
        else:
            names = []
        for name in names:
            program = name.split(".")[0] in ("subprocess", "os")
            known = name in METHODS | CALLS | {"trust_remote_code"} or name.split(".")[0] in MODULES
            if known and not (program and programs):
                yield f"line {getattr(node, 'lineno', '?')}: {name}"


def shipped() -> Iterator[str]:
    """The Python files of the registry's package."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not any(name == ignored or name.startswith(f"{ignored}/") for ignored in IGNORED):
            yield name


FILES = list(shipped())


def test_the_package_has_what_runs_in_comfyui():
    assert {"__init__.py", "nodes/words.py", "scoring/folders.py", "server/routes.py", "tools/runtime/setup.py"} <= set(FILES)
    assert not any(name.startswith(("tests/", ".runtime/")) for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_is_read_is_run(name):
    assert list(dangers((ROOT / name).read_text(encoding="utf-8"), programs=name.split("/")[0] in COMMANDS)) == []


def test_pip_is_run_by_the_set_up_alone():
    """In a virtual environment of its own; never in ComfyUI's."""
    found = [name for name in FILES if '"-m", "pip"' in (ROOT / name).read_text(encoding="utf-8")]
    assert found == ["tools/runtime/setup.py"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nx = torch.load('a.pt')",
        "from torch import load",
        "load = torch.load",
        "eval('1')",
        "[exec][0]('1')",
        "def f():\n    import subprocess",
        "import os\nos.system('ls')",
        "from os import system",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=anything)",
    ],
)
def test_dangers_are_seen(source):
    assert list(dangers(source))


def test_harmless_code_is_let_through():
    source = (
        "import re\nmodel.eval()\nre.compile('a')\nfrom .code import x\nload_file('a.safetensors')\nf(trust_remote_code=False)"
    )
    assert list(dangers(source)) == []
