"""Detail++ against the paper's equations written out, a loop over one branch at a time, and its limits on ComfyUI's models."""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch

from attune.demo import model as demo_model
from attune.language.decompose import decompose
from attune.language.words import Phrase, Words
from attune.nodes.detail import AttuneDetailSampler
from attune.patches import fusion
from attune.patches.detail import gradient
from attune.patches.detail import sampler as detail
from attune.patches.detail.blending import Blending
from attune.patches.detail.branches import BRANCH, EncodedBranch, SubjectColumns
from attune.patches.detail.encode import encode
from attune.patches.detail.session import MASKS_FROM, Settings
from attune.patches.hook.install import REQUESTS, model_sites
from attune.patches.maps.layers import auto_sites
from attune.server import previews as live
from attune.tests import families
from attune.tests.helpers import close, differs
from attune.tests.methods.test_detail import slow_bilinear, slow_binary, slow_blend

CFG, SEED = 3.0, 5


# --- branches for models without a text encoder -------------------------------------------------------------------------


def branches(lengths=(7, 7, 7, 7), subjects=None, **options):
    """A base, the whole picture without details, and details of two subjects; every prompt of its own length."""
    if subjects is None:
        subjects = [(), (), ((2, 3),), ((4,),)][: len(lengths)]
    out = []
    for i, tokens in enumerate(lengths):
        found = tuple(SubjectColumns(c, c, c) for c in subjects[i])
        ((context, own),) = families.text(10 + i, tokens)
        own = {**own, **options, BRANCH: EncodedBranch(i, len(lengths), tokens, found, content=tuple(range(1, tokens - 1)))}
        out.append([context, own])
    return out


def run(model, positive, batch=1, size=(8, 12), sampler="euler", steps=4, latent=None, **more):
    names = ("cfg", "denoise", "seed", "negative", "callback", "scheduler", "observer")
    other = {k: more.pop(k) for k in names if k in more}
    negative = other.pop("negative", families.text(2))
    seed, cfg = other.pop("seed", SEED), other.pop("cfg", CFG)
    scheduler = other.pop("scheduler", "normal")
    latent = latent or {"samples": families.latent(model, *size, batch)}
    return detail.sample(
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        sampler,
        scheduler,
        settings=Settings(**{"optimize": "off", **more}),
        disable_pbar=True,
        **other,
    )


def alone(model, entry, batch=1, size=(8, 12), sampler="euler", steps=4, **more):
    """KSampler on one branch's prompt."""
    more = {"seed": SEED, **more}
    return families.sample(model, [entry], families.text(2), CFG, steps, sampler, size, batch, **more)


# --- one branch at a time, softmax written out, latents blended after each step ------------------------------------------


def read_names(model):
    """Where these tests' models say where subjects are: a UNet's layers at full size, of a transformer three around the middle."""
    family, sites = model_sites(model)
    return {s.name for s in sites if s.stride == 1} if family == "unet" else {s.name for s in auto_sites(sites, family)}


