"""A small dual encoder of the world of shapes: one vector for a picture, one for a text, and their cosine says how well they fit.

The picture side is the bundled autoencoder's encoder and a convolutional tower on its latents; the text side is a transformer on
whole words. ``python3 run.py train`` trains both towers; ``python3 run.py bench scorer`` measures them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..methods import scores as maths
from ..scoring.folders import digest
from ..scoring.scorers import Scorer, chunks, managed, ready
from . import checkpoint, model, world
from .reader import CHUNK, judge, load_reader, read
from .reader import WEIGHTS as READER_WEIGHTS

WEIGHTS = Path(__file__).parent / "weights" / "scorer.safetensors"
WIDTH = 256  # of the vectors
KINDS = ("similarity", "all present", "all bound")


# --- the net --------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.middle = nn.GroupNorm(8, width), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.middle(self.first(F.silu(self.norm(x))))))


class PictureTower(nn.Module):
    """Latents of deviation 1, ``[B, 4, h, w]``, to vectors ``[B, WIDTH]``."""

    MIXED = 384

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(4, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(64, 128, 3, stride=2, padding=1), _Residual(128), _Residual(128))
        self.mix = nn.Sequential(nn.GroupNorm(8, 128), nn.SiLU(), nn.Conv2d(128, self.MIXED, 1), nn.GELU())
        self.out = nn.Linear(2 * self.MIXED, WIDTH)

    def features(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of each place: ``[B, 64, h, w]``, and ``[B, 128, h/2, w/2]``, and of these ``[B, MIXED, h/2, w/2]`` to be pooled."""
        fine = self.fine(latents)
        coarse = self.coarse(fine)
        return fine, coarse, self.mix(coarse)

    def pool(self, mixed: Tensor) -> Tensor:
        return self.out(torch.cat([mixed.mean((2, 3)), mixed.amax((2, 3))], dim=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.pool(self.features(latents)[2])


class TextTower(nn.Module):
    """Word numbers ``[T, L]``, 0 where a text has ended, to vectors ``[T, WIDTH]``."""

    LENGTH = 64  # words

    def __init__(self, words: int, width: int = 128, layers: int = 3):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.5 * torch.randn(self.LENGTH, width))
        self.near = nn.Conv1d(width, width, 7, padding=3)  # which adjective stands at which noun
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, WIDTH)

    def forward(self, numbers: Tensor) -> Tensor:
        ended = numbers == 0
        x = (self.words(numbers) + self.places[: numbers.shape[1]]).masked_fill(ended[..., None], 0)
        x = x + F.gelu(self.near(x.transpose(1, 2))).transpose(1, 2)
        x = self.body(x, src_key_padding_mask=ended)
        x = x.masked_fill(ended[..., None], 0).sum(1) / (~ended).sum(1, keepdim=True)
        return self.out(x)


class Vocabulary:
    """Whole words and their numbers; 0 is the end, 1 every word that the world does not have."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.numbers = {word: n for n, word in enumerate(self.words, 2)}

    def __len__(self) -> int:
        return len(self.words) + 2

    def batch(self, texts: Sequence[str]) -> Tensor:
        """``int64 [T, L]``, L the longest text's words. An empty text is one unknown word; past 64 words nothing is read."""
        rows = [[self.numbers.get(w, 1) for w in re.findall(r"[a-z]+", t.lower())][: TextTower.LENGTH] or [1] for t in texts]
        return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)


class DualEncoder(nn.Module):
    """Both towers, and what makes a probability of their cosine: ``sigmoid(scale · cosine + bias)``."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.picture, self.text = PictureTower(), TextTower(len(vocabulary))
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.65)), nn.Parameter(torch.tensor(-5.0))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=100)

    def say(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1, ``[T, WIDTH]``."""
        return F.normalize(self.text(self.vocabulary.batch(texts).to(self.bias.device)), dim=-1)

    def see(self, latents: Tensor) -> Tensor:
        """Vectors of length 1, ``[B, WIDTH]``."""
        return F.normalize(self.picture(latents), dim=-1)


def load(path: Path | None = None) -> DualEncoder:
    """The trained towers (default: the shipped ones), in float32.

    Raises:
        FileNotFoundError: when the weights are missing from the pack's folder.
        ValueError: when they are of another version of the world.
    """
    path = path or WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"the demo scorer's weights are missing ({path}); install the pack again, they come with it")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("data_version") != world.DATA_VERSION:
            found = metadata.get("data_version")
            raise ValueError(f"{path} scores version {found} of the world, which is now {world.DATA_VERSION}")
        encoder = DualEncoder(Vocabulary(json.loads(metadata["words"])))
        encoder.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return encoder.eval().requires_grad_(False)


