"""Attention while it forms: small pictures of maps, sent to the editors that asked for them, a few times a second.

An editor asks by `listen`; a run that no listening editor has started costs one look-up a step and sends nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.maps import folded, minmax
from ..patches.hook.call import AttentionCall
from ..patches.observer import Observer
from .encode import png
from .graph import Origin, executing, lineage, origin, prompt, prompt_text, server, tell, tell_effect

if TYPE_CHECKING:
    from ..language.words import Words

EVENT = "attune.maps"
PAUSE = 0.25  # seconds between two messages of a node
MOST = 8  # maps in a message
SIDE = 64  # pixels of a map's longer side, at most
KEPT = 32  # prompts whose words are remembered

_listeners: set[str] = set()
_sent: dict[tuple[str, str], float] = {}  # when, by node and kind
_words: OrderedDict[tuple[str, str], Words] = OrderedDict()


def listen(client: str, on: bool) -> None:
    """An editor's wish to see maps, or not to see them any more. Editors that have gone are forgotten."""
    running = server()
    if running is not None:
        _listeners.intersection_update(running.sockets)
    (_listeners.add if on else _listeners.discard)(client)


def listening() -> bool:
    """Whether the editor that has started the running workflow wants to see maps."""
    if not _listeners:
        return False
    running = server()
    return running is not None and running.client_id in _listeners and running.client_id in running.sockets


def _due(node: str, kind: str, last: bool) -> bool:
    """Whether somebody listens, and the node has not just sent maps of this kind."""
    return listening() and (last or time.monotonic() - _sent.get((node, kind), -PAUSE) >= PAUSE)


# --- sending --------------------------------------------------------------------------------------------------------


def show(
    step: int | None,
    steps: int | None,
    names: Sequence[str],
    maps: Tensor,
    kind: str = "heat",
    node: str | None = None,
    last: bool = False,
) -> None:
    """Send maps to the editor, unless nobody listens or the node has just sent some.

    Args:
        step: from 0, of ``steps``.
        names: of the maps; of ``regions`` the names of labels 1, 2, …
        maps: ``[n, h, w]``; ``heat`` of any range, ``masks`` from 0 to 1 or boolean; ``regions``: labels ``[h, w]``, 0 is background.
        node: whose maps these are; None is the node that executes now.
        last: sent however short the pause was.
    """
    node = executing() if node is None else node
    if node is None or not _due(node, kind, last):
        return
    _sent[node, kind] = time.monotonic()
    running = server()
    maps = maps.detach()
    if kind == "regions":
        tiles = _smaller(maps[None, None].float(), "nearest")[0]
    else:
        tiles = _smaller(maps[:MOST, None].float(), "area")[:, 0]
        if kind == "heat":
            tiles = minmax(tiles)
        tiles = tiles * 255
    data = {
        "node": node,
        "kind": kind,
        "step": 0 if step is None else step + 1,
        "steps": steps or 0,
        "names": list(names) if kind == "regions" else list(names)[:MOST],
        "size": [tiles.shape[2], tiles.shape[1]],
        "image": png(tiles),
    }
    running.send_sync(EVENT, data, running.client_id)


def _smaller(maps: Tensor, mode: str) -> Tensor:
    factor = SIDE / max(maps.shape[-2:])
    if factor >= 1:
        return maps
    return F.interpolate(maps, size=[max(1, round(n * factor)) for n in maps.shape[-2:]], mode=mode)


# --- whose columns --------------------------------------------------------------------------------------------------


def remember(words: Words) -> None:
    """Prompt Words has found these: maps of the same workflow will be named after them."""
    node = executing()
    if node is None:
        return
    try:
        key = (node, lineage(prompt(), node))
    except KeyError:
        return
    _words.pop(key, None)
    _words[key] = words
    while len(_words) > KEPT:
        _words.popitem(last=False)


def _known(columns: int) -> Words | None:
    """The running workflow's words that fit a prompt of so many columns."""
    running = prompt()
    for node, entry in running.items():
        if entry.get("class_type") == "AttuneWords":
            words = _words.get((node, lineage(running, node)))
            if words is not None and columns % words.total == 0:
                return words
    return None