class Slow:
    """The model, one row a forward, with full maps: what the base's attention was, and what subjects' words looked at."""

    def __init__(self, model, read, share):
        self.model, self.read, self.share = model.model, read, share
        self.calls = [(s.name, kind) for s in model_sites(model)[1] for kind in s.kinds]
        self.stride = {s.name: s.stride for s in model_sites(model)[1]}

    def __call__(self, x, sigma, context, given=None):
        """Prediction, its self-attention maps and its cross-attention maps with heads averaged; ``given``: maps to use."""
        own, cross, seen = {}, {}, iter(self.calls)

        def override(func, q, k, v, heads, *rest, **kwargs):
            name, kind = next(seen)
            q, k, v = (t.double() for t in (q, k, v))
            if not kwargs.get("skip_reshape"):
                q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            if kind == "self" and name in self.share:
                own[name] = weights
                weights = given[name] if given is not None else weights
            if kind == "cross" and name in self.read:
                cross[name] = weights.mean(1)[0].numpy(), [-(-n // self.stride[name]) for n in x.shape[-2:]]
            return (weights @ v).transpose(1, 2).flatten(2).float()

        options = {"optimized_attention_override": override}
        out = self.model.apply_model(x, sigma.reshape(1), c_crossattn=context, transformer_options=options)
        return out, own, cross


def update(sampler, i, sigmas, x, den, history, noise):
    """One step of a sampler on latents of all branches; ``history`` are earlier predictions, the last one first."""
    now, then = sigmas[i].item(), sigmas[i + 1].item()
    if then == 0:
        return den
    if sampler == "euler":
        return x + (x - den) / now * (then - now)
    if sampler == "euler_ancestral":
        up = min(then, (then**2 * (now**2 - then**2) / now**2) ** 0.5)
        down = (then**2 - up**2) ** 0.5
        return x + (x - den) / now * (down - now) + noise() * up
    h = math.log(now / then)
    if sampler == "dpmpp_2m":
        if history:
            r = math.log(sigmas[i - 1].item() / now) / h
            den = (1 + 1 / (2 * r)) * den - 1 / (2 * r) * history[0]
        return then / now * x - math.expm1(-h) * den
    if sampler == "dpmpp_2m_sde":
        out = then / now * math.exp(-h) * x - math.expm1(-2 * h) * den
        if history:
            r = math.log(sigmas[i - 1].item() / now) / h
            out = out - 0.5 * math.expm1(-2 * h) / r * (den - history[0])
        return out + noise(sigmas[i], sigmas[i + 1]) * then * (-math.expm1(-2 * h)) ** 0.5
    raise AssertionError(sampler)


def reference(
    model,
    positive,
    sampler,
    steps,
    batch,
    size,
    share_until=0.8,
    threshold=0.5,
    max_tokens=None,
    whole=False,
    where="branch before",
):
    """Latents of all branches, branch by branch, and the last masks of each picture."""
    family, sites = model_sites(model)
    flat = family == "unet"
    slow = Slow(
        model,
        read_names(model),
        {s.name for s in sites},
    )
    if max_tokens is not None:
        slow.share = {s.name for s in sites if math.prod(-(-n // s.stride) for n in size) <= max_tokens}
    sigmas = comfy.samplers.KSampler(model, steps, "cpu", sampler, "normal").sigmas
    first = comfy.sample.prepare_noise(families.latent(model, *size, batch), SEED)
    if sampler == "dpmpp_2m_sde":
        tree = comfy.samplers.k_diffusion_sampling.BrownianTreeNoiseSampler(
            first, sigmas[sigmas > 0].min(), sigmas.max(), SEED, cpu=True
        )
        draw = tree
    else:
        normal = comfy.samplers.k_diffusion_sampling.default_noise_sampler(first, seed=SEED)  # seeds are versions' own

        def draw():
            return normal(None, None)

    contexts, marks = [e[0] for e in positive], [e[1][BRANCH] for e in positive]
    negative = families.text(2)[0][0]
    start = (1 + sigmas[0] ** 2) ** 0.5 if flat else sigmas[0]
    z = torch.stack([first * start] * len(positive))  # [n + 1, B, c, (1,) H, W]
    history, sums, masks = [], {}, {}
    for i in range(steps):
        shared = i < int(share_until * steps + 0.5)
        den = torch.empty_like(z)
        for b in range(batch):
            base = None
            crosses = []
            for j, context in enumerate(contexts):
                if whole and not shared and j == len(contexts) - 1:
                    context = contexts[0]
                x = z[j, b : b + 1]
                c, own, cross = slow(x, sigmas[i], context, base if shared else None)
                u = slow(x, sigmas[i], negative)[0]
                base = own if j == 0 else base
                den[j, b] = (u + CFG * (c - u))[0]
                crosses.append(cross)
            for j, mark in enumerate(marks if shared else []):
                found = []
                for s, subject in enumerate(mark.subjects):
                    looked_at, columns = subject.place(j, where)
                    for m, grid in crosses[looked_at].values():
                        part = m[:, list(columns)].mean(1).reshape(tuple(grid))
                        sums[b, j, s] = sums.get((b, j, s), 0) + part
                    found.append(slow_binary(slow_bilinear(sums[b, j, s], *size), threshold))
                masks[b, j] = np.logical_or.reduce(found) if found else None
        cached = {}

        def noise(*levels, cached=cached):
            if "drawn" not in cached:
                cached["drawn"] = draw(*levels)
            return cached["drawn"]

        z = update(sampler, i, sigmas, z, den, history, noise)
        history = [den, *history]
        if shared:

            def blend(t):
                parts = [
                    slow_blend(t[:, b].double().numpy(), [masks[b, j] for j in range(1, len(marks))]) for b in range(batch)
                ]
                return torch.from_numpy(np.stack(parts, 1)).float()

            z, history = blend(z), [blend(t) for t in history]
    return model.model.process_latent_out(z.flatten(0, 1)), masks


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sampler", "size", "batch", "lengths", "more"),
    [
        ("wan", "euler", (8, 12), 2, (7, 7, 7, 7), {}),
        ("cosmos_predict2", "dpmpp_2m", (8, 8), 1, (7, 7, 14), {"share_until": 0.6}),
        ("sd15", "euler", (8, 12), 2, (7, 7, 7, 7), {}),
        ("sd15", "euler", (6, 10), 1, (7, 5, 35, 7), {"share_max_tokens": 15}),
        ("sd15", "euler_ancestral", (8, 8), 2, (7, 7, 14), {}),
        ("sd15", "dpmpp_2m", (8, 8), 1, (7, 7, 7, 7), {}),
        ("sd15", "dpmpp_2m_sde", (8, 8), 1, (7, 7, 7), {"share_until": 1.0}),
        ("sd15", "dpmpp_2m", (6, 8), 2, (7, 5, 35, 7), {"share_until": 0.4, "finish": "whole prompt"}),
    ],
)
def test_equals_one_branch_at_a_time(name, sampler, size, batch, lengths, more):
    model = families.shared(name)
    positive = branches(lengths)
    right, masks = reference(
        model,
        positive,
        sampler,
        5,
        batch,
        size,
        more.get("share_until", 0.8),
        max_tokens=more.get("share_max_tokens"),
        whole="finish" in more,
    )
    ours, shown = run(model, positive, batch, size, sampler, 5, **more)
    close(ours, right, 1e-3)
    subjects = [j for j in range(1, len(lengths)) if positive[j][1][BRANCH].subjects]
    expected = np.stack([masks[b, j] for j in subjects for b in range(batch)])
    assert shown.shape == (len(subjects) * batch, 8 * size[0], 8 * size[1])
    assert torch.equal(shown[:, ::8, ::8], torch.from_numpy(expected).float())
    assert 0 < shown.mean() < 1


@pytest.mark.parametrize("where", MASKS_FROM[1:])
def test_equals_one_branch_at_a_time_on_the_bundled_model(demo, where):
    model, clip, _ = demo
    text = "a red star and a blue circle"
    lines = "* | a star and a circle\nstar | a red star and a circle\ncircle | a star and a blue circle"
    positive = encode(clip, decompose(text, manual=lines))
    right = {"branch before": [(1, (2,)), (2, (6,))], "base": [(0, (3,)), (0, (7,))], "own": [(2, (3,)), (3, (6,))]}[where]
    assert [len(e[1][BRANCH].subjects) for e in positive] == [0, 0, 1, 1]
    assert [e[1][BRANCH].subjects[0].place(i, where) for i, e in enumerate(positive) if i > 1] == right
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    plain = families.text
    families.text = lambda seed, *rest, **more: empty if seed == 2 else plain(seed, *rest, **more)
    try:
        with torch.no_grad():
            right, _ = reference(model, positive, "euler", 4, 1, (10, 8), where=where)
    finally:
        families.text = plain
    ours, _ = run(model, positive, size=(10, 8), negative=empty, masks_from=where)
    close(ours, right, 1e-3)
    if where == "branch before":
        assert torch.equal(ours, run(model, positive, size=(10, 8), negative=empty)[0])  # as released
    differs(ours[-1:], run(model, positive, size=(10, 8), negative=empty, share_until=0.0)[0][-1:])


# --- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "ddim"])
def test_one_branch_is_ksampler_to_the_bit(sampler):
    model = families.shared("sd15")
    positive = branches((7,))
    ours, masks = run(model, positive, 2, sampler=sampler, optimize="entropy + centroid")
    assert torch.equal(ours, alone(model, positive[0], 2, sampler=sampler))
    assert masks.shape == (2, 64, 96) and masks.all()


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *itertools.product(("sd15", "sdxl"), ("euler", "dpmpp_sde", "euler_ancestral")),
        ("wan", "euler"),
        ("cosmos_predict2", "euler"),
    ],
)
def test_without_sharing_branches_are_independent_pictures(name, sampler):
    model = families.shared(name)
    positive = branches((7, 7, 7))
    right = torch.cat([alone(model, e, 2, sampler=sampler) for e in positive])
    fused = name not in ("sd15", "sdxl") and find_spec(detail.FUSED)  # no gradient through newer ComfyUI's transformers
    none, masks = run(model, positive, 2, sampler=sampler, share_until=0.0, optimize="off" if fused else "entropy")
    close(none, right)
    assert masks.all()
    last = run(model, positive, 2, sampler=sampler, share_until=0.0, finish="whole prompt")[0]
    close(last, torch.cat([right[:4], right[:2]]))
    everywhere = [[c, {**o, BRANCH: EncodedBranch(o[BRANCH].index, 3, 7)}] for c, o in positive]
    close(run(model, everywhere, 2, sampler=sampler, share_max_tokens=1)[0], right)


@pytest.mark.parametrize("sampler", detail.SUPPORTED)
def test_outside_its_subject_a_branch_is_the_one_before_it(sampler):
    """Whatever the sampler keeps from step to step. Without the history's blending, or with noise of its own, it would not be."""
    model = families.shared("sd15")
    ours, shown = run(model, branches(), 2, (8, 8), sampler, 4, share_until=1.0)
    z, masks = ours.unflatten(0, (4, 2)), shown[:, ::8, ::8].unflatten(0, (2, 2)).bool()
    assert ours.isfinite().all()
    for branch, mask in ((2, masks[0]), (3, masks[1])):
        assert 0 < mask.float().mean() < 1
        torch.testing.assert_close(
            torch.where(mask[:, None], z[branch - 1], z[branch]), z[branch - 1], rtol=1e-5, atol=1e-5 * z.abs().max().item()
        )
        assert not torch.equal(z[branch], z[branch - 1])


@pytest.mark.parametrize("sampler", detail.SUPPORTED)
def test_a_sampler_calls_the_model_as_often_as_we_think(sampler, monkeypatch):
    model = families.shared("sd15")
    counted = []
    whole = Blending.__call__
    monkeypatch.setattr(Blending, "__call__", lambda self, *a, **k: (counted.append(self), whole(self, *a, **k))[1])
    run(model, branches((7, 7)), size=(4, 4), sampler=sampler, steps=5, denoise=0.8, scheduler="karras")
    assert len(counted) == len(counted[0].steps)


def test_samplers_that_keep_something_else_are_refused():
    model = families.shared("sd15")
    for name in set(comfy.samplers.KSampler.SAMPLERS) - set(detail.SUPPORTED):
        with pytest.raises(ValueError, match="euler_ancestral"):
            run(model, branches(), sampler=name)


# --- what goes in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_img2img_and_noise_masks(sampler):
    model = families.shared("sd15")
    image = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(2, 64, 96)
    mask[0, :, 48:] = 1
    mask[1, 32:] = 1
    latent = {"samples": image, "noise_mask": mask}
    positive = branches()
    ours, _ = run(model, positive, sampler=sampler, latent=latent, denoise=0.7)
    kept = ours.unflatten(0, (4, 2))
    torch.testing.assert_close(kept[:, 0, :, :, :5], image[0, :, :, :5].expand(4, -1, -1, -1))
    torch.testing.assert_close(kept[:, 1, :, :3], image[1, :, :3].expand(4, -1, -1, -1))
    noise = comfy.sample.prepare_noise(image, SEED)
    settings = {"denoise": 0.7, "noise_mask": mask, "disable_pbar": True, "seed": SEED}
    plain = [
        comfy.sample.sample(model, noise, 4, CFG, sampler, "normal", [e], families.text(2), image, **settings) for e in positive
    ]
    close(run(model, positive, sampler=sampler, latent=latent, denoise=0.7, share_until=0.0)[0], torch.cat(plain))
    assert torch.equal(run(model, branches((7,)), latent=latent, denoise=0.0)[0], image)


def test_pictures_of_a_batch_and_their_own_negatives():
    """Every picture of a batch is what it is on its own; conditionings may have a row for each picture."""
    model = families.shared("sd15")
    positive, negative = branches(), [[torch.cat([families.text(2)[0][0], families.text(3)[0][0]]), families.text(2)[0][1]]]
    latent = {"samples": families.latent(model, 8, 8, 2), "batch_index": [1, 4]}
    together = run(model, positive, latent=latent, negative=negative)[0].unflatten(0, (4, 2))
    for i, index in enumerate((1, 4)):
        single = {"samples": families.latent(model, 8, 8, 1), "batch_index": [index]}
        close(together[:, i], run(model, positive, latent=single, negative=families.text(2 + i))[0], 1e-3)


def test_areas_timesteps_and_other_prompts_apply_to_all_branches():
    model = families.shared("sd15")
    whole = run(model, branches())[0]
    close(run(model, branches(area=(8, 12, 0, 0), strength=1.0))[0], whole)
    left = run(model, branches(area=(8, 4, 0, 0), strength=1.0) + families.text(30), share_until=1.0)
    assert left[0].isfinite().all()
    masks = left[1][:, ::8, ::8]
    assert masks[:, :, :4].any() and not masks[:, :, 4:].any()  # subjects are where their prompt is
    late = branches(start_percent=0.4) + families.text(30, end_percent=0.4)
    with pytest.raises(RuntimeError, match="share_until"):  # nothing to read in the first step
        run(model, late)
    other = families.text(30, 11)
    differs(run(model, branches() + other)[0], whole)


def test_long_and_short_prompts_are_one_batch():
    model = families.shared("sd15")
    short, long = branches((7, 7, 7)), branches((7, 14, 21))
    settings = {"share_until": 0.0, "negative": families.text(2, 6)}
    close(run(model, long, **settings)[0][:1], run(model, short, **settings)[0][:1])
    assert run(model, long, negative=families.text(2, 6))[0].isfinite().all()


def test_bad_input_is_refused_before_sampling():
    model = families.shared("sd15")
    for positive, words in (
        (families.text(1), "Encode Branches"),
        (branches()[:3], "every branch"),
        (branches() + branches((7, 7)), "every branch"),
        ([[c[:, :5], o] for c, o in branches()], "shorter"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, positive)
    for name in ("sd3", "flux", "z_image"):
        with pytest.raises(ValueError, match="SDXL"):
            run(families.shared(name), branches())
    film = {"samples": families.latent(families.shared("wan"), frames=3)}
    with pytest.raises(ValueError, match="this latent has 3 frames"):
        run(families.shared("wan"), branches(), latent=film)
    with pytest.raises(ValueError, match="entropy"):
        run(model, branches(), optimize="hard")
    with pytest.raises(ValueError, match="whole prompt"):
        run(model, branches(), finish="early")


# --- inside -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_branches_in_parts_are_the_same(sampler, size):
    model = families.shared("sd15")
    settings = {"batch": 2, "size": (6, 8), "sampler": sampler, "steps": 3}
    whole, masks = run(model, branches(), **settings)
    parts, same = run(model, branches(), branches_at_once=size, **settings)
    close(parts, whole)
    assert torch.equal(masks, same)
    settings["share_until"] = 0.4
    early = run(model, branches(), **settings)[0]
    finished = run(model, branches(), finish="whole prompt", **settings)[0]
    differs(finished[-2:], early[-2:])
    close(finished[:-2], early[:-2])
    close(run(model, branches(), branches_at_once=size, finish="whole prompt", **settings)[0], finished)


def test_parts_by_memory(monkeypatch):
    model, sizes = families.shared("sdxl"), []
    whole, _ = run(model, branches(), size=(8, 8))
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    monkeypatch.setattr(type(model.model), "memory_required", lambda self, shape, **kwargs: shape[0] * 0.25 * free)
    apply_model = type(model.model).apply_model
    monkeypatch.setattr(
        type(model.model), "apply_model", lambda self, x, *a, **k: (sizes.append(len(x)), apply_model(self, x, *a, **k))[1]
    )
    close(run(model, branches(), size=(8, 8))[0], whole)
    assert set(sizes) == {2}


def test_queries_and_keys_of_the_branches_are_not_computed():
    model = families.shared("sd15")
    rows: dict[str, set[int]] = {}
    handles = []
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name[-4:]: rows.setdefault(n, set()).add(len(a[0]))))
    try:
        run(model, branches(), 2, steps=2, share_until=1.0)
    finally:
        for handle in handles:
            handle.remove()
    assert rows == {"to_q": {8 + 2}, "to_k": {8 + 2}, "to_v": {16}}  # all unconditional rows, and the base's two


def test_nothing_stays_and_the_callback_sees_the_result():
    model = families.shared("sd15").clone()
    options, wrappers = str(model.model_options), str(model.wrappers)
    seen = []
    ours, _ = run(model, branches(), 2, callback=lambda i, x0, x, total: seen.append((i, len(x0), len(x), total)))
    assert seen == [(i, 2, 2, 4) for i in range(4)]
    assert torch.equal(ours, run(model, branches(), 2)[0])  # deterministic
    assert (str(model.model_options), str(model.wrappers)) == (options, wrappers)

    def stop(i, *rest):
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, branches(), callback=stop)
    assert torch.equal(alone(model, branches()[0]), alone(families.shared("sd15"), branches()[0]))
    assert REQUESTS not in model.model_options.get("transformer_options", {})
    assert all("forward" not in vars(m) for m in model.model.diffusion_model.modules())


