"""The bundled model's tables by `prove`, the harness that judges any checkpoint: ``bench prove CONFIG`` with a config of `configs`."""

from __future__ import annotations

from pathlib import Path

from ...prove import command
from ..runtime import RunError
from .shared.records import recorded

CONFIGS = Path(__file__).parent / "configs"


@recorded
def main(argv: list[str]) -> int:
    """Run a config by its name; further arguments are `prove`'s."""
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    if not argv or argv[0] not in known:
        raise RunError(f"bench prove needs a config: choose from {', '.join(known)}.")
    return command.main([str(CONFIGS / f"{argv[0]}.json"), *argv[1:]])
