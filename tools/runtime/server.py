"""A real ComfyUI server as a child process that is stopped whatever happens. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from . import RunError
from .setup import HOME, ROOT, Runtime

HOST = "127.0.0.1"
GUARD = Path(__file__).resolve().with_name("guard.py")
TAIL = 12  # lines of the log that an error shows


class Server:
    """``with Server(runtime, cpu=True) as server:`` starts ComfyUI with this pack as its only custom node.

    It works in a temporary folder of its own, so neither a user's ComfyUI nor another server is disturbed. The log is
    kept only when something went wrong.
    """

    def __init__(self, runtime: Runtime, *, cpu: bool, port: int | None = None, wait: float = 240.0) -> None:
        self.port = _usable_port(port)
        self.url = f"http://{HOST}:{self.port}"
        self.log = HOME / "logs" / f"comfyui-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._runtime = runtime
        self._cpu = cpu
        self._wait = wait
        self._base: Path | None = None

    def __enter__(self) -> Server:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if kind is None or not issubclass(kind, Exception):  # Ctrl+C is no reason to keep it
            self.log.unlink(missing_ok=True)

    def _start(self) -> None:
        self._base = Path(tempfile.mkdtemp(prefix="attune-"))
        for name in ("custom_nodes", "input", "models", "output", "user"):
            (self._base / name).mkdir()
        # The folder around the pack holds other things too: it is searched, but only the pack's own folder is loaded.
        paths = self._base / "paths.yaml"
        paths.write_text(json.dumps({"attune": {"custom_nodes": str(ROOT.parent)}}), encoding="utf-8")
        command: list[str] = [str(self._runtime.python), str(GUARD), str(self._runtime.comfyui / "main.py")]
        command += ["--listen", HOST, "--port", str(self.port), "--disable-auto-launch", "--base-directory", str(self._base)]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", ROOT.name]
        command += ["--extra-model-paths-config", str(paths), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        command += ["--cpu"] if self._cpu else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # see guard.py
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._runtime.comfyui,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                start_new_session=os.name != "nt",  # Ctrl+C reaches only us, and we stop it with everything it started
            )

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + self._wait
        while time.monotonic() < give_up:
            self.check_alive("while it was starting")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError, ValueError):
                time.sleep(0.2)
        raise RunError(f"ComfyUI did not answer within {self._wait:.0f} seconds. {self.last_words()}")

    def get(self, path: str) -> dict:
        """The JSON at a path of the server's API."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        with direct.open(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def check_alive(self, when: str) -> None:
        """Complain if the server is gone."""
        code = self.process.poll() if self.process else 0
        if code is not None:
            raise RunError(f"ComfyUI ended {when} (exit code {code}). {self.last_words()}")

    def last_words(self) -> str:
        """The end of the log, for an error message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        tail = "\n".join(f"    {line}" for line in lines[-TAIL:])
        return f"Its log is {self.log} and ends with:\n{tail}" if tail.strip() else f"Its log, {self.log}, is empty."

    def stop(self) -> None:
        """End the server and everything it started, and remove its folder."""
        process, self.process = self.process, None
        if process:
            _end(process)
            if process.stdin:
                process.stdin.close()
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)


def _usable_port(port: int | None) -> int:
    """The asked port if it is free, or any free one."""
    with socket.socket() as probe:
        if os.name != "nt":  # a port that only waits for old connections to time out is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except (OSError, OverflowError) as error:
            raise RunError(f"Port {port} cannot be used ({_reason(error)}): name another, or none at all.") from None
        return probe.getsockname()[1]


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else "there is no such port"


def _end(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    try:
        _signal_all(process, force=False)
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_all(process, force=True)
        process.wait()


def _signal_all(process: subprocess.Popen[bytes], force: bool) -> None:
    if os.name == "nt":
        if process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them are gone
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
