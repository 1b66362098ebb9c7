"""HeadHunter, Save Heads and Load Heads: find the heads that matter, and share them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
from comfy_api.latest import io

from ..hunt import engine as headhunter
from ..hunt import head_files as headsets
from ..hunt import log as evaluations
from ..hunt.report import image
from ..patches.hook.attention import model_sites
from ..server import layouts
from .base import AttuneNode
from .heads import AttuneHeadsType
from .scorers import AttuneScorerType

NONE = "(none yet)"
TEXT_INPUTS = ("text", "prompt", "t5xxl", "clip_l", "value", "string")
THROUGH = ("positive", "conditioning", "conditioning_1", "conditioning_to", "text", "prompt", "value", "string")


def log_path(name: str) -> Path:
    """Where a search keeps its evaluations.

    Raises:
        ValueError: for a name that cannot be a file's.
    """
    return Path(folder_paths.get_user_directory()) / "attune" / "headhunter" / f"{evaluations.file_name(name)}.sqlite"


def prompt_in_graph(graph: Mapping[str, Any] | None, node: str | None) -> str | None:
    """The prompt behind HeadHunter's positive input, as far as it is written in a node and not made by one."""
    found: Any = (graph or {}).get(str(node), {}).get("inputs", {}).get("positive")
    for _ in range(100):
        if not isinstance(found, list) or not found or str(found[0]) not in (graph or {}):
            return None
        inputs = (graph or {})[str(found[0])].get("inputs", {})
        for name in TEXT_INPUTS:
            if isinstance(inputs.get(name), str):
                return inputs[name]
        found = next((inputs[name] for name in THROUGH if isinstance(inputs.get(name), list)), None)
    return None


def texts_of(objective: str, prompts: Sequence[str], conditionings: int) -> list[str]:
    """What pictures are compared with: the lines of the objective, or the prompts where it is empty.

    Raises:
        ValueError: when there is neither, or not one for each conditioning.
    """
    lines = [line.strip() for line in objective.splitlines() if line.strip()]
    found = lines or list(prompts)
    if not found:
        raise ValueError(
            "HeadHunter: the prompts cannot be read from the graph; write the objective (a line for all, or one for each "
            "conditioning), or connect the prompts."
        )
    if len(found) not in (1, conditionings):
        raise ValueError(
            f"HeadHunter: there are {conditionings} conditionings and {len(found)} {'lines of the objective' if lines else 'prompts'}; "
            "give one, or one for each."
        )
    return found


def time_left(seconds: float) -> str:
    """``3 h 20 min left``, or nothing where it is not known yet."""
    if not math.isfinite(seconds):
        return ""
    minutes = round(seconds / 60)
    return (
        f", {minutes // 60} h {minutes % 60} min left"
        if minutes >= 60
        else f", {minutes} min left"
        if minutes
        else ", a moment left"
    )


class _Show:
    """The node's progress bar, with a preview of what is being made and a line of text."""

    def __init__(self, model: Any, node: str | None):
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.bar = comfy.utils.ProgressBar(1, node_id=node)
        self.node, self.done, self.total = node, 0, 1

    def step(self, i: int, x0: Any, x: Any, total: int) -> None:
        preview = self.previewer.decode_latent_to_preview_image("JPEG", x0) if self.previewer else None
        self.bar.update_absolute(self.done, self.total, preview)

    def progress(self, done: int, total: int, left: float) -> None:
        self.done, self.total = done, total
        self.bar.update_absolute(done, total)
        line = f"{done} of {total} pictures{time_left(left)}"
        logging.info("HeadHunter: %s", line)
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)  # none without a browser
        if server is not None and self.node is not None:
            server.send_progress_text(line, self.node)


