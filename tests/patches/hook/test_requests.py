"""The attention hook in joint attention, between owners of whole blocks, and where several requests meet at one place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.modules.attention as backends
import comfy.ldm.modules.diffusionmodules.mmdit
import pytest
import torch
from torch import Tensor

from attune.patches.hook.families import family_of
from attune.patches.hook.forward import Forward
from attune.patches.hook.install import request
from attune.patches.hook.requests import BlendOutputs, EditWeights, ReadWeights, Request, ShareMap
from attune.tests import families
from attune.tests.helpers import close, differs

sample = families.sample
Place = tuple[str, str]
Change = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Every attention call of one forward, in order, written by hand.
CALLS: dict[str, list[Place]] = {
    "sd3": [(f"joint.{i}", "joint") for i in range(3)],
    "sd35": [("joint.0", "joint"), ("joint.0", "self"), ("joint.1", "joint"), ("joint.1", "self"), ("joint.2", "joint")],
    "flux": [(s, "joint") for s in ("double.0", "double.1", "single.0", "single.1", "single.2")],
}
CALLS |= {name: families.calls_of(families.shared(name)) for name in ("qwen_image", "flux2") if name in families.EVERY}
JOINT = [("sd3", "joint.1"), ("sd35", "joint.0"), ("flux", "double.1"), ("flux", "single.1")]
TEXT = 7  # tokens of `families.text`
SELF, CROSS = ("middle.0.0", "self"), ("middle.0.0", "cross")


def with_requests(model: Any, *requests: Request) -> Any:
    """A clone with the requests, each added by a node of its own."""
    for r in requests:
        model = model.clone()
        request(model, r)
    return model


def softmax(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights ``[B, H, M, N]`` written out."""
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores + mask
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def reference(
    model: Any, name: str, changes: Mapping[Place, Change], without: Collection[Place] = (), before: Collection[Place] = ()
) -> Any:
    """The model with attention written out at some places: ``change(q, k, v, roles) -> out [B, H, M, d]``.

    Args:
        without: places that an owner of their block leaves out.
        before: the places whose block makes one more call of its own first.
    """
    calls: list[Place | None] = []
    for place in CALLS[name]:
        if place in before:
            calls.append(None)
        if place not in without:
            calls.append(place)
    patched = model.clone()
    seen = {"calls": 0}

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *rest: Any, **kwargs: Any) -> Tensor:
        place = calls[seen["calls"] % len(calls)]
        seen["calls"] += 1
        if place is None or place not in changes:
            return func(q, k, v, heads, *rest, **kwargs)
        if not kwargs.get("skip_reshape"):
            q, k, v = (torch.stack(t.flatten(2).chunk(heads, dim=-1), dim=1) for t in (q, k, v))
        chunks = kwargs["transformer_options"]["cond_or_uncond"]
        roles = torch.tensor(chunks).repeat_interleave(len(q) // len(chunks))
        out = changes[place](q, k, v, roles)
        return torch.cat(out.unbind(1), dim=-1)

    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched


# --- share in joint attention ---


@pytest.mark.parametrize("source", [[0, 0, 2, 2], [1, 0, 3, 2], [1, 2, 3, 0]], ids=["first", "swapped", "round"])
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, (site, "joint")) for name, site in JOINT] + [("sd35", ("joint.0", "self")), ("sd3", ("joint.2", "joint"))],
)
def test_shared_rows_use_anothers_queries_and_keys_for_text_and_image(name: str, place: Place, source: list[int]) -> None:
    """All tokens of a row, text and image, attend as the other row does, with the row's own values."""
    model = families.shared(name)

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        return torch.stack([(softmax(q[s][None], k[s][None]) @ v[i][None])[0] for i, s in enumerate(source)])

    share = ShareMap({place: None}, lambda call: torch.tensor(source))
    ours = sample(with_requests(model, share), batch=2)
    close(ours, sample(reference(model, name, {place: change}), batch=2))
    differs(ours, sample(model, batch=2))


def test_two_shares_follow_each_other() -> None:
    """The second share picks from the rows that the first one left."""
    model, place = families.shared("flux"), ("double.1", "joint")
    first, second = [1, 2, 3, 0], [0, 0, 1, 3]
    both = [1, 1, 2, 0]

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        return softmax(q[both], k[both]) @ v

    shares = [ShareMap({place: None}, lambda call, rows=rows: torch.tensor(rows)) for rows in (first, second)]
    close(sample(with_requests(model, *shares), batch=2), sample(reference(model, "flux", {place: change}), batch=2))


