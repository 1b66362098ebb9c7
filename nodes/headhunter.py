"""HeadHunter and Prompt List: find the heads that matter."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields
from typing import Any

import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..hunt.engine import Engine
from ..hunt.head_files import HeadFile
from ..hunt.log import Log, log_path
from ..hunt.prompts import lines_of, products, prompt_in_graph, texts_of
from ..hunt.report import image, report, story, time_left
from ..hunt.search import search
from ..hunt.settings import CUSTOM, PRESETS, RANKINGS, Plan, Settings
from ..server import layouts
from .base import AttuneNode, in_menu, on_itself
from .heads import AttuneHeadsType
from .inputs import automatic
from .scorers import AttuneScorerType


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
            **in_menu("Heads", "search heads", "find heads", "optimise", "optimize"),
            description="Finds the attention heads whose perturbation by SoftPAG makes pictures that a scorer likes: every head is tried on the "
            "same noise, the best join, and the next round tries the rest beside them. Takes long and may be stopped at any time: what is "
            "evaluated is kept, and the same search goes on from there. For SD1.5, SDXL, SD3, FLUX and later models.",
            is_input_list=True,
            **on_itself(io.Hidden.prompt),
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
                    tooltip="Pictures (pairs of prompt and seed) that every candidate is judged by; picture i has the seed plus i. "
                    "Few pictures find noise; the paper takes 20 for quality and 5 for a style.",
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
                    default=Settings.cfg,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="1 is no CFG, as in the paper: then the picture shows what the heads do, and costs half. What is found serves "
                    "with CFG too.",
                ),
                io.Combo.Input("sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS), tooltip="As for a KSampler."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS), tooltip="As for a KSampler."),
                automatic(
                    "scale",
                    Settings.scale,
                    tooltip="SoftPAG's scale. -1 is the model's own, as in the paper: 3, and 8 for FLUX.1.",
                ),
                io.Float.Input(
                    "perturbation",
                    default=Settings.perturbation,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="SoftPAG's perturbation (u in the paper). 1 shows best what a head does; make it less when you use the heads.",
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
                AttuneScorerType.Input(
                    "scorer_2", optional=True, tooltip="A second opinion on every picture, for the rankings that take one."
                ),
                AttuneScorerType.Input(
                    "scorer_3", optional=True, tooltip="A third opinion, for the ranking “above thresholds”."
                ),
                io.Combo.Input(
                    "ranking",
                    options=list(RANKINGS),
                    default=Plan.ranking,
                    optional=True,
                    tooltip="What makes a head good. scorer: the first scorer's score. harmonic mean: of the first two, which must be of "
                    "about the same size. above thresholds: the first scorer's score, among heads whose other scores reach the thresholds.",
                ),
                io.Float.Input(
                    "threshold_2",
                    default=0.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    tooltip="For “above thresholds”: what scorer_2 must give a head that may join, on average. In the paper PickScore 20. "
                    "May be changed in a search that is done: its scores are in the log.",
                ),
                io.Float.Input(
                    "threshold_3",
                    default=0.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    tooltip="For “above thresholds”: what scorer_3 must give, as threshold_2. In the paper 6, by an aesthetic scorer.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=CUSTOM,
                    optional=True,
                    tooltip="How much is searched. custom: rounds, heads_per_round and images_per_candidate as set above. As in the paper "
                    "instead: quality, 1 round of 24 heads by 20 pictures; style, 5 rounds of 3 heads by 5 pictures.",
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
        given = {name: value[0] for name, value in inputs.items() if value and value[0] is not None}
        positives = inputs["positive"]
        written = prompt_in_graph(cls.hidden.prompt, cls.hidden.unique_id)
        prompts = [p for p in inputs.get("prompts") or [] if p.strip()] or ([written] if written else [])
        objective = given.get("objective", "")
        settings = Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})
        plan = Plan(
            **{"rounds": given["rounds"], "heads_per_round": given["heads_per_round"], "images": given["images_per_candidate"]}
            | PRESETS[given.get("preset", CUSTOM)],
            halving=given.get("halving", Plan.halving),
            ranking=given.get("ranking", Plan.ranking),
            thresholds=(given.get("threshold_2", 0.0), given.get("threshold_3", 0.0)),
        )
        path = log_path(given["name"])
        engine = Engine(
            given["model"],
            vae=given["vae"],
            positives=positives,
            negative=given["negative"],
            latent=given["latent_image"],
            scorers=[given[name] for name in ("scorer", "scorer_2", "scorer_3") if given.get(name) is not None],
            texts=texts_of(objective, prompts, len(positives)),
            settings=settings,
        )
        show = _Show(given["model"], cls.hidden.unique_id)
        engine.callback = show.step
        log = Log(path)
        try:
            found = search(
                engine,
                log.evaluations(engine.identities()),
                plan,
                candidates=given.get("candidates"),
                progress=show.progress,
            )
        finally:
            log.close()
        about = objective.strip() or "the prompts"
        told = HeadFile(found.heads.family, found.heads.chosen, story(engine, found, about))
        heat = layouts.scores(told.about["heatmap"], f"HeadHunter, {given['name']}")
        return io.NodeOutput(told, image(engine, found), f"{report(engine, found, about)}\nlog: {path}", ui=heat)


class AttunePromptList(AttuneNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttunePromptList",
            display_name="Prompt List",
            **in_menu("Heads", "prompts", "lines"),
            description="Several prompts, a line each, encoded one by one: for HeadHunter, which judges heads on all of them.",
            inputs=[
                io.Clip.Input("clip", tooltip="As for CLIP Text Encode."),
                io.String.Input(
                    "text", default="", multiline=True, tooltip="A prompt on every line. Empty lines are left out."
                ),
                io.String.Input(
                    "styles",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For heads that bring out a style: a style on every line. Every prompt is then drawn in every style, as “style, "
                    "prompt”.",
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
    def execute(cls, clip, text, styles="") -> io.NodeOutput:
        if clip is None:
            raise ValueError("Prompt List: there is no text encoder: this checkpoint has none, so load a CLIP on its own.")
        lines = products(lines_of(styles or ""), lines_of(text))
        if not lines:
            raise ValueError("Prompt List: write at least one prompt, one on every line.")
        return io.NodeOutput([clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines], lines)
