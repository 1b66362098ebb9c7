"""HeadHunter: batches of candidates against SoftPAG alone, cost, the log, resuming."""

import dataclasses
import io
import itertools
import json
import math
import signal
import sqlite3
import subprocess
import sys

import comfy.sample
import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from attune.hunt import command, head_files
from attune.hunt.engine import Engine
from attune.hunt.files import file_name
from attune.hunt.log import Log
from attune.hunt.prompts import prompt_in_graph, texts_of
from attune.hunt.report import report, story
from attune.hunt.search import search
from attune.hunt.settings import Plan, Settings
from attune.methods import headhunter as maths
from attune.nodes.headhunter import AttuneHeadHunter, AttunePromptList
from attune.nodes.heads import AttuneLoadHeads, AttuneSaveHeads
from attune.nodes.scfg import AttuneSemanticCFG
from attune.patches import softpag
from attune.patches.hook.families import family_of
from attune.patches.hook.install import model_sites
from attune.patches.hook.sites import select
from attune.patches.maps import recorder
from attune.patches.maps.record import Settings as Kept
from attune.scoring.scorers import Scorer
from attune.tests import families
from attune.tests.helpers import close
from attune.tests.methods.test_headhunter import brute_force
from attune.tools.runtime.setup import ROOT

# --- batches of candidates --------------------------------------------------------------------------------------------------


class Vae:
    """Shows the first three channels, enlarged."""

    def __init__(self):
        self.patcher = families.shared("flux")

    def decode(self, latents):
        pictures = latents[:, :3].movedim(1, -1).sigmoid()
        return pictures.repeat_interleave(2, 1).repeat_interleave(2, 2)


class Contrast(Scorer):
    """Likes pictures with contrast, in a way that depends on the text."""

    name = key = "contrast"

    def __init__(self):
        self.looked_at = 0

    def scores(self, images, texts):
        self.looked_at += len(images)
        spread = images.flatten(1).std(1)
        return torch.stack([spread * (1 + len(t)) + images.mean((1, 2, 3)) for t in texts], 1)


def engine_of(name, settings=None, rows=0, positives=None, size=(8, 8), texts=None, scorer=None, latent=None, model=None):
    model = model or families.shared(name)
    positives = positives or [families.text(1), families.text(3)]
    return Engine(
        model,
        Vae(),
        positives,
        families.text(2),
        latent or {"samples": families.latent(model, *size)},
        [scorer or Contrast()],
        texts or ["text"],
        settings or Settings(steps=3, cfg=3.0, scale=2.0),
        rows,
    )


def alone(engine, heads, i):
    """The picture that the user gets: Select Heads, SoftPAG, KSampler, one picture."""
    s = engine.settings
    model = engine.given
    if heads:
        chosen = select(engine.text(heads), engine.sites, engine.family)
        model = softpag.apply(model, s.scale, s.perturbation, s.start_percent, 1.0, 0.0, chosen)
    one = engine.latent[i % len(engine.latent)][None]
    noise = comfy.sample.prepare_noise(one, s.seed + i)
    positive = engine.positives[i % len(engine.positives)]
    more = {"noise_mask": engine.mask, "disable_pbar": True, "seed": s.seed + i}
    return comfy.sample.sample(
        model, noise, s.steps, s.cfg, s.sampler_name, s.scheduler, positive, engine.negative, one, **more
    )


SETS = {
    "sd15": [
        (),
        (("input.3.0", 1),),
        (("output.3.0", 2),),
        (("middle.0.0", 0), ("output.1.0", 3)),
        (("input.3.0", 0), ("middle.0.0", 0)),
    ],
    "sdxl": [(("output.0.0", 1),), (), (("middle.0.1", 0), ("middle.0.1", 1)), (("output.1.1", 0),)],
    "sd3": [(("joint.1", 0),), (("joint.2", 2), ("joint.0", 1)), (), (("joint.2", 1),)],
    "sd35": [(("joint.1", 0),), (("joint.2", 2), ("joint.0", 1)), (("joint.1", 1),)],
    "flux": [(("single.2", 0),), (("double.1", 1),), (("double.1", 2), ("single.1", 3)), ()],
    "qwen_image": [(("joint.1", 0),), (("joint.2", 2), ("joint.0", 1)), ()],
    "z_image": [(("joint.1", 0),), (("joint.2", 2), ("joint.0", 1)), ()],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("cfg", "u", "start"), [(3.0, 1.0, 0.0), (1.0, 0.6, 0.3)])
