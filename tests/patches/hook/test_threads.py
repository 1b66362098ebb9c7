"""Several runs on one model at once, and one run on several copies of it, as ComfyUI does where there are several devices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from torch import Tensor

from attune.patches import fusion, regulation, scfg, softpag
from attune.patches.hook.install import model_sites, request
from attune.patches.hook.requests import ReadWeights
from attune.patches.hook.run import EXTRA
from attune.patches.maps import record, recorder
from attune.tests import families
from attune.tests.families import heads_of
from attune.tests.helpers import differs

WAIT = 60  # seconds after which a thread that waits has failed
APPLY = comfy.patcher_extension.WrappersMP.APPLY_MODEL


def sample(model: Any, **more: Any) -> Tensor:
    return families.sample(model, **{"steps": 2, **more})


@pytest.fixture(autouse=True)
def _patchers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI takes the patcher off the shared model when a run ends; another run that goes on would miss it."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "cleanup", lambda self: self.clean_hooks())


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs on threads of their own."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    if errors:
        raise errors[0]
    return results


def state(model: Any) -> Any:
    """Modules, hooks and attributes of a model that something could be left on."""
    modules = list(model.model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return [id(m) for m in modules], hooks, [sorted(vars(m)) for m in modules]


FIRST = [("sd15", "output.1.0"), ("sd3", "joint.1"), ("flux", "single.1")]


@pytest.mark.parametrize(("name", "site"), FIRST)
def test_a_plain_run_while_another_is_inside_a_replayed_pass(name: str, site: str) -> None:
    """The one model of both is never changed, not for the length of a forward either."""
    model = families.shared(name)
    plain, before = sample(model), state(model)
    inside, done = threading.Event(), threading.Event()

    def wait(call: Any, weights: Tensor) -> None:
        inside.set()
        assert done.wait(WAIT)

    patched = softpag.apply(model, 2.0, 0.5, 0, 1, 0, heads_of(model, site))
    alone = sample(patched)
    kind = model_sites(model)[1][-1].kind

    def pausing(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The last site's attention of a pass of our own waits for the other run."""
        options = dict(args[5])
        if EXTRA in options:
            own = options[EXTRA]
            last = ReadWeights({(model_sites(model)[1][-1].name, kind): None}, wait)
            options[EXTRA] = type(own)((*own.requests, last), own.replay_before, own.rows)
        return executor(*args[:5], options, *args[6:], **kwargs)

    waiting = patched.clone()
    held = waiting.wrappers[APPLY]
    waiting.wrappers[APPLY] = {"outer": [pausing], **held}  # before ours

    def plainly() -> Tensor:
        assert inside.wait(WAIT)
        assert state(model) == before
        try:
            return sample(model)
        finally:
            done.set()

    ours, other = together(lambda: sample(waiting), plainly)
    assert torch.equal(other, plain)
    assert torch.equal(ours, alone)
    assert state(model) == before
    differs(alone, plain)


@pytest.mark.parametrize(("name", "site"), FIRST)
def test_two_runs_at_once_are_one_after_the_other(name: str, site: str) -> None:
    """SoftPAG beside SoftPAG, each forward of one at the same time as one of the other."""
    model, seen = families.shared(name), {0: [], 1: []}
    before, kind = state(model), model_sites(model)[1][0].kind
    runs = []
    for i, u in enumerate((0.5, 1.0)):
        patched = softpag.apply(model, 2.0, u, 0, 1, 0, heads_of(model, site))
        place = {(model_sites(model)[1][i].name, kind): None}
        request(patched, ReadWeights(place, lambda call, w, i=i: seen[i].append((call.site.name, call.chunks, w))))
        runs.append(patched)
    one_by_one = [sample(m, seed=i, steps=3) for i, m in enumerate(runs)]
    first = {i: list(maps) for i, maps in seen.items()}
    for maps in seen.values():
        maps.clear()
    gate = threading.Barrier(2, timeout=WAIT)

    def abreast(executor: Any, *args: Any, **kwargs: Any) -> Any:
        gate.wait()
        return executor(*args, **kwargs)

    for patched in runs:
        patched.add_wrapper_with_key(APPLY, "test", abreast)
    at_once = together(*(lambda i=i, m=m: sample(m, seed=i, steps=3) for i, m in enumerate(runs)))
    for ours, right in zip(at_once, one_by_one, strict=True):
        assert torch.equal(ours, right)
    for i, maps in first.items():
        assert len(maps) == len(seen[i]) > 0
        assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(maps, seen[i], strict=True))
    assert state(model) == before