@pytest.mark.parametrize("masked", ["no mask", "one mask", "a mask per row", "a boolean mask per row"])
def test_what_follows_a_share_works_on_the_map_of_the_other_row(masked: str) -> None:
    """The map that is edited, read and corrected is the shared one, mask included."""
    model = families.shared("sd15")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, n, 8, generator=generator) for n in (16, 6, 6))
    settings: dict[str, Any] = {"skip_reshape": True, "skip_output_reshape": True}
    added: Tensor | None = None
    if masked != "no mask":
        mask = added = 2 * torch.randn(1 if masked == "one mask" else 3, 1, 16, 6, generator=generator)
        if "boolean" in masked:
            mask = (mask > -1).index_fill(-1, torch.tensor([0]), True)
            added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        settings["mask"] = mask
    source, maps = [2, 0, 0], []
    asked = [
        ShareMap({CROSS: None}, lambda call: torch.tensor(source)),
        EditWeights({CROSS: (1, 2)}, lambda call, w: (3 * w, None), columns=(4,)),
        ReadWeights({CROSS: None}, lambda call, w: maps.append(w)),
        BlendOutputs({CROSS: (2,)}, lambda call, heads: heads.out * 2),
    ]
    forward = Forward(family_of(model.model.diffusion_model), asked, torch.zeros(3, 4, 8, 8), None, {"cond_or_uncond": [0]})
    forward.at(*CROSS)
    forward.shape = [3, 32, 4, 4]
    out = forward.override(backends.attention_pytorch, q, k, v, 4, **settings)
    weights = softmax(q, k, added)[source].clone()
    weights[:, 1:3, :, 4] *= 3
    right = weights @ v
    right[:, 2] *= 2
    torch.testing.assert_close(maps[0], weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-5)


# --- edit in joint attention ---

EDITED = (1, 4)