def test_a_batched_candidate_is_softpag_alone(name, cfg, u, start):
    settings = Settings(7, 4, cfg, "euler", "simple", 2.0, u, start)
    engine = engine_of(name, settings, size=(8, 12))
    images = (0, 1, 2)
    together = engine.latents(SETS[name], images).unflatten(0, (-1, len(images)))
    for c, heads in enumerate(SETS[name]):
        for j, i in enumerate(images):
            close(together[c, j][None], alone(engine, heads, i))
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "sampler",
    [
        "euler_ancestral",
        "exp_heun_2_x0_sde",
        "dpmpp_2m_sde",
        "dpmpp_2m",
        "heun",
        "uni_pc",
        "lms",
        "er_sde",
        "res_multistep",
        "ddim",
    ],
)
def test_samplers(sampler):
    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip("this ComfyUI does not have it")
    settings = Settings(3, 5, 2.0, sampler, "simple", 2.0, 0.7, 0.35)
    engine = engine_of("sd15", settings)
    together = engine.latents(SETS["sd15"], (0, 1)).unflatten(0, (-1, 2))
    for c, j in ((1, 0), (3, 1), (4, 0)):
        close(together[c, j][None], alone(engine, SETS["sd15"][c], j), 1e-3)


def test_areas_masks_long_prompts_and_pictures_to_start_from():
    model = families.shared("sd15")
    positives = [
        families.text(1, tokens=11),
        families.text(1) + families.text(3, area=(8, 4, 0, 4), strength=0.7),
        families.text(5),
    ]
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    engine = engine_of("sd15", positives=positives, latent={"samples": samples, "noise_mask": mask}, model=model)
    assert engine.alike == [0, 1, 2]
    for sets, images in engine.plan(SETS["sd15"], range(4)):
        together = engine.latents(sets, images).unflatten(0, (-1, len(images)))
        for c, heads in enumerate(sets):
            for j, i in enumerate(images):
                close(together[c, j][None], alone(engine, heads, i))


def test_batches_hold_what_fits_together():
    engine = engine_of("sd15", rows=6, positives=[families.text(1), families.text(2, tokens=11), families.text(3)])
    heads = [((s.name, h),) for s in engine.sites for h in range(s.heads)]
    units = engine.plan(heads[::-1], range(6))
    assert all(len(sets) * len(images) <= 6 for sets, images in units)
    seen = [(h, i) for sets, images in units for h in sets for i in images]
    assert sorted(seen) == sorted((h, i) for h in heads for i in range(6))
    assert {images for _, images in units} == {(0, 2, 3, 5), (1, 4)}


class Work:
    """Rows that the model's blocks compute, seen by hooks on the modules."""

    def __init__(self, model):
        self.model = model.model.diffusion_model
        self.rows = dict.fromkeys(family_of(self.model).blocks(), 0)
        self.forwards = 0

    def __enter__(self):
        self.handles = []
        for block in self.rows:
            module = family_of(self.model).block(block)
            module = module[0] if hasattr(self.model, "input_blocks") else module
            self.handles.append(module.register_forward_hook(lambda m, a, out, block=block: self._add(block, out)))
        return self

    def _add(self, block, out):
        out = out[0] if isinstance(out, tuple) else out
        self.rows[block] += len(out)
        self.forwards += 1

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_rows_are_computed_once_where_they_are_alike():
    """Four candidates, two pictures, six steps of which the first three are plain, cfg on."""
    settings = Settings(0, 6, 3.0, "euler", "simple", 2.0, 1.0, 0.45)
    engine = engine_of("sd15", settings)
    sets = [(("middle.0.0", h),) for h in range(3)] + [(("output.3.0", 0),)]
    sampling = engine.given.get_model_object("model_sampling")
    plain = sum(not engine.span.holds(s, sampling) for s in engine.sigmas[:-1])
    assert plain == 3
    with Work(engine.given) as work:
        engine.latents(sets, (0, 1))
    alike = (plain + 1) * 2 * 2  # cond and uncond of two pictures; the first guided step starts alike as well
    apart = (6 - plain - 1) * 2 * 2 * len(sets)
    assert work.rows["input_blocks", 0] == work.rows["input_blocks", 3] == alike + apart
    perturbed = (6 - plain) * 2
    assert work.rows["middle_block", 0] == alike + apart + perturbed * 3
    assert work.rows["output_blocks", 3] == alike + apart + perturbed * 4
    with Work(engine.given) as work:  # another batch of the same pictures: the plain steps are known
        engine.latents(sets[::-1], (0, 1))
    assert work.rows["input_blocks", 0] == 4 + apart


