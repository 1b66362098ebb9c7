"""What each of ComfyUI's samplers needs of the model and of chance, in one table; a test compares it with what they do.

For methods that stand between sampler and model, or give the rows of a batch noise of their own. A sampler that is not in the table
(a newer ComfyUI's, another pack's) is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

NONE, NORMAL, TREE, TREE_ON_DEVICE = "none", "normal", "Brownian tree", "Brownian tree on the device"
HISTORY = 2  # earlier predictions that a linear sampler may hold
Noise = Callable[[Tensor, Tensor], Tensor]  # of a noise level and the next one


@dataclass(frozen=True)
class SamplerNeeds:
    """What one sampler needs.

    Attributes:
        evaluations: of the model in a step; None where steps differ in it.
        noise: the kind that it draws, by default, for its argument ``noise_sampler``; `NONE`: it has no such argument.
        linear: its next latent is linear in the model's input, its prediction, up to `HISTORY` earlier predictions and noise, with the
            same factors for all rows, and it keeps nothing else from step to step.
        last: evaluations in the step that ends at a noise level of 0; more than one: in the last steps whatever level they end at, the
            last one first.
    """

    evaluations: int | None = 1
    noise: str = NONE
    linear: bool = True
    last: tuple[int, ...] = (1,)


_NOT_LINEAR = SamplerNeeds(linear=False)
SAMPLERS: Mapping[str, SamplerNeeds] = MappingProxyType(
    {
        "euler": SamplerNeeds(),
        "euler_cfg_pp": _NOT_LINEAR,
        "euler_ancestral": SamplerNeeds(1, NORMAL),
        "euler_ancestral_cfg_pp": SamplerNeeds(1, NORMAL, linear=False),
        "heun": SamplerNeeds(2),
        "heunpp2": SamplerNeeds(3, last=(1, 2)),
        "exp_heun_2_x0": SamplerNeeds(2),
        "exp_heun_2_x0_sde": SamplerNeeds(2, NORMAL),
        "dpm_2": SamplerNeeds(2),
        "dpm_2_ancestral": SamplerNeeds(2, NORMAL),
        "lms": _NOT_LINEAR,
        "dpm_fast": SamplerNeeds(None, linear=False),
        "dpm_adaptive": SamplerNeeds(None, linear=False),
        "dpmpp_2s_ancestral": SamplerNeeds(2, NORMAL),
        "dpmpp_2s_ancestral_cfg_pp": SamplerNeeds(2, NORMAL, linear=False),
        "dpmpp_sde": SamplerNeeds(2, TREE),
        "dpmpp_sde_gpu": SamplerNeeds(2, TREE_ON_DEVICE),
        "dpmpp_2m": SamplerNeeds(),
        "dpmpp_2m_cfg_pp": _NOT_LINEAR,
        "dpmpp_2m_sde": SamplerNeeds(1, TREE),
        "dpmpp_2m_sde_gpu": SamplerNeeds(1, TREE_ON_DEVICE),
        "dpmpp_2m_sde_heun": SamplerNeeds(1, TREE),
        "dpmpp_2m_sde_heun_gpu": SamplerNeeds(1, TREE_ON_DEVICE),
        "dpmpp_3m_sde": SamplerNeeds(1, TREE),
        "dpmpp_3m_sde_gpu": SamplerNeeds(1, TREE_ON_DEVICE),
        "ddpm": SamplerNeeds(1, NORMAL),
        "lcm": SamplerNeeds(1, NORMAL),
        "ipndm": _NOT_LINEAR,
        "ipndm_v": _NOT_LINEAR,
        "deis": _NOT_LINEAR,
        "res_multistep": SamplerNeeds(1, NORMAL),
        "res_multistep_cfg_pp": SamplerNeeds(1, NORMAL, linear=False),
        "res_multistep_ancestral": SamplerNeeds(1, NORMAL),
        "res_multistep_ancestral_cfg_pp": SamplerNeeds(1, NORMAL, linear=False),
        "gradient_estimation": _NOT_LINEAR,
        "gradient_estimation_cfg_pp": _NOT_LINEAR,
        "er_sde": SamplerNeeds(1, NORMAL, linear=False),
        "seeds_2": SamplerNeeds(2, NORMAL),
        "seeds_3": SamplerNeeds(3, NORMAL),
        "sa_solver": SamplerNeeds(1, NORMAL, linear=False),
        "sa_solver_pece": SamplerNeeds(None, NORMAL, linear=False),
        "ddim": SamplerNeeds(),
        "uni_pc": _NOT_LINEAR,
        "uni_pc_bh2": _NOT_LINEAR,
    }
)


def needs(name: str, method: str, among: Iterable[str] = SAMPLERS, because: str = "is not known") -> SamplerNeeds:
    """A sampler's row.

    Args:
        method: who asks, for the message; ``among``: the samplers that it takes; ``because``: why it takes no others.

    Raises:
        ValueError: for another sampler, with those that can be chosen.
    """
    known = tuple(among)
    if name not in known:
        raise ValueError(f"{method}: the sampler “{name}” {because}. Choose one of: {', '.join(known)}.")
    return SAMPLERS[name]


def evaluations(name: str, sigmas: Tensor) -> list[int]:
    """How often a sampler calls the model in each step of a schedule ``sigmas [steps + 1]``.

    Raises:
        ValueError: for a sampler whose calls are not counted by steps.
    """
    own = SAMPLERS[name]
    if own.evaluations is None:
        raise ValueError(f"the sampler “{name}” does not call the model equally often in every step")
    levels = sigmas.tolist()
    end = levels[-1] if len(own.last) > 1 else 0.0
    out = []
    for i in range(len(levels) - 1):
        ending = [n for level, n in zip(levels[i + 1 :], own.last, strict=False) if level == end]
        out.append(min([own.evaluations, *ending[:1]]))
    return out


def noise_sampler(kind: str, x: Tensor, sigmas: Tensor, seed: int | None) -> Noise:
    """What a sampler draws from when it is given nothing else, for latents of the shape of ``x``; ``kind`` is not `NONE`."""
    if kind == NORMAL:
        return k_diffusion.default_noise_sampler(x, seed=seed)
    low, high = sigmas[sigmas > 0].min(), sigmas.max()
    return k_diffusion.BrownianTreeNoiseSampler(x, low, high, seed=seed, cpu=kind == TREE)
