"""What tests share that needs no ComfyUI to be imported: comparisons, pictures, the examples and a run on a server."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from attune.tools.runtime.setup import ROOT

DATA = ROOT / "tests" / "data"
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the largest number."""
    assert a.isfinite().all()
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def differs(a: Tensor, b: Tensor) -> None:
    """Different by more than rounding."""
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


def some_pictures(count: int = 3, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Noise as ComfyUI's ``IMAGE``."""
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def run_prompt(server, prompt: dict) -> tuple[dict, list]:
    """Run a prompt on a `Server`; return its pictures and the progress that was reported."""
    from attune.tools.runtime.client import Client

    steps: list = []

    async def job() -> dict:
        async with Client(server) as client:
            return await client.run(prompt, lambda *step: steps.append(step))

    return asyncio.run(job()), steps
