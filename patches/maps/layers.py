"""Which layers' maps show objects best, and which methods read."""

from __future__ import annotations

from ..hook.sites import Site


def every_site(sites: tuple[Site, ...], family: str) -> tuple[Site, ...]:
    """All sites that can show objects.

    UNets: those with attention to text at a quarter and an eighth of the latent's size, as S-CFG and Detail++ have it; where a model has
    neither, at its two coarsest sizes. SD3: all; FLUX: its double blocks.

    Raises:
        ValueError: for a model without attention to text.
    """
    if family != "unet":
        return tuple(s for s in sites if s.name.startswith(("joint.", "double."))) or sites
    with_text = [s for s in sites if "cross" in s.kinds]
    if not with_text:
        raise ValueError(
            "this model has no attention to text, so there are no word maps to read; connect a text-to-image model."
        )
    strides = sorted({s.stride for s in with_text})
    wanted = [s for s in strides if s in (4, 8)] or strides[-2:]
    return tuple(s for s in with_text if s.stride in wanted)


def auto_sites(sites: tuple[Site, ...], family: str) -> tuple[Site, ...]:
    """A few of `every_site`, which show objects nearly as well.

    UNets: one layer of each block, the middle one, where a block has several: SDXL has up to ten. Transformers: three layers around the
    middle.

    Raises:
        ValueError: for a model without attention to text.
    """
    every = every_site(sites, family)
    if family != "unet":
        return tuple(dict.fromkeys(every[round(len(every) * part)] for part in (0.33, 0.5, 0.66) if every))
    blocks: dict[tuple[str, int], list[Site]] = {}
    for site in every:
        blocks.setdefault(site.block, []).append(site)
    return tuple(layers[len(layers) // 2] for layers in blocks.values())
