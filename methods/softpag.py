"""SoftPAG: guidance from a copy of the conditional pass whose attention maps are pulled towards another map.

Source: "Where and How to Perturb" (NeurIPS 2025, arXiv 2506.10978 v4). Per chosen head ``A' = (1 − u)·A + u·I`` (equation 7), which needs no
map: the head's output is ``O' = (1 − u)·(A V) + u·V``. u = 0 changes nothing, u = 1 is perturbed-attention guidance (PAG, arXiv
2403.17377). In joint attention the identity is over all tokens, text too (equation 6).

Appendices B and C have other targets than the identity and other paths than the line. Where a target or a path is again an attention of
changed queries, keys or values, the fast kernel computes it; only `maximum`, and paths that are not so, make maps, a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DIRAC = (
    1e-6  # mass on every key of a target with zeros, on the log-linear path: from log 0 there is no way back (released code)
)
ROOM = 64 * 1024 * 1024  # bytes of a part of a map


def soften(out: Tensor, value: Tensor, perturbation: Tensor | float) -> Tensor:
    """Pull heads towards what a target map gives, for the identity their own value: ``(1 − u)·O + u·V`` (equation 7).

    Args:
        out: attention output ``A V`` of some heads, ``[..., M, d]``.
        value: what the target gives for the same tokens, broadcastable to ``out``.
        perturbation: ``u`` in [0, 1], a number or broadcastable to ``out``; 0 gives ``out`` and 1 gives ``value`` exactly.

    Returns:
        the perturbed heads' output, ``[..., M, d]``, in the dtype of ``out``.
    """
    if isinstance(perturbation, Tensor):
        u = perturbation.to(out.dtype)
        return torch.where(u == 1, value, torch.where(u == 0, out, torch.lerp(out, value, u)))  # lerp is not exact at its ends
    if perturbation == 1:
        return value.expand_as(out) if value.shape != out.shape else value
    return out if perturbation == 0 else torch.lerp(out, value, perturbation)


def guide(guided: Tensor, conditional: Tensor, perturbed: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Move a prediction away from the perturbed one: ``x̂ = x_cfg + f·s·(x_cond − x_pert)`` (equation 5, beside CFG).

    Args:
        guided: the prediction after CFG, ``[B, ...]`` (after no CFG it is the conditional one: SoftPAG needs no CFG).
        conditional: the conditional prediction ``x_cond``, ``[B, ...]``.
        perturbed: the prediction with perturbed heads ``x_pert``, ``[B, ...]``.
        scale: guidance scale ``s``; 0 returns ``guided`` itself.
        rescale: ``φ`` in [0, 1]: how far the term is shrunk, by ``f = φ·σ(x_cond)/σ(x_cfg + term) + 1 − φ`` per picture, so
            that a picture keeps the contrast of the conditional one (Lin et al., arXiv 2305.08891, section 3.4).

    Returns:
        the guided prediction ``x̂``, ``[B, ...]``.
    """
    if scale == 0:
        return guided
    term = scale * (conditional - perturbed)
    if rescale > 0:
        axes = tuple(range(1, guided.ndim))
        spread = (guided + term).std(dim=axes, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
        term = term * (rescale * conditional.std(dim=axes, keepdim=True) / spread + 1 - rescale)
    return guided + term


# --- other targets and paths ----------------------------------------------------------------------------------------------


class Attention(Protocol):
    """Chosen heads of one attention, over all its tokens: ``q``, ``k``, ``v`` and ``out [..., M, d]``, each made when it is asked for.

    ``scale`` is of the logits, ``1/√d``, and ``mask [..., 1 or M, M]`` is added to them, if there is one.
    """

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def out(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def mask(self) -> Tensor | None: ...
    def attend(self, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """The fast kernel's output with some of its inputs replaced."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Which of ``count`` tokens are image and which text (an empty range outside of joint attention)."""

    count: int
    image: slice
    text: slice

    def of(self, who: str) -> slice:
        """The range of ``all``, ``image`` or ``text`` tokens."""
        return {ALL: slice(0, self.count), IMAGE: self.image, TEXT: self.text}[who]


TOKENS = ALL, IMAGE, TEXT = "all", "image", "text"
TARGETS: dict[str, str] = {  # whose rows each of them replaces
    "identity": ALL,
    "uniform": ALL,
    "mean query": ALL,
    "mean image query": IMAGE,
    "mean text query": TEXT,
    "temperature": ALL,
    "maximum": ALL,
    "image-image identity": IMAGE,
    "image-image mask": IMAGE,
    "image-text mask": IMAGE,
    "text-image mask": TEXT,
    "text-text identity": TEXT,
    "text-text mask": TEXT,
}
_LOGITS = ("uniform", "mean query", "mean image query", "mean text query", "temperature")  # an attention of other queries


def queries(name: str, q: Tensor, rows: slice, tokens: Tokens, temperature: float) -> Tensor:
    """The queries whose attention is the target ``name``, for the queries in ``rows``: ``[..., rows or 1, d]``.

    - uniform (equation 8): queries of 0 look at every key alike;
    - mean query (equations 9 and 10, SEG at its limit): one query, the mean over all, the image's or the text's;
    - temperature (equation 11): ``softmax(log A / τ)`` is the attention of ``q / τ``.
    """
    if name == "uniform":
        return torch.zeros_like(q[..., :1, :])
    if name == "temperature":
        return q[..., rows, :] / temperature
    return _wide(q[..., tokens.of(TARGETS[name]), :]).mean(-2, keepdim=True).to(q.dtype)


def target_output(name: str, heads: Attention, rows: slice, tokens: Tokens, temperature: float) -> Tensor:
    """What the target map gives for the queries in ``rows``: ``[..., rows or 1, d]``, without a map but for `maximum`."""
    q, k, v = heads.q, heads.k, heads.v
    if name == "identity":
        return v[..., rows, :]
    if name == "uniform":
        return _wide(v).mean(-2, keepdim=True).to(v.dtype)
    if name in _LOGITS:
        return heads.attend(q=queries(name, q, rows, tokens, temperature))
    if name == "maximum":
        return _maximum(q[..., rows, :], k, v, heads.scale)
    image, text = tokens.image, tokens.text
    other = {"image-image": text, "image-text": image, "text-image": text, "text-text": image}[name.split(" ")[0]]
    if name.endswith("mask"):  # a block of logits is −∞: the rest of the row is attended to alone
        return heads.attend(q=q[..., rows, :], k=k[..., other, :], v=v[..., other, :])
    return _own_and_others(heads, rows, other)


def _wide(t: Tensor) -> Tensor:
    """At least single precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``q kᵀ`` times the scale, in at least single precision."""
    return _wide(q) @ _wide(k).transpose(-1, -2) * scale


def _own_and_others(heads: Attention, rows: slice, others: slice) -> Tensor:
    """Attention of every query to its own key and to some other keys: a block whose logits off the diagonal are −∞."""
    q, k, v = heads.q[..., rows, :], heads.k[..., rows, :], heads.v[..., rows, :]
    looked, seen = heads.k[..., others, :], heads.v[..., others, :]
    diagonal = (_wide(q) * _wide(k)).sum(-1, keepdim=True) * heads.scale
    parts = []
    for at in _parts(q, looked):
        weights = torch.cat([diagonal[..., at, :], _logits(q[..., at, :], looked, heads.scale)], dim=-1).softmax(-1)
        parts.append(weights[..., :1] * _wide(v[..., at, :]) + weights[..., 1:] @ _wide(seen))
    return torch.cat(parts, dim=-2).to(v.dtype)


def _maximum(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The value of the key with the greatest logit, the limit of temperature 0 (equation 12); the first one of equals."""
    found = []
    for at in _parts(q, k):
        best = _logits(q[..., at, :], k, scale).argmax(-1)
        found.append(v.gather(-2, best[..., None].expand(*best.shape, v.shape[-1])))
    return torch.cat(found, dim=-2)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Ranges of queries whose maps have room together."""
    size = max(1, ROOM // (4 * max(1, q[..., 0, 0].numel()) * k.shape[-2]))
    return [slice(i, min(i + size, q.shape[-2])) for i in range(0, q.shape[-2], size)]


def target_map(name: str, logits: Tensor, mean: Tensor | None, first: int, tokens: Tokens, temperature: float) -> Tensor:
    """The target as a map, for some queries.

    Args:
        logits: of these queries ``[..., m, N]``; ``mean`` those of the mean query ``[..., 1 or m, N]``, for targets that have one.
        first: the token that the first of them is.
    """
    at = torch.arange(logits.shape[-2], device=logits.device)
    if name == "identity":
        identity = torch.zeros_like(logits)
        identity[..., at, at + first] = 1.0
        return identity
    if name == "maximum":
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    if name == "temperature":
        return (logits / temperature).softmax(-1)
    if name in _LOGITS:
        assert mean is not None
        return mean.softmax(-1).expand_as(logits)
    block = tokens.image if name.split(" ")[0].endswith("image") else tokens.text
    masked = logits.clone()
    masked[..., block] = float("-inf")
    if name.endswith("identity"):
        masked[..., at, at + first] = logits[..., at, at + first]
    return masked.softmax(-1)


def linear(a: Tensor, b: Tensor, u: float) -> Tensor:
    """``(1 − u)·A + u·B`` (equation 7)."""
    return torch.lerp(a, b, u)


def log_linear(a: Tensor, b: Tensor, u: float) -> Tensor:
    """``A^(1 − u)·B^u``, each row brought to a sum of 1 (released code)."""
    return ((1 - u) * a.log() + u * b.log()).softmax(-1)


def fisher_rao(a: Tensor, b: Tensor, u: float) -> Tensor:
    """The line between square roots, squared, each row brought to a sum of 1: the released code's Fisher–Rao path."""
    mixed = torch.lerp(a.sqrt(), b.sqrt(), u).square()
    return mixed / mixed.sum(-1, keepdim=True)


def slerp(a: Tensor, b: Tensor, u: float) -> Tensor:
    """The geodesic of the Fisher–Rao metric: on the sphere of square roots, from A to B at constant speed."""
    x, y = a.sqrt(), b.sqrt()
    angle = (x * y).sum(-1, keepdim=True).clamp(-1, 1).acos()
    near = angle < 1e-4
    sine = angle.sin().masked_fill(near, 1.0)
    mixed = torch.where(near, 1 - u, ((1 - u) * angle).sin() / sine) * x + torch.where(near, u, (u * angle).sin() / sine) * y
    return mixed.square() / mixed.square().sum(-1, keepdim=True)


PATHS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "linear": linear,
    "log-linear": log_linear,
    "Fisher-Rao": fisher_rao,
    "slerp": slerp,
}


def needs_map(target: str, path: str, u: float) -> bool:
    """Whether a whole attention map is made, a few queries at a time: slow, and little memory."""
    return target == "maximum" or (path != "linear" and u < 1 and not (path == "log-linear" and target in _LOGITS))


def rows_of(who: str, target: str) -> str | None:
    """The tokens whose rows are perturbed: ``all``, ``image`` or ``text``; None where a target has nothing to do with ``who``."""
    own = TARGETS[target]
    return own if who in (ALL, own) else who if own == ALL else None


def perturb(
    heads: Attention,
    tokens: Tokens,
    who: str,
    u: float,
    target: str = "identity",
    path: str = "linear",
    temperature: float = 1.0,
) -> Tensor:
    """The output of heads whose attention is moved to a target along a path.

    Args:
        who: the tokens whose rows may be perturbed: ``all``, ``image`` or ``text``; the target may concern fewer (`rows_of`).
        u: how far along the path, in (0, 1]; at 1 every path is at its target.
        target, path: names in `TARGETS` and `PATHS`; ``temperature`` is τ of the target of that name.

    Returns:
        ``[..., M, d]``, rows of other tokens as they are.
    """
    concerned = rows_of(who, target)
    rows = slice(0, 0) if concerned is None else tokens.of(concerned)
    if rows.stop == rows.start:
        return heads.out
    moved = _moved(heads, tokens, rows, u, target, path, temperature)
    if rows == slice(0, tokens.count):
        return moved
    out = heads.out.clone()
    out[..., rows, :] = moved
    return out


def _moved(heads: Attention, tokens: Tokens, rows: slice, u: float, target: str, path: str, temperature: float) -> Tensor:
    """`perturb` for the queries in ``rows``: ``[..., rows, d]``."""
    along_the_line = path == "linear" or u == 1
    if along_the_line and (target == "identity" or heads.mask is None):
        found = target_output(target, heads, rows, tokens, temperature)
        if u < 1:
            return soften(heads.out[..., rows, :], found, u)
        return found.expand(*found.shape[:-2], rows.stop - rows.start, found.shape[-1])
    own = heads.q[..., rows, :]
    if path == "log-linear" and target in _LOGITS and heads.mask is None:
        # A^(1 − u)·B^u is the attention of the queries between.
        return heads.attend(q=torch.lerp(own, queries(target, heads.q, rows, tokens, temperature).expand_as(own), u))
    keys, values = _wide(heads.k), _wide(heads.v)
    mean = None
    if target in _LOGITS and target != "temperature":
        mean = _logits(queries(target, heads.q, rows, tokens, temperature), keys, heads.scale)
    parts = []
    for at in _parts(own, keys):
        a, mean_here = _logits(own[..., at, :], keys, heads.scale), mean
        if heads.mask is not None:
            hidden = heads.mask if heads.mask.shape[-2] == 1 else heads.mask[..., rows, :][..., at, :]
            a, mean_here = a + hidden, None if mean is None else mean + hidden
        b = target_map(target, a, mean_here, rows.start + at.start, tokens, temperature)
        if path == "log-linear" and u < 1 and target not in _LOGITS:
            b = b * (1 - DIRAC * b.shape[-1]) + DIRAC
        parts.append((b if u == 1 else PATHS[path](a.softmax(-1), b, u)) @ values)
    return torch.cat(parts, dim=-2).to(heads.v.dtype)
