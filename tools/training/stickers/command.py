"""``run.py train stickers [STAGE]``: one stage of the training, or all of them in order. Each goes on where it stopped.

The drawings are fetched with npm, once, and rasterised with resvg: ``pip install -r tools/training/requirements.txt`` first.
"""

from __future__ import annotations

import importlib

STAGES = ("dataset", "reader", "autoencoder", "text_encoder", "denoiser")
TOOLS = ("contact_sheet",)


def main(argv: list[str]) -> int:
    """Run a stage with its own options (``run.py train stickers reader --help``), or every stage with its defaults."""
    if argv and argv[0] not in (*STAGES, *TOOLS):
        print(f"{__doc__}\nStages: {', '.join(STAGES)}; to look at pictures: {', '.join(TOOLS)}. Each has options of its own.")
        return 0 if argv[0] in ("-h", "--help") else 2
    stages, rest = ((argv[0],), argv[1:]) if argv else (STAGES, [])
    return max([importlib.import_module(f".{stage}", __package__).main(rest) for stage in stages], default=0)