def test_flops_and_forwards_against_one_by_one():
    settings = Settings(0, 4, 3.0, "euler", "simple", 2.0, 1.0, 0.5)
    engine = engine_of("sd15", settings)
    sets = [((s.name, h),) for s in engine.sites for h in (1,)]
    with FlopCounterMode(display=False) as ours, Work(engine.given) as together:
        for unit, images in engine.plan(sets, range(2)):
            engine.latents(unit, images)
    with FlopCounterMode(display=False) as theirs, Work(engine.given) as single:
        for heads in sets:
            for i in range(2):
                alone(engine, heads, i)
    assert ours.get_total_flops() <= 0.6 * theirs.get_total_flops()
    assert together.forwards <= 0.25 * single.forwards


def test_nothing_stays_on_the_model():
    model = families.build("sd15")
    before = {k: str(v) for k, v in model.model_options.items()}
    engine = engine_of("sd15", model=model)
    engine.latents(SETS["sd15"], (0,))
    assert {k: str(v) for k, v in model.model_options.items()} == before
    assert not model.wrappers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())
    assert not any("attune" in type(m).__module__ for m in model.model.diffusion_model.modules())


def test_it_works_beside_guidance_that_is_there_already():
    model = softpag.apply(families.shared("sd15"), 1.0, 1.0, 0, 1, 0)
    engine = engine_of("sd15", model=model)
    together = engine.latents(SETS["sd15"], (0,))
    for c in (1, 3):
        close(together[c : c + 1], alone(engine, SETS["sd15"][c], 0))


def test_settings_that_cannot_work_are_refused():
    for change, words in (
        ({"sampler_name": "dpm_adaptive"}, "choose another"),
        ({"sampler_name": "euler_cfg_pp"}, "choose another"),
        ({"sampler_name": "nonsense"}, "no sampler"),
        ({"scale": 0.0}, "alike"),
        ({"perturbation": 0.0}, "alike"),
        ({"start_percent": 1.0}, "start_percent"),
    ):
        with pytest.raises(ValueError, match=words):
            engine_of("sd15", Settings(**change))
    with pytest.raises(ValueError, match="2 conditionings and 3 texts"):
        engine_of("sd15", texts=["a", "b", "c"])


# --- the log --------------------------------------------------------------------------------------------------------------


def hunted(path, engine, rounds=2, k=1, images=4, halving=0, candidates="input.3.0 middle.0.0", ranking="scorer", **more):
    log = Log(path)
    heads = select(candidates, engine.sites, engine.family)
    try:
        return search(engine, log.evaluations(engine.identities()), Plan(rounds, k, images, halving, ranking), heads, **more)
    finally:
        log.close()


QUICK = Settings(steps=2, cfg=1.0, scale=2.0)


def everything(path):
    """All that a log says, in order."""
    base = sqlite3.connect(path)
    rows = base.execute("select heads, image, score, picture from evaluations order by heads, image").fetchall()
    base.close()
    return rows


def test_a_search_equals_one_made_by_hand(tmp_path):
    engine = engine_of("sd15", QUICK)
    told = []
    found = hunted(tmp_path / "log.sqlite", engine, progress=lambda *a: told.append(a))

    def score(chosen, count):
        pictures = torch.cat([Vae().decode(alone(engine, tuple(chosen), i)) for i in range(count)])
        return float(Contrast().scores(pictures, ["text"])[:, 0].double().mean())

    every = [(name, h) for name in ("input.3.0", "middle.0.0") for h in range(4)]
    assert found.hunt.heads == brute_force(score, every, 2, 1, 4)
    assert found.hunt.plain == pytest.approx(score((), 4), abs=1e-5)
    assert found.hunt.rounds[1].score == pytest.approx(score(found.hunt.heads, 4), abs=1e-5)
    assert found.heads == engine.heads(found.hunt.heads)
    assert [len(column) for column in found.pictures] == [4, 4, 4]
    assert told[-1][:2] == (64, 64) and maths.evaluations(8, 2, 1, 4) == 64
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))


