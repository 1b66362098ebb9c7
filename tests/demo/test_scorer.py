"""The bundled scorer: its grammar, its training against loops, and what its shipped weights can do."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attune.demo import model, scorer, world
from attune.demo import reader as reading
from attune.tests.helpers import some_pictures
from attune.tools.benchmarks import scorer as bench
from attune.tools.benchmarks.shared.pictures import verdicts
from attune.tools.training import scorer as scorer_training


def test_the_grammar_is_read_back():
    rng = np.random.default_rng(3)
    source = world.scenes("train", 3)
    for _ in range(600):
        caption = world.describe(next(source), rng, full=True)
        assert scorer.parse(caption.text) == caption
    for caption in world.prompts("test", 40, 3):
        assert scorer.parse(caption.text) == caption
    assert scorer.parse("(red:1.2) STAR").things == (world.Stated("star", "red", "plain"),)
    with pytest.raises(ValueError, match="nothing that the demo model knows"):
        scorer.parse("a cat")


def slowly_true(caption, scene):
    """The same by trying every way to give each stated thing one of its own."""
    order = {"left": lambda a, b: a.x < b.x, "above": lambda a, b: a.y < b.y}
    for chosen in itertools.permutations(scene.things, len(caption.things)):
        fits = all(
            s.noun == t.noun and s.colour in (None, t.colour) and s.pattern in (None, t.pattern)
            for s, t in zip(caption.things, chosen, strict=True)
        )
        if fits and (caption.relation is None or order[caption.relation](*chosen[:2])):
            ground = (scene.background, scene.background_pattern)
            return all(said in (None, real) for said, real in zip(caption.background, ground, strict=True))
    return False


def test_what_is_true_of_a_scene():
    rng, source = np.random.default_rng(4), world.scenes("train", 4)
    scenes = [next(source) for _ in range(24)]
    captions = scorer_training.texts(scenes, rng)
    got = scorer_training.true(captions, scenes)
    for (i, caption), (j, scene) in itertools.product(enumerate(captions), enumerate(scenes)):
        assert bool(got[i, j]) == slowly_true(caption, scene), (caption, scene)
    assert got[:24].diagonal().all() and got[24:48].diagonal().all()
    assert (~got[48:].diagonal()).float().mean() > 0.6


def test_what_goes_with_what_is_marked():
    rng, source = np.random.default_rng(6), world.scenes("train", 6)
    scenes = [next(source) for _ in range(12)]
    captions = scorer_training.texts(scenes, rng)
    colours, grounds = tuple(world.COLOURS), tuple(world.BACKGROUNDS)

    def slow(things, ground):
        """Names of all that is marked, in order of their numbers."""
        words = [(t.noun, t.colour, t.pattern) for t in things]
        lists = (world.NOUNS, colours, world.PATTERNS)
        out = [float(any(w[0] == noun for w in words)) for noun in world.NOUNS]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            out += [float(any((w[a], w[b]) == (x, y) for w in words)) for x in lists[a] for y in lists[b]]
        out += [float(ground[0] == g) for g in grounds]
        return out + [float(ground == (g, p)) for g in grounds for p in world.PATTERNS]

    got = scorer_training.Together.there(*scorer_training.scene_table(scenes)[:2])
    assert got.tolist() == [slow(s.things, (s.background, s.background_pattern)) for s in scenes]
    got = scorer_training.Together.there(*scorer_training.caption_table(captions))
    assert got.tolist() == [slow(c.things, c.background) for c in captions]


def test_training_says_nothing_of_held_out_scenes(monkeypatch):
    told = []
    real = world.describe
    monkeypatch.setattr(world, "describe", lambda scene, *a, **k: told.append(scene) or real(scene, *a, **k))
    rng, source = np.random.default_rng(5), world.scenes("train", 5)
    for _ in range(4):
        scorer_training.texts([next(source) for _ in range(40)], rng)
    assert len(told) > 300 and all(scene.split != "test" for scene in told)


def test_the_loss_against_loops():
    torch.manual_seed(0)
    count = 5
    cosines = torch.rand(3 * count, count, dtype=torch.float64) * 2 - 1
    holds = torch.rand(3 * count, count) < 0.2
    for k in range(2):
        holds[k * count : (k + 1) * count].fill_diagonal_(True)
    holds[2 * count :].fill_diagonal_(False)
    scale, bias = torch.tensor(7.0).double(), torch.tensor(-2.0).double()
    logits = (scale * cosines).tolist()

    def pick(right, others):
        return math.log(math.exp(right) + sum(map(math.exp, others))) - right

    texts = [
        pick(logits[t][t % count], [logits[t][p] for p in range(count) if p != t % count and not holds[t, p]])
        for t in range(2 * count)
    ]
    pictures = [
        pick(logits[k * count + p][p], [logits[t][p] for t in range(3 * count) if not holds[t, p]])
        for k in (0, 1)
        for p in range(count)
    ]
    groups = {"true": [], "false": [], "near": []}
    for t, p in itertools.product(range(3 * count), range(count)):
        chance = 1 / (1 + math.exp(-(logits[t][p] - 2)))
        name = "true" if holds[t, p] else "near" if t % count == p else "false"
        groups[name].append(-math.log(chance if holds[t, p] else 1 - chance))
    wanted = 0.5 * (np.mean(texts) + np.mean(pictures)) + sum(np.mean(g) for g in groups.values())
    assert float(scorer_training.contrast(cosines, holds, scale, bias)) == pytest.approx(wanted, abs=1e-9)


def test_the_shipped_weights_are_small_and_say_where_they_come_from():
    assert scorer.WEIGHTS.stat().st_size < 10e6
    with safe_open(scorer.WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert metadata["data_version"] == world.DATA_VERSION and metadata["command"].startswith("run.py train")
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118
    known = set(json.loads(metadata["words"]))
    assert known >= {*world.NOUNS, *world.COLOURS, *world.PATTERNS, *world.BACKGROUNDS}


def test_weights_of_another_world_are_refused(tmp_path):
    path = tmp_path / "scorer.safetensors"
    save_file(load_file(scorer.WEIGHTS), path, {"data_version": "0", "words": "[]"})
    with pytest.raises(ValueError, match="version 0"):
        scorer.load(path)
    with pytest.raises(FileNotFoundError, match="install the pack again"):
        scorer.load(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def demo():
    return scorer.DemoScorer()


@pytest.fixture(scope="module")
def held_out():
    scenes, captions = bench.held_out("test", 128, 1)
    return scenes, captions, bench.renders(scenes)


def test_it_finds_the_right_picture_and_the_right_text(demo, held_out):
    scenes, captions, pictures = held_out
    shares = bench.retrieval(demo.scores(pictures, [c.text for c in captions]), scorer_training.true(captions, scenes))
    assert min(shares) > 0.8


def test_it_is_not_taken_in_by_what_is_nearly_true(demo, held_out):
    scenes, _, pictures = held_out
    answers = bench.near(demo, pictures, scenes, bench.renders([bench.without_one(s) for s in scenes]))
    assert set(answers) == set(bench.NEAR)
    for kind, right in answers.items():
        assert np.mean(right) > 0.8, kind


def test_phrases_of_a_picture_stand_above_the_even_cosine(demo, held_out):
    scenes, _, pictures = held_out
    least = {
        "star": 0.85,
        "a red star": 0.55,
        "a red striped star": 0.7,
    }  # whose colour is whose is hard to hear from two words
    for name, shares in bench.phrases(demo, pictures, scenes).items():
        assert sum(shares) / 2 > least[name], name
    even = torch.tensor([demo.even])
    assert float(demo.chance(even)) == pytest.approx(0.5, abs=1e-5)


def test_retrieval_counts_what_is_right():
    cosines = torch.tensor([[0.9, 0.1, 0.2], [0.95, 0.8, 0.1], [0.0, 0.85, 0.5]])
    nothing = torch.eye(3, dtype=torch.bool)
    assert bench.retrieval(cosines, nothing) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    also = nothing.clone()
    also[0, 1] = also[1, 2] = True  # the first text is true of the second picture too, the second of the third
    assert bench.retrieval(cosines, also) == (1.0, 1.0)


def test_pictures_of_any_size_in_any_batch(demo):
    images = some_pictures(3, 120, 137)
    each = torch.cat([demo.features(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(demo.features(images), each, atol=1e-4, rtol=0)
    torch.testing.assert_close(each.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert demo.scores(images, ["", "a red star", "red " * 100]).shape == (3, 3)
    with pytest.raises(ValueError, match="too small"):
        demo.features(some_pictures(1, 24, 128))


def test_the_text_side_knows_no_other_texts_of_the_batch(demo):
    texts = ["a red star", "a blue circle and a green moon on a grey wall", "zebra"]
    together = demo.text_features(texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(demo.text_features([text])[0], together[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["present", "bound"])
def test_the_reader_as_a_scorer_is_the_readers_verdict(kind, held_out):
    _, captions, pictures = held_out
    mixed = [captions[i] if i % 2 else captions[i + 1] for i in range(20)]
    wanted = [getattr(v, f"all_{kind}") for v in verdicts(pictures[:20], mixed)]
    got = scorer.scorer(f"all {kind}").scores(pictures[:20], [c.text for c in mixed])
    assert got.shape == (20, 20) and got.diagonal().tolist() == [float(w) for w in wanted]
    assert set(wanted) == {True, False}
    share = scorer.ReaderScorer(kind, share=True).scores(pictures[:20], [c.text for c in mixed]).diagonal()
    each = [getattr(v, kind) for v in verdicts(pictures[:20], mixed)]
    assert share.tolist() == pytest.approx([sum(e) / len(e) for e in each])


def test_the_reader_judges_a_background_by_itself(held_out):
    scenes, _, pictures = held_out
    texts = [f"a {s.background_pattern} {s.background} wall" for s in scenes[:12]]
    got = scorer.ReaderScorer("bound").scores(pictures[:12], texts)
    wanted = [
        [float(a.background == b.background and a.background_pattern == b.background_pattern) for b in scenes[:12]]
        for a in scenes[:12]
    ]
    assert (got == torch.tensor(wanted)).float().mean() > 0.97 and got.sum() < 100
    with pytest.raises(ValueError, match="names nothing"):
        scorer.ReaderScorer("bound").scores(pictures[:1], ["a wall"])


def test_kinds_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="similarity, all present, all bound"):
        scorer.scorer("best")
    with pytest.raises(ValueError, match="present or bound"):
        scorer.ReaderScorer("similar")
    keys = {scorer.scorer(k).key for k in scorer.KINDS} | {scorer.ReaderScorer("bound", True).key}
    assert len(keys) == 4


def test_a_short_training_learns_something(monkeypatch, tmp_path):
    """Not how well, which takes minutes: that the loop runs, goes on from its checkpoint and its loss falls."""
    from attune.tools.training import stage

    monkeypatch.setattr(stage, "CHECKPOINTS", tmp_path)
    ticks = itertools.count()
    monkeypatch.setattr(stage.time, "thread_time", lambda: next(ticks))  # every look at the clock is a second
    source = world.scenes("train", 8)
    scenes = [next(source) for _ in range(48)]
    eye = scorer.Eye().eval()
    with torch.no_grad():
        latents = eye(torch.from_numpy(np.stack([world.render(s) for s in scenes])).permute(0, 3, 1, 2) / 255).half()
    found = []
    real = scorer_training.contrast
    monkeypatch.setattr(scorer_training, "contrast", lambda *a: (value := real(*a), found.append(value.item()))[0])
    scorer_training.train_scorer(latents, scenes, 0.2, batch=16)
    assert (tmp_path / "scorer.pt").exists() and len(found) >= 10
    steps = len(found)
    scorer_training.train_scorer(latents, scenes, 0.4, batch=16)
    assert 8 <= len(found) - steps <= 14  # the rest, not all of it again
    assert np.mean(found[-5:]) < np.mean(found[:5])


def test_the_reader_weights_and_the_scorer_share_nothing():
    """A method that pleases the scorer must not please the reader by construction."""
    assert reading.WEIGHTS != scorer.WEIGHTS and model.WEIGHTS.is_dir()
    own = {tuple(t.flatten()[:8].tolist()) for t in load_file(scorer.WEIGHTS).values() if t.numel() >= 8}
    reader = {tuple(t.flatten()[:8].tolist()) for t in load_file(reading.WEIGHTS).values() if t.numel() >= 8}
    assert not {t for t in own & reader if len(set(t)) > 1}
