"""A whole run with attention written out in float64, for methods that change it at many places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attune.patches.hook.attention import model_sites
from attune.patches.hook.sites import Site


@dataclass
class Seen:
    """One call of attention: weights ``[B, H, queries, keys]`` and values in float64, ``out [B, H, queries, d]``, and what is what.

    ``roles`` says of each row whether it is conditional (0); ``image`` are the queries and ``text`` the keys of these, ``pixels`` the keys
    that are image tokens.
    """

    site: Site
    kind: str
    weights: Tensor
    value: Tensor
    roles: list[int]
    uuids: list[Any]
    grid: tuple[int, int]
    image: slice
    text: slice
    pixels: slice
    step: int

    @property
    def out(self) -> Tensor:
        return self.weights @ self.value


def written_out(model: Any, change: Callable[[Seen], Tensor], size: tuple[int, int] = (8, 8), words: int = 7) -> Any:
    """The model with every attention as ``change(seen) -> out``.

    Args:
        size: of the latent, and ``words`` of the text, where attention is joint.
    """
    family, sites = model_sites(model)
    calls = [(s, kind) for s in sites for kind in s.kinds]
    patched = model.clone()
    count = [0]

    def override(func, q, k, v, heads, *rest, **kwargs):
        site, kind = calls[count[0] % len(calls)]
        count[0] += 1
        if not kwargs.get("skip_reshape"):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        a, b, c = q.double(), k.double(), v.double()
        weights = (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).softmax(-1)
        options = kwargs["transformer_options"]
        chunks = options["cond_or_uncond"]
        pictures = len(q) // len(chunks)
        queries, keys = weights.shape[-2:]
        joint = kind == "joint"
        first = words if joint else 0
        shape = options["activations_shape"][-2:] if family == "unet" else [-(-side // 2) for side in size]
        seen = Seen(
            site,
            kind,
            weights,
            c,
            [role for role in chunks for _ in range(pictures)],
            [uuid for uuid in options["uuids"] for _ in range(pictures)],
            (shape[0], shape[1]),
            slice(first, queries),
            slice(0, words) if joint else slice(0, keys),
            slice(first, keys) if joint else slice(0, keys),
            int((options["sample_sigmas"] >= options["sigmas"][0] * (1 - 1e-6)).sum()) - 1,
        )
        return change(seen).transpose(1, 2).flatten(2).to(q.dtype)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched
