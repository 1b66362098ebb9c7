"""How many prompts are taken apart as their labels say, per kind of prompt, on the half that rules were made with and on the other."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ...language.branches import Branch
from ...language.decompose import decompose
from ...language.writing import article
from .shared.records import recorded

LABELS = Path(__file__).parents[2] / "tests" / "data" / "decompose.jsonl"
SPLITS = ("tune", "held_out")
KINDS = ("colour", "texture", "shape", "complex")

# Marks and words that nothing may follow, or that may not follow each other, in a sub-prompt.
_DANGLING = re.compile(
    r"  | [,.;]|,,|,\.|^[,;]|\b(and|or|with|wearing|holding|of|in|a|an|the|is|are)\W*$|\band and\b"
    r"|\b(a|an|the) (and|or|of|with|in|on|is|are|next|wearing|holding)\b|\b(a|an|the)[,.;]|\b(with|wearing|of) (and|or|on|is|next)\b",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r":[\d.]+(?=\))")


def labels() -> list[dict[str, Any]]:
    """Every labelled prompt: ``kind``, ``split``, ``prompt``, ``base`` and ``details`` as pairs of noun and modifier.

    Two nouns of one modifier are written “man & woman”, the second of two equal nouns “car#2”.
    """
    return [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]


def _words(text: str) -> list[str]:
    return ["a" if w.lower() == "an" else w.lower() for w in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)]


def grammar(text: str, prompt: str) -> list[str]:
    """What is wrong with a sub-prompt, as far as a machine can tell."""
    faults = [f"“{found.group().strip()}” dangles" for found in _DANGLING.finditer(text)]
    for a, word in re.findall(r"\b(an?) ([^\s,.;]+)", text, re.IGNORECASE):
        if a.lower() != article(word):
            faults.append(f"“{a} {word}”")
    rest = iter(_words(_WEIGHT.sub("", prompt)))
    if not all(word in rest for word in _words(_WEIGHT.sub("", text))):
        faults.append("words that the prompt does not have, or in another order")
    return faults


def named(branch: Branch) -> str:
    """A branch's nouns as labels write them, counted in the base."""
    return " & ".join(s.text + (f"#{s.base + 1}" if s.base else "") for s in branch.subjects)


def faults(label: dict[str, Any]) -> list[str]:
    """How the decomposition of a prompt differs from its label; nothing: it is right."""
    found = decompose(label["prompt"], "attribute", "simple first")
    base, *branches = found.branches
    out = [] if base.text == label["base"] else [f"base is “{base.text}”, not “{label['base']}”"]
    pairs = sorted([named(b), added] for b in branches for added in b.added)
    if pairs != sorted(label["details"]):
        out.append(f"details are {pairs}, not {sorted(label['details'])}")
    by_subject = decompose(label["prompt"], "subject", "complex first")
    for branch in (*found.branches, *by_subject.branches[1:]):
        out += [f"“{branch.text}”: {fault}" for fault in grammar(branch.text, label["prompt"].replace("\\", ""))]
    return out


def shares() -> dict[tuple[str, str], tuple[int, int]]:
    """How many are right, and of how many, by kind and split."""
    out = {(kind, split): (0, 0) for kind in KINDS for split in SPLITS}
    for label in labels():
        right, total = out[label["kind"], label["split"]]
        out[label["kind"], label["split"]] = (right + (not faults(label)), total + 1)
    return out


@recorded
def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="run.py bench decompose", description=__doc__)
    parser.add_argument("--failures", action="store_true", help="also print what is wrong, of the tune half only")
    if parser.parse_args(argv).failures:
        for label in labels():
            if label["split"] == "tune" and (wrong := faults(label)):
                print("\n  ".join([label["prompt"], *wrong]))
    print(f"| right / all | {' | '.join(split.replace('_', ' ') for split in SPLITS)} |")
    print("|---" * (1 + len(SPLITS)) + "|")
    found = shares()
    for kind in KINDS:
        cells = (f"{r} / {n} ({100 * r / n:.0f} %)" for r, n in (found[kind, split] for split in SPLITS))
        print(f"| {kind} | {' | '.join(cells)} |")
    return 0
