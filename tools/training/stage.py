"""What the trainings share: one training loop with checkpoints, how layers start, and attention that trains fast on a CPU."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

CHECKPOINTS = Path(__file__).parents[2] / ".runtime" / "training"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the trainings that are written for both


def mixed() -> torch.autocast:
    """Half precision where it is safe, on `DEVICE`."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def initialise(module: nn.Module, seed: int) -> None:
    """ComfyUI's layers come uninitialised; give every one the usual start."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        with torch.no_grad():
            if isinstance(layer, nn.Embedding):
                weight.normal_(0, 0.02, generator=generator)
            elif weight.ndim == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()


def together(processes: int) -> int:
    """Go on as so many processes that train one model, each on batches of its own; returns which of them this is.

    Small convolutions gain little from a second thread, and twice as much from a second process. To be called before anything is computed.
    """
    if processes == 1:
        return 0
    meeting = Path(tempfile.mkdtemp()) / "processes"
    rank = next((n for n in range(1, processes) if os.fork() == 0), 0)
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=processes)
    return rank


def _mean_over_processes(parameters: Iterable[Tensor]) -> None:
    """Give every process the mean of all gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(whole)
    whole /= distributed.get_world_size()
    for g, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


class Stage:
    """One training loop: a cosine schedule by time spent, checkpoints every few minutes, an average of the weights.

    Time is what this thread has worked, so that a machine busy with other things makes training longer, not worse; on a GPU
    it is the clock's. ``modules`` are moved to ``device``; `kept` gives an average back where it is saved and measured.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, nn.Module],
        minutes: float,
        rate: float,
        decay: float = 0.999,
        device: torch.device | None = None,
    ):
        device = device or torch.device("cpu")
        self.clock = time.thread_time if device.type == "cpu" else time.monotonic
        for module in modules.values():
            module.to(device)
        self.name, self.modules, self.seconds, self.rate, self.decay = name, modules, minutes * 60, rate, decay
        self.path = CHECKPOINTS / f"{name}.pt"
        self.average = copy.deepcopy(nn.ModuleDict(modules)).requires_grad_(False)
        self.live = nn.ModuleDict(modules)
        self.optimiser = torch.optim.AdamW(self.live.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.spent = 0, 0.0
        self.alone = not distributed.is_initialized()
        self.first = self.alone or distributed.get_rank() == 0
        if self.path.exists():
            saved = torch.load(self.path, map_location=device, weights_only=True)
            self.live.load_state_dict(saved["live"])
            self.average.load_state_dict(saved["average"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.spent = saved["step"], saved["spent"]

    @property
    def done(self) -> bool:
        return self.spent >= self.seconds

    def kept(self, name: str) -> nn.Module:
        """The average of a module's weights, on the CPU, ready for use."""
        return self.average[name].cpu().eval()

    def save(self) -> None:
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        state = {"live": self.live.state_dict(), "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "spent": self.spent}, temporary)
        temporary.replace(self.path)

    def run(self, loss: Callable[[int], tuple[Tensor, Mapping[str, float | Tensor]]], batch: int) -> None:
        """Call ``loss(step)`` until the time is spent."""
        began, saved_at, said, window = self.clock() - self.spent, self.spent, self.spent, self.step
        while not self.done:
            progress = self.spent / self.seconds
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            value, notes = loss(self.step)
            self.optimiser.zero_grad(set_to_none=True)
            value.backward()
            if not self.alone:
                _mean_over_processes(self.live.parameters())
            nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
            self.optimiser.step()
            keep = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                averaged: list[Tensor] = list(self.average.parameters())
                live: list[Tensor] = list(self.live.parameters())
                torch._foreach_lerp_(averaged, live, 1 - keep)
            self.step += 1
            self.spent = self.clock() - began
            if not self.alone:  # the first one's clock is everybody's
                spent = torch.tensor(self.spent, dtype=torch.float64)
                distributed.broadcast(spent, 0)
                self.spent = spent.item()
            if self.first and self.spent - said > 30:
                speed = (self.step - window) * batch / (self.spent - said)
                words = "  ".join(f"{k} {float(v):.4f}" for k, v in notes.items())
                print(
                    f"{self.name}: {self.spent / 60:5.1f} of {self.seconds / 60:.0f} min, step {self.step}, {speed:.0f}/s  {words}",
                    flush=True,
                )
                said, window = self.spent, self.step
            if self.first and self.spent - saved_at > 90:
                self.save()
                saved_at = self.spent
        if self.first:
            self.save()


def plain_attention(function: object, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, **kwargs: object) -> Tensor:
    """softmax(QKᵀ/√d)V written out: the CPU's flash attention is slow backwards at these sizes, the compiler fuses this."""
    q, k, v = (t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)
