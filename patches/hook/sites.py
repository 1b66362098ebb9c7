"""Names for every place where a model attends, and the grammar that selects heads.

A site is ``input.4.0``, ``middle.0.0``, ``output.3.1`` (UNets: block and transformer in it), ``joint.7`` (SD3) or
``double.7`` / ``single.20`` (FLUX). Every site has one or two kinds of attention: ``self`` and ``cross`` in a UNet,
``joint`` in a transformer (and ``self`` in the SD3.5-medium blocks that have a second attention).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One attention place of a model.

    Attributes:
        name: as in the module's text.
        heads: number of attention heads.
        kinds: kinds of attention, in order of execution.
        layer: place among the model's sites in order of execution, from 0 (the ``L`` of ``L8H3``).
        block: path of the ComfyUI block that holds it, below the diffusion model: ``("input_blocks", 4)``.
        stride: latent pixels per image token, along each side.
    """

    name: str
    heads: int
    kinds: tuple[str, ...]
    layer: int
    block: tuple[str, int]
    stride: int = 1

    @property
    def kind(self) -> str:
        """The kind that image tokens attend to each other in: ``self`` or ``joint``."""
        return self.kinds[0]


@dataclass(frozen=True)
class Heads:
    """A set of heads (``ATTUNE_HEADS``): head numbers per site, in order of execution, and the model family they fit."""

    family: str
    chosen: tuple[tuple[str, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return sum(len(heads) for _, heads in self.chosen)

    @property
    def text(self) -> str:
        """The set in the selection grammar; `select` reads it back."""
        return " ".join(f"{site}:{_ranges(heads)}" for site, heads in self.chosen)


def joint(sites: Iterable[Site]) -> bool:
    """Whether a model attends to text and image at once; else it has attention to the text of its own."""
    return any("joint" in site.kinds for site in sites)


# --- the selection grammar ------------------------------------------------------------------------------------------

_PAPER = re.compile(r"L(?P<layers>[\d,\-*]+)(?:H(?P<heads>[\d,\-*]+))?", re.IGNORECASE)


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _short(text: str) -> str:
    """A part of a selection in a sentence."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:60])
    return shown if len(text) <= 60 else f"{shown}…"


def _numbers(text: str, count: int, item: str) -> list[int]:
    """``*``, ``3``, ``0-3`` and ``1,5,7-9`` as numbers below ``count``."""
    out: set[int] = set()
    for part in text.split(","):
        if part == "*":
            out.update(range(count))
            continue
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)  # Python reads no number of thousands of digits
        if not match:
            raise ValueError(f"“{_short(part)}” in “{_short(item)}” is not a number, a range like 0-3, or *")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range “{_short(part)}” in “{_short(item)}” runs backwards")
        out.update(
            [*range(first, min(last, count) + 1), *([first] if first > count else [])]
        )  # the caller says what is too high
    return sorted(out)


def _describe(model_sites: tuple[Site, ...]) -> str:
    """What a model has, short enough for an error: ``input.1.0 … (8 heads)``."""
    groups: dict[int, list[str]] = {}
    for site in model_sites:
        groups.setdefault(site.heads, []).append(site.name)
    return "; ".join(f"{', '.join(names)} ({heads} heads each, 0-{heads - 1})" for heads, names in groups.items())


def _matches(pattern: str, name: str) -> bool:
    parts, names = pattern.split("."), name.split(".")
    if len(parts) != len(names):
        return False
    for part, actual in zip(parts, names, strict=True):
        if actual.isdigit() and re.fullmatch(r"[\d,\-]+", part):
            if int(actual) not in _numbers(part, int(actual) + 1, pattern):
                return False
        elif not fnmatch.fnmatchcase(actual, part):
            return False
    return True


def select(selection: str, model_sites: tuple[Site, ...], model_family: str) -> Heads:
    """Read a head selection.

    Items are separated by spaces, newlines or ``;``. An item is ``site[:heads]``, where every part of the site and the
    heads may be a number, a range, a list or ``*`` (``middle.0.0:0-3 output.*.*:1,5``), or in paper style
    ``L8H3 L9H0-4`` (layers in order of execution). Items add up.

    Raises:
        ValueError: for an empty selection or an unknown site, layer or head, with what this model has.
    """
    wanted: dict[str, set[int]] = {}
    items = re.split(r"[\s;]+", selection.strip()) if selection.strip(" \t\n;") else []
    for item in filter(None, items):
        has = f"This model has {_describe(model_sites)}; paper-style layers are L0 to L{len(model_sites) - 1}."
        paper = _PAPER.fullmatch(item)
        if paper:
            layers = _numbers(paper["layers"], len(model_sites), item)
            missing = [n for n in layers if n >= len(model_sites)]
            if missing:
                raise ValueError(f"there is no layer L{missing[0]} (in “{_short(item)}”). {has}")
            chosen, heads = [model_sites[n] for n in layers], paper["heads"] or "*"
        else:
            pattern, _, heads = item.partition(":")
            chosen, heads = [s for s in model_sites if _matches(pattern, s.name)], heads or "*"
            if not chosen:
                raise ValueError(f"no site is called “{_short(pattern)}” (in “{_short(item)}”). {has}")
        for site in chosen:
            numbers = _numbers(heads, site.heads, item)
            if any(n >= site.heads for n in numbers):
                raise ValueError(
                    f"{site.name} has heads 0 to {site.heads - 1}, not {max(numbers)} (in “{_short(item)}”). {has}"
                )
            wanted.setdefault(site.name, set()).update(numbers)
    if not wanted:
        raise ValueError("the head selection is empty: write for example “middle.*.*”, “joint.9” or “L8H3 L9H0-4”")
    order = {site.name: site.layer for site in model_sites}
    return Heads(model_family, tuple((name, tuple(sorted(wanted[name]))) for name in sorted(wanted, key=order.__getitem__)))


def check(heads: Heads, model_sites: tuple[Site, ...], model_family: str) -> Mapping[str, tuple[int, ...]]:
    """Heads per site, after making sure that they exist on this model.

    Raises:
        ValueError: when the set was made for another kind of model.
    """
    known = {site.name: site.heads for site in model_sites}
    for name, numbers in heads.chosen:
        if heads.family != model_family or name not in known or max(numbers) >= known[name]:
            raise ValueError(
                f"these heads were selected on another model ({heads.family}: {name}); connect Select Heads to the model that the "
                f"method patches. This model ({model_family}) has {_describe(model_sites)}."
            )
    return dict(heads.chosen)
