"""The gradient of the loss of the base's maps by its latents: the optimisation's own pass through the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ...methods.detail import objective
from ..hook.call import AttentionCall
from ..hook.families import family_of
from ..hook.install import REQUESTS
from ..hook.run import ExtraForward, with_extra_forward
from .branches import rows_of
from .guider import Guider
from .session import OPTIMIZE, Session


class _EnoughError(Exception):
    """The last map has been read: the rest of the forward has nothing to add."""


class OutsideInference(TorchFunctionMode):
    """Autograd takes no tensors made in inference mode, as ComfyUI's weights are: it gets normal ones that share their memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _outside_inference, (args, kwargs or {}))
        return func(*args, **kwargs)


def _outside_inference(t: Tensor) -> Tensor:
    if type(t) not in (Tensor, nn.Parameter):
        return t
    if t.is_inference():
        with torch.inference_mode(False):
            return torch.empty(0, dtype=t.dtype, device=t.device).set_(
                t.untyped_storage(), t.storage_offset(), t.size(), t.stride()
            )
    return t.detach() if isinstance(t, nn.Parameter) else t  # weights are not what is optimised


@contextlib.contextmanager
def checkpointed(diffusion_model: nn.Module, until: tuple[str, int]) -> Iterator[None]:
    """While a forward runs, layers before a block keep their input only and are computed again when gradients come back."""
    family = family_of(diffusion_model)
    order = family.blocks()
    changed = []
    for block in order[: order.index(until)]:
        for layer in family.block(block):
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                changed.append((layer, layer.__dict__.get("forward")))  # another pack's, perhaps
                layer.forward = _checkpointed(layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in changed:
            del layer.forward
            if own is not None:
                layer.forward = own


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with OutsideInference():
            return forward(*args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        # ComfyUI writes down where it is in the options as it goes along; what comes back must find itself where it was.
        args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def _with_backward(kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose gradient is known: SageAttention's and others', chosen for ComfyUI or by another pack, is not."""
    return attention_pytorch(*args, **kwargs)


def gradient(
    session: Session, guider: Guider, model: Any, x: Tensor, sigma: Tensor, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Gradient of the loss of the base's maps by its latents ``x [B, c, H, W]``; None where the base has none of the subjects.

    The forward stops at the last layer that feeds a map. It is a pass of its own: no other method reads, edits or records in it.

    Args:
        model: ComfyUI's, which knows the picture under a noise mask.
        kwargs: what the sampler calls it with.
    """
    found = next(((uuid, plan) for uuid, plan in session.prompts.items() if plan.base), None)
    if found is None:
        return None
    uuid, plan = found
    rows = slice(0, session.pictures)
    base = guider.inner_model
    total = session.total * session.pictures
    cond = next(rows_of(c, total, rows) for c in guider.conds["positive"] if c["uuid"] == uuid)
    last = session.read_at[-1]
    maps: list[Tensor] = []
    done = False

    def read(call: AttentionCall, weights: Tensor) -> None:
        part = torch.stack([subject.map(weights) for subject in plan.base], dim=1)
        if not done:  # a checkpointed layer comes here once more, and must do the same up to this line
            maps.append(part.unflatten(-1, (call.height, call.width)))
            if call.site.name == last.name:
                raise _EnoughError

    options = kwargs["model_options"]
    asked = {**options.get("transformer_options", {}), REQUESTS: (), "optimized_attention_override": _with_backward}
    options = {**options, "transformer_options": asked}
    options = with_extra_forward(options, ExtraForward((session.reader(plan, read),)))
    with torch.inference_mode(False), torch.enable_grad(), OutsideInference():
        z = x.clone().requires_grad_()
        sigma = sigma.clone()
        seen = z
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            if "denoise_mask_function" in options:
                mask = options["denoise_mask_function"](
                    sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas}
                )
            mask = mask[rows].clone()
            known = base.scale_latent_inpaint(x=z, sigma=sigma, noise=model.noise[rows], latent_image=model.latent_image[rows])
            seen = z * mask + known * (1 - mask)
        with contextlib.suppress(_EnoughError), checkpointed(base.diffusion_model, last.block):
            comfy.samplers.calc_cond_batch(base, [[cond]], seen, sigma, options)
        done = True
        if not maps:
            return None  # outside the prompt's timesteps
        loss = objective(torch.stack(maps).mean(dim=0), session.settings.optimize == OPTIMIZE[2], released=True).sum()
        lift = 2.0**8 if base.get_dtype() == torch.float16 else 1.0  # small gradients of half precision are zero
        (found_gradient,) = torch.autograd.grad(loss * lift, z)
    if not bool(found_gradient.isfinite().all()):
        logging.warning("Attune: Detail++ skips an optimisation step whose gradient is not finite.")
        return None
    return found_gradient / lift
