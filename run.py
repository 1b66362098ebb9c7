"""Attune's commands: ``python3 run.py --help`` lists them. Needs nothing but Python; the rest is set up on first use."""

import sys

# Every command that runs a module of the pack in the prepared environment: its name, the module, and what it does.
# A name in angle brackets in the module is the command's first argument.
COMMANDS = {
    "demo": (
        "tools.runtime.job",
        "make pictures with a real ComfyUI, with and without guidance, and a grid that compares them",
    ),
    "train": ("tools.training.command", "train a bundled model, shapes or stickers"),
    "reader": ("tools.training.reader", "train or check the reader of pictures that the benchmarks use"),
    "premises": ("tools.premises", "check that a bundled model shares the facts of large models that methods build on"),
    "hunt": ("hunt.command", "search for attention heads as a config file says, here or on a Ray cluster"),
    "prove": (
        "prove.command",
        "judge methods on your checkpoint: pictures at the same seeds, scores and a report to send back",
    ),
    "locales": ("tools.locales", "write the English words of the nodes for the frontend, and check the other languages"),
    "measurements": ("tools.measurements", "write the tables of MEASUREMENTS.md from the benchmarks' results"),
    "templates": ("tools.templates", "lay out the templates for the canvas and for Nodes 2.0, in the real editor"),
    "thumbnails": ("tools.thumbnails", "draw the templates' thumbnails with the bundled model"),
    "models": ("tools.models", "write the tables of MODELS.md: which node works on which model"),
    "architecture": ("tools.architecture", "write the picture of the folders and their imports into CONTRIBUTING.md"),
    "fuzz": ("tools.robustness.fuzz", "give every node ordinary and hostile inputs, and say which break it"),
    "stack": ("tools.robustness.stack", "run stacks of our nodes with each other and with ComfyUI's own patches"),
    "bench": ("tools.benchmarks.<name>", "run one of the benchmarks, by name"),
}

OLDEST = (3, 10)

if __name__ == "__main__":
    if sys.version_info[:2] < OLDEST:  # before any import that an older Python could not read
        sys.exit("Attune's commands need Python 3.10 or newer, and this is Python {}.{}.".format(*sys.version_info[:2]))
    from tools.runtime.cli import main

    sys.exit(main(sys.argv[1:], COMMANDS))
