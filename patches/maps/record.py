"""Attention maps of a run, kept for other nodes to look at: which run made them, what they hold, and never more than asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...methods import scfg as maths
from ...methods.maps import folded
from ..hook.call import AttentionCall
from ..hook.install import ModelPatcher, model_sites, request
from ..hook.requests import COND, PIXELS, ReadWeights
from ..hook.sites import Heads, Site, check
from ..observer import NOBODY, Observer

KINDS = ("cross", "self", "both")
STEPS = {"mean": 0, "last": 0, "every step": 1, "every 2nd step": 2, "every 5th step": 5, "every 10th step": 10}
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
KEPT_RUNS = 4  # finished runs that one handle remembers


@dataclass
class Place:
    """Maps of one site and kind: a frame per kept step (mean and last: one, under step -1).

    A frame is ``[pictures, heads, M, N]`` (``M`` text columns, or pixels for self-attention); heads are 1 where averaged.
    """

    grid: tuple[int, int]
    frames: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0
    sigma: Tensor | None = None


@dataclass
class Record:
    """The maps of one sampling run.

    Attributes:
        latent: height and width of the latent.
        pictures: in the batch.
        cross, pixels: places by site, in order of execution.
        planned: bytes that it will take; ``dropped``: that was too much, and nothing is kept.
        origin: what made the picture (`Observer.origin`).
    """

    latent: tuple[int, int]
    pictures: int
    cross: dict[str, Place] = field(default_factory=dict)
    pixels: dict[str, Place] = field(default_factory=dict)
    planned: int = 0
    dropped: bool = False
    origin: Any = None

    def places(self) -> Iterator[Place]:
        yield from self.cross.values()
        yield from self.pixels.values()

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for place in self.places() for t in place.frames.values())

    def only(self, site: str, head: int | None = None) -> Record:
        """One site's part, or one head's of it."""
        place = self.cross[site]
        frames = place.frames if head is None else {k: t[:, head : head + 1] for k, t in place.frames.items()}
        return Record(self.latent, self.pictures, {site: Place(place.grid, frames)})

    @property
    def steps(self) -> list[int]:
        """The kept steps, in order; ``[-1]`` for a mean or the last."""
        return sorted({step for place in self.places() for step in place.frames})


class Maps:
    """``ATTUNE_MAPS``: the promise of maps. Runs of the patched model fill it; a node that gets it asks for its own picture's."""

    def __init__(
        self,
        kind: str = "cross",
        steps: str = "mean",
        precision: str = "fp32",
        keep_on: str = "device",
        limit_mb: float = 1024,
        observer: Observer = NOBODY,
    ):
        self.kind, self.steps, self.every = kind, steps, STEPS[steps]
        self.dtype, self.keep_on, self.limit_mb, self.observer = PRECISIONS[precision], keep_on, limit_mb, observer
        self.records: OrderedDict[Any, Record] = OrderedDict()  # by origin

    def __deepcopy__(self, memo: dict[int, Any]) -> Maps:
        """Cloning a model copies what is on it: not this, which a node has given out."""
        return self

    def publish(self, record: Record) -> None:
        """Keep the record of a run that came to its end."""
        if record.dropped:
            self.observer.tell(
                f"the maps are not kept: they would take more than {self.limit_mb:g} MB; Capture Attention Maps can keep fewer"
            )
            return
        record.origin = self.observer.origin()
        self.records.pop(record.origin, None)
        self.records[record.origin] = record
        while len(self.records) > KEPT_RUNS or (len(self.records) > 1 and self.bytes > self.limit_mb * 2**20):
            self.records.popitem(last=False)

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.records.values())

    def record(self, made_by: Container[Any] | None = None) -> Record:
        """The maps of the last run of one of these origins; None: of the last run.

        Raises:
            ValueError: when no run that these maps know of has made that picture.
        """
        if not self.records:
            raise ValueError(
                "there are no attention maps yet: connect the MODEL output of the node that gave these maps to the sampler that makes "
                "the picture, and the picture to this node."
            )
        for record in reversed(self.records.values()):
            if made_by is None or record.origin in made_by:
                return record
        raise ValueError(
            "these attention maps belong to another picture: this one was not made by a sampler that runs the MODEL of the node that "
            "gave the maps, or its result came from a cache. Check the connections, or change the seed and run again."
        )


# --- recording ------------------------------------------------------------------------------------------------------


