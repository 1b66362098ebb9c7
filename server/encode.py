"""Pictures as texts that a browser shows."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor


def png(tiles: Tensor) -> str:
    """Grey tiles ``[n, h, w]`` of 0 to 255 below each other, as a PNG in base64."""
    return _text(tiles.flatten(0, 1), "L", "PNG")


def jpeg(picture: Tensor) -> str:
    """A picture ``[h, w, 3]`` of 0 to 1, as a JPEG in base64."""
    return _text(picture * 255, "RGB", "JPEG", quality=85)


def _text(pixels: Tensor, mode: str, kind: str, **options: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).cpu().numpy(), mode).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
