"""Conditionings of many branches: what each one carries to the sampler, all of them as the rows of one batch, and parts of that again.

Rows of every batch are branch by branch, ``[branch 0's pictures, branch 1's pictures, …]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from torch import Tensor

BRANCH = "attune_branch"  # in a conditioning's options: the `EncodedBranch` that it is
BRANCHES = "attune_branches"  # in those of branches merged into one: all of them, and the columns of each one's own prompt
BASE, BEFORE, OWN = "base", "branch before", "own"
ROWS = ("mask", "concat_latent_image", "concat_mask")  # tensors in a conditioning's options that have a row per picture

Columns = tuple[int, ...]


@dataclass(frozen=True)
class SubjectColumns:
    """A subject ``q``: its columns in the prompt of its own branch, of the base and of the branch before; None where it is not there."""

    own: Columns
    base: Columns | None = None
    before: Columns | None = None

    def place(self, branch: int, where: str) -> tuple[int, Columns]:
        """The branch whose attention shows where the subject of branch number ``branch`` is, and its columns there.

        Args:
            where: `BASE`, `BEFORE` or `OWN`; the subject's own branch where the prompt asked for does not have it.
        """
        if where == BASE and self.base is not None:
            return 0, self.base
        if where == BEFORE and self.before is not None:
            return branch - 1, self.before
        return branch, self.own


@dataclass(frozen=True)
class EncodedBranch:
    """What a branch's conditioning carries to the sampler.

    Attributes:
        index, count: which one of how many; 0 is the base, which gives the layout.
        tokens: columns of its prompt.
        subjects: whose regions its details go to; none is the whole picture.
        name: of its subjects, for people.
        content: columns of the prompt itself, without start, end and padding; known where another branch's subject is in this prompt.
    """

    index: int
    count: int
    tokens: int
    subjects: tuple[SubjectColumns, ...] = ()
    name: str = ""
    content: Columns = ()


# --- many branches, one batch -------------------------------------------------------------------------------------------


def of_batch(t: Tensor, pictures: int) -> Tensor:
    """One row per picture, as ComfyUI repeats rows."""
    return comfy.utils.repeat_to_batch_size(t, pictures)


def tiled(t: Tensor, pictures: int, count: int) -> Tensor:
    """Rows of pictures for all branches; one row for all pictures stays one."""
    return t if t.shape[0] == 1 else of_batch(t, pictures).repeat(count, *[1] * (t.ndim - 1))


def _tiled_options(options: Mapping[str, Any], pictures: int, count: int) -> dict[str, Any]:
    out = dict(options)
    for name in ROWS:
        if isinstance(out.get(name), Tensor):
            out[name] = tiled(out[name], pictures, count)
    return out


def tiled_conditioning(conditioning: Sequence[Any], pictures: int, count: int) -> list[Any]:
    """A conditioning that is the same for all branches (the negative one): its rows for every branch."""
    out = []
    for context, options in conditioning:
        options = _tiled_options(options, pictures, count)
        if isinstance(options.get("pooled_output"), Tensor):
            options["pooled_output"] = tiled(options["pooled_output"], pictures, count)
        out.append([None if context is None else tiled(context, pictures, count), options])
    return out


def sets_of_branches(positive: Sequence[Any]) -> list[list[Any]]:
    """The branches in a conditioning, each set in order: more than one set after a schedule or Conditioning Combine.

    Raises:
        ValueError: when there are none, or not all of them.
    """
    found: dict[int, list[Any]] = {}
    for entry in positive:
        if BRANCH in entry[1]:
            found.setdefault(entry[1][BRANCH].index, []).append(entry)
    if not found:
        raise ValueError(
            "Detail++ Sampler: the positive conditioning has no branches. Connect Encode Branches, or what ControlNet, area and timestep "
            "nodes made of its output."
        )
    counts = {entry[1][BRANCH].count for entries in found.values() for entry in entries}
    if len(counts) > 1 or set(found) != set(range(max(counts))) or len({len(e) for e in found.values()}) > 1:
        raise ValueError(
            "Detail++ Sampler: the positive conditioning does not hold every branch equally often. Connect one Encode Branches, without a "
            "node that keeps only some of its conditionings."
        )
    return [list(entries) for entries in zip(*(found[i] for i in sorted(found)), strict=True)]


def merged(branches: Sequence[Any], pictures: int) -> Any:
    """One conditioning of all branches' rows; the base's ControlNet, area and timesteps are everyone's.

    Raises:
        ValueError: for a branch that has lost tokens.
    """
    contexts = []
    for context, options in branches:
        if context is None or context.shape[1] < options[BRANCH].tokens:
            raise ValueError(
                "Detail++ Sampler: a branch's conditioning is shorter than its prompt; another node has cut it. Connect Encode Branches "
                "without that node."
            )
        contexts.append(of_batch(context, pictures))
    length = math.lcm(*(c.shape[1] for c in contexts))
    context = torch.cat([c.repeat(1, length // c.shape[1], 1) for c in contexts])
    options = _tiled_options(branches[0][1], pictures, len(branches))
    pooled = [o.get("pooled_output") for _, o in branches]
    if all(isinstance(p, Tensor) for p in pooled):
        options["pooled_output"] = torch.cat([of_batch(p, pictures) for p in pooled])
    del options[BRANCH]
    options[BRANCHES] = tuple((o[BRANCH], c.shape[1]) for c, (_, o) in zip(contexts, branches, strict=True))
    return [context, options]


# --- which columns are read ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadSubject:
    """A subject's map: where it is read.

    Attributes:
        branch: the one to look at.
        places: of its columns among those that are read, ``count`` of them in each copy of the prompt.
        name: the same for the same subject in several branches.
    """

    branch: int
    places: tuple[int, ...]
    count: int
    name: tuple[int, Columns]

    def map(self, weights: Tensor) -> Tensor:
        """The mean over the subject's columns of weights ``[..., columns that are read]``."""
        return weights[..., list(self.places)].sum(dim=-1) / self.count


