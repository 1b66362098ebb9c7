"""Ordinary and hostile inputs for every node, made from the node's own schema, and what becomes of them.

Nodes are run as ComfyUI runs them: the validation of prompts, then the node, then two steps of sampling where a MODEL comes out. What may
come of it is a result without NaN, or a sentence before the first step is done.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import logging
import math
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import execution
import folder_paths
import torch
from comfy_api.latest import io
from nodes import NODE_CLASS_MAPPINGS
from torch import Tensor

from ...nodes import Attune, AttuneSaveHeads
from ...nodes.base import shown
from . import models

ROOT = Path(__file__).resolve().parents[2]
# What ComfyUI calls the hidden inputs that it passes on; after 0.3.75 there is more in them.
HIDDEN = "v3_data" if "v3_data" in inspect.signature(execution.get_output_data).parameters else "hidden_inputs"
REFUSED_BY_COMFYUI, REFUSED, FINE, WRONG = "refused by ComfyUI", "refused in a sentence", "fine", "WRONG"
WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")
HUGE = 10**5000
LONG = 2000  # characters of a long text

# The most that ordinary numbers are, and how many options are tried, where more would only take longer.
CHEAP = {
    "heads_per_round": 2,
    "images_per_candidate": 2,
    "iterations": 3,
    "optimize_steps": 2,
    "preset": 1,
    "rounds": 1,
    "spatial_sigma": 3.0,
    "steps": 2,
}
NEEDED = ("candidates",)  # without them the search tries every head, which only takes longer
PROMPTS = (
    models.PROMPT,
    "a (red striped:1.3) star, and a blue circle",
    "red",
    "",
    " ",
    "embedding:none a star",
    "((((",
    "a star\\(",
    "ein größerer Stern 中文 🟥 é",
    "a\0star",
    "star " * (LONG // 5),
    "🟥" * (LONG // 4),
    "|" * 50,
)
TEXTS: dict[str, tuple[str, ...]] = {
    "layers": ("auto", "", "*.*.*", "middle.*.*", "L0 L1", "joint.1", "double.*", "L0H0-1"),
    "manual": ("", "", "star|a red star", "* | a star", "star #2 | a red star", "|", "star|", "star|" + "a star " * 200),
    "name": (
        "search",
        "my heads",
        "..",
        "../x",
        "CON",
        "com1.txt",
        "a/b",
        "a\\b",
        "",
        " ",
        "x" * 300,
        "🟥" * 100,
        "a\0b",
        "a:b",
        "x.",
    ),
    "objective": ("crisp patterns", "", "one\ntwo", " \n "),
    "selection": (
        "auto",
        "middle.*.*",
        "*.*.*:0",
        "L0H0-1 L1",
        "joint.*",
        "double.0:1",
        "",
        "L99",
        "middle.0.0:99",
        "L" + "9" * 5000,
        "*" * 2000,
    ),
    "weights": (
        "star: 1.4\ncircle: -1",
        "",
        "star: 1",
        "red star: 0",
        "moon: 2",
        "star",
        ":",
        "star: 1e9",
        "star: nan",
        "star: 2\n" * 300,
    ),
    "words": ("star, circle", "", "star", "red striped star", "moon", ",", "star," * 300),
}
HOSTILE_NUMBERS: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    HUGE,
    -HUGE,
    -1,
    10**30,
    1e308,
    "x",
    "",
    "\ud800",
    None,
    {},
    {"__value__": [1, 2]},
)
HOSTILE_TEXTS: tuple[Any, ...] = ("\ud800", "a star \udfff", math.nan, HUGE, None, {}, {"__value__": ["star"]})


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Inputs of a node: values by name, and which of them come through a link, past ComfyUI's validation."""

    node: type[io.ComfyNode]
    inputs: Mapping[str, Any]
    linked: frozenset[str]
    number: str

    def __str__(self) -> str:
        return f"{self.node.__name__} {self.number}: " + ", ".join(f"{k}={about(v)}" for k, v in self.inputs.items())


