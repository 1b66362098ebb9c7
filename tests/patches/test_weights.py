"""Word Weights against whole runs with softmax written out, on every family; and the node on the bundled model."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attune.demo import model as demo_model
from attune.language.weights import Weighted, weighted
from attune.language.words import Phrase, encode_prompt, prompt_words
from attune.methods import attention
from attune.nodes.weights import AttuneWordWeights
from attune.nodes.words import AttuneWords
from attune.patches import fusion, headfilter, prompts, refine, regulation, scfg, softpag, weights
from attune.patches.hook import forward
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import EditWeights, ReadWeights
from attune.patches.hook.sites import select
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.patches.weights import ATTENTION, BOTH, VALUE, Settings
from attune.tests import families
from attune.tests.families import words, written_out
from attune.tests.helpers import close, differs
from attune.tests.methods.test_weights import slow_weights
from attune.tests.text_encoders import language_model
from attune.tools.benchmarks.shared.pictures import generate

sample = families.sample
PROMPT = words((1, 2), (2, 4), (5,))
SOFT = [[0.3 * families.text(1)[0][0], families.text(1)[0][1]]]  # no head looks at one column alone
TWO = {"steps": 2, "size": (8, 12), "batch": 2}


def chosen(*numbers, of=PROMPT):
    return tuple(Weighted(phrase, n) for phrase, n in zip(of.phrases, numbers, strict=False))


def slow(model, columns, gains_at, mode, size=(8, 8), length=7, uuid=None, copies=1, text=False):
    """The model with the columns' weights multiplied in its conditional rows, in loops.

    ``gains_at(picture, y, x)`` in [0, 1) of the picture's sides gives the columns' gains; None in their place is a text token.
    """

    def change(seen):
        if seen.kind == "self":
            return seen.out
        height, width = seen.grid
        pictures = len(seen.roles) // len(set(zip(seen.roles, seen.uuids, strict=True)))
        for row, role in enumerate(seen.roles):
            if role != 0 or (uuid is not None and seen.uuids[row] != uuid):
                continue
            for head in range(seen.weights.shape[1]):
                for query in range(seen.weights.shape[2]):
                    pixel = query - seen.image.start
                    if (pixel < 0 and not text) or query >= seen.image.stop:
                        continue
                    at = (None, None) if pixel < 0 else ((pixel // width, height), (pixel % width, width))
                    gains = [g for _ in range(copies) for g in gains_at(row % pictures, *at)]
                    keys = [seen.text.start + c + copy * length for copy in range(copies) for c in columns]
                    seen.weights[row, head, query] = slow_weights(seen.weights[row, head, query], keys, gains, mode)
        return seen.out

    return written_out(model, change, size, length * copies)


def constant(*gains):
    return lambda picture, y, x: gains


# --- runs ---


@pytest.mark.parametrize(
    ("name", "mode"), [*((n, ATTENTION) for n in families.EVERY), *((n, VALUE) for n in ("sd15", "sd3", "flux2", "z_image"))]
)
def test_equals_the_written_out_run(name, mode):
    """Column 2 is in two phrases: they multiply."""
    model, settings = families.shared(name), {**TWO, "steps": 1, "positive": SOFT}
    ours = sample(weights.apply(model, PROMPT, chosen(2.0, -0.5), settings=Settings(mode)), **settings)
    close(ours, sample(slow(model, (1, 2, 4), constant(2.0, -1.0, -0.5), mode, (8, 12)), **settings), 1e-3)
    differs(ours, sample(model, **settings))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", *families.MORE])
def test_masks_of_phrases_and_pictures_at_every_grid(name):
    """Two pictures, each with a mask for each phrase; hard ones, whose edges are on every layer's grid."""
    model, settings = families.shared(name), {**TWO, "steps": 1}
    masks = torch.zeros(4, 32, 48)
    masks[0, :16] = masks[1, :, 24:] = masks[2, 16:] = masks[3, :, :24] = 1  # top, right; bottom, left
    ours = weights.apply(model, PROMPT, chosen(3.0, 1.0), masks, Settings(ATTENTION, outside=0.25))

    def gains_at(picture, y, x):
        first = 3.0 if (y[0] < y[1] / 2) == (picture == 0) else 0.25
        second = 1.0 if (x[0] >= x[1] / 2) == (picture == 0) else 0.25
        return first, first * second, second

    close(sample(ours, **settings), sample(slow(model, (1, 2, 4), gains_at, ATTENTION, (8, 12)), **settings), 1e-3)


