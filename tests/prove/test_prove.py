"""A comparison from its config to its report: bundled model, all families, all kinds of scorers; killed and gone on with; merged."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from attune.prove import bench, command, judges, methods, pictures, report, statistics, suites
from attune.prove.log import Log
from attune.tests import families

SOFTPAG = {"name": "SoftPAG", "node": "AttuneSoftPAG", "scale": 3.0}
DETAIL = {"name": "Detail++", "node": "AttuneDetailSampler", "granularity": "subject", "optimize": "off"}
CONFIG = {"name": "small", "suite": {"name": "shapes", "prompts": 2}, "steps": 2, "methods": [SOFTPAG]}


class Killed(Exception):
    pass


def test_every_suite_says_what_each_prompt_asks_for(tmp_path):
    sizes = {"scb": 300, "two_objects": 66 + 144 + 66, "styles": 30}
    for name, size in sizes.items():
        found = suites.items({"name": name})
        assert len(found) == size == len({item.text for item in found})
    for name in ("scb", "two_objects", "counts", "shapes"):
        smoke = suites.items({"name": name, "smoke": True})
        assert len(smoke) == suites.SMOKE and all(item.things for item in smoke)
    lines = tmp_path / "colour.txt"
    lines.write_text("a red apple and a green bench\tx\n\n", encoding="utf-8")
    (item,) = suites.items({"name": "file", "file": str(lines)})
    assert item.text == "a red apple and a green bench"
    assert [(t.noun, t.phrase) for t in item.things] == [("apple", "a red apple"), ("bench", "a green bench")]
    pairs = suites.items({"name": "two_objects"})  # as in the paper's own list
    assert [sum(item.group == g for item in pairs) for g in ("animals", "animal-object", "objects")] == [66, 144, 66]
    texts = {item.text for item in pairs}
    assert {"a cat and a dog", "a lion with a crown", "a elephant and a rabbit"} <= texts
    assert all(item.things[1].details for item in pairs if item.group == "objects")
    notes = tmp_path / "captions.json"
    notes.write_text(json.dumps({"annotations": [{"id": i, "image_id": i // 2, "caption": f"{i} "} for i in range(4)]}))
    assert [item.text for item in suites.items({"name": "coco", "file": str(notes)})] == ["0", "2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 2}, "stepz"),
        ({"steps": 0}, "steps must"),
        ({"seeds": [-1]}, "seeds must"),
        ({"suite": {"name": "nobody's"}}, "there are shapes"),
        ({"suite": {"name": "file", "file": "/nowhere"}}, "/nowhere"),
        ({"methods": [{"node": "AttuneNothing"}]}, "AttuneNothing"),
        ({"methods": [{**SOFTPAG, "scales": 3}]}, "scales"),
        ({"methods": [{**SOFTPAG, "scale": float("nan")}]}, "scale"),
        ({"methods": [SOFTPAG, SOFTPAG]}, "two methods"),
        ({"methods": [{**DETAIL, "cfg": 3.0}]}, "no input “cfg”"),
        ({"methods": [{**DETAIL, "optimize": "much"}]}, "optimize"),
        ({"methods": [{**DETAIL, "granularity": "word"}]}, "granularity"),
        (
            {"methods": [{"name": "D", "nodes": [{"node": "AttuneDetailSampler"}, {"node": "AttuneSoftPAG"}]}]},
            "must be the last",
        ),
        ({"methods": [DETAIL], "sampler_name": "lms"}, "lms"),
        ({"scorers": ["taste"]}, "taste"),
        ({"model": {"vae": "x"}, "scorers": ["demo: bound"]}, "unet, clip"),
        ({"model": "absent.safetensors", "scorers": ["demo: bound"]}, "absent.safetensors"),
        ({"scorers": ["clip_t: absent"]}, "no scorer left"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error_before_drawing(change, said, monkeypatch):
    monkeypatch.setattr(bench.Bench, "draw", lambda *_: pytest.fail("it drew"))
    with pytest.raises(ValueError, match=said):
        bench.Bench({**CONFIG, **change})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was killed after its third picture, and gone on with: its log, its result and how many pictures were drawn."""
    place = tmp_path_factory.mktemp("prove") / "log.sqlite"
    drawn, draw = [], bench.Bench.draw
    with pytest.MonkeyPatch.context() as patch:

        def counted(self, tasks):
            if len(drawn) == 3:
                drawn.append(None)
                raise Killed
            drawn.extend(tasks)
            return draw(self, tasks)

        patch.setattr(bench.Bench, "draw", counted)
        with pytest.raises(Killed):
            command.run(CONFIG, log_at=place)
        made, log = command.run(CONFIG, log_at=place, preview=place.with_suffix(".png"))
    result, gallery = report.result_of(made, log)
    yield SimpleNamespace(log=log, place=place, drawn=[t for t in drawn if t], result=result, gallery=gallery)
    log.close()