def test_a_finished_candidate_is_never_computed_twice(tmp_path):
    scorer = Contrast()
    first = hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, scorer=scorer))
    assert (scorer.looked_at, first.computed, first.known) == (64, 64, 0)
    again = hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, scorer=scorer))
    assert (scorer.looked_at, again.computed, again.known) == (64, 0, 64)
    assert again.hunt == first.hunt
    longer = hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, scorer=scorer), rounds=3)
    assert longer.hunt.rounds[:2] == first.hunt.rounds
    assert scorer.looked_at == 64 + 6 * 4
    halved = hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, scorer=scorer), rounds=1, halving=2)
    assert halved.computed == 0


def test_other_settings_do_not_share_scores(tmp_path):
    scorer = Contrast()

    def computed(**changes):
        return hunted(
            tmp_path / "log.sqlite", engine_of("sd15", scorer=scorer, **{"settings": QUICK, **changes}), rounds=1
        ).computed

    count = computed()
    assert computed() == 0
    model = families.build("sd15")
    assert computed(model=model) == 0  # the same weights
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    weight = model.model.state_dict()[key]
    model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.05,))}, 0.5)
    assert computed(model=model) == count
    assert computed(model=model.clone()) == 0
    model.add_patches({key: ("diff", (torch.ones_like(weight) * 0.05,))}, 0.25)
    assert computed(model=model) == count
    assert computed(positives=[families.text(1), families.text(4)]) == count
    assert computed(texts=["another"]) == count
    assert computed(settings=dataclasses.replace(QUICK, scale=2.5)) == count
    assert computed(model=softpag.apply(families.shared("sd15"), 1.0, 1.0, 0, 1, 0)) == count
    assert computed(model=softpag.apply(families.shared("sd15"), 1.5, 1.0, 0, 1, 0)) == count
    scorer.key = "another"
    assert computed() == count


def test_another_machines_rounding_is_the_same_search(tmp_path):
    """Text encodings and weights differ in their last bits from machine to machine."""
    hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK), rounds=1)
    positives = [families.text(1), families.text(3)]
    for p in positives:
        p[0][0] = p[0][0].half().float()
    assert hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, positives=positives), rounds=1).computed == 0
    positives[1][0][0][0, 3] += 0.05
    assert hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK, positives=positives), rounds=1).computed > 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("halving", [0, 2])
