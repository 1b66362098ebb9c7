"""Methods of a comparison: nodes of the pack by their ids, with settings that their own schemas check before anything is drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.utils

from ..hunt.head_files import load
from ..language.phrases import fusable
from ..language.words import prompt_words
from ..nodes import Attune
from ..nodes.base import AttuneNode, check
from ..patches.head_presets import preset_heads
from ..patches.hook.install import model_sites
from ..patches.hook.sites import Heads, select
from .suites import Item

PLAIN = "plain"
DETAIL, DECOMPOSE, ENCODE = "AttuneDetailSampler", "AttuneDecompose", "AttuneEncodeBranches"  # Detail++ samples by itself
OF_RUN = (
    "model",
    "positive",
    "negative",
    "latent_image",
    "seed",
    "steps",
    "cfg",
    "sampler_name",
    "scheduler",
    "denoise",
    "text",
)
FILE, PRESET = "file", "preset"  # what a method's heads are, beside a selection
NOUNS, PHRASES = "nouns", "phrases"  # what a method's words are, beside texts of the user's


@dataclass(frozen=True)
class Method:
    """A name and nodes with settings, one on another; none is the plain model."""

    name: str
    nodes: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@cache
def nodes_of_pack() -> dict[str, type[AttuneNode]]:
    """All nodes by their ids."""
    return {node.define_schema().node_id: node for node in asyncio.run(Attune().get_node_list())}


@cache
def usable() -> dict[str, type[AttuneNode]]:
    """Nodes that make a MODEL of a MODEL and nothing else, or a LATENT of a LATENT; and the Detail++ Sampler."""
    found: dict[str, Any] = {DETAIL: nodes_of_pack()[DETAIL]}
    for name, node in nodes_of_pack().items():
        schema = node.define_schema()
        inputs, outputs = ([str(entry.get_io_type()) for entry in part] for part in (schema.inputs, schema.outputs))
        latent = "LATENT" in inputs and "MODEL" not in inputs and outputs[:1] == ["LATENT"]
        if latent or ("MODEL" in inputs and "MODEL" in outputs and "LATENT" not in inputs):
            found[name] = node
    return found


def inputs_of(name: str) -> list[str]:
    """What may be set on a node; the Detail++ Sampler takes Decompose Prompt's inputs too, and the config's steps, CFG and seeds."""
    schemas = [nodes_of_pack()[n].define_schema() for n in ((name, DECOMPOSE) if name == DETAIL else (name,))]
    found = [entry.id for schema in schemas for entry in schema.inputs]
    return [n for n in found if n not in OF_RUN] if name == DETAIL else found


def defaults_of(name: str) -> dict[str, Any]:
    """What a node's inputs are when nothing is set."""
    schemas = [nodes_of_pack()[n].define_schema() for n in ((name, DECOMPOSE) if name == DETAIL else (name,))]
    known = {entry.id: getattr(entry, "default", None) for schema in schemas for entry in schema.inputs}
    return {n: known[n] for n in inputs_of(name) if known[n] is not None}


def method_of(given: Mapping[str, Any]) -> Method:
    """``{name, node, settings…}``, or ``{name, nodes: [{node, settings…}, …]}``.

    Raises:
        ValueError: for a node or an input that is not known.
    """
    data = dict(given)
    name = str(data.pop("name", data.get("node", PLAIN)))
    listed = data.pop("nodes", None)
    if listed is None:
        listed = [data] if data else []
    elif data:
        raise ValueError(
            f"prove: the method “{name}” has nodes and {next(iter(data))} beside them; write settings within each node."
        )
    nodes = []
    for one in listed:
        settings = dict(one)
        node = settings.pop("node", None)
        if node not in usable():
            raise ValueError(f"prove: the method “{name}” names the node “{node}”; there are {', '.join(usable())}.")
        known = inputs_of(node)
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"prove: {node} has no input “{unknown[0]}”; there are {', '.join(known)}.")
        nodes.append((node, settings))
    if DETAIL in [node for node, _ in nodes[:-1]]:
        raise ValueError(
            f"prove: the method “{name}” has {DETAIL} before another node; it samples by itself, so it must be the last."
        )
    return Method(name, tuple(nodes))


def methods_of(given: Sequence[Mapping[str, Any]]) -> list[Method]:
    """The methods of a config, plain first.

    Raises:
        ValueError: for two of one name, and as `method_of`.
    """
    found = [method_of(one) for one in given]
    found = [Method(PLAIN), *(m for m in found if m.nodes)]
    names = [m.name for m in found]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise ValueError(f"prove: two methods are called “{double}”; give each a name of its own.")
    return found


@dataclass
class Loaded:
    """What a checkpoint gives, and the scorer that nodes with one get."""

    model: Any
    clip: Any
    vae: Any
    scorer: Any = None