def test_an_editor_that_listens_sees_the_masks(monkeypatch):
    model, shown = families.shared("sd15"), []
    seen = run(model, branches(), 2, steps=5)
    monkeypatch.setattr(live, "show", lambda *a, **k: shown.append((a, k)))
    run(model, branches(), 2, steps=5, observer=live.Preview(None))
    assert not shown  # nobody listens
    monkeypatch.setattr(live, "listening", lambda: True)
    samples, masks = run(model, branches(), 2, steps=5, observer=live.Preview(None))
    assert torch.equal(samples, seen[0])
    assert [(*a[:3], a[4]) for a, _ in shown] == [(i, 5, ["branch 2", "branch 3"], "masks") for i in range(4)]
    assert [a[6] for a, _ in shown] == [False, False, False, True]
    assert torch.equal(shown[-1][0][3].float(), masks[::2, ::8, ::8])  # the first picture's


def test_stacks_with_guidance():
    from attune.patches import scfg, softpag

    model = families.shared("sd15")
    for patched in (scfg.apply(model)[0], softpag.apply(model, 2, 1, 0, 1, 0)):
        whole, _ = run(patched, branches(), 2, (6, 8), steps=3)
        differs(whole, run(model, branches(), 2, (6, 8), steps=3)[0])
        close(run(patched, branches(), 2, (6, 8), steps=3, branches_at_once=2)[0], whole, 1e-3)


