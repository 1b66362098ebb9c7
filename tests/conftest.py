"""The pack as the package ``attune``, and a real ComfyUI server for the tests that ask for one."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_pack() -> None:
    """Find the helper by its file (this folder's name is unknown), then let it load the pack with ComfyUI beside it."""
    spec = importlib.util.spec_from_file_location("attune_bootstrap", ROOT / "tools" / "runtime" / "bootstrap.py")
    assert spec and spec.loader
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    own = os.environ.get("COMFYUI_PATH")
    bootstrap.load(Path(own).expanduser().resolve() if own else ROOT / ".runtime" / "ComfyUI")


_load_pack()

from attune.tools.runtime.bootstrap import has_accelerator  # noqa: E402
from attune.tools.runtime.server import Server  # noqa: E402
from attune.tools.runtime.setup import Runtime, comfyui_folder  # noqa: E402


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The Python that runs the tests, and its ComfyUI."""
    return Runtime(Path(sys.executable), comfyui_folder())


@pytest.fixture(scope="session")
def server(runtime: Runtime) -> Iterator[Server]:
    """A real ComfyUI with this pack in it: one for all tests."""
    with Server(runtime, cpu=not has_accelerator()) as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server) -> dict:
    """Every node that the server has, as the editor is told."""
    return server.get("/object_info")
