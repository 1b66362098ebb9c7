"""Our nodes on one model with each other and with ComfyUI's own patches, in every order.

A stack makes a picture in two steps, or is refused in a sentence before the first step is done. Afterwards the plain model gives the same
bits as before, and nothing is left on it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import random
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ... import nodes
from . import models
from .fuzz import FINE, REFUSED, WRONG, fault, finite, own_folder

PROGRESS = 200  # stacks from one line about progress to the next
Patch: TypeAlias = Callable[..., Any]  # a MODEL and its family to the patched MODEL; keywords are other values of ours


# --- what is stacked --------------------------------------------------------------------------------------------------


def _ours(node: Any, **chosen: Any) -> Patch:
    """One of our nodes with its defaults and some other values; those that are functions are made for a family."""

    def patch(model: Any, family: str, **more: Any) -> Any:
        values = {e.id: e.default for e in node.define_schema().inputs if hasattr(e, "default") and not e.optional}
        made = {name: value(family) if callable(value) else value for name, value in chosen.items()}
        known = {name: value for name, value in more.items() if name in values}
        return node.execute(**{**values, **made, **known, "model": model}).args[0]

    return patch


def _cores(module: str, name: str, **chosen: Any) -> Patch:
    """One of ComfyUI's nodes."""

    def patch(model: Any, family: str) -> Any:
        node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        if hasattr(node, "EXECUTE_NORMALIZED"):
            return node.EXECUTE_NORMALIZED(model=model, **chosen).args[0]
        return getattr(node(), node.FUNCTION)(model=model, **chosen)[0]

    return patch


def _lora(model: Any, family: str) -> Any:
    """Weights with something added, as Load LoRA does it."""
    patched = model.clone()
    keys = [k for k, t in model.model_state_dict().items() if t.ndim == 2 and k.endswith("weight")][:8]
    patched.add_patches({k: ("diff", (0.1 * torch.ones_like(model.model_state_dict()[k]),)) for k in keys})
    return patched