def slow_complete(pixels, cross):
    """``(1/4) Σ S^r C`` of one picture's ``pixels [M, M]``, ``cross [M]``, then the 3×3 Gaussian of half a pixel."""
    return sum(np.linalg.matrix_power(pixels, r) @ cross for r in (1, 2, 3, 4)) / 4


def slow_smooth(m):
    row = [math.exp(-2), 1, math.exp(-2)]
    padded = np.pad(m, 1, mode="reflect")
    weights = [[a * b / sum(row) ** 2 for a in row] for b in row]
    return np.array(
        [
            [sum(padded[y + i, x + j] * weights[i][j] for i in range(3) for j in range(3)) for x in range(m.shape[1])]
            for y in range(m.shape[0])
        ]
    )


@torch.no_grad()
def test_exclusive_masks_are_scfgs_maps_in_competition():
    """After one step from the same noise: maps over their mean, completed by the base's self-attention, one owner for each pixel."""
    model, size, threshold = families.shared("sd15"), (6, 8), 0.3
    positive = branches()
    sites = model_sites(model)[1]
    slow = Slow(model, {s.name for s in sites if s.stride == 1}, {s.name for s in sites})
    sigma = comfy.samplers.KSampler(model, 1, "cpu", "euler", "normal").sigmas[:1]
    x = comfy.sample.prepare_noise(families.latent(model, *size, 2), SEED) * (1 + sigma**2) ** 0.5
    right = np.zeros((2, 2, *size), dtype=bool)
    for b in range(2):
        _, base, _ = slow(x[b : b + 1], sigma, positive[0][0])
        total = np.zeros((2, *size))
        for s, (looked_at, columns) in enumerate(((1, (2, 3)), (2, (4,)))):
            _, _, cross = slow(x[b : b + 1], sigma, positive[looked_at][0], base)
            for name, (m, grid) in cross.items():
                own = m[:, list(columns)].mean(1)
                own = slow_complete(base[name].mean(1)[0].numpy(), own / own.mean())
                total[s] += slow_smooth(own.reshape(tuple(grid)))
        owner = total.argmax(0)
        for s in range(2):
            right[s, b] = slow_binary(total[s], threshold) & (owner == s)
    settings = {"size": size, "steps": 1, "share_until": 1.0, "mask_threshold": threshold}
    _, masks = run(model, positive, 2, masks="exclusive", **settings)
    assert torch.equal(masks[:, ::8, ::8].unflatten(0, (2, 2)).bool(), torch.from_numpy(right))
    assert (right.sum(0) <= 1).all() and 0 < right.mean() < 1
    published = run(model, positive, 2, **settings)[1]
    assert not torch.equal(published, masks)
    for parts in (1, 3):
        assert torch.equal(run(model, positive, 2, masks="exclusive", branches_at_once=parts, **settings)[1], masks)