def test_a_soft_mask_of_any_size():
    model = families.shared("sd15")
    mask = torch.rand(37, 91, generator=torch.Generator().manual_seed(4))
    ours = weights.apply(model, PROMPT, chosen(2.0), mask, Settings(VALUE))
    grids = {
        size: torch.nn.functional.adaptive_avg_pool2d(mask[None].double(), size)[0] for size in ((8, 8), (4, 4))
    }  # of the layers

    def gains_at(picture, y, x):
        return (2 * float(grids[y[1], x[1]][y[0], x[0]]),) * 2

    close(sample(ours, steps=1), sample(slow(model, (1, 2), gains_at, VALUE), steps=1), 1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_text_that_looks_too(name):
    model = families.shared(name)
    both = sample(weights.apply(model, PROMPT, chosen(2.0), settings=Settings(tokens=BOTH)), steps=1)
    close(both, sample(slow(model, (1, 2), constant(2.0, 2.0), ATTENTION, text=True), steps=1), 1e-3)
    differs(both, sample(weights.apply(model, PROMPT, chosen(2.0)), steps=1))
    with pytest.raises(ValueError, match="joint attention only, not at middle"):
        EditWeights({("middle.0.0", "cross"): None}, lambda call, w: None, tokens="text")


def test_text_has_no_say_in_a_unet():
    model = families.shared("sd15")
    runs = [weights.apply(model, PROMPT, chosen(2.0), settings=Settings(tokens=t)) for t in weights.LOOKING]
    assert torch.equal(*(sample(run, steps=1) for run in runs))


def test_a_prompt_of_two_chunks_and_one_that_comfyui_repeats():
    model = families.shared("sd15")
    long = words((75, 80), total=154, content=range(1, 150))
    settings = {"positive": families.text(1, 154), "negative": families.text(2, 77), "steps": 1}
    ours = sample(weights.apply(model, long, chosen(0.0, of=long)), **settings)
    close(ours, sample(slow(model, (75, 80), constant(0.0, 0.0), ATTENTION, length=154), **settings), 1e-3)
    settings = {"positive": families.text(1, 7), "negative": families.text(2, 14), "steps": 1}
    ours = sample(weights.apply(model, PROMPT, chosen(2.0)), **settings)
    close(ours, sample(slow(model, (1, 2), constant(2.0, 2.0), ATTENTION, copies=2), **settings), 1e-3)


@pytest.mark.parametrize("name", families.NAMES)
def test_one_is_the_plain_model_to_the_last_bit(name):
    model = families.shared(name)
    plain, mask = sample(model), torch.zeros(4, 4)
    for patched in (
        weights.apply(model, PROMPT, chosen(1.0, 1.0)),
        weights.apply(model, PROMPT, ()),
        weights.apply(model, PROMPT, chosen(1.0), mask, Settings(outside=1.0)),
    ):
        assert "attune" not in patched.model_options.get("transformer_options", {})  # it costs nothing either
        assert torch.equal(sample(patched), plain)
    assert torch.equal(sample(weights.apply(model, PROMPT, chosen(2.0), settings=Settings(start_percent=1.0))), plain)


def test_zero_is_a_prompt_without_the_words():
    """In the layers that attend: the same as a context in which these columns are not."""
    model, (context, options) = families.shared("sd15"), SOFT[0]
    without = [[context[:, [0, 3, 4, 5, 6]], options]]
    settings = {"cfg": 1.0, "steps": 2}
    ours = sample(weights.apply(model, PROMPT, chosen(0.0)), positive=[[context, options]], **settings)
    close(ours, sample(model, positive=without, **settings), 1e-4)


def test_only_its_own_prompt_rows_span_and_phrases_are_touched():
    model = families.shared("sd15")
    other = [[families.text(5)[0][0], {**families.text(5)[0][1], "area": (4, 8, 0, 0), "strength": 1.0}]]
    seen = []
    patched = weights.apply(model, PROMPT, chosen(0.0, 1.0), settings=Settings(end_percent=0.4))
    request(patched, ReadWeights({("middle.0.0", "cross"): None}, lambda call, w: seen.append((call, call.step, w.clone()))))
    sample(patched, positive=[*other, *families.text(1)], steps=4)
    silent = {}
    for call, step, w in seen:
        for part in call.parts():
            silent.setdefault(step, []).append([bool((w[part.rows][..., c] == 0).all()) for c in (1, 2, 4)])
            assert (w.sum(-1) - 1).abs().max() < 1e-3
    assert silent[0].count([True, True, False]) == 1 and silent[0].count([False, False, False]) == len(silent[0]) - 1
    assert all(columns == [False, False, False] for columns in silent[3])


def test_pictures_of_a_forward_of_our_own_keep_their_masks():
    """SoftPAG perturbs each picture of a batch beside the conditional pass: alone or together, a picture is the same."""
    model = families.shared("sd15")
    masks = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])

    def run(mask, batch):
        steered = weights.apply(model, PROMPT, chosen(3.0), mask)
        return sample(softpag.apply(steered, 3.0, 1.0, 0.0, 1.0, 0.0), steps=2, batch=batch)

    both = run(masks, 2)
    close(both[:1], run(masks[:1], 2)[:1])
    close(both[1:], run(masks[1:], 2)[1:])


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "z_image"])
def test_a_kernel_that_tells_its_sums_spares_the_map(name, monkeypatch):
    """PyTorch's, as on most GPUs: the same picture, no map is computed, and two phrases cost next to nothing."""
    model, mask = families.shared(name), torch.eye(4)
    patched = weights.apply(model, PROMPT, chosen(2.0, -0.5), mask)
    settings = {"steps": 1, "size": (32, 32), "positive": SOFT}
    right = sample(patched, **settings)
    monkeypatch.setattr(forward, "PLAIN", {"attention_pytorch", "attention_sub_quad"})
    monkeypatch.setattr(attention, "probabilities", None)  # the whole map
    close(sample(patched, **settings), right, 1e-4)
    counts = []
    for one in (model, patched):
        with FlopCounterMode(display=False) as counter:
            sample(one, **settings)
        counts.append(counter.get_total_flops())
    assert counts[1] < 1.03 * counts[0]