def test_nothing_is_done_twice_after_a_kill(finished):
    assert sorted(finished.drawn) == [(m, i, 0) for m in (0, 1) for i in (0, 1)]
    assert len(finished.result["costs"]) == 4 and finished.place.with_suffix(".png").is_file()


def test_a_run_gone_on_with_is_the_run_in_one_go(finished, tmp_path):
    made, log = command.run(CONFIG, log_at=tmp_path / "log.sqlite")
    assert report.result_of(made, log)[0]["rows"] == finished.result["rows"]
    log.close()


def test_another_scorer_judges_the_pictures_that_are_there(finished, monkeypatch):
    monkeypatch.setattr(bench.Bench, "draw", lambda *_: pytest.fail("it drew"))
    shown = []
    more = {**CONFIG, "scorers": ["demo: bound", "demo: similarity", "clip_t: absent"]}
    made, log = command.run(more, lambda *told: shown.append(told), log_at=finished.place)
    result, _ = report.result_of(made, log)
    log.close()
    assert [told[:2] for told in shown] == [(i, 4) for i in range(1, 5)]
    assert {row[3] for row in result["rows"]} == {"reader", "demo: similarity", report.CHANGE}
    assert "absent" in report.markdown_of(result) and "skipped" in report.markdown_of(result)


def test_the_report_opens_offline_and_has_every_part(finished):
    page = report.html_of(finished.result, finished.gallery)
    assert "http" not in page and "<script" not in page
    for part in ("all", "thing 1 bound", "thing 2 present", "colours"):
        assert f"reader, {part}" in page
    assert "SoftPAG" in page and finished.result["model hash"] in page


def test_results_are_joined(finished):
    other = json.loads(json.dumps(finished.result))
    other["rows"] = [[*row[:2], row[2] + 100, *row[3:]] for row in other["rows"]]
    other["seeds"], other["costs"] = [100], []
    (joined,) = report.merged([finished.result, other, finished.result])["runs"]
    assert len(joined["rows"]) == 2 * len(finished.result["rows"]) and joined["seeds"] == [0, 100]
    other["methods"][1][1][0][1]["scale"] = 2.0
    with pytest.raises(ValueError, match="other settings"):
        report.merged([finished.result, other])
    with pytest.raises(ValueError, match="no result"):
        report.merged([{}])


def test_detail_samples_what_its_node_does_with_other_nodes_before_it(monkeypatch):
    from attune.demo import model
    from attune.language.decompose import decompose
    from attune.patches.detail import sampler
    from attune.patches.detail.encode import encode

    soft = {
        "name": "both",
        "nodes": [{"node": "AttuneSoftPAG", "scale": 3.0}, {k: v for k, v in DETAIL.items() if k != "name"}],
    }
    made = bench.Bench({**CONFIG, "methods": [DETAIL, soft], "seeds": [7]})
    plain, ours, both = (bench.tensor_of(made.draw([(m, 1, 0)])[0][0]) for m in (0, 1, 2))
    base, clip, vae = model.load()
    settings = sampler.Settings(optimize="off")
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        positive = encode(clip, decompose(made.items[1].text, "subject"))
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        samples, _ = sampler.sample(
            base, positive, negative, latent, 8, 2, 5.0, "euler", "normal", settings=settings, disable_pbar=True
        )
        wanted = vae.decode(samples[-1:])
    assert torch.equal(ours, bench.tensor_of(bench.png_of(wanted)))  # prompt 1 at seed 7 has the noise of seed 8
    assert not torch.equal(both, ours) and not torch.equal(plain, ours)


