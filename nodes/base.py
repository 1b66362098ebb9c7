"""What every node of the pack is: a V3 node whose inputs are checked against its own schema before anything is computed."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..language.branches import Branches
from ..language.words import Words
from ..patches.hook.sites import Heads
from ..patches.maps.record import Maps
from ..scoring.scorers import Scorer

WHOLE, NUMBER, TEXT, CHOICE, SWITCH = "INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"
# What an object of a type has, where it is of a class of ComfyUI's that other packs derive from or imitate.
PARTS = {"MODEL": ("clone", "model_options"), "CLIP": ("tokenize", "encode_from_tokens_scheduled"), "VAE": ("decode",)}
# Our own types: their class, and what must not be empty in it.
CLASSES: dict[str, tuple[type, str]] = {
    "ATTUNE_BRANCHES": (Branches, "branches"),
    "ATTUNE_HEADS": (Heads, "chosen"),
    "ATTUNE_MAPS": (Maps, ""),
    "ATTUNE_SCORER": (Scorer, ""),
    "ATTUNE_WORDS": (Words, "phrases"),
}
MOST_PICTURES = 1_000_000  # of a batch; ComfyUI makes the noise of all before the one that it wants
ABSENT = {
    "CLIP": "there is no text encoder: this checkpoint has none, so load a CLIP on its own",
    "MODEL": "there is no diffusion model: this file has none, so load a checkpoint or a diffusion model",
    "VAE": "there is no VAE: this checkpoint has none, so load a VAE on its own",
}


MENU = ("Start", "Guidance", "Words", "Maps", "Heads", "Scores", "Benchmark")  # the submenus of Attune


def in_menu(submenu: str, *aliases: str) -> dict[str, Any]:
    """Of a schema: where the node is in the menu, and other names that it is found by, where the editor's search knows such."""
    assert submenu in MENU
    searched = {"search_aliases": list(aliases)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}
    return {"category": f"Attune/{submenu}", **searched}


def on_itself(*more: io.Hidden) -> dict[str, Any]:
    """Of a schema: the node knows its number, to show things on itself, and ``more`` of what ComfyUI tells.

    Without ``not_idempotent`` ComfyUI would give it what an equal node with another number has made, which shows things there.
    """
    return {"hidden": [io.Hidden.unique_id, *more], "not_idempotent": True}


class AttuneNode(io.ComfyNode):
    """A node that checks what it is given, whoever runs it.

    ComfyUI compares widgets with their limits, but NaN passes every comparison, and what comes through a link is not looked at. So
    `execute` begins with `check`, in ComfyUI and from Python alike.
    """

    hidden = io.HiddenHolder.from_dict({})  # from Python: no graph and no node of it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("execute")
        # ComfyUI derives a class from each node for every run, with the node's own methods in it: they check already.
        if own is not None and own.__func__ is not super(cls, cls).execute.__func__:
            cls.execute = classmethod(_checked(own.__func__))  # type: ignore[method-assign]


