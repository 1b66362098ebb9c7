"""Attune: training-free attention control for ComfyUI. ``methods`` holds the mathematics and needs no ComfyUI."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]  # ComfyUI's types are only there inside ComfyUI
    """ComfyUI's way in; the nodes are imported here and not before, so that ``methods`` can be used without ComfyUI."""
    from .nodes import Attune
    from .server.routes import register

    register()
    return Attune()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
