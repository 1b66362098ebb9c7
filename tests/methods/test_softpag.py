"""SoftPAG's equations, its targets and its paths against maps written out row by row in float64."""

import math
from dataclasses import dataclass

import pytest
import torch

from attune.methods import softpag as maths
from attune.methods.softpag import PATHS, TARGETS, Tokens, guide, needs_map, perturb, rows_of, soften
from attune.tests.methods.test_attention import tensor


def test_soften():
    out, value = tensor(2, 3, 5, 4, seed=1) * 1e6, tensor(2, 3, 5, 4, seed=2) * 1e-6
    out, value = out.float(), value.float()
    assert torch.equal(soften(out, value, 0.0), out) and torch.equal(soften(out, value, 1.0), value)
    u = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1)
    mixed = soften(out, value, u)
    assert torch.equal(mixed[:, 0], out[:, 0]) and torch.equal(mixed[:, 2], value[:, 2])
    torch.testing.assert_close(mixed[:, 1], 0.75 * out[:, 1] + 0.25 * value[:, 1])
    torch.testing.assert_close(soften(out, value, 0.25), 0.75 * out + 0.25 * value)


def test_guide():
    cfg, cond, pert = (tensor(2, 4, 3, 3, seed=s) for s in (1, 2, 3))
    assert guide(cfg, cond, pert, 0, 0.5) is cfg
    torch.testing.assert_close(guide(cfg, cond, pert, 3.0), cfg + 3 * (cond - pert))
    ours = guide(cfg, cond, pert, 3.0, 0.4)
    for i in range(2):
        term = 3 * (cond[i] - pert[i])
        factor = 0.4 * cond[i].std() / (cfg[i] + term).std() + 0.6
        torch.testing.assert_close(ours[i], cfg[i] + factor * term)


# --- targets and paths ----------------------------------------------------------------------------------------------------

JOINT = Tokens(9, slice(3, 9), slice(0, 3))
SELF = Tokens(6, slice(0, 6), slice(0, 0))