class AttuneHeadHunter(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneHeadHunter",
            display_name="HeadHunter",
            category="Attune",
            description="Finds the attention heads whose perturbation by SoftPAG makes pictures that a scorer likes: every head is tried on the "
            "same noise, the best join, and the next round tries the rest beside them. Takes long and may be stopped at any time: what is "
            "evaluated is kept, and the same search goes on from there. For SD1.5, SDXL, SD3 and FLUX.",
            is_input_list=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to search on, with its LoRAs; without SoftPAG, which the search adds itself."
                ),
                io.Vae.Input("vae", tooltip="Decodes the pictures for the scorer."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt; or a list of prompts (Prompt List), which the pictures of a candidate take in turn.",
                ),
                io.Conditioning.Input("negative", tooltip="As for a KSampler."),
                io.Latent.Input(
                    "latent_image", tooltip="The size of the pictures: an empty latent. A batch is taken picture by picture."
                ),
                AttuneScorerType.Input(
                    "scorer", tooltip="Says how good a picture is: CLIP Scorer, Preference Scorer, Demo Scorer."
                ),
                io.String.Input(
                    "objective",
                    default="",
                    multiline=True,
                    tooltip="What pictures should show, for the scorer: a line for all prompts, such as “crisp patterns”, or a line "
                    "for each. Empty: the prompts themselves.",
                ),
                AttuneHeadsType.Input(
                    "candidates", optional=True, tooltip="From Select Heads: where to search. Open: every head of the model."
                ),
                io.Int.Input("rounds", default=3, min=1, max=1000, tooltip="How often the best heads join the set."),
                io.Int.Input("heads_per_round", default=2, min=1, max=1000, tooltip="How many join each time."),
                io.Int.Input(
                    "images_per_candidate",
                    default=8,
                    min=1,
                    max=100000,
                    tooltip="Pictures that every candidate is judged by; picture i has the seed plus i. "
                    "Few pictures find noise; the paper takes 100.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,  # or a stopped search would start anew with another seed
                    tooltip="The first picture's noise, the same for all candidates. The same seed gives the same result.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of a picture."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="As for a KSampler. Use what you draw with.",
                ),
                io.Combo.Input("sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS), tooltip="As for a KSampler."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS), tooltip="As for a KSampler."),
                io.Float.Input("scale", default=3.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="SoftPAG's scale."),
                io.Float.Input(
                    "perturbation", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="SoftPAG's perturbation (u in the paper)."
                ),
                io.String.Input(
                    "name",
                    default="search",
                    tooltip="Names the log of evaluations in ComfyUI's user folder (attune/headhunter). "
                    "Searches of one name share what they know.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    optional=True,
                    tooltip="Where SoftPAG begins. Steps before are computed once for all candidates: 0.2 saves a fifth of the time.",
                ),
                io.Int.Input(
                    "halving",
                    default=0,
                    min=0,
                    max=8,
                    optional=True,
                    tooltip="2 or more tries all candidates on a few pictures and only the promising ones, a half or a third…, on more. "
                    "Much faster, and may miss a head. 0 and 1: every candidate on all pictures.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="The prompts in words, for an empty objective, where they are not written in a CLIP Text Encode: from Prompt List.",
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="The heads that were found: for SoftPAG, and Save Heads."),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="Layers by heads as a heatmap with the chosen ones marked, the score after each round, and pictures along the way.",
                ),
                io.String.Output(display_name="report", tooltip="The search in words and numbers."),
            ],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        given = {name: value[0] for name, value in inputs.items() if value}
        positives = inputs["positive"]
        written = prompt_in_graph(cls.hidden.prompt, cls.hidden.unique_id) if cls.hidden is not None else None
        prompts = [p for p in inputs.get("prompts") or [] if p.strip()] or ([written] if written else [])
        objective = given.get("objective", "")
        settings = headhunter.Settings(
            given["seed"],
            given["steps"],
            given["cfg"],
            given["sampler_name"],
            given["scheduler"],
            given["scale"],
            given["perturbation"],
            given.get("start_percent", 0.0),
        )
        path = log_path(given["name"])
        texts = texts_of(objective, prompts, len(positives))
        engine = headhunter.Engine(
            given["model"], given["vae"], positives, given["negative"], given["latent_image"], given["scorer"], texts, settings
        )
        show = _Show(given["model"], cls.hidden.unique_id if cls.hidden is not None else None)
        engine.callback = show.step
        log = evaluations.Log(path)
        try:
            found = headhunter.search(
                engine,
                log.search(*engine.identity()),
                given.get("candidates"),
                given["rounds"],
                given["heads_per_round"],
                given["images_per_candidate"],
                given.get("halving", 0),
                progress=show.progress,
            )
        finally:
            log.close()
        about = objective.strip() or "the prompts"
        told = headsets.HeadFile(found.heads.family, found.heads.chosen, headhunter.story(engine, found, about))
        report = f"{headhunter.report(engine, found, f'objective: {about}')}\nlog: {path}"
        heat = layouts.scores(told.about["heatmap"], f"HeadHunter, {given['name']}")
        return io.NodeOutput(told, image(engine, found), report, ui=heat)


class AttuneSaveHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneSaveHeads",
            display_name="Save Heads",
            category="Attune",
            description="Writes a head set as a small file in ComfyUI's user folder (attune/heads), with the model that it is for, and where it "
            "comes from. Share the file; Load Heads reads it.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the heads are for."),
                AttuneHeadsType.Input("heads", tooltip="From HeadHunter or Select Heads."),
                io.String.Input(
                    "name", default="my heads", tooltip="The file's name. A head set of the same name is replaced."
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="The same heads."),
                io.String.Output(display_name="path", tooltip="The file."),
            ],
        )

    @classmethod
    def execute(cls, model, heads, name) -> io.NodeOutput:
        family, sites = model_sites(model)
        return io.NodeOutput(heads, str(headsets.save(heads, sites, family, name)))


class AttuneLoadHeads(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttuneLoadHeads",
            display_name="Load Heads",
            category="Attune",
            description="Reads a head set that Save Heads wrote, that somebody shared, or that comes with the pack. It must be for this kind of "
            "model.",
            inputs=[
                io.Model.Input("model", tooltip="The model to use the heads on; a set for another kind of model is refused."),
                io.Combo.Input(
                    "name",
                    options=headsets.names() or [NONE],
                    tooltip="The files in attune/heads in ComfyUI's user folder, and the pack's presets. Press R after adding one.",
                ),
            ],
            outputs=[
                AttuneHeadsType.Output(display_name="heads", tooltip="For SoftPAG, or as HeadHunter's candidates."),
                io.String.Output(display_name="summary", tooltip="What it is and where it comes from."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, name) -> str:
        try:
            path = headsets.find(name)
            return f"{path} {path.stat().st_mtime_ns}"
        except ValueError:
            return ""

    @classmethod
    def execute(cls, model, name) -> io.NodeOutput:
        family, sites = model_sites(model)
        told = headsets.load(name, sites, family)
        lines = [f"{name}: {len(told)} heads: {told.text}"]
        told_of = ("objective", "scorer", "scores", "images", "prompts", "settings", "pack")
        lines += [f"{key}: {told.about[key]}" for key in told_of if key in told.about]
        heat = layouts.scores(told.about["heatmap"], name) if "heatmap" in told.about else None
        return io.NodeOutput(told, "\n".join(lines), ui=heat)


class AttunePromptList(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttunePromptList",
            display_name="Prompt List",
            category="Attune",
            description="Several prompts, a line each, encoded one by one: for HeadHunter, which judges heads on all of them.",
            inputs=[
                io.Clip.Input("clip", tooltip="As for CLIP Text Encode."),
                io.String.Input(
                    "text", default="", multiline=True, tooltip="A prompt on every line. Empty lines are left out."
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", is_output_list=True, tooltip="One conditioning for each prompt."
                ),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="The prompts: for HeadHunter's prompts."),
            ],
        )

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        if clip is None:
            raise ValueError("Prompt List: there is no text encoder: this checkpoint has none, so load a CLIP on its own.")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError("Prompt List: write at least one prompt, one on every line.")
        return io.NodeOutput([clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines], lines)