def about(value: Any) -> str:
    """A value in a report."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {about(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(about, value[:3])) + ("…]" if len(value) > 3 else "]")
    return "None" if value is None else shown(value)


def case(node: type[io.ComfyNode], seed: int, number: int) -> Case:
    """The inputs of one number; the same every time.

    Half of the cases are well-typed. In the others one or two inputs are of a wrong type, damaged or out of their limits.
    """
    rng = random.Random(f"{seed} {node.__name__} {number}")
    family = pick(models.FAMILIES, rng)
    entries = node.define_schema().inputs
    hostile = set(rng.sample([e.id for e in entries], min(len(entries), rng.choice((0, 0, 1, 2)))))
    inputs: dict[str, Any] = {}
    for entry in entries:
        if entry.optional and entry.id not in {*hostile, *NEEDED} and rng.random() < 0.5:
            continue
        of = family if rng.random() < 0.95 else rng.choice(models.FAMILIES)  # of two models now and then
        inputs[entry.id] = (damaged if entry.id in hostile else ordinary)(entry, of, rng)
    linked = {e.id for e in entries if e.get_io_type() not in WIDGETS or (e.id in hostile and rng.random() < 0.5)}
    return Case(node, inputs, frozenset(linked & inputs.keys()), f"{seed}/{number}")


def pick(options: Sequence[Any], rng: random.Random) -> Any:
    """The first option, which most nodes can do something with, half of the time; else any."""
    return options[0] if rng.random() < 0.5 else rng.choice(options)


def ordinary(entry: Any, family: str, rng: random.Random) -> Any:
    """A value of the input's type, within its limits."""
    kind = entry.get_io_type()
    if kind in ("INT", "FLOAT"):
        most = min(entry.max, CHEAP.get(entry.id, entry.max))
        between = rng.randint(entry.min, most) if kind == "INT" else rng.uniform(entry.min, most)
        return rng.choice((min(entry.default, most), entry.min, most, between))
    if kind == "STRING":
        return pick(TEXTS.get(entry.id, PROMPTS), rng)
    if kind == "COMBO":
        return pick(entry.options[: CHEAP.get(entry.id)], rng)
    if kind == "BOOLEAN":
        return rng.random() < 0.5
    objects = _objects(family)
    return pick(objects.get(f"{kind} {entry.id}", objects.get(kind, ())), rng)()


def damaged(entry: Any, family: str, rng: random.Random) -> Any:
    """A value that does not fit the input, or hardly."""
    kind = entry.get_io_type()
    if kind in ("INT", "FLOAT", "BOOLEAN"):
        return rng.choice((*HOSTILE_NUMBERS, *([] if kind == "BOOLEAN" else [entry.min - 1, entry.max + 1])))
    if kind in ("STRING", "COMBO"):
        return rng.choice(HOSTILE_TEXTS)
    strangers: tuple[Callable[[], Any], ...] = (lambda: None, lambda: "x", lambda: torch.zeros(2, 2), lambda: {}, lambda: [])
    return rng.choice((*strangers, *_damaged(family).get(kind, ())))()


def _objects(family: str) -> dict[str, Sequence[Callable[[], Any]]]:
    """What comes through links, by type."""
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    return {
        "MODEL": (lambda: models.model(family),),
        "CLIP": (models.clip,),
        "VAE": (lambda: models.vae(family),),
        "CONDITIONING": (lambda: models.words()[1], lambda: models.conditioning("")),
        "CONDITIONING positive": (models.encoded_branches, lambda: models.words()[1]),
        "LATENT": (
            lambda: {"samples": models.latent(family)},
            lambda: {"samples": models.latent(family, 6, 10, 2), "batch_index": [3, 4]},
            lambda: {"samples": models.latent(family), "noise_mask": torch.ones(1, 64, 64)},
        ),
        "IMAGE": (
            lambda: picture,
            lambda: picture.repeat(2, 1, 1, 1),
            lambda: torch.zeros(1, 40, 70, 4),
            lambda: picture[:, :1, :1],
            lambda: picture * 100 - 50,
        ),
        "IMAGE images": (lambda: picture.repeat(2, 1, 1, 1), lambda: torch.zeros(3, 40, 70, 4)),
        "MASK": (lambda: torch.ones(1, 64, 64), lambda: torch.zeros(2, 32, 32), lambda: torch.rand(64, 64)),
        "ATTUNE_BRANCHES": (models.branches,),
        "ATTUNE_HEADS": (lambda: models.heads(family, "L0H0"), lambda: models.heads(family, "L1H1-2")),
        "ATTUNE_MAPS": (lambda: models.maps(family),),
        "ATTUNE_SCORER": (lambda: models.judge("similarity"), lambda: models.judge("all present")),
        "ATTUNE_WORDS": (lambda: models.words()[0], lambda: models.words("red striped star")[0], lambda: models.words("")[0]),
    }


