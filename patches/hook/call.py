"""One call of attention, as methods see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .families.base import Tokens
from .parts import Chunk, chunks_of
from .requests import ALL, COND, UNCOND, Rows
from .run import SamplingRun
from .sites import Site
from .texts import OtherText, TextAttention


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, as methods see it.

    Attributes:
        site, kind: where.
        tokens: what the tokens are; `height`, `width`, `image` and `text` say the same.
        batch: rows in the call; ``chunks[i]`` (0 conditional, 1 unconditional) is what chunk ``i`` of equal parts of it is.
        perturbed: this is a forward of our own, in which every row counts as conditional.
        uuids: ComfyUI's name of the conditioning that each chunk belongs to.
        latent: height and width of the latent of this forward (smaller than the picture's under a conditioning area), of all frames of a
            film one under the other.
        sigma: noise level, ``[pictures]``.
        steps: how many the sampler makes, or None outside one.
        which_step: tells `step`, which may wait for the device.
        run: the run's state, or None outside a sampling run.
        forward: state of this forward alone, for whoever has to bring several of its calls together.
        first_times: of each chunk, whether this is its first forward in this evaluation (see `Chunk`).
        texts: what the conditional rows attend to with other texts than the prompt.
        tiles: rows of each picture, next to each other; more than one where another pack cuts pictures up (HyperTile).
        source: in a forward of our own, which of the normal forward's pictures each of its own is; None: the same ones.
    """

    site: Site
    kind: str
    tokens: Tokens
    batch: int
    chunks: tuple[int, ...]
    perturbed: bool
    uuids: tuple[Any, ...]
    latent: tuple[int, int]
    sigma: Tensor | None
    steps: int | None
    which_step: Callable[[], int | None]
    run: SamplingRun | None
    forward: dict[Any, Any] = field(default_factory=dict)
    first_times: tuple[bool, ...] = ()
    texts: Mapping[OtherText, TextAttention] = field(default_factory=dict)
    tiles: int = 1
    source: tuple[int, ...] | None = None

    @property
    def step(self) -> int | None:
        """Number of the sampling step, or None outside a sampler."""
        return self.which_step()

    @property
    def height(self) -> int:
        return self.tokens.height

    @property
    def width(self) -> int:
        return self.tokens.width

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of all image tokens: frames of a film are one under the other."""
        return self.tokens.frames * self.tokens.height, self.tokens.width

    @property
    def image(self) -> slice:
        return self.tokens.image

    @property
    def text(self) -> slice:
        return self.tokens.text

    @property
    def pictures(self) -> int:
        """Rows in each chunk."""
        return self.batch // len(self.chunks)

    def numbers(self, rows: int) -> list[int]:
        """Which picture of the normal forward each of some ``rows`` is of: those of whole chunks, one after the other."""
        own = [row // self.tiles for row in range(self.pictures)]
        return [n if self.source is None else self.source[n] for n in own] * (rows // max(1, self.pictures))

    def parts(self, who: str = ALL) -> tuple[Chunk, ...]:
        """The chunks whose rows a request for ``cond``, ``uncond`` or ``all`` is given, in order."""
        wanted = None if who == ALL or (who == COND and self.perturbed) else 0 if who == COND else 1
        return (
            () if self.perturbed and who == UNCOND else chunks_of(self.batch, self.chunks, self.uuids, self.first_times, wanted)
        )

    def rows(self, who: Rows) -> slice | list[int]:
        """Row numbers of a role, or of pictures in a forward of our own; a slice where it is everything."""
        if who == ALL or (who == COND and self.perturbed):
            return slice(0, self.batch)
        if isinstance(who, tuple):
            of = range(self.tiles)
            numbers = [c.rows.start + p * self.tiles + tile for c in self.parts() for p in who for tile in of]
            return numbers if self.perturbed else []
        return [row for c in self.parts(who) for row in range(c.rows.start, c.rows.stop)]