@dataclass(frozen=True)
class BaseTokens:
    """What the optimisation reads: the tokens of the base's prompt, and which of these are each subject's.

    Attributes:
        prompt_columns: of the base's own prompt.
        columns: of its tokens, without start, end and padding.
        subjects: places among ``columns``; every subject that is in this prompt, once.
    """

    prompt_columns: int
    columns: Columns
    subjects: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ReadPlan:
    """One conditioning of all branches, as readers of attention need it.

    Attributes:
        prompt_columns: of the merged prompt.
        columns: those that are read for masks.
        subjects: of each branch, where its masks come from.
        base: for the optimisation.
    """

    prompt_columns: int
    columns: Columns
    subjects: tuple[tuple[ReadSubject, ...], ...]
    base: BaseTokens

    @classmethod
    def of(cls, conditioning: Any, where: str) -> ReadPlan:
        """The plan for a conditioning of `merged`; ``where`` as in `SubjectColumns.place`."""
        context, options = conditioning
        branches: Sequence[tuple[EncodedBranch, int]] = options[BRANCHES]
        length = context.shape[1]
        known: dict[int, int] = {}

        def read(index: int, subject: SubjectColumns) -> ReadSubject:
            branch, columns = subject.place(index, where)
            own = branches[branch][1]
            copies = [c + k for k in range(0, length, own) for c in columns]
            places = tuple(known.setdefault(c, len(known)) for c in copies)
            name = (index, subject.own) if subject.base is None else (0, subject.base)
            return ReadSubject(branch, places, len(columns), name)

        subjects = tuple(tuple(read(b.index, s) for s in b.subjects) for b, _ in branches)
        first, prompt_columns = branches[0]
        place = {column: i for i, column in enumerate(first.content)}
        in_base = dict.fromkeys(s.base for b, _ in branches for s in b.subjects if s.base is not None)
        base = tuple(tuple(place[c] for c in columns) for columns in in_base if place.keys() >= set(columns))
        return cls(length, tuple(known), subjects, BaseTokens(prompt_columns, first.content, base))

    def by_branch(self, now: range) -> Iterator[tuple[int, list[tuple[int, int]], list[ReadSubject]]]:
        """The branches of ``now`` that are looked at, each with its subjects: whose they are (branch and number there), and where."""
        found: dict[int, list[tuple[int, int]]] = {}
        for branch, subjects in enumerate(self.subjects):
            for number, subject in enumerate(subjects):
                if subject.branch in now:
                    found.setdefault(subject.branch, []).append((branch, number))
        for looked_at, keys in found.items():
            yield looked_at, keys, [self.subjects[branch][number] for branch, number in keys]


# --- parts of a batch ---------------------------------------------------------------------------------------------------


def own_name(uuid: Any) -> Any:
    """A conditioning's own name: its parts in chunks of branches have names of their own."""
    return uuid[0] if isinstance(uuid, tuple) else uuid


def rows_of(cond: Mapping[str, Any], total: int, rows: slice | Tensor, part: int) -> dict[str, Any]:
    """Some rows of a conditioning that ComfyUI has prepared for ``total`` of them; ``part`` is in its name."""
    out = {**cond, "uuid": (cond["uuid"], part)}
    for name in ROWS:
        if isinstance(out.get(name), Tensor) and out[name].shape[0] == total:
            out[name] = out[name][rows]
    return {**out, "model_conds": chosen_rows(cond, total, rows)}


def chosen_rows(cond: Mapping[str, Any], total: int, rows: slice | Tensor) -> dict[str, Any]:
    """What the model sees of a conditioning, for some of its ``total`` rows."""
    out = {}
    for name, value in cond["model_conds"].items():
        held = getattr(value, "cond", None)
        if isinstance(held, Tensor) and held.ndim and held.shape[0] == total:
            value = value._copy_with(held[rows])
        elif isinstance(held, list):
            value = value._copy_with([t[rows] if t.shape[0] == total else t for t in held])
        out[name] = value
    return out