def test_stopping_anywhere_and_going_on_gives_the_identical_result(tmp_path, halving):
    def engine(limit=None):
        made = engine_of("sd15", QUICK, rows=6)
        count = 0
        evaluate = made.evaluate

        def limited(sets, images):
            nonlocal count
            count += 1
            if limit is not None and count > limit:
                raise Stop
            return evaluate(sets, images)

        made.evaluate = limited
        return made

    whole = hunted(tmp_path / "whole.sqlite", engine(), halving=halving)
    for limit in (0, 1, 4, 3):
        with pytest.raises(Stop):
            hunted(tmp_path / "log.sqlite", engine(limit), halving=halving)
    resumed = hunted(tmp_path / "log.sqlite", engine(), halving=halving)
    assert resumed.hunt == whole.hunt
    assert resumed.known and resumed.computed + resumed.known == whole.computed
    assert everything(tmp_path / "log.sqlite") == everything(tmp_path / "whole.sqlite")


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
import conftest
conftest.load_pack()
from attune.tests.hunt import test_headhunter as t
engine = t.engine_of("sd15", t.QUICK, rows=6)
evaluate, count = engine.evaluate, 0
def limited(sets, images):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(sets, images)
engine.evaluate = limited
t.hunted(pathlib.Path({path!r}), engine)
"""


def test_a_killed_process_loses_only_its_batch(tmp_path):
    whole = hunted(tmp_path / "whole.sqlite", engine_of("sd15", QUICK, rows=6))
    path = tmp_path / "log.sqlite"
    script = KILLED.format(tests=str(ROOT / "tests"), path=str(path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = everything(path)
    assert 4 <= len(left) < 64
    resumed = hunted(path, engine_of("sd15", QUICK, rows=6))
    assert resumed.known == len(left)
    assert resumed.hunt == whole.hunt
    assert everything(path) == everything(tmp_path / "whole.sqlite")


def test_a_log_that_is_none_and_scores_that_are_none(tmp_path):
    path = tmp_path / "log.sqlite"
    path.write_text("this is no database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match="not a log"):
        Log(path)

    class Broken(Contrast):
        def scores(self, images, texts):
            return super().scores(images, texts) * math.nan

    with pytest.raises(ValueError, match="not a number"):
        hunted(tmp_path / "nan.sqlite", engine_of("sd15", QUICK, scorer=Broken()))
    for name in ("", "../x", "a/b", ".hidden", "C:x", "a" * 200):
        with pytest.raises(ValueError, match="file's name"):
            file_name(name)
    with pytest.raises(ValueError, match="at least as many"):
        hunted(tmp_path / "few.sqlite", engine_of("sd15", QUICK), images=1)
    with pytest.raises(ValueError, match="another model"):
        other = select("joint.1", *model_sites(families.shared("sd3"))[::-1])
        search(engine_of("sd15", QUICK), None, Plan(1, 1, 4), other)


class Brightness(Scorer):
    """Likes bright pictures, whatever the text."""

    name = key = "brightness"

    def scores(self, images, texts):
        return images.mean((1, 2, 3))[:, None].repeat(1, len(texts))


def test_rankings_by_several_scorers(tmp_path):
    """Against brute force over pictures made one by one."""
    every = [("middle.0.0", h) for h in range(4)]

    def engine():
        made = engine_of("sd15", QUICK)
        made.scorers = (Contrast(), Brightness())
        return made

    def means(chosen):
        pictures = torch.cat([Vae().decode(alone(engine(), tuple(chosen), i)) for i in range(2)])
        return [float(scorer.scores(pictures, ["text"])[:, 0].double().mean()) for scorer in engine().scorers]

    def ranked(**plan):
        made, log = engine(), Log(tmp_path / "log.sqlite")
        heads = select("middle.0.0", made.sites, made.family)
        try:
            return search(made, log.evaluations(made.identities()), Plan(2, 1, 2, **plan), heads), made
        finally:
            log.close()

    def harmonic(chosen, count):
        a, b = means(chosen)
        return 2 * a * b / (a + b)

    found, made = ranked(ranking="harmonic mean")
    assert found.hunt.heads == brute_force(harmonic, every, 2, 1, 2)
    assert found.means[-1] == pytest.approx(means(found.hunt.heads), abs=1e-5)
    assert "harmonic mean" in report(made, found, "x") and story(made, found, "x")["ranking"] == "harmonic mean"
    first = {head: means([head]) for head in every}
    order = sorted(second for _, second in first.values())
    best = []
    for passing in (1, 2, 3):
        limit = (order[-passing] + order[-passing - 1]) / 2
        found, _ = ranked(ranking="above thresholds", thresholds=(limit,))
        best.append(max((h for h in every if first[h][1] >= limit), key=lambda head: first[head][0]))
        assert found.hunt.rounds[0].chosen == (best[-1],)
    assert len(set(best)) > 1
    with pytest.raises(ValueError, match=r"no head passes the thresholds .*best scores are .*Lower the thresholds"):
        ranked(ranking="above thresholds", thresholds=(9.0,))
    with pytest.raises(ValueError, match="no ranking “best”"):
        ranked(ranking="best")
    with pytest.raises(ValueError, match="needs a threshold for each"):
        ranked(ranking="above thresholds")
    with pytest.raises(ValueError, match="needs 2 scorers"):
        hunted(tmp_path / "one.sqlite", engine_of("sd15", QUICK), ranking="harmonic mean")


def test_a_second_scorer_does_not_make_another_search_of_the_first(tmp_path):
    hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK), rounds=1)
    engine = engine_of("sd15", QUICK)
    engine.scorers = (Brightness(), Contrast())
    both = hunted(tmp_path / "log.sqlite", engine, rounds=1)
    assert both.computed  # the second scorer has not seen the pictures
    again = hunted(tmp_path / "log.sqlite", engine_of("sd15", QUICK), rounds=1)
    assert again.computed == 0


def test_pictures_of_other_settings_are_told_of(tmp_path):
    engine = engine_of("sd15", QUICK)
    hunted(tmp_path / "log.sqlite", engine, rounds=1)
    other = engine_of("sd15", dataclasses.replace(QUICK, scale=2.5))
    found = hunted(tmp_path / "log.sqlite", other, rounds=1)
    assert "The log also holds" in report(other, found, "x") and found.of_others == found.computed


@pytest.mark.parametrize("node", ["Semantic-aware CFG", "Attention Maps"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_model_with_maps_that_are_read_is_refused_before_the_first_step(node, name):
    model = families.shared(name)
    if node == "Attention Maps":
        model = recorder.apply(model, Kept("self", limit_mb=64))[0]
    else:
        model = AttuneSemanticCFG.execute(model, "foreground", 0.8, 3.0, 15.0, 4, 0.5, 0.0, 1.0).result[0]
    with pytest.raises(ValueError, match="Connect the model from before that node"):
        engine_of(name, model=model)


def test_scores_of_joint_attention_mean_something_else_than_before():
    """Once text rows stayed as they were: logs of then are of other settings; a UNet's go on."""
    assert [engine_of(name).identities()[0][0].get("tokens") for name in ("sd15", "sdxl", "sd3", "flux")] == [
        None,
        None,
        "all",
        "all",
    ]