class Eye(nn.Module):
    """Pictures ``[B, 3, H, W]`` in [0, 1] to latents of deviation 1, by the bundled autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        whole = model.ARCHITECTURE.autoencoder()
        whole.load_state_dict(model.stored()["autoencoder"])
        self.encoder, self.quant_conv = whole.encoder, whole.quant_conv

    def forward(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images * 2 - 1))[:, :4] * checkpoint.LATENT_SCALE


# --- as scorers -----------------------------------------------------------------------------------------------------


def _eights(images: Tensor) -> Tensor:
    """``[B, h, w, 3]`` as ``[B, 3, H, W]`` with sides divisible by 8, cut at the right and at the bottom.

    Raises:
        ValueError: when nothing is left to look at.
    """
    height, width = (n // 8 * 8 for n in images.shape[1:3])
    if min(height, width) < 32:
        raise ValueError(
            f"Demo Scorer: a picture of {images.shape[2]}×{images.shape[1]} pixels is too small; the demo model draws 128×128."
        )
    return images[:, :height, :width].permute(0, 3, 1, 2).contiguous()


class DemoScorer(Scorer):
    """The dual encoder as a scorer: cosines, for pictures at the demo model's own scale.

    `chance` makes probabilities of them: a text that is as likely true as not has the cosine `even`.
    """

    cosine = True
    name = "demo"

    def __init__(self, path: Path | None = None):
        encoder = load(path)
        self.patcher = managed(nn.ModuleDict({"eye": Eye(), "encoder": encoder}))
        self.models = (self.patcher,)
        self.key = digest([path or WEIGHTS, model.WEIGHTS / "shapes.safetensors"], "similarity")
        self._scale, self._bias = float(encoder.scale), float(encoder.bias)

    @property
    def scale(self) -> float:
        return self._scale

    @property
    def even(self) -> float:
        """The cosine at which a text is as likely true as not."""
        return -self._bias / self._scale

    def chance(self, cosines: Tensor) -> Tensor:
        return torch.sigmoid(self._scale * cosines + self._bias)

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return maths.cosines(self.features(images), self.text_features(texts))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        out = []
        for part in chunks(images):
            network, device = ready(self.patcher)
            out.append(network["encoder"].see(network["eye"](_eights(part).to(device))).float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """A vector of length 1 for each text: float32 ``[T, WIDTH]`` on the CPU."""
        network, _ = ready(self.patcher)
        return network["encoder"].say(texts).float().cpu()


class ReaderScorer(Scorer):
    """The reader of pictures as a scorer: 1 where all that the text states is there, else 0; with ``share``, how much of it is.

    Args:
        kind: "present" counts things whose shape is there, "bound" those that also have the stated colour and pattern.
    """

    def __init__(self, kind: str, share: bool = False):
        if kind not in ("present", "bound"):
            raise ValueError(f"there is no objective “{kind}”; choose present or bound")
        self.kind, self.share = kind, share
        self.patcher = managed(load_reader())
        self.models = (self.patcher,)
        self.name = f"demo: {'share' if share else 'all'} {kind}"
        self.key = digest([READER_WEIGHTS], self.name)

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        captions = [parse(t) for t in texts]
        out = []
        for part in chunks(images, CHUNK):
            network, _ = ready(self.patcher)
            for reading in read(network, _eights(part)):
                verdicts = [judge(reading, c) for c in captions]
                # A text of the background alone, such as “a grey wall”, is judged by that.
                right = [getattr(v, self.kind) or (v.background,) for v in verdicts]
                out.append([sum(r) / len(r) if self.share else float(all(r)) for r in right])
        return torch.tensor(out, dtype=torch.float32)


def scorer(kind: str = KINDS[0]) -> Scorer:
    """The bundled scorer of one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind “{kind}” of demo scorer; choose one of: {', '.join(KINDS)}")
    return DemoScorer() if kind == KINDS[0] else ReaderScorer(kind.removeprefix("all "))


_AFTER = {"stripes": "striped", "dots": "dotted", "checks": "checkered"}
_RELATIONS = {"left": "left", "right": "right", "above": "above", "over": "above", "below": "below", "under": "below"}


def parse(text: str) -> world.Caption:
    """What a sentence of the world states: `world.describe` backwards. A pattern that is not said is plain.

    Raises:
        ValueError: for a text without a thing or a background of the world.
    """
    things: list[world.Stated] = []
    background: tuple[str | None, str | None] = (None, None)
    colour = pattern = relation = None
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in world.COLOURS or word in world.BACKGROUNDS:
            colour = word
        elif word in world.PATTERNS:
            pattern = word
        elif word in world.NOUNS:
            things.append(world.Stated(word, colour, pattern or "plain"))
            colour = pattern = None
        elif word in _AFTER and things:
            things[-1] = world.Stated(things[-1].noun, things[-1].colour, _AFTER[word])
        elif word in ("wall", "background", "floor", "cloth"):
            background = (colour, pattern or "plain") if colour or pattern else (None, None)
            colour = pattern = None
        elif word in _RELATIONS and len(things) == 1:
            relation = _RELATIONS[word]
    if not things and background == (None, None):
        raise ValueError(f"“{text}” names nothing that the demo model knows; name one of: {', '.join(world.NOUNS)}.")
    if len(things) != 2:
        relation = None
    if relation in ("right", "below"):  # kept as said, stored from the other side
        things.reverse()
        relation = {"right": "left", "below": "above"}[relation]
    return world.Caption(text, tuple(things), relation, background)