def test_a_film_has_its_mask_in_every_frame():
    model = families.shared("wan")
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    ours = sample(weights.apply(model, PROMPT, chosen(2.0), mask), steps=1, frames=3)

    def gains_at(picture, y, x):
        height = y[1] // 3  # frames are one under the other
        return ((2.0 if y[0] % height < height / 2 else 0.0),) * 2

    close(ours, sample(slow(model, (1, 2), gains_at, ATTENTION), steps=1, frames=3), 1e-3)


# --- what is refused ---


def test_bad_input_is_told_before_sampling(monkeypatch):
    model = families.shared("sd15")
    with pytest.raises(ValueError, match="mode must be one of attention, value, not “both”"):
        weights.apply(model, PROMPT, chosen(2.0), settings=Settings("both"))
    with pytest.raises(ValueError, match="tokens must be one of image, image and text"):
        weights.apply(model, PROMPT, chosen(2.0), settings=Settings(tokens="text"))
    with pytest.raises(ValueError, match=r"start_percent \(0\.6\) is after end_percent"):
        weights.apply(model, PROMPT, chosen(2.0), settings=Settings(start_percent=0.6, end_percent=0.4))
    with pytest.raises(ValueError, match="there are 3 masks for 2 phrases"):
        weights.apply(model, PROMPT, chosen(2.0, 1.0), torch.ones(3, 4, 4))
    steps = []
    long = words((1, 2), total=12)
    with pytest.raises(ValueError, match="words are of a prompt with 12 token columns"):
        sample(weights.apply(model, long, chosen(2.0, of=long)), callback=lambda *a: steps.append(a))
    assert not steps
    monkeypatch.setattr(prompts, "model_sites", lambda model: ("unet", ()))
    with pytest.raises(ValueError, match="no attention to text"):
        weights.apply(model, PROMPT, chosen(2.0))