# --- a run on several copies of the model ---


def on_copies(model: Any, threads: bool) -> Any:
    """The model with every conditioning on a copy of it, with noise levels of its own, as ComfyUI has it for several devices."""
    patched = model.clone()
    copies: list[Any] = []

    def calculate(args: dict[str, Any]) -> list[Tensor]:
        options = {k: v for k, v in args["model_options"].items() if k != "sampler_calc_cond_batch_function"}
        while len(copies) < len(args["conds"]):
            config = model.model.model_config  # newer ones cannot be copied
            copies.append(copy.deepcopy(model.model, {id(config): config}))
        gate = threading.Barrier(len(args["conds"]), timeout=WAIT)

        def job(role: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                copies[role].current_patcher = args["model"].current_patcher
                conds = [None] * role + [args["conds"][role]]
                if threads:
                    gate.wait()
                with torch.inference_mode():
                    return comfy.samplers.calc_cond_batch(
                        copies[role], conds, args["input"].clone(), args["sigma"].clone(), options
                    )[role]

            return run

        jobs = [job(role) for role in range(len(args["conds"]))]
        return together(*jobs) if threads else [run() for run in jobs]

    patched.set_model_sampler_calc_cond_batch_function(calculate)
    return patched


METHODS: dict[str, Callable[[Any], Any]] = {
    "SoftPAG": lambda m: softpag.apply(m, 2.0, 0.5, 0, 1, 0),
    "Attention Regulation": lambda m: regulation.apply(m, families.words((1, 2), (4,)), regulation.Settings(iterations=3)),
    "Phrase Fusion": lambda m: fusion.apply(m, families.words((1, 2)), 0.5),
    "Semantic-aware CFG": lambda m: scfg.apply(m)[0],
}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("method", METHODS)
def test_conditionings_on_threads_are_those_one_after_the_other(method: str, name: str) -> None:
    model = families.shared(name)
    patched = METHODS[method](model)
    right = sample(on_copies(patched, threads=False), sampler="heun")
    differs(right, sample(on_copies(model, threads=False), sampler="heun"))
    for _ in range(3):
        assert torch.equal(sample(on_copies(patched, threads=True), sampler="heun"), right)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_maps_of_conditionings_on_threads(name: str) -> None:
    model = families.shared(name)
    found = []
    for threads in (False, True):
        patched, maps = recorder.apply(model, record.Settings(kind="both", steps="every step"))
        sample(on_copies(patched, threads))
        found.append(list(frames(maps.record())))
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def frames(kept: Any) -> Iterator[Tensor]:
    for place in kept.places():
        yield from place.frames.values()


# --- whose forward is it? ---


def test_only_a_conditionings_first_forward_in_an_evaluation_is_the_first() -> None:
    """Another pack runs the positive prompt again after CFG; the sampler comes back at the same noise level."""
    model = families.shared("sd15")
    seen: list[tuple[int, list[tuple[int, bool]]]] = []

    def look(call: Any, weights: Tensor) -> None:
        seen.append((call.run.evaluation, [(c.role, c.first_time) for c in call.parts()]))

    def again(args: dict[str, Any]) -> Tensor:
        comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"].clone(), args["model_options"]
        )
        return args["denoised"]

    patched = model.clone()
    request(patched, ReadWeights({("middle.0.0", "cross"): None}, look))
    patched.set_model_sampler_post_cfg_function(again)

    @torch.no_grad()
    def twice(guide: Any, x: Tensor, sigmas: Tensor, **kwargs: Any) -> Tensor:
        for _ in range(2):
            guide(x, sigmas[:1], **kwargs["extra_args"])
        return x

    noise = torch.zeros(1, 4, 8, 8)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(families.text(1), families.text(2))
    guider.set_cfg(3.0)
    guider.sample(noise, noise, comfy.samplers.KSAMPLER(twice), torch.tensor([1.0, 0.0]))
    once = [(1, True), (0, True)]
    assert [number for number, _ in seen] == [1, 1, 2, 2]
    assert [sorted(chunks) for _, chunks in seen] == [sorted(once), [(0, False)]] * 2
