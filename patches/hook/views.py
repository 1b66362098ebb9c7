"""A diffusion model with other blocks in some places, for one forward and for nobody else.

Several runs may use one model at once, on threads, and runs that know nothing of this pack as well; so nothing on the model is ever changed,
neither its blocks nor its hooks. A forward is given a *view* of the model instead: an object of a subclass of the model's own class that shares
all of the model's attributes, weights and state, and shows other blocks where it is asked for its lists of blocks.

What it costs: one new object for the model and one for ComfyUI's model around it, and a list of blocks, for each such forward. That is some
0.1 ms of the processor's time for FLUX's 57 blocks, 0.5 to 2 ms for SD1.5's 25, whose layers ComfyUI walks itself, and no memory of the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from comfy.patcher_extension import WrapperExecutor
from torch import nn


class Around(nn.Module):
    """Stands for a block and does something around it: ``act(block, *args, **kwargs) -> the block's output``.

    The block is a child, where whoever moves weights ahead of time looks for them. ComfyUI's private marks on a block (a captured graph of it)
    are not passed on: with something around it, it is another block.
    """

    def __init__(self, block: nn.Module, act: Callable[..., Any]):
        super().__init__()
        self.block = block
        self.act = act

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.block, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(super().__getattr__("block"), name)


class _Shown:
    """An attribute of a view's class: what the view shows; asked for on the class, what the module's class has."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __get__(self, seen: Any, owner: Any = None) -> Any:
        if seen is None:
            return getattr(self.kind, self.name)
        seen.attune_read.add(self.name)
        return seen.attune_shown[self.name]

    def __set__(self, seen: Any, value: Any) -> None:
        seen.attune_shown[self.name] = value


@functools.cache
def _view_class(kind: type, names: frozenset[str]) -> type:
    """A subclass of a module's class that shows something else under some names."""
    members = {
        "__slots__": ("attune_shown", "attune_read"),
        "attune_kind": kind,
        **{name: _Shown(kind, name) for name in names},
    }
    return type(kind)(kind.__name__, (kind,), members)


def view(module: nn.Module, shown: Mapping[str, Any]) -> Any:
    """A view of a module that shows other things under some names; everything else is the module's own, set through the view as well.

    Methods that other packs have put on the module itself are bound to the view, so that they find what is shown. ``attune_read`` are the names
    that somebody has looked up on the view.
    """
    own, inner = vars(module), getattr(module, "attune_shown", {})  # of a module that is a view itself
    methods = {n: m for n, m in {**own, **inner}.items() if isinstance(m, MethodType) and m.__self__ is module}
    shown = {**inner, **methods, **shown}
    kind: Any = getattr(type(module), "attune_kind", type(module))
    out: Any = object.__new__(_view_class(kind, frozenset(shown)))
    object.__setattr__(out, "__dict__", own)
    bound = {n: MethodType(m.__func__, out) for n, m in methods.items() if shown[n] is m}
    object.__setattr__(out, "attune_shown", {**shown, **bound})
    object.__setattr__(out, "attune_read", set())
    return out


def with_blocks(model: nn.Module, containers: Iterable[str], blocks: Mapping[tuple[str, int], nn.Module]) -> Any:
    """A view of a diffusion model with other blocks, by the attribute that holds them and their number in it."""
    shown: dict[str, Any] = {}
    for name in containers:
        own = {number: block for (attribute, number), block in blocks.items() if attribute == name}
        if own:
            held = getattr(model, name)
            listed = isinstance(held, nn.ModuleList)
            shown[name] = nn.ModuleList([own.get(i, block) for i, block in enumerate(held)]) if listed else own[0]
    return view(model, shown)


def through(executor: Any, base: Any) -> Callable[..., Any] | None:
    """What an APPLY_MODEL wrapper calls instead of its executor to go on with a view of ComfyUI's model.

    None where another pack has put something on the model that is not its method.
    """
    method = executor.original
    if getattr(method, "__self__", None) is not executor.class_obj:
        return None
    bound = MethodType(method.__func__, base)
    return WrapperExecutor.new_class_executor(bound, base, executor.wrappers, executor.idx + 1).execute