def test_the_scale_is_the_familys_own():
    for name, scale in (("sd15", 3.0), ("sd3", 3.0), ("flux", 8.0)):
        assert engine_of(name, Settings(steps=1)).settings.scale == scale
        assert engine_of(name, Settings(steps=1, scale=1.5)).settings.scale == 1.5
    assert Settings().cfg == 1.0


# --- head sets, nodes, the command --------------------------------------------------------------------------------------------


@pytest.fixture
def user(tmp_path, monkeypatch):
    """ComfyUI's user folder."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "user"


def test_head_sets_as_files(user):
    family, sites = model_sites(families.shared("sd15"))
    heads = head_files.HeadFile(family, select("middle.0.0:1 output.1.0:2,3", sites, family).chosen, {"objective": "crisp"})
    path = head_files.save(heads, sites, family, "my set")
    assert path == user / "attune" / "heads" / "my set.json"
    data = json.loads(path.read_text())
    assert data["family"] == "unet" and data["heads"] == heads.text and data["pack"] == head_files.pack_version()
    back = head_files.load("my set", sites, family)
    assert back == heads and back.about["objective"] == "crisp"
    for heatmap in (
        [1],
        {"middle.0.0": [1.0]},
        {"nowhere.0": []},
        {"middle.0.0": "12"},
        {"middle.0.0": ["a"] * sites[0].heads},
    ):
        path.write_text(json.dumps({**data, "heatmap": heatmap}))
        assert "heatmap" not in head_files.load("my set", sites, family).about
    assert "my set" in head_files.names()
    for name in ("sdxl", "flux"):  # SDXL is a UNet as well, and has a middle.0.0
        other, others = model_sites(families.shared(name))
        with pytest.raises(ValueError, match="for another model"):
            head_files.load("my set", others, other)
        with pytest.raises(ValueError, match="another model"):
            head_files.save(heads, others, other, "my set") if name == "flux" else head_files.load("my set", others, other)
    with pytest.raises(ValueError, match=r"There are: .*my set"):
        head_files.load("nothing", sites, family)
    with pytest.raises(ValueError, match="file's name"):
        head_files.load("../my set", sites, family)
    for text in ("no json", "[]", '{"heads": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a head set"):
            head_files.load("my set", sites, family)
    path.write_text(json.dumps({**data, "attune heads": 99}))
    with pytest.raises(ValueError, match="another version"):
        head_files.load("my set", sites, family)


def test_presets_fit_the_bundled_model(user):
    from attune.demo import model

    family, sites = model_sites(model.load()[0])
    for path in head_files.PRESETS.glob("*.json"):
        told = head_files.load(path.stem, sites, family)
        assert len(told) and told.about["scores"]["rounds"]


def run_node(**changes):
    model = families.shared("sd15")
    given = {
        "model": model,
        "vae": Vae(),
        "negative": families.text(2),
        "latent_image": {"samples": families.latent(model)},
        "scorer": Contrast(),
        "objective": "crisp",
        "candidates": select("middle.0.0", *model_sites(model)[::-1]),
        "rounds": 2,
        "heads_per_round": 1,
        "images_per_candidate": 2,
        "seed": 3,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "scale": 2.0,
        "perturbation": 1.0,
        "name": "test",
        **changes,
    }
    positive = given.pop("positive", [families.text(1), families.text(3)])
    return AttuneHeadHunter.execute(positive=positive, **{k: [v] for k, v in given.items()})


def test_the_pickers_are_told_the_scores(user):
    """What HeadHunter finds colours the head picker, and so does the file that it is saved in."""
    model = families.shared("sd15")
    found = run_node(candidates=select("middle.0.0 output.1.0:1", *model_sites(model)[::-1]))
    AttuneSaveHeads.execute(model, found.result[0], "found")
    (ui,) = AttuneLoadHeads.execute(model, "found").ui["attune_scores"]
    assert found.ui["attune_scores"] == [{**ui, "title": "HeadHunter, test"}]
    widths = {site.name: site.heads for site in model_sites(model)[1]}
    assert ui["title"] == "found" and set(ui["sites"]) == {"middle.0.0", "output.1.0"}
    assert all(len(row) == widths[site] for site, row in ui["sites"].items())
    assert all(isinstance(v, float) for v in ui["sites"]["middle.0.0"])
    assert [n for n, v in enumerate(ui["sites"]["output.1.0"]) if v is not None] == [1]


def test_the_node(user):
    heads, sheet, report = run_node().result
    assert len(heads) == 2 and heads.about["scores"]["rounds"][1]["score"] > 0
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.min() >= 0 and sheet.max() <= 1
    assert sheet.flatten(0, 2).unique(dim=0).shape[0] > 50
    assert heads.text in report and "16 pictures made" in report
    assert (user / "attune" / "headhunter" / "test.sqlite").is_file()
    assert "0 pictures made and scored now, 16 were in the log" in run_node().result[2]
    saved, path = AttuneSaveHeads.execute(families.shared("sd15"), heads, "found").result
    assert saved is heads and path.endswith("found.json")
    loaded, summary = AttuneLoadHeads.execute(families.shared("sd15"), "found").result
    assert loaded == heads and "crisp" in summary
    with pytest.raises(ValueError, match="write the objective"):
        run_node(objective=" ")
    with pytest.raises(ValueError, match="3 lines"):
        run_node(objective="a\nb\nc")
    with pytest.raises(ValueError, match="file's name"):
        run_node(name="../x")
    with pytest.raises(ValueError, match="24 conditionings need images_per_candidate"):
        run_node(preset="quality", positive=[families.text(1)] * 24)
    styled = run_node(preset="style", name="style").result
    assert len(styled[0]) == 4 and "5 pictures of 2 prompts" in styled[2]  # the middle block has no more heads


def test_prompts_are_products_of_styles_and_contents():
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return families.text(len(tokens))

    positives, prompts = AttunePromptList.execute(Clip(), "a cat\n\na dog\n", "golden hour\nline art\n").result
    assert prompts == ["golden hour, a cat", "golden hour, a dog", "line art, a cat", "line art, a dog"]
    assert len(positives) == 4
    assert AttunePromptList.execute(Clip(), "a cat\na dog").result[1] == ["a cat", "a dog"]


def test_prompts_are_read_from_the_graph():
    graph = {
        "1": {"class_type": "AttuneHeadHunter", "inputs": {"positive": ["2", 0]}},
        "2": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["3", 0], "strength": 1.0}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["9", 0], "text": "a red star"}},
        "4": {"class_type": "AttuneHeadHunter", "inputs": {"positive": ["5", 0]}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"text": ["6", 0]}},
        "6": {"class_type": "PrimitiveString", "inputs": {"value": "a blue ring"}},
        "7": {"class_type": "AttuneHeadHunter", "inputs": {"positive": ["8", 0]}},
        "8": {"class_type": "Unknown", "inputs": {"strength": 1}},
    }
    assert prompt_in_graph(graph, "1") == "a red star"
    assert prompt_in_graph(graph, "4") == "a blue ring"
    assert prompt_in_graph(graph, "7") is None and prompt_in_graph(None, None) is None
    assert texts_of("", ["a", "b"], 2) == ["a", "b"] and texts_of(" x \n\n", ["a"], 2) == ["x"]


CONFIG = {
    "name": "demo",
    "prompts": ["a red star and a blue circle", "a green ring on a grey wall"],
    "scorer": "demo: share bound",
    "candidates": "middle.0.0",
    "rounds": 1,
    "heads_per_round": 1,
    "images_per_candidate": 2,
    "steps": 2,
    "cfg": 1.0,
}


def test_the_command(user, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    assert command.main([str(config), "--output", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert data["settings"]["steps"] == 2 and data["heads"].startswith("middle.0.0:")
    assert (tmp_path / "out" / "demo.png").is_file() and data["heads"] in capsys.readouterr().out
    toml = "\n".join(f"{k} = {json.dumps(v)}" for k, v in CONFIG.items())
    (tmp_path / "config.toml").write_text(toml)
    if sys.version_info >= (3, 11):
        assert command.read(tmp_path / "config.toml") == command.read(config)
    for change, words in (
        ({"round": 2}, "“round”, which is not known"),
        ({"prompts": []}, "no prompts"),
        ({"scorer": "magic"}, "scorer is “magic”"),
        ({"preset": "huge"}, "no preset “huge”"),
        ({"model": "none.safetensors"}, "there is no “none.safetensors”"),
    ):
        config.write_text(json.dumps({**CONFIG, **change}))
        assert command.main([str(config), "--output", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_command_searches_with_the_papers_guidance_of_flux(name, monkeypatch):
    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return families.text(len(tokens))

    monkeypatch.setattr(command, "load_model", lambda config: (families.shared(name), Clip(), Vae()))
    monkeypatch.setattr(command, "load_scorer", lambda text: Contrast())
    config = {
        "model": "m",
        "prompts": ["a cat", "a dog"],
        "styles": ["ink", "oil"],
        "scorer": ["clip: a", "clip: b"],
        "width": 64,
        "height": 64,
    }
    made = command.engine_of(config)
    assert [p[0][1].get("guidance") for p in made.positives] == [0.0 if name == "flux" else None] * 4
    assert made.texts == ["ink, a cat", "ink, a dog", "oil, a cat", "oil, a dog"] and len(made.scorers) == 2
    assert made.settings.cfg == 1.0 and made.settings.scale == (8.0 if name == "flux" else 3.0)
    assert command.plan_of(command.filled({"preset": "style"})) == Plan(5, 3, 5)


# --- many machines --------------------------------------------------------------------------------------------------------


def test_a_ray_cluster_that_loses_and_gains_workers(tmp_path, monkeypatch):
    """Two workers; one dies in the middle of a batch; a machine joins; the result is the one of this process alone."""
    ray = pytest.importorskip("ray", reason="ray has no build for this Python")
    from ray.cluster_utils import Cluster as Machines

    diary = tmp_path / "diary"
    diary.write_text("")
    monkeypatch.setenv("ATTUNE_TEST_DIARY", str(diary))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    config = {**CONFIG, "candidates": "middle.0.0 output.0.0", "images_per_candidate": 4, "rows": 4}
    here = command.run(config, log_at=tmp_path / "here.sqlite")[1]
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    joined = []

    def join(done, total, left):
        if done and not joined:
            joined.append(machines.add_node(num_cpus=1))

    try:
        ray.init(machines.address, log_to_driver=False, configure_logging=False)
        monkeypatch.setattr(command, "BUILDER", "attune.tests.hunt.ray_worker:engine")
        there = command.run({**config, "ray": {"address": "auto", "cpus": 1, "gpus": 0}}, join, tmp_path / "there.sqlite")[1]
    finally:
        ray.shutdown()
        machines.shutdown()
    assert there.hunt == here.hunt
    assert there.computed == here.computed
    workers = diary.read_text().split()
    assert "died" in workers and len(set(workers) - {"died"}) == 3  # the one that died, its successor, and the one that joined
    ours, theirs = everything(tmp_path / "here.sqlite"), everything(tmp_path / "there.sqlite")
    assert [(*row[:3], row[3] is None) for row in theirs] == [(*row[:3], row[3] is None) for row in ours]
    for mine, other in ((a[3], b[3]) for a, b in zip(ours, theirs, strict=True) if a[3]):  # threads round differently
        first, second = (np.asarray(Image.open(io.BytesIO(picture)), dtype=float) for picture in (mine, other))
        assert np.abs(first - second).mean() < 2
