"""What newer versions of ComfyUI hand to attention and do with blocks, by small stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import comfy
import comfy.ldm.flux.math
import comfy.ldm.modules.attention as backends
import pytest
import torch
from torch import Tensor, nn

from attune.patches import softpag
from attune.patches.hook.families import family_of
from attune.patches.hook.forward import OVERRIDE, Forward
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.prefix_cache import PrefixCache
from attune.patches.hook.requests import BlendOutputs, EditWeights, MapSource, ReadWeights, ShareMap
from attune.patches.hook.views import Around, view, with_blocks
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.helpers import close, differs

sample = families.sample
CROSS, SELF = ("middle.0.0", "cross"), ("middle.0.0", "self")


def with_requests(model: Any, *requests: Any) -> Any:
    patched = model.clone()
    request(patched, *requests)
    return patched


# --- a checkpoint's own kernel ---


class Chosen:
    """A kernel that a checkpoint asks for at one place: ComfyUI's own, and a little more."""

    def __init__(self) -> None:
        self.calls = 0

    def function(self, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        assert kwargs["_inside_attn_wrapper"]  # or it would come to the override again
        return backends.attention_basic(q, k, v, heads, *args, **kwargs) * 1.5


def choosing(wrapped: Any, chosen: dict[int, Chosen]) -> Any:
    """ComfyUI's attention as newer versions have it: a block's choice counts, unless there is an override.

    ``chosen`` are choices by the width of keys, which differs from place to place here.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or {}
        preferred = chosen.get(k.shape[1])
        if OVERRIDE not in options and preferred is not None:
            return preferred.function(q, k, v, heads, *args, **{**kwargs, "_inside_attn_wrapper": True})
        return wrapped(q, k, v, heads, *args, **kwargs)

    return attend


def test_blocks_that_nobody_asks_about_keep_the_kernel_of_their_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX: no override reaches them; the block that is read is given its own choice."""
    model = families.shared("flux")
    chosen = Chosen()
    keys = 7 + 16
    monkeypatch.setattr(
        comfy.ldm.flux.math, "optimized_attention", choosing(backends.optimized_attention, dict.fromkeys([4, keys], chosen))
    )
    right = sample(model, steps=1)
    count, chosen.calls = chosen.calls, 0
    block = model.model.diffusion_model.double_blocks[1]
    monkeypatch.setattr(block, "comfy_attention", chosen, raising=False)
    maps: list[Tensor] = []
    ours = sample(with_requests(model, ReadWeights({("double.1", "joint"): None}, lambda call, w: maps.append(w))), steps=1)
    assert len(maps) == 1 and chosen.calls == count == 5
    assert torch.equal(ours, right)


def test_all_calls_of_a_unet_keep_the_kernel_of_their_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.shared("sd15")
    chosen = {}
    for block in (1, 3):
        transformer = model.model.diffusion_model.input_blocks[block][1].transformer_blocks[0]
        for attention in (transformer.attn1, transformer.attn2):
            chosen[attention] = Chosen()
            monkeypatch.setattr(attention, "comfy_attention", chosen[attention], raising=False)
    patched = with_requests(model, ReadWeights({("input.3.0", "self"): None}, lambda call, w: None))
    ours = sample(patched, steps=1)
    assert [c.calls for c in chosen.values()] == [1, 1, 1, 1]
    differs(ours, sample(model, steps=1))  # 0.3.75 itself knows of no choices


def test_another_packs_override_gets_the_kernel_that_it_gets_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.shared("sd15").clone()
    chosen = Chosen()
    transformer = model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    monkeypatch.setattr(transformer.attn1, "comfy_attention", chosen, raising=False)
    model.model_options.setdefault("transformer_options", {})[OVERRIDE] = lambda f, *args, **kwargs: f(*args, **kwargs)
    plain = sample(model, steps=1)
    assert torch.equal(sample(with_requests(model, ReadWeights({SELF: None}, lambda call, w: None)), steps=1), plain)
    assert not chosen.calls


def test_keywords_pass_through() -> None:
    """What a call carries besides q, k and v reaches the kernel, on the whole and on a part of it."""
    model = families.shared("sd15")
    seen: list[dict[str, Any]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        out = (q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2) * kwargs["scale"]).softmax(-1)
        return out @ v.repeat_interleave(heads // v.shape[1], 1)

    attended: list[Tensor] = []

    def blend(call: Any, heads: Any) -> Tensor:
        attended.append(heads.attend())
        return heads.out

    blending = BlendOutputs({CROSS: (1, 3)}, blend)
    forward = Forward(family_of(model.model.diffusion_model), [blending], torch.zeros(2, 4, 8, 8), None, {})
    forward.at(*CROSS)
    q, (k, v) = torch.randn(2, 4, 16, 8), (torch.randn(2, 2, 6, 8) for _ in range(2))
    given = {"scale": 0.3, "low_precision_attention": False, "enable_gqa": True, "something_new": 1}
    out = forward.override(kernel, q, k, v, 4, skip_reshape=True, skip_output_reshape=True, **given)
    whole, part = seen
    assert whole.items() >= given.items()
    assert part["scale"] == 0.3 and part["low_precision_attention"] is False and part["something_new"] == 1
    assert "enable_gqa" not in part  # the part's keys have as many heads as its queries
    torch.testing.assert_close(attended[0], out[:, [1, 3]], rtol=1e-4, atol=1e-5)


# --- memory that is planned ahead ---


def test_what_outlives_a_block_is_made_outside_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, maps, what edits remember, and shared q and k."""
    paused = [False]
    told: dict[str, bool] = {}

    @contextlib.contextmanager
    def pause() -> Iterator[None]:
        paused[0] = True
        yield
        paused[0] = False

    monkeypatch.setattr(comfy, "model_prefetch", SimpleNamespace(pause_malloc_graph=pause), raising=False)
    clone = Tensor.clone

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if recording[0]:
            told["prefix"] = told.get("prefix", True) and paused[0]
        return clone(self, *args, **kwargs)

    recording = [False]
    unet = family_of(families.shared("sd15").model.diffusion_model)
    monkeypatch.setattr(Tensor, "clone", watched)
    recording[0] = True
    cache = PrefixCache()
    options = {"cond_or_uncond": [0], "uuids": ["a"], "sigmas": torch.ones(1)}
    blocks = cache.recorders(unet, [("input_blocks", 2)], torch.randn(1, 4, 8, 8), options)
    for block in blocks.values():
        list(block)[-1](torch.randn(1, 4, 8, 8))
    recording[0] = False

    def edit(call: Any, weights: Tensor) -> None:
        told["edit"] = paused[0]

    def listen(q: Tensor, k: Tensor) -> None:
        told["share"] = paused[0]

    requests = [
        ReadWeights({CROSS: None}, lambda call, w: told.__setitem__("read", paused[0])),
        EditWeights({CROSS: None}, edit, columns=(1,)),
        ShareMap({SELF: None}, lambda call: MapSource(range(call.batch), None, (0,), listen)),
        BlendOutputs({SELF: None}, lambda call, heads: told.__setitem__("blend", paused[0]) or heads.out),
    ]
    sample(with_requests(families.shared("sd15"), *requests), steps=1)
    assert told == {"prefix": True, "edit": True, "share": True, "read": True, "blend": False}
    assert not paused[0]


# --- blocks that are other blocks ---


def test_weights_moved_ahead_of_time_are_found_in_a_block_with_something_around_it() -> None:
    block = nn.Linear(2, 2)
    block._comfy_graph, block.hidden_size = object(), 3
    around = Around(block, lambda run, x: run(x) + 1)
    assert block in list(around.modules()) and around.hidden_size == 3
    assert getattr(around, "_comfy_graph", None) is None  # a captured graph of the bare block is none of this one
    torch.testing.assert_close(around(torch.ones(1, 2)), block(torch.ones(1, 2)) + 1)


@pytest.mark.parametrize(
    ("name", "block"), [("sd15", ("middle_block", 0)), ("sd15", ("output_blocks", 1)), ("flux", ("single_blocks", 1))]
)
def test_a_view_is_the_model_but_for_its_blocks(name: str, block: tuple[str, int]) -> None:
    model = families.shared(name).model.diffusion_model
    family = family_of(model)
    before = dict(vars(model))
    other = nn.Identity()
    seen = with_blocks(model, family.attributes, {block: other})
    assert isinstance(seen, type(model)) and type(seen).__name__ == type(model).__name__
    held = getattr(seen, block[0])
    assert (held if block[0] == "middle_block" else held[block[1]]) is other
    assert family.block(block) is not other
    assert all(a is b for a, b in zip(seen.parameters(), model.parameters(), strict=True))
    seen.remembered = 3  # as packs do that cache from step to step
    assert model.remembered == 3
    del model.remembered
    assert vars(model) == before


def test_a_view_of_a_view_shows_what_both_show() -> None:
    layer = nn.Linear(2, 2)
    first, second = nn.Identity(), nn.Identity()
    once = view(layer, {"a": first, "weight": second})
    twice = view(once, {"b": second, "weight": first})
    assert (twice.a, twice.b, twice.weight, once.weight) == (first, second, first, second)
    assert twice.bias is layer.bias and type(twice).__mro__[1] is nn.Linear


def test_a_pack_that_puts_its_own_method_on_the_model_is_followed() -> None:
    """As TeaCache and others replace ``forward_orig``: what they replace it by finds the other blocks."""
    model = families.build("flux")
    network = model.model.diffusion_model
    plain = sample(model)
    own = type(network).forward_orig
    calls = []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        self.steps = getattr(self, "steps", 0) + 1
        return own(self, *args, **kwargs)

    network.forward_orig = theirs.__get__(network)
    try:
        blend = BlendOutputs({("double.1", "joint"): None}, lambda call, heads: heads.out * 0.5)
        ours = sample(with_requests(model, blend))
        assert len(calls) == network.steps == 2
    finally:
        del network.forward_orig
    assert torch.equal(ours, sample(with_requests(model, blend)))
    differs(ours, plain)


def test_a_compiled_model_is_run_as_it_is_where_its_blocks_are_others() -> None:
    """What was compiled knows the model's own blocks only."""

    class Compiled(nn.Module):
        """As `torch.compile` wraps a module."""

        def __init__(self, module: nn.Module):
            super().__init__()
            self._orig_mod = module

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("_orig_mod"), name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._orig_mod(*args, **kwargs)

    model = families.build("flux")
    plain = sample(softpag.apply(model, 2, 1, 0, 1, 0, heads_of(model, "single.1")))
    model.model.diffusion_model = Compiled(model.model.diffusion_model)
    assert torch.equal(sample(softpag.apply(model, 2, 1, 0, 1, 0, heads_of(model, "single.1"))), plain)


def test_a_function_in_place_of_the_models_own_is_told() -> None:
    model = families.build("flux")
    perturbed = softpag.apply(model, 2, 1, 0, 1, 0, heads_of(model, "single.1"))
    read = with_requests(model, ReadWeights({("double.1", "joint"): None}, lambda call, w: None))
    plain = sample(model)
    for owner, name in ((model.model, "_apply_model"), (model.model.diffusion_model, "forward")):
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, own=own, **kwargs: own(*args, **kwargs))
        for patched in (read, perturbed):
            with pytest.raises(RuntimeError, match="another node has put a function of its own"):
                sample(patched)
        assert torch.equal(sample(model), plain)
        delattr(owner, name)
    sample(read)


def test_a_prefix_is_only_spared_time_where_it_cannot_be_replayed() -> None:
    """A UNet says itself where it is."""
    model = families.build("sd15")
    network = model.model.diffusion_model
    patched = softpag.apply(model, 2, 1, 0, 1, 0)
    right = sample(patched)
    own = network.forward
    network.forward = lambda *args, **kwargs: own(*args, **kwargs)
    close(sample(patched), right)


def test_a_view_of_a_layer_calls_another_forward() -> None:
    layer = nn.Linear(2, 2)
    seen = view(layer, {"forward": lambda x: layer(x) * 2})
    assert isinstance(seen, nn.Linear) and seen.weight is layer.weight
    close(seen(torch.ones(1, 2)).detach(), 2 * layer(torch.ones(1, 2)).detach())


def test_places_that_a_model_does_not_have_are_told() -> None:
    model = families.shared("sd15")
    for where, words in (
        ({("middle.0.1", "self"): None}, "no attention at “middle.0.1”"),
        ({("middle.0.0", "joint"): None}, "no “joint” attention at middle.0.0"),
        ({("middle.0.0", "self"): (0, 4)}, "heads 0 to 3 in this model, not 4"),
    ):
        with pytest.raises(ValueError, match=words):
            request(model.clone(), ReadWeights(where, lambda call, w: None))
    assert len(model_sites(model)[1]) == 7
