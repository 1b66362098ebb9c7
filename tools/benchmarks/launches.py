"""What each node starts on a GPU in a step, and how often it waits for it, beside ComfyUI's own: counted on a CPU, on small random models.

A launch is an operation on tensors that computes or copies; views start nothing. A wait is an operation whose answer Python has to know before
it goes on (`item`, `equal`, `nonzero`, an index of booleans, a copy to the CPU): the GPU is idle meanwhile. Tensors that were made of Python's
numbers alone are the host's, and nobody waits for them. Numbers are of a step, without what a run does once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..robustness import models, stack
from .shared.records import recorded

FEW, MORE = 2, 4  # steps of two runs, whose difference is that of steps
WAITING = (
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
)
METHODS = (
    "cpu",
    "tolist",
    "numpy",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)  # of tensors; may reach no operation on a CPU
PART = {"start_percent": 0.01, "end_percent": 0.99}
SCORES = "Semantic Gate"  # which decodes the picture and scores it, here in every step
FROM_NUMBERS = ("tensor", "zeros", "ones", "full", "arange", "eye")
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias")


class Counted(TorchDispatchMode):
    """Counts launches, and waits by the operation's name, while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.known = False
        self.waits: Counter[str] = Counter()
        self.host = WeakIdKeyDictionary()  # tensors that the GPU has no part in
        self._methods = _Methods(self)

    def __enter__(self) -> Counted:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[misc]
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        host = bool(given) and all(t in self.host for t in given)
        mask = name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in _indices(args))
        if host or (self.known and name in WAITING):
            pass
        elif name in WAITING or mask:
            self.waits["boolean index" if mask else name] += 1
        elif name not in NOTHING and not func.is_view:
            self.launches += 1
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out) if host else ():
            if isinstance(t, Tensor):
                self.host[t] = True
        return out


class _Methods(TorchFunctionMode):
    def __init__(self, counted: Counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and args and isinstance(args[0], Tensor) and getattr(Tensor, name) is func:
            if args[0] not in self.counted.host:
                self.counted.waits[name.strip("_")] += 1
            self.counted.known = True  # an operation below is the same wait
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.counted.known = False
        out = func(*args, **(kwargs or {}))
        if name in FROM_NUMBERS and (kwargs or {}).get("device") is None:
            self.counted.host[out] = True
        return out


def _indices(args: Sequence[Any]) -> Sequence[Any]:
    return args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()


def of_a_step(run: Callable[[int], Any]) -> tuple[float, Counter[str]]:
    """Launches and waits of a step of ``run(steps)``, after one that warms up."""
    found = []
    run(FEW)
    for steps in (FEW, MORE):
        with Counted() as counted:
            run(steps)
        found.append(counted)
    few, more = found
    names = few.waits.keys() | more.waits.keys()
    waits = {name: (more.waits[name] - few.waits[name]) / (MORE - FEW) for name in names}
    return (more.launches - few.launches) / (MORE - FEW), Counter({n: count for n, count in waits.items() if count})


def sampling(family: str, patches: Sequence[str], **more: Any) -> Callable[[int], Any]:
    """Runs of a family's small model with some of the nodes on it, which have these values where they have such inputs."""
    model = models.model(family)
    for name in patches:
        model = stack.OURS[name](model, family, **more)

    def run(steps: int) -> Tensor:
        with torch.inference_mode():
            return models.sample(model, family, steps)

    return run


def beside(family: str, patches: Sequence[str], **more: Any) -> tuple[float, float, Counter[str]]:
    """Launches of a plain step, and what nodes add to them and to its waits."""
    plain, own = of_a_step(sampling(family, ())), of_a_step(sampling(family, patches, **more))
    return plain[0], own[0] - plain[0], Counter({n: own[1][n] - plain[1][n] for n in own[1] if own[1][n] != plain[1][n]})


@recorded
def main(argv: list[str]) -> int:
    """Print a table of every node on some families."""
    parser = argparse.ArgumentParser(prog="run.py bench launches", description=__doc__)
    parser.add_argument("--families", nargs="*", default=["sd15", "flux"], choices=models.FAMILIES)
    parser.add_argument("--nodes", nargs="*", default=list(stack.OURS), choices=list(stack.OURS))
    args = parser.parse_args(argv)
    print("| node | " + " | ".join(f"{f}: launches added, of a plain step's | waits added" for f in args.families) + " |")
    print("|---" * (1 + 2 * len(args.families)) + "|")
    together = [name for name in args.nodes if name != SCORES]
    rows: dict[str, tuple[Sequence[str], dict[str, float]]] = {name: ((name,), {}) for name in args.nodes}
    rows[f"all but {SCORES} together, in a part of sampling"] = (together, PART)
    for name, (patches, more) in rows.items():
        cells = []
        for family in args.families:
            try:
                plain, launches, waits = beside(family, patches, **more)
            except ValueError:
                cells += ["refused", ""]
                continue
            named = ", ".join(f"{n} {count:.3g}" for n, count in waits.items())
            cells += [
                f"{launches:+.0f} ({100 * launches / plain:+.0f} %)",
                f"{sum(waits.values()):.3g}" + f" ({named})" * bool(named),
            ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0
