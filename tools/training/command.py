"""``run.py train [shapes|stickers]``: which of the bundled models to train."""

from __future__ import annotations

import importlib


def main(argv: list[str]) -> int:
    """Hand over to the training of a model, shapes unless stickers is named first."""
    which, rest = (argv[0], argv[1:]) if argv[:1] and argv[0] in ("shapes", "stickers") else ("shapes", argv)
    module = "shapes" if which == "shapes" else "stickers.command"
    return importlib.import_module(f".{module}", __package__).main(rest) or 0
