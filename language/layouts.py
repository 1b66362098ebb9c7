"""How a CLIP lays out its context: which token of which text encoder is in which column, by running ComfyUI's own code without the encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Place = tuple[str, int]  # an encoder's name among the tokens, and the token's place in all of its chunks
NOBODY = ""  # in place of a name: padding that no encoder has made
ANIMA = 512  # columns that Anima's context has at least
WIDTH = 4  # channels of a stand-in's output
FAR = 1 << 24  # tokens; between the numbers of two encoders


class _StandIn:
    """In place of a text encoder: puts each token's number where its embedding would be."""

    def __init__(self, real: Any, names: Mapping[int, int]):
        self.real, self.names = real, names

    def encode_token_weights(self, chunks: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        count = sum(map(len, chunks))
        numbers = (self.names[id(chunks)] * FAR + torch.arange(count, dtype=torch.float64))[None, :, None].expand(1, -1, WIDTH)
        layers = getattr(self.real, "layer", None)
        out = numbers[:, None].expand(1, len(layers), -1, -1) if isinstance(layers, list) else numbers
        pooled = torch.zeros(1, WIDTH, dtype=torch.float64)
        if getattr(self.real, "return_attention_masks", False):
            return out, pooled, {"attention_mask": torch.ones(1, count, dtype=torch.long)}
        return out, pooled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def places(clip: Any, tokens: Mapping[str, Any]) -> list[Place]:
    """The token of each context column, in order; what a CLIP cuts away (the opening of a chat) has no column.

    Args:
        tokens: of ``clip.tokenize(prompt)``; each a plain token that takes one column.

    Raises:
        ValueError: for a CLIP that lays out its context in a way that this cannot follow.
    """
    model = clip.cond_stage_model
    names = list(tokens)
    numbers = {id(chunks): i for i, chunks in enumerate(tokens.values())}
    whole = model.__new__(type(model))  # a view: the model itself stays as it is
    parts = {**model.__dict__.get("_modules", {}), **{n: m for n, m in model.__dict__.items() if not n.startswith("_")}}
    stands = {n: _StandIn(m, numbers) for n, m in parts.items() if hasattr(m, "encode_token_weights")}
    others = {n: m for n, m in model.__dict__.get("_modules", {}).items() if n not in stands}
    whole.__dict__.update({**model.__dict__, "_modules": others, **stands})
    try:
        out, _, *rest = whole.encode_token_weights(tokens)
        column = out[0, :, 0].tolist()
    except Exception as error:
        raise ValueError(_unknown(names)) from error
    if rest and "t5xxl_ids" in rest[0]:  # Anima makes a context of its own: a column for each of these, and zeros
        if "t5xxl" not in names:
            raise ValueError(_unknown(names))
        count = len(rest[0]["t5xxl_ids"])
        return [("t5xxl", i) for i in range(count)] + [(NOBODY, i) for i in range(count, ANIMA)]
    found = [(names[int(number) // FAR], int(number) % FAR) for number in column]
    if len(set(found)) != len(found):
        raise ValueError(_unknown(names))
    return found


def _unknown(names: Sequence[str]) -> str:
    return (
        f"Attune does not know how this CLIP (text encoders: {', '.join(names)}) lays out its prompts, so that it cannot tell where a word is. "
        "Use nodes that need no words with it."
    )