@dataclass
class Heads:
    """Attention written out, which counts what the fast kernel is asked for."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    asked: int = 0

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def out(self):
        return self.attend()

    def attend(self, q=None, k=None, v=None):
        self.asked += 1
        q, k, v = (own if given is None else given for own, given in ((self.q, q), (self.k, k), (self.v, v)))
        hidden = 0.0 if self.mask is None else self.mask
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + hidden).softmax(-1) @ v


def heads_of(tokens, peaked=2.0):
    shape = (2, 3, tokens.count, 4)
    return Heads(tensor(*shape, seed=1) * peaked, tensor(*shape, seed=2) * peaked, tensor(*shape, seed=3))


def row_softmax(logits):
    top = max(logits)
    parts = [math.exp(x - top) for x in logits]
    return [p / sum(parts) for p in parts]


def naive_target(name, logits, i, q, k, tokens, temperature, hidden):
    """The target's row ``i`` for one head, from that row's logits; None where the target leaves it alone."""
    count = tokens.count
    is_image, is_text = tokens.image.start <= i < tokens.image.stop, tokens.text.start <= i < tokens.text.stop
    if name == "identity":
        return [float(j == i) for j in range(count)]
    if name == "uniform":
        return row_softmax(hidden)
    if name == "temperature":
        return row_softmax([x / temperature for x in logits])
    if name == "maximum":
        return [float(j == logits.index(max(logits))) for j in range(count)]
    if name.startswith("mean"):
        which = {"mean query": range(count), "mean image query": range(count)[tokens.image]}.get(
            name, range(count)[tokens.text]
        )
        if i not in which:
            return None
        mean = sum(q[j] for j in which) / len(which)
        return row_softmax([float(mean @ k[j]) / len(mean) ** 0.5 + hidden[j] for j in range(count)])
    block, kind = name.split(" ")
    of, to = block.split("-")
    if not (is_image if of == "image" else is_text):
        return None
    hidden = range(count)[tokens.image if to == "image" else tokens.text]
    return row_softmax([-math.inf if j in hidden and not (kind == "identity" and j == i) else x for j, x in enumerate(logits)])


def naive_path(name, target, a, b, u):
    if u == 1:
        return b
    if name == "linear":
        return [(1 - u) * x + u * y for x, y in zip(a, b, strict=True)]
    if name == "log-linear":
        if target in ("identity", "maximum") or "-" in target:  # the released code's way around log 0
            b = [y * (1 - 1e-6 * len(b)) + 1e-6 for y in b]
        mixed = [x ** (1 - u) * y**u for x, y in zip(a, b, strict=True)]
    elif name == "Fisher-Rao":
        mixed = [((1 - u) * math.sqrt(x) + u * math.sqrt(y)) ** 2 for x, y in zip(a, b, strict=True)]
    else:
        angle = math.acos(min(1.0, sum(math.sqrt(x * y) for x, y in zip(a, b, strict=True))))
        ends = math.sin((1 - u) * angle) / math.sin(angle), math.sin(u * angle) / math.sin(angle)
        mixed = [(ends[0] * math.sqrt(x) + ends[1] * math.sqrt(y)) ** 2 for x, y in zip(a, b, strict=True)]
    return [m / sum(mixed) for m in mixed]


def naive(heads, tokens, who, u, target, path, temperature):
    out = torch.empty_like(heads.q)
    for b in range(heads.q.shape[0]):
        for h in range(heads.q.shape[1]):
            q, k, v = heads.q[b, h], heads.k[b, h], heads.v[b, h]
            for i in range(tokens.count):
                hidden = [0.0] * tokens.count if heads.mask is None else heads.mask[b, 0, i].tolist()
                logits = [float(q[i] @ k[j]) / q.shape[-1] ** 0.5 + hidden[j] for j in range(tokens.count)]
                row = row_softmax(logits)
                chosen = {"all": True, "image": i in range(100)[tokens.image], "text": i in range(100)[tokens.text]}[who]
                moved = naive_target(target, logits, i, q, k, tokens, temperature, hidden) if chosen else None
                if moved is not None:
                    row = naive_path(path, target, row, moved, u)
                out[b, h, i] = sum(weight * v[j] for j, weight in enumerate(row))
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_by_every_path(target, path):
    """On joint attention for all, image and text tokens, and on self-attention where the target means something there."""
    for tokens, who in ((JOINT, "all"), (JOINT, "image"), (JOINT, "text"), (SELF, "all")):
        if tokens is SELF and ("text" in target or "-" in target):
            continue
        for u in (0.35, 1.0):
            heads = heads_of(tokens)
            ours = perturb(heads, tokens, who, u, target, path, 0.6)
            expected = naive(heads, tokens, who, u, target, path, 0.6)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
            changed = (ours - heads.attend()).abs().amax((0, 1, 3)) > 1e-6
            own = rows_of(who, target)
            assert changed.any() == (own is not None)
            if own is not None:
                assert changed.nonzero().flatten().tolist() == list(range(tokens.count))[tokens.of(own)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mask_hides_keys_from_targets_too(target, path):
    heads = heads_of(JOINT)
    heads.mask = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    heads.mask[0, :, :, 7] = heads.mask[1, :, 2:4, 0] = -math.inf
    heads.mask[:, :, range(9), range(9)] = 0.0
    for u in (0.35, 1.0):
        ours = perturb(heads, JOINT, "all", u, target, path, 0.6)
        torch.testing.assert_close(ours, naive(heads, JOINT, "all", u, target, path, 0.6), rtol=1e-7, atol=1e-7)


def test_identity_in_joint_attention_is_over_text_too():
    """Equation 6: every token keeps its own value."""
    heads = heads_of(JOINT)
    assert torch.equal(perturb(heads, JOINT, "all", 1.0), heads.v)
    assert heads.asked == 0
    image = perturb(heads, JOINT, "image", 1.0)
    assert torch.equal(image[..., 3:, :], heads.v[..., 3:, :])
    torch.testing.assert_close(image[..., :3, :], heads.attend()[..., :3, :])


def test_temperature_goes_to_maximum_and_to_uniform():
    heads = heads_of(JOINT)
    for temperature, limit in ((1e-6, "maximum"), (1e6, "uniform")):
        ours = perturb(heads, JOINT, "all", 1.0, "temperature", "linear", temperature)
        torch.testing.assert_close(ours, perturb(heads, JOINT, "all", 1.0, limit), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("target", "path", "u"), [(t, p, u) for t in TARGETS for p in PATHS for u in (0.5, 1.0)])
def test_maps_are_made_only_where_it_is_said(target, path, u, monkeypatch):
    made = []
    monkeypatch.setattr(maths, "target_map", lambda *a: made.append(1) or a[1].softmax(-1))
    monkeypatch.setattr(maths, "_maximum", lambda q, *_: made.append(1) or q)
    perturb(heads_of(JOINT), JOINT, "all", u, target, path, 0.7)
    assert bool(made) == needs_map(target, path, u)


@pytest.mark.parametrize(("target", "path"), [("maximum", "linear"), ("identity", "slerp"), ("image-image identity", "linear")])
def test_maps_come_a_few_queries_at_a_time(target, path, monkeypatch):
    heads = heads_of(JOINT)
    whole = perturb(heads, JOINT, "all", 0.5, target, path)
    keys = 3 if "-" in target else 9
    monkeypatch.setattr(maths, "ROOM", 2 * 4 * 6 * keys)  # two queries of six heads
    sizes = []
    logits = maths._logits
    monkeypatch.setattr(maths, "_logits", lambda q, *a: sizes.append(q.shape[-2]) or logits(q, *a))
    torch.testing.assert_close(perturb(heads, JOINT, "all", 0.5, target, path), whole)
    assert max(sizes) <= 2 and len(sizes) > 1


def test_half_precision_stays_half():
    heads = Heads(*(t.half() for t in (heads_of(JOINT).q, heads_of(JOINT).k, heads_of(JOINT).v)))
    exact = heads_of(JOINT)
    for target in TARGETS:
        for path in PATHS:
            ours = perturb(heads, JOINT, "all", 0.5, target, path, 0.6)
            assert ours.dtype == torch.half
            torch.testing.assert_close(
                ours.double(), perturb(exact, JOINT, "all", 0.5, target, path, 0.6), rtol=0.03, atol=0.03
            )