def given_to(node: type[AttuneNode], settings: Mapping[str, Any], loaded: Loaded, item: Item) -> dict[str, Any]:
    """A node's inputs: settings, defaults of its schema, and what comes through links.

    Raises:
        ValueError: when the schema refuses one.
    """
    schema = node.define_schema()
    out: dict[str, Any] = {}
    for entry in schema.inputs:
        kind, value = str(entry.get_io_type()), settings.get(entry.id)
        if kind in ("MODEL", "CLIP", "VAE"):
            out[entry.id] = getattr(loaded, kind.lower())
        elif kind == "ATTUNE_SCORER":
            out[entry.id] = loaded.scorer
        elif kind == "ATTUNE_WORDS":
            if value is not None or not entry.optional:
                out[entry.id] = words_of(loaded.clip, item, str(value or NOUNS))
        elif kind == "ATTUNE_HEADS":
            if value is not None:
                out[entry.id] = heads_of(loaded.model, str(value))
        elif entry.id in settings:
            out[entry.id] = value
        elif getattr(entry, "default", None) is not None:
            out[entry.id] = entry.default
    check(schema, {name: value for name, value in out.items() if name not in ("samples", "latent")})
    return out


def heads_of(model: Any, value: str) -> Heads:
    """A selection as in Select Heads, ``preset: NAME`` of that node, or ``file: NAME`` as in Load Heads.

    Raises:
        ValueError: for heads that the model does not have, or a preset or a file that there is not.
    """
    family, sites = model_sites(model)
    kind, _, name = (part.strip() for part in value.partition(":"))
    if kind == FILE:
        return load(name, sites, family)
    return preset_heads(name, sites, family) if kind == PRESET else select(value, sites, family)


def named_heads(method: Method, model: Any) -> str:
    """The heads behind presets and files, which may change while their names stay; empty without any."""
    values = [str(v) for node, x in method.nodes for k, v in x.items() if k in head_inputs(node) and v is not None]
    return "; ".join(heads_of(model, v).text for v in values if v.partition(":")[0].strip() in (FILE, PRESET))


def head_inputs(node: str) -> list[str]:
    """A node's inputs for heads."""
    return [entry.id for entry in usable()[node].define_schema().inputs if str(entry.get_io_type()) == "ATTUNE_HEADS"]


def kinds_of(method: Method) -> set[str]:
    """What its nodes take."""
    return {str(entry.get_io_type()) for name, _ in method.nodes for entry in usable()[name].define_schema().inputs}


def listens(method: Method) -> bool:
    """Whether a node of it takes a scorer."""
    return "ATTUNE_SCORER" in kinds_of(method)


def needs_prompt(method: Method) -> bool:
    """Whether it is another one for every prompt."""
    return bool(kinds_of(method) & {"ATTUNE_SCORER", "ATTUNE_WORDS", "CONDITIONING"})


def words_of(clip: Any, item: Item, wanted: str) -> Any:
    """The words of a prompt: its things' nouns, its noun phrases, or those that are written."""
    if wanted == PHRASES:
        return fusable(prompt_words(clip, item.text))
    named = ", ".join(dict.fromkeys(t.noun for t in item.things)) if wanted == NOUNS else wanted
    return prompt_words(clip, item.text, named)


def on_model(method: Method, loaded: Loaded, item: Item) -> Any:
    """The MODEL with a method on it, for a prompt."""
    model = loaded.model
    for name, settings in method.nodes:
        node = usable()[name]
        schema = node.define_schema()
        kinds = [str(entry.get_io_type()) for entry in schema.outputs]
        if "MODEL" in kinds:
            here = Loaded(model, loaded.clip, loaded.vae, loaded.scorer)
            model = node.execute(**given_to(node, settings, here, item)).args[kinds.index("MODEL")]
    return model


def on_latent(method: Method, loaded: Loaded, item: Item, samples: Any) -> Any:
    """A finished latent with what a method does to it."""
    for name, settings in method.nodes:
        node = usable()[name]
        schema = node.define_schema()
        if str(schema.outputs[0].get_io_type()) == "LATENT" and name != DETAIL:
            given = given_to(node, settings, loaded, item)
            place = next(entry.id for entry in schema.inputs if str(entry.get_io_type()) == "LATENT")
            samples = node.execute(**{**given, place: {"samples": samples}}).args[0]["samples"]
    return samples


@dataclass(frozen=True)
class Detail:
    """The Detail++ Sampler for a prompt: its settings, and the prompt's branches as a conditioning."""

    settings: Mapping[str, Any]
    positive: Any

    @classmethod
    def of(cls, method: Method, loaded: Loaded, item: Item) -> Detail | None:
        """None for a method that KSampler's own sampling does.

        Raises:
            ValueError: when a schema refuses a setting, or the prompt cannot be taken apart.
        """
        found = dict(method.nodes).get(DETAIL)
        if found is None:
            return None
        parts = []
        for name in (DECOMPOSE, DETAIL):
            node = nodes_of_pack()[name]
            own = {entry.id for entry in node.define_schema().inputs}
            parts.append({**given_to(node, {k: v for k, v in found.items() if k in own}, loaded, item)})
        parts[0]["text"] = item.text
        branches = nodes_of_pack()[DECOMPOSE].execute(**parts[0]).args[0]
        positive = nodes_of_pack()[ENCODE].execute(loaded.clip, branches).args[0]
        return cls({name: value for name, value in parts[1].items() if name not in OF_RUN}, positive)

    def sample(self, model: Any, **run: Any) -> Any:
        """A finished latent ``[1, C, h, w]``; ``run`` is `OF_RUN` without model, positive and text."""
        with no_bars():
            return (
                nodes_of_pack()[DETAIL].execute(model=model, positive=self.positive, **run, **self.settings).args[0]["samples"]
            )


@contextmanager
def no_bars() -> Iterator[None]:
    """A node's own progress bar would write over the run's."""
    before = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_enabled(False)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(before)