def test_a_subject_with_two_details_has_one_exclusive_region():
    model = families.shared("sd15")
    positive = branches((7, 7, 7, 7, 7), [(), (), ((2, 3),), ((4,),), ((2, 3),)])
    masks = run(model, positive, masks="exclusive", mask_threshold=0.2, steps=2, size=(6, 8))[1]
    assert torch.equal(masks[0], masks[2]) and not (masks[0].bool() & masks[1].bool()).any()


# --- nodes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Any:
    return demo_model.load()


def test_subjects_are_found_where_they_stand(demo):
    _, clip, _ = demo
    lines = "* | a star and a star\nstar #2 | a star and a red star\ncircle | a blue circle and a star and a star"
    taken = decompose("a star and a red star and a blue circle", manual=lines, order="simple first")
    marks = [e[1][BRANCH] for e in encode(clip, taken)]
    assert [m.index for m in marks] == [0, 1, 2] and {m.count for m in marks} == {3}
    assert marks[1].subjects == (SubjectColumns((6,), (5,), (5,)),)
    for where, place in (("base", (0, (5,))), ("branch before", (0, (5,))), ("own", (1, (6,)))):
        assert marks[1].subjects[0].place(1, where) == place
    # no circle in the base, nor in the branch before
    assert marks[2].subjects == (SubjectColumns((3,)),)
    assert {marks[2].subjects[0].place(2, where) for where in MASKS_FROM[1:]} == {(2, (3,))}
    both = decompose("a red star and a red ring", manual="* | a star and a ring\nstar, ring | a red star and a red ring")
    marks = [e[1][BRANCH] for e in encode(clip, both)]
    assert [s.place(2, "branch before") for s in marks[2].subjects] == [(1, (2,)), (1, (5,))]
    assert [s.place(2, "base") for s in marks[2].subjects] == [(0, (3,)), (0, (7,))]
    with pytest.raises(ValueError, match="text encoder"):
        encode(None, decompose("a star", manual="* | a star"))