def _named(maps: Tensor) -> tuple[list[str], Tensor]:
    """Columns' maps ``[h, w, N]`` as words' maps ``[n, h, w]``; without known words, the most uneven columns."""
    words = _known(maps.shape[-1])
    if words is not None:
        maps = folded(maps, words.total)
        return [p.text for p in words.phrases], torch.stack([maps[..., list(p.columns)].mean(dim=-1) for p in words.phrases])
    spread = maps.flatten(0, 1).std(dim=0) if maps.shape[:2].numel() > 1 else maps[0, 0]
    best = sorted(spread.topk(min(MOST // 2, len(spread))).indices.tolist())
    return [f"token {i}" for i in best], maps[..., best].permute(2, 0, 1)


@dataclass
class Feed:
    """One node's maps of one run: layers of a step are averaged, and shown when the next step begins.

    Attributes:
        node: whose they are; names: of the columns that are handed over; None: all of a prompt's columns, named by Prompt Words.
    """

    node: str
    names: tuple[str, ...] | None = None
    at: tuple[int | None, int | None] = (None, None)
    layers: list[Tensor] = field(default_factory=list)

    def add(self, call: AttentionCall, weights: Tensor) -> None:
        """A layer's weights of the first picture: ``[M, N]``, or ``[heads, M, N]``."""
        if (call.step, call.steps) != self.at:
            self.flush()
            self.at = (call.step, call.steps)
        weights = weights.detach().float()
        self.layers.append((weights.mean(dim=0) if weights.ndim == 3 else weights).unflatten(0, (call.height, call.width)))

    def flush(self, last: bool = False) -> None:
        """Show what there is."""
        layers, self.layers = self.layers, []
        layers = [t for t in layers if t.shape[-1] == layers[-1].shape[-1]]
        if not layers or not _due(self.node, "heat", last):
            return
        size = max((t.shape[:2] for t in layers), key=lambda s: s[0] * s[1])
        whole = sum(F.interpolate(t.permute(2, 0, 1)[None], size=size, mode="bilinear")[0] for t in layers)
        assert isinstance(whole, Tensor)
        maps = whole.permute(1, 2, 0) / len(layers)
        names, tiles = _named(maps) if self.names is None else (list(self.names), maps.permute(2, 0, 1))
        show(*self.at, names, tiles, "heat", self.node, last)


class Preview(Observer):
    """A node of the editor that looks on. Without a node, masks are shown on the one that executes."""

    def __init__(self, node: str | None):
        self.node = node

    def watching(self) -> bool:
        return listening()

    def tell(self, text: str) -> None:
        tell(self.node, text)

    def effect(self, missing: str | None) -> None:
        super().effect(missing)
        tell_effect(executing() if self.node is None else self.node, missing)

    def origin(self) -> Origin:
        return origin()

    def prompt_text(self) -> str | None:
        node = executing()
        return None if node is None else prompt_text(prompt(), node)

    def layer(self, call: AttentionCall, weights: Tensor, names: Sequence[str] | None = None) -> None:
        if self.node is None or call.run is None:
            return
        key = (EVENT, self.node)
        if key not in call.run.state:
            feed = call.run.state[key] = Feed(self.node, None if names is None else tuple(names))
            call.run.finished.append(lambda: feed.flush(last=True))
        call.run.state[key].add(call, weights)

    def masks(self, step: int | None, steps: int | None, names: Sequence[str], masks: Tensor, last: bool = False) -> None:
        show(step, steps, names, masks, "masks", self.node, last)

    def regions(self, step: int | None, steps: int | None, owner: Tensor, columns: int) -> None:
        if self.node is None or not _due(self.node, "regions", False):
            return
        words, named = _known(columns), torch.zeros_like(owner)
        if words is not None:
            column = (owner - 1) % words.total
            for label, phrase in enumerate(words.phrases, 1):
                mine = torch.isin(column, torch.tensor(phrase.columns, device=owner.device)) & (owner > 0)
                named = torch.where(mine, label, named)
            names = [p.text for p in words.phrases]
        else:
            found, areas = owner[owner > 1].unique(return_counts=True)
            best = found[areas.argsort(descending=True)[: MOST - 1]].tolist()
            for label, column in enumerate(best, 1):
                named = torch.where(owner == column, label, named)
            names = [f"token {c - 1}" for c in best]
        show(step, steps, names, named, "regions", self.node)
