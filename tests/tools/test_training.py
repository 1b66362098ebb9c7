"""The training loop that all trained parts share."""

import itertools

import pytest
import torch
from torch import nn

from attune.tools.training import stage


@pytest.fixture
def training(monkeypatch, tmp_path):
    """A stage on one linear layer, and its loss; every look at the clock is a second."""
    monkeypatch.setattr(stage, "CHECKPOINTS", tmp_path)
    ticks = itertools.count()
    monkeypatch.setattr(stage.time, "thread_time", lambda: next(ticks))

    def start(minutes):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        loop = stage.Stage("line", {"layer": layer}, minutes, 0.1, decay=0.5)
        x = torch.randn(64, 3)
        truth = x @ torch.tensor([[1.0], [2.0], [3.0]])
        losses = []

        def loss(step):
            value = ((layer(x) - truth) ** 2).mean()
            losses.append(value.item())
            return value, {"loss": value.detach()}

        return loop, loss, losses

    return start


def test_the_average_follows_the_weights_and_keeps_no_graph(training):
    loop, loss, losses = training(2)
    loop.run(loss, 64)
    assert losses[-1] < losses[0]
    live, average = loop.live["layer"].weight, loop.kept("layer").weight
    assert average.grad_fn is None and not average.requires_grad
    assert torch.allclose(live, average, atol=0.3) and not torch.equal(live, average)


def test_training_goes_on_from_its_checkpoint(training):
    loop, loss, losses = training(1)
    loop.run(loss, 64)
    first = len(losses)
    again, loss, losses = training(2)
    assert again.step == first and torch.equal(again.live["layer"].weight, loop.live["layer"].weight)
    again.run(loss, 64)
    assert 0.5 * first < len(losses) < 1.5 * first and again.done
