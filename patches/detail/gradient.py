"""The gradient of the loss of the base's maps by its latents: the optimisation's own pass through the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ...methods.detail import objective, subject_maps
from ...methods.maps import added
from ..hook.call import AttentionCall
from ..hook.families import family_of
from ..hook.install import REQUESTS
from ..hook.run import ExtraForward, with_extra_forward
from ..hook.sites import Site
from ..hook.tensors import index_or_slice
from ..hook.views import view, with_blocks
from .branches import rows_of
from .guider import Guider
from .session import OPTIMIZE, Session


class _EnoughError(Exception):
    """The last map has been read: the rest of the forward has nothing to add."""


class OutsideInference(TorchFunctionMode):
    """Autograd takes no tensors made in inference mode, as ComfyUI's weights are: it gets normal ones that share their memory.

    ComfyUI adds ControlNet's residuals in place, to what autograd has kept for its way back; here the sum is a new tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) == 2 and type(args[1]) is _Residual:
            func, args = Tensor.add, (args[0], args[1].as_subclass(Tensor).to(args[0].dtype))
        args, kwargs = tree_map_only(Tensor, _outside_inference, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Residual(Tensor):
    """A ControlNet's, which is only ever added to something."""


class _Residuals:
    """A ControlNet whose residuals can be told from other tensors."""

    def __init__(self, control: Any):
        self.control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        found = self.control.get_control(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: t.as_subclass(_Residual), found)


def _outside_inference(t: Tensor) -> Tensor:
    if type(t) not in (Tensor, nn.Parameter):
        return t
    if t.is_inference():
        with torch.inference_mode(False):
            return torch.empty(0, dtype=t.dtype, device=t.device).set_(
                t.untyped_storage(), t.storage_offset(), t.size(), t.stride()
            )
    return t.detach() if isinstance(t, nn.Parameter) else t  # weights are not what is optimised


def checkpointed(diffusion_model: nn.Module, read_at: Sequence[Site]) -> Any:
    """A view of a model whose layers before the last of ``read_at`` keep their input only and are computed again when gradients come back.

    Of a transformer those blocks that are read keep everything: what is around a block is not computed again with it.
    """
    family = family_of(getattr(diffusion_model, "_orig_mod", diffusion_model))  # not compiled
    order = family.blocks()

    def seen(layer: nn.Module) -> nn.Module:
        saves = isinstance(layer, (ResBlock, SpatialTransformer))
        return view(layer, {"forward": _checkpointed(layer.forward)}) if saves else layer

    before = {block: family.block(block) for block in order[: order.index(read_at[-1].block)]}
    read = {site.block for site in read_at}
    blocks = {
        block: nn.ModuleList([seen(layer) for layer in module])
        if isinstance(module, nn.Sequential)  # of a UNet
        else view(module, {"forward": _checkpointed(module.forward)})
        for block, module in before.items()
        if isinstance(module, nn.Sequential) or block not in read
    }
    return with_blocks(family.model, family.attributes, blocks)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with OutsideInference():
            return forward(*args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        # ComfyUI writes down where it is in the options as it goes along; what comes back must find itself where it was.
        args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        with set_checkpoint_early_stop(False):  # nodes that change tokens and change them back (HyperTile) do both
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return again


def _with_backward(kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose gradient is known: SageAttention's and others', chosen for ComfyUI or by another pack, is not."""
    return attention_pytorch(*args, **kwargs)


def _on_copies(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Another node's patch, which may write into what it is given (FreeU does) and into what autograd keeps for its own steps."""

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return patch(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)

    return on_copies


def gradient(
    session: Session, guider: Guider, model: Any, x: Tensor, sigma: Tensor, pictures: Sequence[int], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """The loss of the base's maps, and its gradient by the base's latents; None where its prompt has none of the subjects.

    The forward stops at the last layer that feeds a map. It is a pass of its own: no other method reads, edits or records in it. Nothing
    of it is left when it has failed.

    Args:
        model: ComfyUI's, which knows the picture under a noise mask.
        x, sigma: latents ``[rows, c, H, W]`` and noise levels ``[rows]`` of all branches.
        pictures: which of the base's.
        kwargs: what the sampler calls the model with.

    Returns:
        ``[pictures]`` and ``[pictures, c, H, W]``; a gradient that is not finite is 0, with a loss of 0.
    """
    found = next(((uuid, plan) for uuid, plan in session.prompts.items() if plan.base.subjects), None)
    if found is None:
        return None
    uuid, plan = found
    total = session.total * session.pictures
    rows = index_or_slice(pictures, x.device)
    cond = next(rows_of(c, total, rows, part=0) for c in guider.conds["positive"] if c["uuid"] == uuid)
    if cond.get("control") is not None:
        cond["control"] = _Residuals(cond["control"])
    reading = _Reading(session.read_at[-1].name)
    options = kwargs["model_options"]
    asked = options.get("transformer_options", {})
    patches = {name: [_on_copies(p) for p in held] for name, held in asked.get("patches", {}).items()}
    asked = {**asked, REQUESTS: (), "patches": patches, "optimized_attention_override": _with_backward}
    options = {**options, "transformer_options": asked}
    reader = session.reader(plan.base.columns, plan.base.prompt_columns, reading.read)
    options = with_extra_forward(options, ExtraForward((reader,)))
    try:
        with torch.inference_mode(False), torch.enable_grad(), OutsideInference():
            z = x[rows].clone().requires_grad_()
            seen = _under_noise_mask(
                guider.inner_model, model, z, sigma[rows].clone(), rows, {**kwargs, "model_options": options}
            )
            network = checkpointed(guider.inner_model.diffusion_model, session.read_at)
            with contextlib.suppress(_EnoughError):
                shown = view(guider.inner_model, {"diffusion_model": network})
                comfy.samplers.calc_cond_batch(shown, [[cond]], seen, sigma[rows].clone(), options)
            reading.done = True
            if reading.total is None:
                return None  # outside the prompt's timesteps
            attention = (reading.total / reading.layers).movedim(1, -1).float()
            losses = objective(subject_maps(attention, plan.base.subjects), session.settings.optimize == OPTIMIZE[2])
            half = guider.inner_model.get_dtype() == torch.float16
            lift = 2.0**8 if half else 1.0  # small gradients of half precision are zero
            (by_z,) = torch.autograd.grad(losses.sum() * lift, z)
    finally:
        # Layers that are computed again hold the options, these the reader, and that the maps, whose graph holds the layers.
        reading.total = None
    finite = by_z.flatten(1).isfinite().all(dim=1) & losses.isfinite()
    by_z = torch.where(finite.reshape(-1, *[1] * (by_z.ndim - 1)), by_z / lift, torch.zeros_like(by_z))
    return torch.where(finite, losses.detach(), torch.zeros_like(losses)), by_z


@dataclass
class _Reading:
    """The tokens' maps ``[B, N, h, w]`` of a pass, summed over its layers, up to the one named ``last``."""

    last: str
    total: Tensor | None = None
    layers: int = 0
    done: bool = False

    def read(self, call: AttentionCall, weights: Tensor) -> None:
        maps = weights.transpose(1, 2).unflatten(2, (call.height, call.width))
        if self.done:  # a checkpointed layer comes here once more, and must do the same up to this line
            return
        self.total = added(self.total, maps)
        self.layers += 1
        if call.site.name == self.last:
            raise _EnoughError


def _under_noise_mask(base: Any, model: Any, z: Tensor, sigma: Tensor, rows: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """What ComfyUI shows the network of latents ``z`` under a noise mask: the known picture outside of it."""
    mask = kwargs.get("denoise_mask")
    if mask is None:
        return z
    options = kwargs["model_options"]
    if "denoise_mask_function" in options:
        mask = options["denoise_mask_function"](sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})
    mask = mask[rows].clone()
    known = base.scale_latent_inpaint(x=z, sigma=sigma, noise=model.noise[rows], latent_image=model.latent_image[rows])
    return z * mask + known * (1 - mask)