# --- with the others ---


@pytest.mark.parametrize("name", families.NAMES)
def test_stacks_with_every_other_node_and_leaves_nothing(name):
    model = families.shared(name)
    before = (str(model.model_options), str(model.wrappers))
    family, sites = model_sites(model)
    one = weights.apply(model, PROMPT, chosen(2.0, -0.5), torch.eye(4))
    stacks = [
        weights.apply(one, PROMPT, chosen(0.5)),
        fusion.apply(one, PROMPT),
        headfilter.apply(one, select(f"{sites[-1].name}:0", sites, family), "both"),
        refine.apply(one, PROMPT, 1),
        softpag.apply(one, 3.0, 1.0, 0.0, 1.0, 0.0),
        scfg.apply(one)[0],
        regulation.apply(one, words((3,)), regulation.Settings(iterations=2)),
    ]
    alone = sample(one)
    for stacked in stacks:
        assert not torch.equal(sample(stacked), alone)
    kept, held = recorder.apply(one, Kept("cross"))
    assert torch.equal(sample(kept), alone) and held.record().bytes
    assert (str(model.model_options), str(model.wrappers)) == before
    assert torch.equal(sample(one), alone)


def test_two_nodes_multiply():
    model = families.shared("flux")
    for mode, second in ((ATTENTION, 0.2), (VALUE, -0.5)):
        run = Settings(mode)
        first = weights.apply(model, PROMPT, chosen(2.0), settings=run)
        twice = sample(weights.apply(first, PROMPT, chosen(second), settings=run), steps=1)
        close(twice, sample(weights.apply(model, PROMPT, chosen(2 * second), settings=run), steps=1), 1e-3)


# --- the node on the bundled model ---


@pytest.fixture(scope="module")
def demo():
    return demo_model.load()


TEXT = "a red star and a blue circle on a grey wall"


def run(model, **given):
    given = {"weights": "", "mode": ATTENTION, "start_percent": 0.0, "end_percent": 1.0, **given}
    return AttuneWordWeights.execute(model, **given).args


def test_the_node_on_the_bundled_model(demo):
    model, clip, vae = demo
    schema = AttuneWordWeights.define_schema()
    assert [i.id for i in schema.inputs] == [
        *("model", "words", "clip", "text", "weights", "mask", "mode", "start_percent", "end_percent", "outside", "tokens")
    ]
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    found = AttuneWords.execute(clip, TEXT, "star, blue circle").args[0]
    patched, said = run(model, words=found, weights="red star: 1.8\ncircle: 0")
    assert said == "red star: 1.8 (columns 2, 3 of 77)\ncircle: 0 (columns 7 of 77)"
    plain, drawn = (generate(m, clip, vae, [TEXT], 5.0, 1, 4) for m in (model, patched))
    differs(drawn, plain)
    (other, same) = run(model, clip=clip, text=TEXT, weights="red star：1.8, circle=0")
    assert same == said and torch.equal(generate(other, clip, vae, [TEXT], 5.0, 1, 4), drawn)
    silent, said = run(model, words=found)
    assert said.startswith("Nothing weighs other than 1")
    assert torch.equal(generate(silent, clip, vae, [TEXT], 5.0, 1, 4), plain)
    said = run(model, words=found, mask=torch.ones(2, 4, 4), outside=0.3)[1]
    assert said.splitlines()[1] == "blue circle: 1 inside its mask, 0.3 elsewhere (columns 6, 7 of 77)"


def test_weights_that_the_clip_uses_are_not_used_again(demo):
    model, clip, _ = demo
    text = "a (red star:1.4) and a blue circle"
    assert run(model, clip=clip, text=text)[1].startswith("Nothing")
    assert run(model, clip=clip, text=text, weights="star: 2")[1] == "star: 2 (columns 3 of 77)"


