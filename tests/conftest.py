"""The pack as the package ``attune``, with ComfyUI beside it where a test needs it, and a real ComfyUI server for those that ask."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from attune.tools.runtime.server import Server
    from attune.tools.runtime.setup import Runtime

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def load_pack(comfyui: bool = True) -> None:
    """Find the helper by its file (this folder's name is unknown), then let it load the pack, with ComfyUI if asked."""
    spec = importlib.util.spec_from_file_location("attune_bootstrap", ROOT / "tools" / "runtime" / "bootstrap.py")
    assert spec and spec.loader
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    own = os.environ.get("COMFYUI_PATH")
    folder = Path(own).expanduser().resolve() if own else ROOT / ".runtime" / "ComfyUI"
    bootstrap.load(folder if comfyui else None)


def pytest_configure(config: pytest.Config) -> None:
    """The mathematics is tested without ComfyUI: ``pytest tests/methods`` needs torch, numpy and kornia only."""
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    load_pack(comfyui=not all(TESTS / "methods" in (path, *path.parents) for path in paths))


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The Python that runs the tests, and its ComfyUI."""
    from attune.tools.runtime.setup import Runtime, comfyui_folder

    return Runtime(Path(sys.executable), comfyui_folder())


@pytest.fixture(scope="session")
def server(runtime: Runtime) -> Iterator[Server]:
    """A real ComfyUI with this pack in it: one for all tests."""
    from attune.tools.runtime.bootstrap import has_accelerator
    from attune.tools.runtime.server import Server

    with Server(runtime, cpu=not has_accelerator()) as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server) -> dict:
    """Every node that the server has, as the editor is told."""
    return server.get("/object_info")
