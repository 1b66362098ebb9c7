"""Pictures of the bundled model at known seeds, made with ComfyUI's own sampler, and what the reader sees in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ....demo import world
from ....demo.reader import Verdict, judge, load_reader, read


def sample(
    patched: Any,
    positive: Any,
    negative: Any,
    latent: Tensor,
    seeds: Sequence[int],
    steps: int,
    cfg: float,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 0,
) -> Tensor:
    """Finished latents ``[len(seeds), C, h, w]`` from ``latent [1, C, h, w]``; picture ``i`` starts from the noise of ``seeds[i]``.

    Args:
        seed: of what the sampler itself draws.
    """
    noise = torch.cat([comfy.sample.prepare_noise(latent, i) for i in seeds])
    image = latent.repeat(len(seeds), 1, 1, 1)
    return comfy.sample.sample(
        patched, noise, steps, cfg, sampler, scheduler, positive, negative, image, seed=seed, disable_pbar=True
    )


@torch.inference_mode()
def generate(
    patched: Any,
    clip: Any,
    vae: Any,
    texts: Sequence[str],
    cfg: float,
    seed: int,
    steps: int = 20,
    batch: int = 25,
    after: Callable[[Tensor], Tensor] | None = None,
    side: int = world.SIZE,
) -> Tensor:
    """Pictures ``[B, side, side, 3]`` in [0, 1] with euler; picture ``i`` starts from the noise of seed ``seed + i``.

    Args:
        after: what is done to finished latents.
        side: of the pictures, in pixels.
    """
    out = []
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        conds = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True) for t in part]
        positive = [[torch.cat([c for c, _ in conds]), {"pooled_output": torch.cat([p for _, p in conds])}]]
        seeds = range(seed + start, seed + start + len(part))
        latent = torch.zeros(1, 4, side // 8, side // 8)
        samples = sample(patched, positive, empty, latent, seeds, steps, cfg, seed=seed)
        out.append(vae.decode(samples if after is None else after(samples)))
    return torch.cat(out)


def verdicts(pictures: Tensor, captions: Sequence[world.Caption]) -> list[Verdict]:
    """What the reader thinks of each picture against its caption."""
    return [judge(r, c) for r, c in zip(read(load_reader(), pictures), captions, strict=True)]