def test_words_of_another_prompt_are_refused_before_sampling(demo):
    model, clip, _ = demo
    patched = run(model, clip=clip, text="a red star and a green square", weights="star: 2")[0]
    other = AttuneWords.execute(clip, TEXT, "star").args[2]
    with pytest.raises(ValueError, match=r"Word Weights: .* different prompts"):
        sample(patched, positive=other, negative=other)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "there is no prompt; connect words"),
        ({"words": True, "clip": True}, "words and clip are both connected"),
        ({"clip": True, "text": ""}, "the prompt is empty"),
        ({"clip": True, "text": TEXT, "weights": "star"}, "“star” is no phrase with a weight"),
        ({"clip": True, "text": TEXT, "weights": ": 2"}, "“: 2” is no phrase with a weight"),
        ({"clip": True, "text": TEXT, "weights": "star: much"}, "“much” in the weight of “star” is no number"),
        ({"clip": True, "text": TEXT, "weights": "star: nan"}, "the weight of “star” is nan; it must be from -2 to 5"),
        ({"clip": True, "text": TEXT, "weights": "star: 5.1"}, r"it must be from -2 to 5"),
        ({"clip": True, "text": TEXT, "weights": "moon: 2"}, "“moon” is not in the prompt. It has these words: a, red, star"),
        ({"clip": True, "text": TEXT, "mask": torch.ones(4, 4)}, "there is a mask, but no phrase for it"),
    ],
)
def test_what_is_wrong_is_said(demo, given, words):
    model, clip, _ = demo
    objects = {"words": prompt_words(clip, TEXT, "star"), "clip": clip}
    with pytest.raises(ValueError, match=words):
        run(model, **{name: objects[name] if value is True else value for name, value in given.items()})


def test_phrases_everywhere_and_the_last_of_two_lines(demo):
    _, clip, _ = demo
    found = encode_prompt(clip, prompt_words(clip, "a red star, a star and a (red:1.2) star", None))[0]
    assert found.phrases == () and not found.automatic
    (one, two) = weighted(found, "Red  STAR: 2, star: 1.5\nred star: -1")
    assert (one.phrase.text, one.weight, two.phrase.text, two.weight) == ("star", 1.5, "red star", -1.0)
    assert two.phrase.columns == (2, 3, 9, 10) and set(one.phrase.columns) == {3, 6, 10}
    assert isinstance(two.phrase, Phrase) and two.phrase.encoders["l"] == two.phrase.columns


# --- encoders to which weights in the prompt are text ---


def test_weights_of_the_prompt_where_they_are_text():
    found = prompt_words(language_model("z_image"), "a (red car:1.4) and (zebra:-1)", "zebra")
    (car, zebra) = weighted(found, "")
    assert (car.phrase.text, car.weight, zebra.phrase.text, zebra.weight) == ("red car", 1.4, "zebra", -1.0)
    assert [one.weight for one in weighted(found, "red car: 2")] == [-1.0, 2.0]  # a line says it anew
    with pytest.raises(ValueError, match="the weight of “red car” is 9; it must be from -2 to 5"):
        weighted(prompt_words(language_model("z_image"), "a (red car:9)", None), "")


def test_brackets_are_silenced_with_them():
    """In all of the picture, whatever the mask; and not where nothing weighs other than 1."""
    model = families.shared("sd15")
    words = dataclasses.replace(PROMPT, brackets=(3,))
    mask = torch.eye(2)
    ours = weights.apply(model, words, chosen(2.0), mask, Settings(VALUE, outside=0.5))

    def gains_at(picture, y, x):
        inside = (y[0] < y[1] / 2) == (x[0] < x[1] / 2)
        return (2.0, 2.0, 0.0) if inside else (0.5, 0.5, 0.0)

    close(sample(ours, steps=1), sample(slow(model, (1, 2, 3), gains_at, VALUE), steps=1), 1e-3)
    assert torch.equal(sample(weights.apply(model, words, chosen(1.0)), steps=1), sample(model, steps=1))