def _damaged(family: str) -> dict[str, Sequence[Callable[[], Any]]]:
    """What should not come through links, by type."""
    text, options = models.words()[1][0]
    latent, picture = models.latent(family), torch.rand(1, 16, 16, 3)
    return {
        "MODEL": (models.foreign,),
        "CLIP": (lambda: models.vae(family), lambda: SimpleNamespace(tokenize=lambda text: {})),
        "VAE": (lambda: models.vae("flux" if family == "sd15" else "sd15"), models.clip),
        "CONDITIONING": (
            lambda: [text],
            lambda: [[None, {}]],
            lambda: [[text]],
            lambda: [[text[0], options]],
            lambda: [[text[:0], options]],
            lambda: [[text[:, :0], options]],
            lambda: [[text[..., :7], options]],
            lambda: [[text * math.nan, options]],
            lambda: [[text, {}]],
            lambda: [[text, None]],
            lambda: [[text, {**options, "pooled_output": torch.zeros(1, 3)}]],
        ),
        "LATENT": (
            lambda: latent,
            lambda: {"samples": None},
            lambda: {"samples": latent[:, :, None]},
            lambda: {"samples": latent[0]},
            lambda: {"samples": latent[:0]},
            lambda: {"samples": latent[..., :0]},
            lambda: {"samples": latent[:, :3]},
            lambda: {"samples": latent.repeat(1, 2, 1, 1)},
            lambda: {"samples": latent + math.nan},
            lambda: {"samples": latent.long()},
            lambda: {"samples": latent, "noise_mask": torch.ones(1)},
            lambda: {"samples": latent, "noise_mask": "x"},
            lambda: {"samples": latent, "noise_mask": torch.full((1, 64, 64), math.nan)},
            lambda: {"samples": latent, "batch_index": [HUGE]},
            lambda: {"samples": latent, "batch_index": "x"},
        ),
        "IMAGE": (
            lambda: picture[0],
            lambda: picture[None],
            lambda: picture[:0],
            lambda: picture[:, :0],
            lambda: picture[..., :2],
            lambda: picture[..., :1],
            lambda: picture.byte(),
            lambda: picture + math.nan,
            lambda: picture + math.inf,
        ),
        "MASK": (
            lambda: torch.ones(1, 1, 8, 8),
            lambda: torch.ones(0, 8, 8),
            lambda: torch.ones(8),
            lambda: torch.full((1, 8, 8), math.nan),
            lambda: torch.ones(5, 8, 8),
        ),
        "ATTUNE_BRANCHES": (lambda: replace(models.branches(), branches=()),),
        "ATTUNE_HEADS": (
            lambda: replace(models.heads(family, "L0H0"), chosen=()),
            lambda: replace(models.heads(family, "L0H0"), chosen=(("nowhere.0", (0,)),)),
            lambda: replace(models.heads(family, "L0H0"), family="x"),
            lambda: models.heads("flux" if family == "sd15" else "sd15", "L0H0"),
        ),
        "ATTUNE_MAPS": (lambda: type(models.maps(family))("both"),),
        "ATTUNE_WORDS": (
            lambda: replace(models.words()[0], phrases=()),
            lambda: replace(models.words()[0], total=3),
            lambda: replace(models.words()[0], total=10_000),
        ),
    }


# --- what becomes of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a case, and the words that it ended in."""

    kind: str
    words: str = ""