def test_a_batch_is_its_pictures_one_by_one(tmp_path):
    config = {**CONFIG, "suite": {"name": "shapes", "prompts": 3}}
    pictures, calls = [], []
    for size, name in ((1, "one"), (2, "two")):
        more, seen = {**config, "batch": size, "preview": 1}, tmp_path / f"{name}.png"
        made, log = command.run(more, lambda *told: calls.append(told[:2]), log_at=tmp_path / name, preview=seen)
        assert calls[-1] == (6, 6)
        pictures.append([bench.tensor_of(log.picture(made.key(task))) for task in made.tasks()])
        log.close()
    assert len(calls) == 6 + 4
    assert all(torch.allclose(a, b, atol=1.5 / 255) for a, b in zip(*pictures, strict=True))
    made = bench.Bench({**config, "batch": 2, "methods": [SOFTPAG, DETAIL]})  # Detail++ is another one for every prompt
    groups = made.together([(m, i, 0, None, []) for i in range(3) for m in range(3)])
    assert sorted([task[0] for task in group] for group in groups) == [[0], [0, 0], [1], [1, 1], [2], [2], [2]]
    with pytest.raises(ValueError, match="batch"):
        bench.Bench({**config, "batch": 0})


def test_prompts_of_different_shapes_are_drawn_one_by_one():
    def text(length, **more):
        return [[torch.zeros(1, length, 2), {"pooled_output": torch.zeros(1, 2), **more}]]

    (joined,) = bench.cat([text(3), text(3)])
    assert joined[0].shape == (2, 3, 2) and joined[1]["pooled_output"].shape == (2, 2)
    assert bench.cat([text(3), text(4)]) is None and bench.cat([text(3, guidance=1.0), text(3, guidance=2.0)]) is None
    made = bench.Bench({**CONFIG, "batch": 4, "sampler_name": "euler_ancestral"})  # its noise is drawn for a whole batch
    assert [len(group) for group in made.together([(m, i, 0, None, []) for i in (0, 1) for m in (0, 1)])] == [1] * 4


def test_each_prompt_has_noise_of_its_own_unless_told_otherwise():
    made = bench.Bench({**CONFIG, "seeds": [5, 9]})
    assert [[made.seed(i, s) for s in (0, 1)] for i in (0, 1)] == [[5, 9], [6, 10]]
    made = bench.Bench({**CONFIG, "seeds": [5, 9], "seed_per_prompt": False})
    assert [[made.seed(i, s) for s in (0, 1)] for i in (0, 1)] == [[5, 9], [5, 9]]


def test_differences_are_paired():
    mean, low, high = statistics.paired([0.0, 1.0, 1.0], [1.0, 2.0, 1.0])
    assert mean == pytest.approx(2 / 3) and low == pytest.approx(2 / 3 - 1.96 / 3) and high == pytest.approx(2 / 3 + 1.96 / 3)