def halve(call: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Half the weight on the columns, and what they lose to all others in proportion."""
    total = weights.sum(-1, keepdim=True)
    return weights / 2, (1 - total / 2) / (1 - total)


def halved(weights: Tensor) -> Tensor:
    """`halve` on a whole map."""
    new = weights.clone()
    new[..., list(EDITED)] = weights[..., list(EDITED)] * 0.5
    others = [n for n in range(weights.shape[-1]) if n not in EDITED]
    missing = 1 - new[..., list(EDITED)].sum(-1, keepdim=True)
    new[..., others] = weights[..., others] / weights[..., others].sum(-1, keepdim=True) * missing
    return new


def edited(weights: Tensor, rows: Tensor, heads: Collection[int], change: Callable[[Tensor], Tensor], image: slice) -> Tensor:
    """A map changed in some rows and heads, for the queries of the image only, one head at a time."""
    weights = weights.clone()
    for row in rows.nonzero().flatten().tolist():
        for head in heads:
            weights[row, head, image] = change(weights[row, head, image])
    return weights


@pytest.mark.parametrize("rest", [False, True], ids=["columns only", "with a factor on the rest"])
@pytest.mark.parametrize(("name", "site"), JOINT)
def test_edit_of_text_columns_reaches_the_image_queries_of_its_rows_and_heads(name: str, site: str, rest: bool) -> None:
    """Text queries, unconditional rows and other heads keep their map."""
    model, place, heads = families.shared(name), (site, "joint"), (0, 2)

    def scale(call: Any, weights: Tensor) -> Any:
        return halve(call, weights) if rest else (4 * weights, None)

    def on_map(weights: Tensor) -> Tensor:
        if rest:
            return halved(weights)
        weights = weights.clone()
        weights[..., list(EDITED)] *= 4
        return weights

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        return edited(softmax(q, k), roles == 0, heads, on_map, slice(TEXT, None)) @ v

    settings = {"size": (7, 10), "batch": 2}
    edit = EditWeights({place: heads}, scale, rows="cond", columns=EDITED)
    ours = sample(with_requests(model, edit), **settings)
    close(ours, sample(reference(model, name, {place: change}), **settings))
    differs(ours, sample(model, **settings))


@pytest.mark.parametrize(("name", "site"), JOINT)
def test_edit_leaves_everything_else_of_the_output_alone(name: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention gives back at the place, token by token and head by head."""
    model, place = families.shared(name), (site, "joint")
    module = comfy.ldm.flux.math if name == "flux" else comfy.ldm.modules.diffusionmodules.mmdit
    original = module.optimized_attention
    outputs: list[Tensor] = []
    number, heads = CALLS[name].index(place), 4 if name == "flux" else 3

    def listen(*args: Any, **kwargs: Any) -> Tensor:
        out = original(*args, **kwargs)
        outputs.append(torch.stack(out.chunk(heads, dim=-1), dim=1).clone())
        return out

    def of(patched: Any) -> Tensor:
        outputs.clear()
        sample(patched, steps=1)
        assert len(outputs) == len(CALLS[name])  # one forward
        return outputs[number]

    monkeypatch.setattr(module, "optimized_attention", listen)
    plain = of(model)
    roles = []

    def zero(call: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        roles.extend(call.chunks)
        total = weights.sum(-1, keepdim=True)
        return weights * 0, 1 / (1 - total)

    ours = of(with_requests(model, EditWeights({place: (1,)}, zero, rows="cond", columns=EDITED)))
    cond = roles.index(0)
    assert sorted(roles) == [0, 1]
    assert torch.equal(ours[1 - cond], plain[1 - cond])
    assert torch.equal(ours[cond, :, :TEXT], plain[cond, :, :TEXT])
    others = [h for h in range(heads) if h != 1]
    torch.testing.assert_close(ours[cond, others], plain[cond, others], rtol=1e-4, atol=1e-5)
    assert ((ours[cond, 1, TEXT:] - plain[cond, 1, TEXT:]).abs().amax(-1) > 1e-4).all()  # every image token, nothing less


@pytest.mark.parametrize("tokens", [TEXT, 11], ids=["one batch", "two batches"])
@pytest.mark.parametrize(("name", "site"), [("sd3", "joint.1"), ("flux", "double.1")])
def test_two_edits_in_order_and_readers_of_any_rows_and_columns_see_both(name: str, site: str, tokens: int) -> None:
    """Halving and then copying is not copying and then halving; unconditional rows are read as they are."""
    model, place = families.shared(name), (site, "joint")
    read_heads, columns = (2, 0), (5, 0, 4)
    seen: dict[str, list[Tensor]] = {"columns": [], "mean": [], "all": []}
    right: dict[str, list[Tensor]] = {"columns": [], "mean": [], "all": []}

    def copy(call: Any, weights: Tensor) -> tuple[Tensor, None]:
        return weights[..., [1, 1]], None  # asked for as (6, 4): column 4 is copied to 6

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        words = q.shape[2] - 4 * 4
        image = slice(words, None)
        weights = edited(softmax(q, k), roles == 0, (0, 1), halved, image)

        def copied(part: Tensor) -> Tensor:
            part = part.clone()
            part[..., 6] = part[..., 4]
            return part

        weights = edited(weights, roles == 0, range(q.shape[1]), copied, image)
        shown = weights[:, :, image]
        right["columns"].append(shown[:, list(read_heads)][..., list(columns)])
        right["mean"].append(shown[:, list(read_heads)][..., list(columns)].mean(1))
        if (roles == 0).any():
            right["all"].append(shown[roles == 0][..., :words])
        return weights @ v

    requests = [
        ReadWeights({place: read_heads}, lambda call, w: seen["columns"].append(w), columns=columns),
        EditWeights({place: (0, 1)}, halve, rows="cond", columns=EDITED),
        ReadWeights({place: read_heads}, lambda call, w: seen["mean"].append(w), columns=columns, mean_heads=True),
        EditWeights({place: None}, copy, rows="cond", columns=(6, 4)),
        ReadWeights({place: None}, lambda call, w: seen["all"].append(w), rows="cond"),
    ]
    settings = {"negative": families.text(2, tokens), "steps": 1}
    ours = sample(with_requests(model, *requests), **settings)
    close(ours, sample(reference(model, name, {place: change}), **settings))
    differs(ours, sample(model, **settings))
    for what, maps in right.items():
        assert len(maps) == len(seen[what]) > 0, what
        for one, expected in zip(seen[what], maps, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


def test_edits_of_different_rows_and_columns_do_not_mix() -> None:
    """Conditional and unconditional rows have edits of their own, on columns that overlap."""
    model, place = families.shared("sd3"), ("joint.1", "joint")

    def scaled(columns: list[int], factor: float) -> Callable[[Tensor], Tensor]:
        def on_map(weights: Tensor) -> Tensor:
            weights = weights.clone()
            weights[..., columns] *= factor
            return weights

        return on_map

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        weights = edited(softmax(q, k), roles == 0, (0,), scaled([1, 4], 5), slice(TEXT, None))
        return edited(weights, roles == 1, (0, 2), scaled([4, 6], 0), slice(TEXT, None)) @ v

    requests = [
        EditWeights({place: (0,)}, lambda call, w: (5 * w, None), rows="cond", columns=(4, 1)),
        EditWeights({place: (0, 2)}, lambda call, w: (0 * w, None), rows="uncond", columns=(6, 4)),
    ]
    ours = sample(with_requests(model, *requests), batch=2)
    close(ours, sample(reference(model, "sd3", {place: change}), batch=2))


@pytest.mark.parametrize("site", ["double.1", "single.1"])
def test_reference_pictures_and_masks_of_flux(site: str) -> None:
    """Tokens after the image are neither image nor text, and a mask counts for the map that is read and edited."""
    model, place = families.shared("flux"), (site, "joint")
    generator = torch.Generator().manual_seed(3)
    picture = torch.randn(1, 16, 6, 4, generator=generator)
    count, extra = 4 * 4, 3 * 2
    mask = 2 * torch.randn(1, TEXT + count + extra, TEXT + count + extra, generator=generator)
    more = {"reference_latents": [picture], "attention_mask": mask, "attention_mask_img_shape": (4, 4)}
    image = slice(TEXT, TEXT + count)
    seen: list[Tensor] = []
    right: list[Tensor] = []

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        assert q.shape[2] == TEXT + count + extra
        weights = edited(softmax(q, k, mask[:, None]), roles == 0, (1, 3), halved, image)
        right.append(weights[roles == 0][:, :, image, :TEXT])
        out = weights @ v
        out[:, 2, image] = v[:, 2, image]
        return out

    requests = [
        EditWeights({place: (1, 3)}, halve, rows="cond", columns=EDITED),
        ReadWeights({place: None}, lambda call, w: seen.append(w), rows="cond"),
        BlendOutputs({place: (2,)}, lambda call, heads: heads.v),
    ]
    settings = {"positive": families.text(1, **more), "negative": families.text(2, **more), "steps": 1}
    ours = sample(with_requests(model, *requests), **settings)
    close(ours, sample(reference(model, "flux", {place: change}), **settings))
    differs(ours, sample(model, **settings))
    torch.testing.assert_close(seen[0], right[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "site", "before"), [("qwen_image", "joint.1", TEXT), ("flux2", "single.1", 512)])
def test_reference_pictures_of_others(name: str, site: str, before: int) -> None:
    """Tokens after the image are neither image nor text; of a text that ComfyUI lengthens at its beginning, the prompt is the end."""
    model, place = families.shared(name), (site, "joint")
    shape = families.latent(model, 8, 6).shape
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    extra, count = 4 * 3, families.latent(model, 8, 8).shape[-1] ** 2 // (1 if name == "flux2" else 4)
    image = slice(before, before + count)
    seen: list[Tensor] = []
    right: list[Tensor] = []

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        assert q.shape[2] == before + count + extra
        weights = softmax(q, k)
        right.append(weights[roles == 0][:, :, image, before - TEXT : before])
        out = weights @ v
        out[:, 2, image] = v[:, 2, image]
        return out

    requests = [
        ReadWeights({place: None}, lambda call, w: seen.append(w), rows="cond"),
        BlendOutputs({place: (2,)}, lambda call, heads: heads.v),
    ]
    more = {"reference_latents": [picture]}
    settings = {"positive": families.text(1, **more), "negative": families.text(2, **more), "steps": 1}
    ours = sample(with_requests(model, *requests), **settings)
    close(ours, sample(reference(model, name, {place: change}), **settings))
    differs(ours, sample(model, **settings))
    torch.testing.assert_close(seen[0], right[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("site", ["double.1", "single.1"])
def test_tokens_put_before_the_text_of_flux_are_neither_text_nor_image(site: str) -> None:
    """ComfyUI's USO style reference prepends tokens to the text: text columns and image tokens keep their meaning."""
    model, place, style = families.shared("flux").clone(), (site, "joint"), 3
    tokens = torch.randn(1, style, 64, generator=torch.Generator().manual_seed(5))
    words, image = slice(style, style + TEXT), slice(style + TEXT, None)
    seen: list[Tensor] = []
    right: list[Tensor] = []

    def prepend(args: dict[str, Any]) -> dict[str, Any]:
        txt, ids = args["txt"], args["txt_ids"]
        more = tokens.expand(len(txt), -1, -1)
        return {
            **args,
            "txt": torch.cat([more, txt], dim=1),
            "txt_ids": torch.cat([torch.zeros(len(ids), style, 3), ids], dim=1),
        }

    def scaled(weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[..., [style + n for n in EDITED]] *= 4
        return weights

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        assert q.shape[2] == style + TEXT + 4 * 4
        weights = edited(softmax(q, k), roles == 0, (1, 3), scaled, image)
        right.append(weights[roles == 0][:, :, image, words])
        out = weights @ v
        out[:, 2, image] = v[:, 2, image]
        return out

    model.set_model_post_input_patch(prepend)
    requests = [
        EditWeights({place: (1, 3)}, lambda call, w: (4 * w, None), rows="cond", columns=EDITED),
        ReadWeights({place: None}, lambda call, w: seen.append(w), rows="cond"),
        BlendOutputs({place: (2,)}, lambda call, heads: heads.v),
    ]
    ours = sample(with_requests(model, *requests), steps=1)
    close(ours, sample(reference(model, "flux", {place: change}), steps=1))
    torch.testing.assert_close(seen[0], right[0], rtol=1e-3, atol=1e-5)


# --- owners of whole blocks ---

OWNED = [
    ("sd3", "joint.0", ("double_block", 0)),
    ("sd35", "joint.1", ("double_block", 1)),
    ("flux", "double.0", ("double_block", 0)),
    ("flux", "double.1", ("double_block", 1)),
    ("flux", "single.1", ("single_block", 1)),
]


def block_replaced(model: Any, block: tuple[str, int], owner: Callable[..., Any]) -> Any:
    patched = model.clone()
    patched.set_model_patch_replace(owner, "dit", *block)
    return patched


def everywhere(name: str, maps: dict[Place, list[Tensor]]) -> list[Request]:
    """Reads and blends at every place of a model, different ones at each."""
    requests = []
    for i, place in enumerate(CALLS[name]):

        def read(call: Any, weights: Tensor, place: Place = place) -> None:
            assert (call.site.name, call.kind) == place
            maps.setdefault(place, []).append(weights)

        def blend(call: Any, heads: Any, share: float = 0.1 * (i + 1)) -> Tensor:
            return (1 - share) * heads.out + share * heads.v

        requests += [ReadWeights({place: None}, read), BlendOutputs({place: (i % 3,)}, blend)]
    return requests


def blended(name: str) -> dict[Place, Change]:
    """What `everywhere` does, written out."""

    def at(i: int, kind: str) -> Change:
        def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
            out, head, share = softmax(q, k) @ v, i % 3, 0.1 * (i + 1)
            image = slice(TEXT if kind == "joint" else 0, None)
            out[:, head, image] = (1 - share) * out[:, head, image] + share * v[:, head, image]
            return out

        return change

    return {place: at(i, place[1]) for i, place in enumerate(CALLS[name])}


def attend_itself(args: dict[str, Any]) -> Tensor:
    """A pack's own attention among the image's tokens, with the options it was given."""
    img = args["img"]
    return backends.optimized_attention(
        img, img, img, 4 if img.shape[-1] == 64 else 3, transformer_options=args["transformer_options"]
    )


@pytest.mark.parametrize("attends", [False, True], ids=["passes through", "attends around it"])
@pytest.mark.parametrize(("name", "site", "block"), OWNED)
def test_an_owner_that_calls_its_block_changes_nothing(name: str, site: str, block: tuple[str, int], attends: bool) -> None:
    """Reads and blends give what they give without it, even if it attends on its own before and after the block."""
    model = families.shared(name)
    called = []

    def owner(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        called.append(args["img"].shape)
        if attends:
            attend_itself(args)
        out = extra["original_block"](args)
        if attends:
            attend_itself({**args, "img": out["img"]})
        return out

    alone: dict[Place, list[Tensor]] = {}
    beside: dict[Place, list[Tensor]] = {}
    right = sample(with_requests(model, *everywhere(name, alone)))
    assert torch.equal(sample(with_requests(block_replaced(model, block, owner), *everywhere(name, beside))), right)
    assert called
    differs(right, sample(model))
    assert list(alone) == list(beside) == CALLS[name]
    for place, maps in alone.items():
        assert len(maps) == len(beside[place]) == 2
        assert all(torch.equal(a, b) for a, b in zip(maps, beside[place], strict=True))


@pytest.mark.parametrize(("name", "site", "block"), OWNED)
def test_an_owner_that_changes_what_its_block_gives_keeps_its_effect(name: str, site: str, block: tuple[str, int]) -> None:
    """Both changes are in the picture: the owner's and ours."""

    def owner(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.5}

    model = block_replaced(families.shared(name), block, owner)
    ours = sample(with_requests(model, *everywhere(name, {})))
    close(ours, sample(reference(model, name, blended(name))))
    differs(ours, sample(model))
    differs(ours, sample(with_requests(families.shared(name), *everywhere(name, {}))))


@pytest.mark.parametrize("attends", [False, True], ids=["skips it", "attends in its stead"])
@pytest.mark.parametrize(("name", "site", "block"), OWNED)
def test_an_owner_that_leaves_its_block_out_does_not_shift_the_others(
    name: str, site: str, block: tuple[str, int], attends: bool
) -> None:
    """The block's own place is not met, and every other place keeps its name."""

    def owner(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = {"img": args["img"] + (0.1 * attend_itself(args) if attends else 0)}
        return {**out, "txt": args["txt"]} if "txt" in args else out

    model = block_replaced(families.shared(name), block, owner)
    maps: dict[Place, list[Tensor]] = {}
    gone = [place for place in CALLS[name] if place[0] == site]
    ours = sample(with_requests(model, *everywhere(name, maps)))
    right = reference(model, name, blended(name), without=gone, before=gone[:1] if attends else ())
    close(ours, sample(right))
    differs(ours, sample(model))
    assert list(maps) == [place for place in CALLS[name] if place not in gone]


def test_gradients_pass_through_a_map_in_an_owned_block() -> None:
    """ComfyUI runs an owned SD3 block under a checkpoint; the map that was read has the same gradient as without the owner."""
    place = ("joint.1", "joint")

    def gradient(patched: Any) -> Tensor:
        maps: list[Tensor] = []
        blend = BlendOutputs({place: (0,)}, lambda call, heads: 0.5 * heads.out + 0.5 * heads.v)
        last = ReadWeights({("joint.2", "joint"): None}, lambda call, w: maps.append(w), columns=(1,))
        read = ReadWeights({place: None}, lambda call, w: maps.append(w), columns=(1,))
        patched = with_requests(patched, blend, read, last)
        options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers, "cond_or_uncond": [0]}
        context, more = families.text(1)[0]
        with torch.enable_grad():
            x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            patched.model.apply_model(
                x, torch.tensor([0.5]), c_crossattn=context, y=more["pooled_output"], transformer_options=options
            )
            (out,) = torch.autograd.grad(sum(m.square().sum() for m in maps), x)
        return out

    model = families.shared("sd3")
    plain = gradient(model)
    assert plain.abs().max() > 0
    close(gradient(block_replaced(model, ("double_block", 1), lambda args, extra: extra["original_block"](args))), plain)


# --- several requests at one place ---


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["double, then add", "add, then double"])
@pytest.mark.parametrize(("name", "place"), [("sd15", SELF), ("flux", ("double.1", "joint"))])
def test_blends_act_in_the_order_of_the_graph(name: str, place: Place, order: tuple[int, int]) -> None:
    """Each sees what the one before it made of the heads that they have in common."""
    model = families.shared(name)
    acts = [lambda out, value: out * 2, lambda out, value: out + value]
    requests = [BlendOutputs({place: ((0, 2), (2, 3))[i]}, lambda call, heads, i=i: acts[i](heads.out, heads.v)) for i in order]

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        out = softmax(q, k) @ v
        image = slice(TEXT if name == "flux" else 0, None)
        for head, todo in ((0, (0,)), (2, order), (3, (1,))):
            for i in todo:
                out[:, head, image] = acts[i](out[:, head, image], v[:, head, image])
        return out

    ours = sample(with_requests(model, *requests))
    close(ours, sample(written_out(model, name, place, change)))
    differs(ours, sample(with_requests(model, *reversed(requests))))


def written_out(model: Any, name: str, place: Place, change: Change) -> Any:
    """`reference`, for UNets too, which say themselves where they are."""
    if name in CALLS:
        return reference(model, name, {place: change})
    patched = model.clone()
    replace = {"self": patched.set_model_attn1_replace, "cross": patched.set_model_attn2_replace}[place[1]]

    def owner(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        q, k, v = (torch.stack(t.chunk(extra["n_heads"], dim=-1), dim=1) for t in (q, k, v))
        chunks = extra["cond_or_uncond"]
        out = change(q, k, v, torch.tensor(chunks).repeat_interleave(len(q) // len(chunks)))
        return torch.cat(out.unbind(1), dim=-1)

    block, number, inner = place[0].split(".")
    replace(owner, block, int(number), int(inner))
    return patched


@pytest.mark.parametrize(
    ("name", "place"),
    [("sd15", CROSS), ("sdxl", ("output.1.1", "cross")), ("sd35", ("joint.0", "joint")), ("flux", ("single.1", "joint"))],
)
def test_verbs_act_in_their_order_whatever_the_order_of_the_graph(name: str, place: Place) -> None:
    """Share, then edit, then read, then blend, though the graph has them the other way round."""
    model, source, column = families.shared(name), [1, 0, 3, 2], 3
    joint = place[1] == "joint"
    seen: list[Tensor] = []
    right: list[Tensor] = []

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        image = slice(TEXT if joint else 0, None)
        weights = softmax(q[source], k[source])
        weights[roles == 0, 0, image, column] = 0
        right.append(weights[:, :, image, column])
        out = weights @ v
        out[:, 0, image] *= 2
        return out

    requests = [
        BlendOutputs({place: (0,)}, lambda call, heads: heads.out * 2),
        ReadWeights({place: None}, lambda call, w: seen.append(w[..., 0]), columns=(column,)),
        EditWeights({place: (0,)}, lambda call, w: (w * 0, None), rows="cond", columns=(column,)),
        ShareMap({place: None}, lambda call: torch.tensor(source)),
    ]
    ours = sample(with_requests(model, *requests), batch=2, steps=1)
    written = written_out(model, name, place, change)
    close(ours, sample(written, batch=2, steps=1))
    torch.testing.assert_close(seen[0], right[0], rtol=1e-3, atol=1e-5)
    differs(ours, sample(model, batch=2, steps=1))


# --- layouts and other overrides ---


def test_all_verbs_with_grouped_queries() -> None:
    """Two heads of keys and values for four of queries, in the layout of tokens and in the layout of heads."""
    model = families.shared("sd15")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 16, 8, generator=generator)
    k, v = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    wide = [torch.stack([t[:, 0], t[:, 0], t[:, 1], t[:, 1]], dim=1) for t in (k, v)]

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, skip_reshape: bool = False, **kwargs: Any) -> Tensor:
        if not skip_reshape:
            q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        assert q.shape[1] == heads == 4 and k.shape[1] == v.shape[1] == 2  # as given
        out = torch.cat([softmax(q[:, h : h + 1], k[:, h // 2, None]) @ v[:, h // 2, None] for h in range(4)], dim=1)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    edit = EditWeights({CROSS: (1, 2)}, lambda call, w: (w * 0, None), columns=(2,))
    blend = BlendOutputs({CROSS: (3,)}, lambda call, heads: heads.out * 2)
    share = ShareMap({CROSS: None}, lambda call: torch.tensor([1, 0]))
    for shares in (False, True):
        rows = [1, 0] if shares else [0, 1]
        right = softmax(q[rows], wide[0][rows])
        right[:, 1:3, :, 2] = 0
        for layout in ("tokens", "heads"):
            maps: list[Tensor] = []
            read = ReadWeights({CROSS: None}, lambda call, w, maps=maps: maps.append(w))
            asked = [*([share] if shares else []), edit, read, blend]
            forward = Forward(
                family_of(model.model.diffusion_model), asked, torch.zeros(2, 4, 8, 8), None, {"cond_or_uncond": [1, 0]}
            )
            forward.at(*CROSS)
            forward.shape = [2, 32, 4, 4]
            given, settings = (q, k, v), {"skip_reshape": True, "skip_output_reshape": True, "enable_gqa": True}
            if layout == "tokens":
                given, settings = tuple(t.transpose(1, 2).flatten(2) for t in given), {}
            out = forward.override(kernel, *given, 4, **settings)
            out = out if layout == "heads" else out.unflatten(-1, (4, -1)).transpose(1, 2)
            expected = right @ wide[1]
            expected[:, 3] *= 2
            torch.testing.assert_close(maps[0], right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_given_by_place_counts() -> None:
    """Older callers hand the mask over without its name."""
    model = families.shared("sd15")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 32, generator=generator) for n in (16, 6, 6))
    mask = 2 * torch.randn(16, 6, generator=generator)
    maps: list[Tensor] = []
    read = ReadWeights({CROSS: None}, lambda call, w: maps.append(w))
    forward = Forward(family_of(model.model.diffusion_model), [read], torch.zeros(2, 4, 8, 8), None, {"cond_or_uncond": [1, 0]})
    forward.at(*CROSS)
    forward.shape = [2, 32, 4, 4]
    forward.override(backends.attention_pytorch, q, k, v, 4, mask)
    q, k = (torch.stack(t.chunk(4, dim=-1), dim=1) for t in (q, k))
    torch.testing.assert_close(maps[0], softmax(q, k, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(("name", "place"), [("sd35", ("joint.0", "self")), ("flux", ("single.1", "joint"))])
def test_another_override_is_chained_before_or_after(name: str, place: Place, ours_first: bool) -> None:
    """Its change of every call is there, and ours comes on top of it, whichever node is first."""
    model = families.shared(name)

    def third(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs) * 0.5

    def theirs(patched: Any) -> Any:
        patched = patched.clone()
        patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = third
        return patched

    number = CALLS[name].index(place)
    seen = {"calls": 0}

    def both(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        out = 0.5 * func(q, k, v, heads, *args, **kwargs)
        if seen["calls"] % len(CALLS[name]) == number:
            width = out.shape[-1] // heads
            out[:, TEXT if place[1] == "joint" else 0 :, width : 2 * width] += 1
        seen["calls"] += 1
        return out

    right = model.clone()
    right.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = both
    blend = BlendOutputs({place: (1,)}, lambda call, heads: heads.out + 1)
    ours = theirs(with_requests(model, blend)) if ours_first else with_requests(theirs(model), blend)
    out = sample(ours)
    close(out, sample(right))
    differs(out, sample(theirs(model)))
    differs(out, sample(with_requests(model, blend)))


def test_an_override_that_is_installed_anew_in_every_step_is_chained() -> None:
    model, place, steps = families.shared("flux"), ("single.1", "joint"), []

    def theirs(patched: Any) -> Any:
        def step(apply: Any, args: dict[str, Any]) -> Tensor:
            def third(func: Any, *args: Any, **kwargs: Any) -> Tensor:
                return func(*args, **kwargs) * 0.5

            steps.append(third)
            options = {**args["c"].get("transformer_options", {}), "optimized_attention_override": third}
            return apply(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})

        patched = patched.clone()
        patched.set_model_unet_function_wrapper(step)
        return patched

    def once(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs) * 0.5

    always = model.clone()
    always.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = once
    blend = BlendOutputs({place: (1,)}, lambda call, heads: heads.out + 1)
    close(sample(theirs(with_requests(model, blend))), sample(with_requests(always, blend)))
    assert len(steps) > 1
    differs(sample(theirs(model)), sample(theirs(with_requests(model, blend))))


# --- blends of tokens, and attention with other inputs ---


@pytest.mark.parametrize("tokens", ["image", "text", "all"])
@pytest.mark.parametrize(("name", "site"), JOINT)
def test_blends_reach_the_tokens_that_they_ask_for(name: str, site: str, tokens: str) -> None:
    model, place, settings = families.shared(name), (site, "joint"), {"size": (7, 10), "batch": 2}
    own = {"image": slice(TEXT, None), "text": slice(0, TEXT), "all": slice(None)}[tokens]

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        out = softmax(q, k) @ v
        for row in (roles == 0).nonzero().flatten().tolist():
            for head in (0, 2):
                out[row, head, own] = 0.5 * out[row, head, own] + v[row, head, own]
        return out

    blend = BlendOutputs({place: (0, 2)}, lambda call, heads: 0.5 * heads.out + heads.v, rows="cond", tokens=tokens)
    ours = sample(with_requests(model, blend), **settings)
    close(ours, sample(reference(model, name, {place: change}), **settings))
    differs(ours, sample(model, **settings))


def test_tokens_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text tokens .* not at middle.0.0 \(cross\)"):
        BlendOutputs({CROSS: None}, lambda call, heads: heads.out, tokens="text")
    with pytest.raises(ValueError, match="tokens must be image, text or all, not 'pixels'"):
        BlendOutputs({CROSS: None}, lambda call, heads: heads.out, tokens="pixels")


@pytest.mark.parametrize("replaced", ["nothing", "q", "k", "v", "all"])
@pytest.mark.parametrize("tokens", ["image", "all"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sd15", SELF),
        ("sd15", CROSS),
        ("sd35", ("joint.0", "joint")),
        ("sd35", ("joint.0", "self")),
        ("flux", ("single.1", "joint")),
    ],
)
def test_attention_of_some_heads_with_other_inputs(name: str, place: Place, tokens: str, replaced: str) -> None:
    """Queries of the chosen tokens on all keys, of which those of the chosen tokens may be others."""
    model = families.shared(name)
    own = slice(TEXT if place[1] == "joint" and tokens == "image" else 0, None)

    def other(t: Tensor) -> Tensor:
        return t.flip(2) * 0.5

    def blend(call: Any, heads: Any) -> Tensor:
        new = {n: other(getattr(heads, n)) for n in ("q", "k", "v") if replaced in (n, "all")}
        return heads.attend(**new)

    def change(q: Tensor, k: Tensor, v: Tensor, roles: Tensor) -> Tensor:
        out = softmax(q, k) @ v
        a, b, c = q.clone(), k.clone(), v.clone()
        for t, n in ((a, "q"), (b, "k"), (c, "v")):
            if replaced in (n, "all"):
                t[:, :, own] = other(t[:, :, own].clone())
        changed = softmax(a, b) @ c
        for row in (roles == 0).nonzero().flatten().tolist():
            for head in (0, 2):
                out[row, head, own] = changed[row, head, own]
        return out

    attending = BlendOutputs({place: (0, 2)}, blend, rows="cond", tokens=tokens)
    ours = sample(with_requests(model, attending), batch=2, steps=1)
    close(ours, sample(written_out(model, name, place, change), batch=2, steps=1))
    if replaced == "nothing":
        close(ours, sample(model, batch=2, steps=1))
    else:
        differs(ours, sample(model, batch=2, steps=1))


def test_outputs_that_all_are_ignored_are_not_computed() -> None:
    """In joint attention only where text and image are."""
    model, calls = families.shared("flux"), []

    def kernel(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return func(*args, **kwargs)

    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = kernel
    place = {("double.1", "joint"): None}
    for tokens, left in (("image", 5), ("all", 4)):
        calls.clear()
        blend = BlendOutputs(place, lambda call, heads: heads.v, tokens=tokens, ignores_output=True)
        sample(with_requests(patched, blend), steps=1)
        assert len(calls) == left
