"""Puts the maps of a run where other nodes find them, and never more than asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...language.words import PROMPT
from ...methods import maps as maths
from ..hook.call import AttentionCall
from ..hook.install import ModelPatcher, model_sites, request
from ..hook.requests import COND, PIXELS, ReadWeights
from ..hook.run import whole_picture
from ..hook.sites import Heads, Site, check
from ..observer import NOBODY, Observer
from .layers import auto_sites
from .record import BOTH, CROSS, DEVICES, KINDS, PRECISIONS, SELF, STEPS, Maps, Place, Record, Settings

DEFAULTS = Settings()
METHOD = "Capture Attention Maps"


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

    @property
    def settings(self) -> Settings:
        return self.maps.settings

    def requests(self) -> tuple[ReadWeights, ...]:
        joint = self.sites[0].kind == "joint"
        out = []
        if self.settings.kind in (CROSS, BOTH):
            where: dict[tuple[str, str], Any] = {(s.name, "joint" if joint else "cross"): None for s in self.sites}
            out.append(ReadWeights(where, self.read_text, rows=COND, mean_heads=self.mean_heads))
        if self.settings.kind in (SELF, BOTH):
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
            record = run.state[self] = Record(call.latent, call.pictures, cond=self._cond(call))
            run.finished.append(lambda: self._finish(record))  # type: ignore[arg-type]
        if record.dropped:
            return
        places = record.cross if kind == "cross" else record.pixels
        grid = call.grid
        place = places.setdefault(call.site.name, Place(grid))
        step, every = call.step or 0, self.settings.every
        if not part.first_time or (every and (step % every or step in place.frames)):
            return  # another pack's pass, or not a step to keep
        chosen = weights[part.given]
        chosen = (chosen if chosen.ndim == 4 else chosen[:, None]).detach()
        if grid != place.grid:  # another node changes sizes on the way
            chosen = maths.resize_weights(chosen, grid, place.grid, keys=kind == "pixels")
        if not place.frames and not self._fits(record, call, chosen):
            return
        if kind == "cross" and not self.by_product and self.maps.observer.watching():
            self.maps.observer.layer(call, weights[part.given][0])
        chosen = chosen.to(device=None if self.settings.keep_on == "device" else "cpu", dtype=self.settings.dtype)
        place.count += 1
        if self.settings.steps == "mean" and place.frames:
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

    @staticmethod
    def _cond(call: AttentionCall) -> dict[str, Any]:
        """What words are compared with that claim to be of these maps."""
        whole = whole_picture(call.run.conds.get("positive", ())) if call.run is not None else None
        return {name: whole[name] for name in ("cross_attn", PROMPT) if name in whole} if whole is not None else {}

    def _fits(self, record: Record, call: AttentionCall, weights: Tensor) -> bool:
        """Whether there is room for these weights; where maps are all that is wanted, too little is an error."""
        frames = 1 if not self.settings.every else -(-(call.steps or 1) // self.settings.every)
        record.planned += weights.numel() * self.settings.dtype.itemsize * frames
        if record.planned <= self.settings.limit_mb * 2**20:
            return True
        if not self.by_product:
            raise ValueError(
                f"Capture Attention Maps would hold more than {record.planned / 2**20:.0f} MB for this picture, and the limit is "
                f"{self.settings.limit_mb:g} MB. Choose fewer or coarser layers, kind “cross”, fewer steps or fp16, or raise limit_mb."
            )
        record.dropped = True
        record.cross.clear()
        record.pixels.clear()
        return False


def apply(
    model: ModelPatcher,
    settings: Settings = DEFAULTS,
    heads: Heads | None = None,
    observer: Observer = NOBODY,
) -> tuple[ModelPatcher, Maps]:
    """A clone of ``model`` whose runs fill the returned maps.

    Args:
        heads: a selection whose sites are captured; None is `auto_sites`.

    Raises:
        ValueError: for an unknown choice, a selection of another model, or a model without attention to text.
    """
    choices: dict[str, Iterable[str]] = {"kind": KINDS, "steps": STEPS, "precision": PRECISIONS, "keep_on": DEVICES}
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            raise ValueError(f"{METHOD}: {name} must be one of {', '.join(known)}, not “{value}”.")
    family, sites = model_sites(model)
    if heads is None:
        chosen = auto_sites(sites, family)
    else:
        names = check(heads, sites, family)
        chosen = tuple(s for s in sites if s.name in names)
    if settings.kind != SELF and family == "unet":
        without = [s.name for s in chosen if "cross" not in s.kinds]
        if without:
            raise ValueError(f"{without[0]} has no attention to text; choose other layers, or kind “self”.")
    maps = Maps(settings, observer)
    patched = model.clone()
    request(patched, *Recorder(maps, chosen).requests())
    return patched, maps