def test_the_node(demo):
    model, clip, _ = demo
    positive = encode(clip, decompose("a red star", manual="* | a star\nstar | a red star"))
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latent = {"samples": torch.zeros(2, 4, 16, 12), "batch_index": [3, 4], "noise_mask": torch.ones(1, 128, 96)}
    schema = AttuneDetailSampler.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    assert [i.id for i in schema.inputs][-8:] == [
        "share_until",
        "share_max_tokens",
        "mask_threshold",
        "optimize",
        "optimize_steps",
        "step_size",
        "finish",
        "masks",
    ]
    assert (defaults["cfg"], defaults["optimize"], defaults["masks"]) == (7.5, "entropy + centroid", "published")
    given = {"model": model, "positive": positive, "negative": empty, "latent_image": latent, "sampler_name": "euler"}
    with torch.inference_mode():
        out = AttuneDetailSampler.execute(**{**defaults, **given, "scheduler": "normal", "steps": 2})
    result, every, masks = out.args
    assert result["samples"].shape == (2, 4, 16, 12) and result["batch_index"] == [3, 4]
    assert every["samples"].shape == (6, 4, 16, 12) and every["noise_mask"].shape[0] == 6 and len(every["batch_index"]) == 6
    assert torch.equal(every["samples"][-2:], result["samples"]) and masks.shape == (2, 128, 96)