def _checked(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def checked(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        check(cls.define_schema(), dict(zip(names, args, strict=False)) | kwargs)
        return execute(cls, *args, **kwargs)

    return checked


def check(schema: io.Schema, given: Mapping[str, Any]) -> None:
    """Compare what a node is given with its schema.

    Args:
        given: values by the inputs' names; lists of them for a node with ``is_input_list``.

    Raises:
        ValueError: for the first value that does not fit, with the node, the input, the value and what to do.
    """
    for entry in schema.inputs:
        if entry.id not in given:
            continue
        value = given[entry.id]
        listed = schema.is_input_list and isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        for one in value if listed else (value,):
            wrong = fault(entry, one)
            if wrong is not None:
                raise ValueError(f"{schema.display_name}: {wrong}.")


def fault(entry: Any, value: Any) -> str | None:
    """What is wrong with a value for an input, and what to do; None where it fits."""
    kind, name = str(entry.get_io_type()), entry.id
    if value is None:
        default = f"{name} has no value: connect it or fill it in"
        return None if entry.optional else f"{name}: {ABSENT[kind]}" if kind in ABSENT else default
    if kind in (WHOLE, NUMBER):
        return _number(entry, kind, value)
    if kind == TEXT:
        return _text(name, value)
    if kind == CHOICE:
        listed = ", ".join(map(str, entry.options))
        if isinstance(value, str) and value in entry.options:
            return None
        unknown = f"there is no {name} {shown(value)}" if isinstance(value, str) else f"{name} is {shown(value)}"
        return f"{unknown}; choose one of: {shortened(listed, 400)}"
    if kind == SWITCH:
        return None if isinstance(value, Integral) else f"{name} is {shown(value)}; it must be on or off (true or false)"
    if kind in CHECKS:
        wrong = CHECKS[kind](value)
        return None if wrong is None else f"{name} {wrong}"
    of, content = CLASSES.get(kind, (object, ""))
    if not isinstance(value, of) or not all(hasattr(value, part) for part in PARTS.get(kind, ())):
        return f"{name} is {shown(value)} and no {kind}; connect a node that gives one"
    return (
        None
        if not content or getattr(value, content)
        else f"{name} has no {content} in it; choose some in the node that gives it"
    )


def _number(entry: Any, kind: str, value: Any) -> str | None:
    most = sys.float_info.max
    low = -most if entry.min is None else entry.min
    high = most if entry.max is None else entry.max
    fits = isinstance(value, Integral if kind == WHOLE else Real)
    if fits and low <= value <= high:  # NaN is in no range
        return None
    limits = "" if entry.min is None or entry.max is None else f" from {low} to {high}"
    return f"{entry.id} is {shown(value)}; give a {'whole ' if kind == WHOLE else ''}number{limits}"


def _text(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{name} is {shown(value)}; it must be a text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return (
            f"{name} has half a character at place {error.start + 1} (a lone surrogate), which cannot be encoded; delete it and type "
            "it again"
        )
    return None


def _tensor(value: Any, dimensions: str) -> str | None:
    """What is wrong with a tensor that must have as many dimensions as ``dimensions`` has letters."""
    if not isinstance(value, Tensor) or value.is_nested or not value.dtype.is_floating_point:
        return f"is {shown(value)}"
    if value.ndim != len(dimensions) or not value.numel():
        return f"has the shape {list(value.shape)} and not [{', '.join(dimensions)}], each at least 1"
    if not torch.stack(value.aminmax()).isfinite().all():
        return "holds values that are not finite numbers (NaN or infinity)"
    return None


def _image(value: Any) -> str | None:
    wrong = _tensor(value, "BHWC")
    if wrong is None and value.shape[3] not in (3, 4):
        wrong = f"has {value.shape[3]} channels and not red, green and blue"
    return None if wrong is None else f"{wrong}; connect pictures, as VAE Decode or Load Image gives them"


def _mask(value: Any) -> str | None:
    flat = isinstance(value, Tensor) and value.ndim == 2
    wrong = _tensor(value.float() if isinstance(value, Tensor) else value, "HW" if flat else "BHW")
    return None if wrong is None else f"{wrong}; connect masks, as Load Image or Attention Segmentation gives them"


def _latent(value: Any) -> str | None:
    samples = value.get("samples") if isinstance(value, Mapping) else value
    if samples is value:
        wrong: str | None = f"is {shown(value)}"
    elif getattr(samples, "ndim", 4) > 4 or getattr(samples, "is_nested", False):
        wrong = "is of a video, of sound or of something else than pictures"
    else:
        wrong = _tensor(samples, "BCHW") or _extras(value)
    return None if wrong is None else f"{wrong}; connect a latent of pictures, from a sampler, VAE Encode or Empty Latent Image"


def _extras(latent: Mapping[str, Any]) -> str | None:
    """What is wrong with a latent's noise mask and with the places of its pictures in a batch."""
    mask, places = latent.get("noise_mask"), latent.get("batch_index")
    if mask is not None and (
        not isinstance(mask, Tensor) or not 2 <= mask.ndim <= 4 or _tensor(mask.float(), "BCHW"[-mask.ndim :])
    ):
        return "has a noise mask that is not [B, H, W] of finite numbers"
    known = isinstance(places, (list, tuple)) and all(isinstance(i, Integral) and 0 <= int(i) < MOST_PICTURES for i in places)
    return None if places is None or known else "has a batch_index that is no list of pictures' numbers"


def _conditioning(value: Any) -> str | None:
    pairs = value if isinstance(value, (list, tuple)) else ()
    wrong = None if pairs else "holds no prompt" if value == [] else f"is {shown(value)}"
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[1], dict)):
            wrong = wrong or f"holds {shown(pair)}, which is no pair of an encoded text and its options"
        else:
            wrong = wrong or _tensor(pair[0], "BNC")
    return None if wrong is None else f"{wrong}; connect a conditioning, as CLIP Text Encode gives it"


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "CONDITIONING": _conditioning,
    "IMAGE": _image,
    "LATENT": _latent,
    "MASK": _mask,
}


def shortened(text: str, most: int) -> str:
    """A text that fits into a sentence, and that every terminal and log can show."""
    whole = "".join(c if c.isprintable() or c.isspace() else "?" for c in text)
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def shown(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, str):
        return f"“{shortened(value, 60)}”"
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if not isinstance(value, Real):
        return f"a {type(value).__name__}"
    try:
        return shortened(str(value), 60)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