def run(given: Case) -> Outcome:
    """Run a case as ComfyUI would."""
    name, source = given.node.define_schema().node_id, "source"
    types = given.node.INPUT_TYPES()
    kinds = {k: entry[0] for group in ("required", "optional") for k, entry in types.get(group, {}).items()}
    slots = [k for k in given.inputs if k in given.linked]
    links = {k: [source, i] for i, k in enumerate(slots)}
    giver = type("Source", (), {"INPUT_TYPES": classmethod(lambda cls: {}), "RETURN_TYPES": tuple(kinds[k] for k in slots)})
    prompt = {
        "node": {"class_type": name, "inputs": {k: links.get(k, v) for k, v in given.inputs.items()}},
        source: {"class_type": source, "inputs": {}},
    }
    NODE_CLASS_MAPPINGS.update({name: given.node, source: giver})
    try:
        valid, errors, _ = asyncio.run(execution.validate_inputs("fuzz", prompt, "node", {}))
    except Exception as error:
        return Outcome(REFUSED_BY_COMFYUI, str(error))
    finally:
        del NODE_CLASS_MAPPINGS[name], NODE_CLASS_MAPPINGS[source]
    if not valid:
        return Outcome(REFUSED_BY_COMFYUI, str(errors[0]["message"]))
    made = SimpleNamespace(outputs=[[given.inputs[k]] for k in slots])
    cache = SimpleNamespace(get_cache=lambda *_: made)
    NODE_CLASS_MAPPINGS[source] = giver
    values, _, hidden = execution.get_input_data(prompt["node"]["inputs"], given.node, "node", cache)
    steps: list[int] = []
    try:
        with torch.inference_mode():
            of_hidden = {HIDDEN: hidden}
            outputs, *_ = asyncio.run(execution.get_output_data("fuzz", "node", given.node(), values, **of_hidden))
            sampled = [_sampled(value, steps) for output in outputs for value in output if _ours(value)]
    except Exception as error:
        wrong = fault(error) or (f"came after {len(steps)} steps" if steps else None)
        told = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(WRONG, f"{told[:300]} ({wrong}; {where.filename}:{where.lineno})") if wrong else Outcome(REFUSED, told)
    finally:
        del NODE_CLASS_MAPPINGS[source]
    return Outcome(FINE) if all(map(finite, (*outputs, *sampled))) else Outcome(WRONG, "NaN or infinity in the result")


def _ours(value: Any) -> bool:
    return hasattr(value, "model_options") and value.model is not models.foreign().model


def _sampled(model: Any, steps: list[int]) -> Tensor:
    family = next((f for f in models.FAMILIES if model.model is models.model(f).model), "sd15")  # the demo model is like it
    return models.sample(model, family, callback=lambda step, *_: steps.append(step))


def fault(error: Exception) -> str | None:
    """Why an error is no sentence of ours; None where it is one: raised by the pack on purpose, to be read by people."""
    if not isinstance(error, (ValueError, RuntimeError)):
        return "of another kind than ValueError and RuntimeError"
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename)
    if not path.is_relative_to(ROOT) or ".runtime" in path.parts or "raise" not in (last.line or ""):
        return "not raised by the pack on purpose"
    text = str(error)
    if len(text.split()) < 5 or len(text) > 2500 or not text.isprintable():
        return "no sentence that can be shown"
    return None


def finite(value: Any) -> bool:
    """Whether no number in a result is NaN or infinite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, (list, tuple)) else True


# --- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_folder() -> Iterator[None]:
    """A user folder that is new and goes away, for what nodes write, with one head set in it."""
    before = folder_paths.get_user_directory()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_user_directory(folder)
        try:
            AttuneSaveHeads.execute(models.model("sd15"), models.heads("sd15", "L0H0"), "saved")
            yield
        finally:
            folder_paths.set_user_directory(before)


def failures(node: type[io.ComfyNode], seed: int, count: int, counts: Counter[str] | None = None) -> list[str]:
    """The cases of a node that ended in another way than they may, each in a line that says how."""
    found = []
    with own_folder():
        for number in range(count):
            given = case(node, seed, number)
            outcome = run(given)
            if counts is not None:
                counts[outcome.kind] += 1
            if outcome.kind == WRONG:
                found.append(f"{given}\n    {outcome.words}")
    return found


def every_node() -> list[type[io.ComfyNode]]:
    return asyncio.run(Attune().get_node_list())


def main(arguments: list[str]) -> int:
    """Fuzz the nodes and say what failed."""
    parser = argparse.ArgumentParser(prog="run.py fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs")
    parser.add_argument("--count", type=int, default=50, help="inputs for each node")
    parser.add_argument("--node", help="one node only, such as AttuneScore")
    chosen = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    total: Counter[str] = Counter()
    wrong: list[str] = []
    for node in every_node():
        if chosen.node in (None, node.__name__):
            counts: Counter[str] = Counter()
            wrong += failures(node, chosen.seed, chosen.count, counts)
            total += counts
            print(f"{node.__name__:<24}", ", ".join(f"{kind}: {n}" for kind, n in sorted(counts.items())), flush=True)
    print("\n" + "\n".join([*wrong, f"{total.total()} inputs", *(f"{kind}: {n}" for kind, n in sorted(total.items()))]))
    return 1 if wrong else 0