def auto_sites(sites: tuple[Site, ...], family: str) -> tuple[Site, ...]:
    """The sites whose maps show objects best.

    UNets: a quarter and an eighth of the latent's size, as S-CFG and Detail++ have it; where a model has neither, its two
    coarsest sizes. One layer of each block, the middle one, where a block has several: SDXL has up to ten. SD3: three layers
    around the middle; FLUX: three of its double blocks.

    Raises:
        ValueError: for a model without attention to text.
    """
    if family != "unet":
        first = [s for s in sites if s.name.startswith(("joint.", "double."))] or list(sites)
        return tuple(dict.fromkeys(first[round(len(first) * part)] for part in (0.33, 0.5, 0.66) if first))
    with_text = [s for s in sites if "cross" in s.kinds]
    if not with_text:
        raise ValueError(
            "this model has no attention to text, so there are no word maps to read; connect a text-to-image model."
        )
    strides = sorted({s.stride for s in with_text})
    wanted = [s for s in strides if s in (4, 8)] or strides[-2:]
    blocks: dict[tuple[str, int], list[Site]] = {}
    for s in with_text:
        if s.stride in wanted:
            blocks.setdefault(s.block, []).append(s)
    return tuple(layers[len(layers) // 2] for layers in blocks.values())


def whole_picture(conds: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first conditioning that is not limited to an area."""
    return next((cond for cond in conds if "area" not in cond), None)


@dataclass(frozen=True, eq=False)
class Recorder:
    """Puts the maps of a run into a `Maps`.

    Attributes:
        by_product: of another method, which shows what there is to see itself; a run without maps to keep is then no error.
    """

    maps: Maps
    sites: tuple[Site, ...]
    mean_heads: bool = False
    by_product: bool = False

    def requests(self) -> tuple[ReadWeights, ...]:
        joint = self.sites[0].kind == "joint"
        out = []
        if self.maps.kind in ("cross", "both"):
            where: dict[tuple[str, str], Any] = {(s.name, "joint" if joint else "cross"): None for s in self.sites}
            out.append(ReadWeights(where, self.read_text, rows=COND, mean_heads=self.mean_heads))
        if self.maps.kind in ("self", "both"):
            where = {(s.name, s.kind): None for s in self.sites}
            out.append(ReadWeights(where, self.read_pixels, rows=COND, columns=PIXELS if joint else None, mean_heads=True))
        return tuple(out)

    def read_text(self, call: AttentionCall, weights: Tensor) -> None:
        self._store(call, "cross", weights)

    def read_pixels(self, call: AttentionCall, weights: Tensor) -> None:
        self._store(call, "pixels", weights)

    def read_pair(self, call: AttentionCall, cross: Tensor, pixels: Tensor | None) -> None:
        """The same from a method that has read all rows for itself."""
        rows = call.rows(COND)
        for kind, weights in (("cross", cross), ("pixels", pixels)):
            if weights is not None and rows:
                self._store(call, kind, weights[rows])

    def _store(self, call: AttentionCall, kind: str, weights: Tensor) -> None:
        """Keep ``weights [R, (heads,) M, N]`` of the conditional rows, if they are the whole picture's and it is their turn."""
        run = call.run
        if run is None:
            return
        uuid = self._prompt(call)
        part = next((p for p in call.parts(COND) if p.uuid == uuid), None)
        if part is None:
            return
        record: Record | None = run.state.get(self)
        if record is None:
            record = run.state[self] = Record(call.latent, call.pictures)
            run.finished.append(lambda: self._finish(record))  # type: ignore[arg-type]
        if record.dropped:
            return
        places = record.cross if kind == "cross" else record.pixels
        place = places.setdefault(call.site.name, Place((call.height, call.width)))
        step, every = call.step or 0, self.maps.every
        if place.sigma is call.sigma or (every and (step % every or step in place.frames)):
            return  # seen in this evaluation already (another pack's pass), or not a step to keep
        chosen = weights[part.given]
        chosen = (chosen if chosen.ndim == 4 else chosen[:, None]).detach()
        if not place.frames and not self._fits(record, call, chosen):
            return
        if kind == "cross" and not self.by_product and self.maps.observer.watching():
            self.maps.observer.layer(call, chosen[0])
        chosen = chosen.to(device=None if self.maps.keep_on == "device" else "cpu", dtype=self.maps.dtype)
        place.sigma, place.count = call.sigma, place.count + 1
        if self.maps.steps == "mean" and place.frames:
            place.frames[-1].lerp_(chosen, 1 / place.count)
        else:
            place.frames[step if every else -1] = chosen

    def _finish(self, record: Record) -> None:
        self.maps.publish(record)
        if not (self.by_product or record.dropped):
            count = len(record.cross) + len(record.pixels)
            self.maps.observer.tell(f"{record.bytes / 2**20:.1f} MB of attention maps ({count} maps)")

    def _prompt(self, call: AttentionCall) -> Any:
        """The conditioning whose maps are kept: the first positive one that is for the whole picture."""
        positive = call.run.conds.get("positive", ()) if call.run is not None else ()
        whole = whole_picture(positive)
        if whole is not None:
            return whole.get("uuid")
        if positive and not self.by_product:
            raise ValueError(
                "Capture Attention Maps: every positive prompt is limited to an area of the picture; add one for the whole picture "
                "(Conditioning Combine), whose maps will be kept."
            )
        return None if positive else next((u for u, role in zip(call.uuids, call.chunks, strict=False) if role == 0), None)

    def _fits(self, record: Record, call: AttentionCall, weights: Tensor) -> bool:
        """Whether there is room for these weights; where maps are all that is wanted, too little is an error."""
        frames = 1 if not self.maps.every else -(-(call.steps or 1) // self.maps.every)
        record.planned += weights.numel() * self.maps.dtype.itemsize * frames
        if record.planned <= self.maps.limit_mb * 2**20:
            return True
        if not self.by_product:
            raise ValueError(
                f"Capture Attention Maps would hold more than {record.planned / 2**20:.0f} MB for this picture, and the limit is "
                f"{self.maps.limit_mb:g} MB. Choose fewer or coarser layers, kind “cross”, fewer steps or fp16, or raise limit_mb."
            )
        record.dropped = True
        record.cross.clear()
        record.pixels.clear()
        return False


def apply(
    model: ModelPatcher,
    heads: Heads | None = None,
    kind: str = "cross",
    steps: str = "mean",
    precision: str = "fp16",
    keep_on: str = "device",
    limit_mb: float = 1024,
    observer: Observer = NOBODY,
) -> tuple[ModelPatcher, Maps]:
    """A clone of ``model`` whose runs fill the returned maps.

    Args:
        heads: a selection whose sites are captured; None is `auto_sites`.

    Raises:
        ValueError: for an unknown choice, a selection of another model, or a model without attention to text.
    """
    for value, known, name in ((kind, KINDS, "kind"), (steps, STEPS, "steps"), (precision, PRECISIONS, "precision")):
        if value not in known:
            raise ValueError(f"Capture Attention Maps: {name} must be one of {', '.join(known)}, not “{value}”.")
    family, sites = model_sites(model)
    if heads is None:
        chosen = auto_sites(sites, family)
    else:
        names = check(heads, sites, family)
        chosen = tuple(s for s in sites if s.name in names)
    if kind != "self" and family == "unet":
        without = [s.name for s in chosen if "cross" not in s.kinds]
        if without:
            raise ValueError(f"{without[0]} has no attention to text; choose other layers, or kind “self”.")
    maps = Maps(kind, steps, precision, keep_on, limit_mb, observer)
    patched = model.clone()
    request(patched, *Recorder(maps, chosen).requests())
    return patched, maps


# --- reading them back ------------------------------------------------------------------------------------------------


def token_maps(
    record: Record,
    columns: int | None = None,
    powers: int = 0,
    sigma: float = 0.0,
    step: int | None = None,
    against_start: bool = False,
) -> Tensor:
    """Every token's renormalised map from all captured layers, ``[pictures, N, h, w]`` on the finest captured grid.

    Args:
        columns: the prompt's own number of text columns (see `folded`); None takes what is there.
        powers: of the completion by self-attention, where that was captured.
        step: one kept step, or None for the mean of all kept ones.
        against_start: two maps only, the start token's and that of all others together.

    Raises:
        ValueError: when the maps hold no attention to text, or are of another prompt.
    """
    if not record.cross:
        raise ValueError("these maps hold no attention to text: set kind to “cross” or “both” in Capture Attention Maps.")
    size = max((p.grid for p in record.cross.values()), key=lambda g: g[0] * g[1])
    layers = []
    for name, place in record.cross.items():
        cross = _mean(place, step).mean(dim=1)
        cross = cross if columns is None else folded(cross, columns)
        if against_start:
            cross = maths.against_start(cross, start_column(record, cross.shape[-1]))
        own = None
        if powers and name in record.pixels:
            own = _mean(record.pixels[name], step)[:, 0]
            own = own / own.sum(dim=-1, keepdim=True)  # in joint attention a pixel also looks at words
        layers.append(maths.layer_maps(cross, own, place.grid, size, powers, sigma))
    return torch.stack(layers).mean(dim=0)


def start_column(record: Record, columns: int) -> int:
    """The column that takes what nothing else wants, the background: CLIP's start token in a UNet, elsewhere the most attended one."""
    if next(iter(record.cross)).startswith(("input.", "middle.", "output.")):
        return 0
    attention = [folded(_mean(place, None), columns).mean(dim=(0, 1, 2)) for place in record.cross.values()]
    return int(torch.stack(attention).sum(dim=0).argmax())


def _mean(place: Place, step: int | None) -> Tensor:
    """A kept step, or the mean of all: ``[pictures, heads, M, N]`` in float32."""
    frames = list(place.frames.values()) if step is None else [place.frames[step]]
    return torch.stack([f.float() for f in frames]).mean(dim=0)
