"""The command line behind run.py: set up, then hand over to the prepared Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

from . import RunError, setup

Commands: TypeAlias = dict[str, tuple[str, str]]


def main(arguments: list[str], commands: Commands) -> int:
    """Run one command and return its exit code."""
    command, *rest = arguments or ["--help"]
    try:
        if command in ("-h", "--help", "help"):
            print(_help(commands))
            return 0
        if command == "setup":
            setup.prepare()
            return 0
        if command == "lint":
            return _check(_lint())
        if command == "test":
            return _check({**_lint(), "pytest": _pytest(rest)})
        if command not in commands:
            raise RunError(f"There is no command '{command}': there are {', '.join([*commands, 'lint', 'test', 'setup'])}.")
        module = commands[command][0]
        if "<name>" in module:
            module, rest = _named(command, module, rest)
        file = module.replace(".", "/") + ".py"
        if not (setup.ROOT / file).is_file():
            raise RunError(f"The command '{command}' needs {file}, which is not in this copy of the pack.")
        runtime = setup.prepare()
        bootstrap = setup.ROOT / "tools" / "runtime" / "bootstrap.py"
        return _become([str(runtime.python), str(bootstrap), str(runtime.comfyui), module, *rest])
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _help(commands: Commands) -> str:
    lines = {name: text for name, (_, text) in commands.items()}
    lines["lint"] = "check the code's style and types only, as before a commit"
    lines["test"] = "check the code's style and types and run the tests; arguments go to pytest"
    lines["setup"] = "only set up what the commands need, in .runtime (every command does this by itself)"
    listed = "\n".join(f"  {name:<10} {text}" for name, text in lines.items())
    return (
        f"usage: python3 run.py COMMAND [ARGUMENTS]\n\n{listed}\n\n"
        "'python3 run.py COMMAND --help' tells what a command takes. The first run fetches ComfyUI and torch. Set\n"
        "COMFYUI_PATH to a ComfyUI folder, and run this with that ComfyUI's Python, to use those instead."
    )


def _named(command: str, module: str, rest: list[str]) -> tuple[str, list[str]]:
    """Fill the command's first argument into its module."""
    folder = setup.ROOT.joinpath(*module.split(".")[:-1])
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if not rest or rest[0] not in names:
        given = f"no '{rest[0]}'" if rest else "none named"
        raise RunError(f"'{command}' needs a name, and there is {given}: choose from {', '.join(names) or '(none yet)'}.")
    return module.replace("<name>", rest[0]), rest[1:]


def _become(command: list[str]) -> int:
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    return subprocess.call(command)


def _lint() -> dict[str, list[str]]:
    return {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "mypy": ["mypy", "--config-file", str(setup.ROOT / "pyproject.toml"), "-p", "attune"],
    }


def _pytest(arguments: list[str]) -> list[str]:
    paths_given = any((setup.ROOT / argument.split("::")[0]).exists() for argument in arguments)
    return ["pytest", "--confcutdir=tests", *([] if paths_given else ["tests"]), *arguments]


def _check(checks: dict[str, list[str]]) -> int:
    """Run every check, even after one has failed; pytest comes last, so that its summary is what ends the output."""
    python = str(setup.prepare(tests=True).python)
    failed: list[str] = []
    for name, (tool, *options) in checks.items():
        if failed and name == "pytest":
            print(f"\n[test] failed so far: {', '.join(failed)}", flush=True)
        print(f"\n[test] {name}", flush=True)
        folder = _named_attune() if tool == "mypy" else setup.ROOT
        if subprocess.call([python, "-m", tool, *options], cwd=folder):
            failed.append(name)
    return 1 if failed else 0


def _named_attune() -> Path:
    """A folder in which the pack is the package ``attune``, as mypy must see it: its own folder may have any name."""
    link = setup.HOME / "named" / "attune"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(setup.ROOT, target_is_directory=True)
        except OSError as error:
            raise RunError(f"The type check needs a symbolic link, and this system does not allow it ({error}).") from None
    return link.parent