def _in_the_middle(model: Any, family: str) -> Any:
    """What GLIGEN does: a module of its own for every transformer block, found by the block's number."""
    patched = model.clone()
    blocks = [m for m in model.model.diffusion_model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    gates = [1 + 0.1 * number for number in range(len(blocks))]
    patched.set_model_patch(lambda x, options: x * gates[options["transformer_index"]], "middle_patch")
    return patched


def _words(family: str) -> Any:
    return models.words()[0]


OURS: dict[str, Patch] = {
    "SoftPAG": _ours(nodes.AttuneSoftPAG),
    "SoftPAG everywhere": _ours(nodes.AttuneSoftPAG, heads=lambda family: models.heads(family, "L*"), perturbation=0.5),
    "Semantic-aware CFG": _ours(nodes.AttuneSemanticCFG),
    "Capture Attention Maps": _ours(nodes.AttuneAttentionMaps, steps="every step"),
    "Attention Regulation": _ours(nodes.AttuneRegulation, words=_words, iterations=3),
    "Semantic Gate": _ours(
        nodes.AttuneSemanticGate,
        words=_words,
        scorer=lambda _: models.judge("similarity"),
        every=1,
        start_percent=0.0,
        end_percent=1.0,
    ),
    "Phrase Fusion": _ours(nodes.AttunePhraseFusion, words=lambda _: models.words("red striped star")[0]),
    "Refine Attention": _ours(nodes.AttuneRefineMaps, words=_words),
    "Word Weights": _ours(nodes.AttuneWordWeights, words=_words, weights="star: 1.6\ncircle: -0.5"),
    "Words in places": _ours(
        nodes.AttuneWordWeights, words=_words, weights="star: 1", mask=lambda _: torch.eye(2).repeat(3, 5), mode="value"
    ),
    "Negative Prompt at cfg 1": _ours(nodes.AttuneNegative, negative=lambda _: models.conditioning("a grey wall")),
    "Fix My Prompt": _ours(nodes.AttuneFix, clip=lambda _: models.clip(), text=models.PROMPT, problem="something is missing"),
    "Head Filter": _ours(nodes.AttuneHeadFilter, heads=lambda family: models.heads(family, "L0-2H0"), kind="both"),
}
CORES: dict[str, Patch] = {
    "FreeU_V2": _cores("nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "HyperTile": _cores("nodes_hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False),
    "PatchModelAddDownscale": _cores(
        "nodes_model_downscale",
        "PatchModelAddDownscale",
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=0.35,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    "SelfAttentionGuidance": _cores("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "PerturbedAttentionGuidance": _cores("nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
    "RescaleCFG": _cores("nodes_model_advanced", "RescaleCFG", multiplier=0.7),
    "TomePatchModel": _cores("nodes_tomesd", "TomePatchModel", ratio=0.3),
    "SkipLayerGuidanceDiT": _cores(
        "nodes_slg",
        "SkipLayerGuidanceDiT",
        scale=3.0,
        start_percent=0.0,
        end_percent=1.0,
        double_layers="1",
        single_layers="1",
        rescaling_scale=0.5,
    ),
    "ModelSamplingDiscrete": _cores("nodes_model_advanced", "ModelSamplingDiscrete", sampling="v_prediction", zsnr=True),
    "ModelSamplingSD3": _cores("nodes_model_advanced", "ModelSamplingSD3", shift=3.0),
    "DifferentialDiffusion": _cores("nodes_differential_diffusion", "DifferentialDiffusion"),
    "TCFG": _cores("nodes_tcfg", "TCFG"),
    "CFGZeroStar": _cores("nodes_cfg", "CFGZeroStar"),
    "APG": _cores("nodes_apg", "APG", eta=1.0, norm_threshold=5.0, momentum=0.5),
    "Epsilon Scaling": _cores("nodes_eps", "EpsilonScaling", scaling_factor=1.05),
    "LoRA": _lora,
    "GLIGEN's way": _in_the_middle,
}


# --- what samples them ------------------------------------------------------------------------------------------------

Sampler: TypeAlias = Callable[[Any, str, Callable[..., None]], Tensor]


def _ksampler(model: Any, family: str, callback: Callable[..., None]) -> Tensor:
    return models.sample(model, family, callback=callback)


def _upscaling(model: Any, family: str, callback: Callable[..., None]) -> Tensor:
    """SamplerLCMUpscale, which makes the latent larger from step to step."""
    extras = importlib.import_module("comfy_extras.nodes_advanced_samplers")
    sampler = extras.SamplerLCMUpscale.execute(2.0, -1, "bislerp").args[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    empty = models.latent(family)
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample_custom(
        model,
        noise,
        3.0,
        sampler,
        sigmas,
        models.words()[1],
        models.conditioning("a grey wall"),
        empty,
        callback=callback,
        disable_pbar=True,
        seed=1,
    )


def _detail(model: Any, family: str, callback: Callable[..., None]) -> Tensor:
    """The Detail++ Sampler, which moves the layout's noise in its first step."""
    values = {
        e.id: e.default for e in nodes.AttuneDetailSampler.define_schema().inputs if getattr(e, "default", None) is not None
    }
    values |= {"steps": 2, "optimize": "entropy", "optimize_steps": 1, "sampler_name": "euler", "scheduler": "normal"}
    positive, negative = models.encoded_branches(), models.conditioning("a grey wall")
    latent = {"samples": models.latent(family)}
    result = nodes.AttuneDetailSampler.execute(model=model, positive=positive, negative=negative, latent_image=latent, **values)
    return result.args[0]["samples"]


def _headhunter(model: Any, family: str, callback: Callable[..., None]) -> Tensor:
    """HeadHunter, which tries two heads on one picture; its result is the sheet."""
    values = {e.id: e.default for e in nodes.AttuneHeadHunter.define_schema().inputs if getattr(e, "default", None) is not None}
    values |= {"rounds": 1, "heads_per_round": 1, "images_per_candidate": 1, "steps": 2, "cfg": 3.0}
    values |= {"objective": "a star", "sampler_name": "euler", "scheduler": "normal", "scorer": models.judge("similarity")}
    values |= {"model": model, "vae": models.vae(family), "candidates": models.heads(family, "L0H0-1")}
    values |= {"positive": models.words()[1], "negative": models.conditioning("a grey wall")}
    values |= {"latent_image": {"samples": models.latent(family)}}
    with own_folder():
        return nodes.AttuneHeadHunter.execute(**{name: [value] for name, value in values.items()}).args[1]


SAMPLERS: dict[str, Sampler] = {
    "KSampler": _ksampler,
    "SamplerLCMUpscale": _upscaling,
    "Detail++ Sampler": _detail,
    "HeadHunter": _headhunter,
}


# --- the matrix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Patches in the order in which a model goes through them, and what samples it then."""

    family: str
    patches: tuple[str, ...]
    sampler: str = "KSampler"

    def __str__(self) -> str:
        return f"{self.family}: {' → '.join((*self.patches, self.sampler))}"

    def model(self) -> Any:
        """The patched MODEL."""
        model = models.model(self.family)
        for name in self.patches:
            model = (OURS | CORES)[name](model, self.family)
        return model


@cache
def cores(family: str, sampler: str = "KSampler") -> tuple[str, ...]:
    """ComfyUI's patches that work without us on a family and with a sampler, and are in this ComfyUI."""
    found = []
    for name, patch in CORES.items():
        try:
            works = finite(SAMPLERS[sampler](patch(models.model(family), family), family, lambda *_: None))
        except Exception:  # such as FreeU on a model that is no UNet
            continue
        if works:
            found.append(name)
    return tuple(found)


def stacks() -> list[Stack]:
    """Every ordered pair of our nodes under and over each of ComfyUI's patches; and each of ours and theirs for the other samplers."""
    found = []
    for family in models.FAMILIES:
        theirs = cores(family)
        pairs = [(a, b) for a in OURS for b in OURS]
        found += [Stack(family, pair) for pair in pairs]
        found += [Stack(family, patches) for a, b in pairs for c in theirs for patches in ((c, a, b), (a, b, c))]
        for sampler in list(SAMPLERS)[1:]:
            theirs = cores(family, "SamplerLCMUpscale") if sampler == "SamplerLCMUpscale" else cores(family)
            singles = [(), *((name,) for name in (*OURS, *theirs))]
            both = [patches for a in OURS for c in theirs for patches in ((a, c), (c, a))]
            found += [Stack(family, patches, sampler) for patches in (*singles, *both)]
    return found


# --- what becomes of them ---------------------------------------------------------------------------------------------


@cache
def plain(family: str) -> Tensor:
    """What the model gives without patches."""
    return models.sample(models.model(family), family)


def left(family: str) -> list[str]:
    """What is on a plain model that was not there when it was made."""
    patcher = models.model(family)
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {})}
    options.pop("transformer_options", None)
    found = [f"option {key}" for key in options]
    found += [f"wrapper {key}" for kinds in (patcher.wrappers, patcher.callbacks) for by in kinds.values() for key in by]
    for name, module in patcher.model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        if any(hooks) or "forward" in module.__dict__:
            found.append(f"hook on {name}")
        if not type(module).__module__.startswith(("comfy.", "torch.")) and type(module).__name__ not in _classes(family):
            found.append(f"{type(module).__name__} in the place of {name}")
    return found


@cache
def _classes(family: str) -> frozenset[str]:
    return frozenset(type(module).__name__ for module in models.model(family).model.modules())


def runs_alive() -> int:
    """Sampling runs whose state nobody has let go of."""
    gc.collect()
    return sum(type(thing).__name__ == "SamplingRun" for thing in gc.get_objects())


def run(stack: Stack) -> tuple[str, str]:
    """What becomes of a stack, and in which words."""
    before = plain(stack.family)
    _classes(stack.family)
    steps: list[int] = []
    try:
        with torch.inference_mode():
            made = SAMPLERS[stack.sampler](stack.model(), stack.family, lambda step, *_: steps.append(step))
        outcome = (FINE, "") if finite(made) else (WRONG, "NaN or infinity in the result")
    except Exception as error:
        wrong = fault(error) or (f"came after {len(steps)} steps" if steps else None)
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = (WRONG, f"{error!r:.300} ({wrong}; {place.filename}:{place.lineno})") if wrong else (REFUSED, str(error))
    if not torch.equal(models.sample(models.model(stack.family), stack.family), before):
        return WRONG, "the plain model gives another picture afterwards"
    remains = left(stack.family)
    return (WRONG, f"left on the plain model: {', '.join(remains[:5])}") if remains else outcome


def failures(chosen: Sequence[Stack], counts: Counter[str], say: Callable[[str], None] = lambda line: None) -> list[str]:
    """The stacks that ended in another way than they may, each with how."""
    found = []
    for number, stack in enumerate(chosen, 1):
        kind, words = run(stack)
        counts[kind] += 1
        if number % PROGRESS == 0:
            say(f"{number} of {len(chosen)} stacks")
        if kind == WRONG:
            found.append(f"{stack}\n    {words}")
            say(found[-1])
    if alive := runs_alive():
        found.append(f"{alive} sampling runs are still in memory")
    return found


def sampled(seed: int, count: int | None = None) -> list[Stack]:
    """Some stacks of the matrix in a random order; all of them without a count."""
    every = stacks()
    return random.Random(seed).sample(every, len(every) if count is None else min(count, len(every)))


def main(arguments: list[str]) -> int:
    """Run the stacks and say what failed."""
    parser = argparse.ArgumentParser(prog="run.py stack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of which stacks")
    parser.add_argument("--count", type=int, help="how many stacks; all of them if left out")
    parser.add_argument("--only", default="", help="stacks with this in their name, such as FreeU_V2 or sdxl:")
    chosen = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    every = [stack for stack in sampled(chosen.seed) if chosen.only in str(stack)][: chosen.count]
    for family in models.FAMILIES:
        print(f"{family}: {len(cores(family))} of ComfyUI's patches: {', '.join(cores(family))}")
    counts: Counter[str] = Counter()
    wrong = failures(every, counts, lambda line: print(line, flush=True))
    print(f"\n{len(every)} stacks, " + ", ".join(f"{kind}: {n}" for kind, n in sorted(counts.items())))
    return 1 if wrong else 0
