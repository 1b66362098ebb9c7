"""The architecture as the imports tell it: a table and a picture of the rooms in CONTRIBUTING.md (``run.py architecture``).

A room is a folder; `ORDER` lists them from the top to the ground, and imports go down only. ``--check`` writes nothing and fails if the
page is out of date, if an import goes up, or if files import each other in a circle.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from .runtime import RunError
from .runtime.setup import ROOT

PAGE = ROOT / "CONTRIBUTING.md"
ORDER = ("tools", "prove", "nodes", "server", "hunt", "demo", "patches", "scoring", "language", "methods")
FOLDERS = {  # those without Python, or without a package
    "web": "What nodes have in the browser: a module per widget, `shared.js` for all; `server/routes.py` answers them.",
    "web/docs": "A help page per node, `<NodeId>/zh.md` in Chinese, and their pictures.",
    "locales": "What the editor shows: `en` is written from the schemas by `python3 run.py locales`, `zh` by hand.",
    "example_workflows": "The templates that the editor offers, each with a picture.",
    "tests": "A folder for each of these; `helpers.py` and `families.py` are what they share.",
}
START, END = "<!-- architecture: written by python3 run.py architecture -->\n", "<!-- end of architecture -->\n"


def files() -> dict[str, Path]:
    """Every module of the pack by its dotted name without ``attune.``; a folder's ``__init__`` has the folder's name."""
    found = {}
    for room in ORDER:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the pack that a file imports, at its top or inside a function; what only the type checker sees does not count."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            bases: list[tuple[str, list[str]]] = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            bases = [(".".join([*start, *(node.module or "").split(".")]).strip("."), [a.name for a in node.names])]
        else:
            continue
        for base, names in bases:
            base = base.removeprefix("attune.")
            submodules = [f"{base}.{n}".strip(".") for n in names if f"{base}.{n}".strip(".") in known]
            yield from submodules or ([base] if base in known else [])


def graph() -> dict[str, set[str]]:
    """Which modules each module imports."""
    known = files()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def circle(of: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports in order, or nothing."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for other in sorted(of[name]):
                if found := visit(other, [*trail, name]):
                    return found
            done.add(name)
        return []

    for name in sorted(of):
        if found := visit(name, []):
            return found
    return []


def room(name: str) -> str:
    """The folder at the root that a module is in."""
    return name.split(".")[0]


def between_rooms(of: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {name: set() for name in ORDER}
    for name, others in of.items():
        found[room(name)] |= {room(other) for other in others} - {room(name)}
    return found


def upwards(of: Mapping[str, set[str]]) -> list[str]:
    """Imports that go up."""
    return [f"{a} imports {b}" for a in of for b in sorted(of[a]) if ORDER.index(room(b)) < ORDER.index(room(a))]


def purpose(folder: Path) -> str:
    """The first line of a package."""
    return (
        (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "")
        .split("\n")[0]
        .replace("``", "`")
    )


def packages() -> Iterator[Path]:
    """The rooms from the top to the ground, each followed by the rooms in it."""
    for name in ORDER:
        yield from sorted({path.parent for path in (ROOT / name).rglob("__init__.py")})


def direct(rooms: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """For the picture: without the arrows that a longer way already shows."""

    def below(name: str) -> set[str]:
        return rooms[name].union(*map(below, rooms[name]))

    return {
        name: sorted(others - set().union(*(below(other) for other in others)), key=ORDER.index)
        for name, others in rooms.items()
    }


def text() -> str:
    """What stands between the marks in CONTRIBUTING.md."""
    rooms = between_rooms(graph())
    arrows = [f"    {name} --> {other}" for name, others in direct(rooms).items() for other in others]
    lines = ["```mermaid", "flowchart TD", *arrows, "```", "", "| folder | what is there | imports |", "|---|---|---|"]
    for folder in packages():
        path = folder.relative_to(ROOT).as_posix()
        below = ", ".join(f"`{other}`" for other in sorted(rooms[path], key=ORDER.index)) if path in rooms else ""
        lines.append(f"| `{path}/` | {purpose(folder)} | {below} |")
    lines += [f"| `{path}/` | {what} | |" for path, what in FOLDERS.items()]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the architecture as it is now."""
    before, found, rest = page.partition(START)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise RunError(
            f"{PAGE.name} has no lines '{START.strip()}' and '{END.strip()}': put them where the architecture belongs."
        )
    return before + START + text() + END + after


def faults() -> list[str]:
    """What is wrong with the imports."""
    of = graph()
    ring = circle(of)
    return [*upwards(of), *([f"a circle: {' → '.join(ring)}"] if ring else [])]


def main(argv: list[str]) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="run.py architecture", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page and the imports are in order")
    check = parser.parse_args(argv).check
    if wrong := faults():
        raise RunError("Imports go down only: " + "; ".join(wrong))
    page = PAGE.read_text(encoding="utf-8")
    new = written(page)
    if check and new != page:
        raise RunError(f"{PAGE.name} is out of date: run 'python3 run.py architecture'.")
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    return 0