class Text:
    """A text encoder without weights."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return families.text(len(text))


class Pixels:
    """A VAE without weights: three channels, eight times as large."""

    downscale_ratio = 8

    def decode(self, latents):
        pictures = latents.reshape(len(latents), latents.shape[1], *latents.shape[-2:])[:, :3].float().sigmoid()
        return pictures.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)


@pytest.mark.parametrize("name", families.EVERY)
def test_every_family_is_drawn_and_judged(name, tmp_path):
    config = {**CONFIG, "suite": {"name": "shapes", "prompts": 1}, "width": 64, "height": 64, "scorers": ["demo: bound"]}
    loaded = methods.Loaded(families.shared(name), Text(), Pixels())
    try:
        bench.Bench(config, loaded, name)
    except ValueError as error:  # a family that the method does not know is refused in its own sentence; plain is still drawn
        assert "SoftPAG" in str(error)
        config["methods"] = [{"node": "AttuneStructureRefine", "name": "SoftPAG"}]
    made, log = command.run(config, loaded=loaded, identity=name, log_at=tmp_path / "log.sqlite")
    result, _ = report.result_of(made, log)
    pictures = [log.picture(made.key((m, 0, 0))) for m in (0, 1)]
    log.close()
    assert {row[0] for row in result["rows"]} == {"plain", "SoftPAG"} and pictures[0] != pictures[1]


def test_pictures_beside_plain_and_all_together_are_in_the_report(finished, folders, tmp_path, monkeypatch):
    from attune.tests.scoring.tiny import tiny_folder

    tiny_folder(folders[0] / "clip")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(bench.png_of(torch.rand(1, 16, 16, 3)))
    monkeypatch.setattr(bench.Bench, "draw", lambda *_: pytest.fail("it drew"))
    config = {**CONFIG, "scorers": ["demo: bound", "distance: clip", f"frechet: clip, {tmp_path}"]}
    for _ in range(2):
        made, log = command.run(config, log_at=finished.place)
        result, gallery = report.result_of(made, log)
        log.close()
        for kind in (pictures.Distance, pictures.Frechet):  # the second time everything is in the log
            monkeypatch.setattr(kind, "apart" if kind is pictures.Distance else "of", lambda *_: pytest.fail("it judged again"))
    assert [row[:3] for row in result["sets"]] == [[f"frechet: clip, {tmp_path}", name, 2] for name in ("plain", "SoftPAG")]
    assert sum(row[3] == "distance: clip" for row in result["rows"]) == 2
    page = report.html_of(result, gallery)
    assert "of all pictures together" in page and "distance: clip, all" in page
    (joined,) = report.merged([result, {**result, "seeds": [9]}])["runs"]
    assert joined["sets"] == [] and "cannot be joined" in " ".join(joined["skipped"])


def test_heads_come_from_files_and_presets_too(monkeypatch, tmp_path):
    from attune.hunt import head_files
    from attune.patches.hook.install import model_sites
    from attune.patches.hook.sites import select

    monkeypatch.setattr(head_files, "folder", lambda: tmp_path)
    keys = []
    for text in ("middle.0.0:0", "middle.0.0:1"):
        made = bench.Bench({**CONFIG, "methods": [{**SOFTPAG, "heads": "preset: unet_middle"}]})
        family, sites = model_sites(made.loaded.model)
        head_files.save(select(text, sites, family), sites, family, "mine")
        made = bench.Bench({**CONFIG, "methods": [{**SOFTPAG, "heads": "file: mine"}]})
        keys.append(made.key((1, 0, 0)))
        assert made.heads == {"SoftPAG": text}
    assert keys[0] != keys[1]
    with pytest.raises(ValueError, match="no head set"):
        bench.Bench({**CONFIG, "methods": [{**SOFTPAG, "heads": "file: absent"}]})


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "x.sqlite").write_text("no log of anything, but long enough to be looked at" * 9)
    with pytest.raises(ValueError, match="move"):
        Log(tmp_path / "x.sqlite")


def test_the_configs_of_the_page_are_configs():
    import re

    from attune.tools.runtime.setup import ROOT

    page = (ROOT / "PROVE.md").read_text(encoding="utf-8")
    found = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert len(found) == 6
    for config in found:
        filled = bench.filled(config)
        assert suites.items(filled["suite"]) and methods.methods_of(filled["methods"])
        assert all(name.partition(":")[0] in judges.KINDS for name in filled["scorers"])
    for name in (*suites.SUITES, *judges.KINDS):
        assert f"`{name}" in page


def test_the_configs_of_the_benchmarks_can_be_set_up():
    from attune.tools.benchmarks.prove import CONFIGS

    for path in sorted(CONFIGS.glob("*.json")):
        config = command.parse(path)
        made = bench.Bench({**config, "suite": {**config["suite"], "prompts": 1}})
        assert len(made.methods) > 1
