"""What tests share that needs no ComfyUI to be imported: comparisons, pictures, the examples and a run on a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from torch import Tensor

from attune.tools.runtime.setup import ROOT
from attune.tools.runtime.workflow import missing_files, read, to_prompt

DATA = ROOT / "tests" / "data"
SHORTER = """(pictures) => window.comfyAPI.app.app.graph.nodes.forEach((n) => n.widgets?.forEach((w) => {
    const most = { steps: 2, batch_size: pictures }[w.name]
    if (w.value > most) w.value = most
}))"""  # in the editor: a run of two steps, of so many pictures at most
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


def without_their_files(path: Path, info: dict) -> set[int]:
    """The nodes of a template that name files which this ComfyUI does not have: newer editors mark these, and no others."""
    prompt = to_prompt(read(path), info)
    return {int(number) for number, node in prompt.items() if missing_files({number: node}, info)}


def over(nodes: list[dict]) -> list[tuple]:
    """Pairs of nodes of which one covers a part of the other."""
    boxes = [(n["type"], *n["box"]) for n in nodes if n["box"]]
    apart = lambda a, b: a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1] or a[2] + a[4] <= b[2] or b[2] + b[4] <= a[2]  # noqa: E731
    return [(a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if not apart(a, b)]


def outside(nodes: list[dict], groups: list[list[float]]) -> list[str]:
    """Nodes that lie in none of the groups."""
    holds = lambda g, b: (  # noqa: E731
        g[0] <= b[0] and g[1] <= b[1] and b[0] + b[2] <= g[0] + g[2] + 1 and b[1] + b[3] <= g[1] + g[3] + 1
    )
    return [n["type"] for n in nodes if n["box"] and not any(holds(g, n["box"]) for g in groups)]


def run_prompt(server, prompt: dict) -> tuple[dict, list]:
    """Run a prompt on a `Server`; return its pictures and the progress that was reported."""
    from attune.tools.runtime.client import Client

    steps: list = []

    async def job() -> dict:
        async with Client(server) as client:
            return await client.run(prompt, lambda *step: steps.append(step))

    return asyncio.run(job()), steps