def test_words_of_one_prompt_are_refused():
    """Other branches have other words at these places."""
    model = families.shared("sd15")
    patched = fusion.apply(model, Words("", (Phrase("a b", (2, 3), {}),), (), (), 7, {"l": 7}))
    with pytest.raises(ValueError, match="Detail\\+\\+ Sampler: on this model a node acts on single words"):
        run(patched, branches())
    run(patched, branches((7,)))


def test_a_layers_own_forward_stays():
    """Another pack may have put one there; it runs, and nothing is put in its place."""
    model = families.build("sd15")
    unet = model.model.diffusion_model
    layer, ran = unet.input_blocks[1][1], []
    own = layer.forward
    layer.forward = lambda *args, **kwargs: (ran.append(torch.is_grad_enabled()), own(*args, **kwargs))[1]
    put = layer.forward
    seen = gradient.checkpointed(unet, [s for s in model_sites(model)[1] if s.block == ("middle_block", 0)])
    assert seen.input_blocks[1][1].forward is not put and layer.forward is put and seen.middle_block is unet.middle_block
    assert seen.input_blocks[1][1].transformer_blocks is layer.transformer_blocks and type(seen).__name__ == type(unet).__name__
    run(model, branches(), optimize="entropy", steps=2, size=(4, 4))
    assert (
        layer.forward is put and ran.count(True) == 4 and False in ran
    )  # once forwards and once backwards in each step's update
    assert "forward" not in unet.input_blocks[1][0].__dict__
