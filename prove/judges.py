"""Judges: what a picture gets from each scorer, as a whole and part by part. One that is not there is skipped, and the report says so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..demo import scorer as demo
from ..demo.reader import WEIGHTS, judge, load_reader, read
from ..scoring.detector import Detector
from ..scoring.folders import DETECTORS, SCORERS, digest, files_of, model_folder, network_of_folder, part_of_folder
from ..scoring.metrics import score, style_score
from ..scoring.scorers import ClipScorer, PreferenceScorer, Scorer, managed, ready
from .suites import Item

ALL = "all"  # the part that is the whole


class Judge(ABC):
    """A scorer of a report. ``key`` stands for weights and settings; ``share``: values are 0 or 1, or parts of 1."""

    name: str
    key: str
    share = False

    @abstractmethod
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        """Of a picture ``[1, h, w, 3]``: a value by part; nothing where there is nothing to judge."""


class Reader(Judge):
    """The bundled reader: things, colours, patterns, and the background of the bundled model's world."""

    name, share = "reader", True

    def __init__(self) -> None:
        self.reader = load_reader()
        self.key = digest([WEIGHTS], "prove reader")

    @torch.inference_mode()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        found = judge(read(self.reader, picture)[0], demo.parse(item.text))
        out = {
            "present": all(found.present),
            "colours": all(found.colour),
            "patterns": all(found.pattern),
            ALL: all(found.bound),
        }
        for i, (there, bound) in enumerate(zip(found.present, found.bound, strict=True), 1):
            out |= {f"thing {i} present": there, f"thing {i} bound": bound}
        for part, value in (("background", found.background), ("relation", found.relation)):
            if value is not None:
                out[part] = value
        return {part: float(value) for part, value in out.items()}


class Metric(Judge):
    """CLIP-T (with each phrase as a part), CLIP-IQA, or a preference."""

    def __init__(self, name: str, scorer: Scorer, metric: str):
        self.name, self.scorer, self.metric = name, scorer, metric
        self.key = f"{metric} {scorer.key}"

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        out = {ALL: float(score(picture, "" if self.metric == "clip_iqa" else item.text, self.scorer, self.metric)[0])}
        if self.metric == "clip_t" and item.things:
            found = self.scorer.scores(picture, [t.phrase for t in item.things])[0]
            out |= {f"thing {i}": float(value) for i, value in enumerate(found, 1)}
        return out


class Detection(Judge):
    """Attention Regulation's detection rate: the share of things that a detector finds; it does not count them."""

    share = True

    def __init__(self, name: str, folder: str, least: float = 0.3):
        self.name, self.least, self.detector = name, least, Detector(folder)
        self.key = digest(files_of(model_folder(DETECTORS, folder)), "detection", least)

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        found = {
            f"thing {i}": float(self.detector.find(picture[0], t.noun, self.least) is not None)
            for i, t in enumerate(item.things, 1)
        }
        return {ALL: float(all(found.values())), "share": sum(found.values()) / len(found), **found} if found else {}


class Styles(Judge):
    """The style composition score of Detail++: each part cut out by the detector, and CLIP's cosine with its phrase."""

    def __init__(self, name: str, folder: str, clip: str):
        self.name, self.detector, self.clip = name, Detector(folder), ClipScorer(clip)
        self.key = f"{self.clip.key} {digest(files_of(model_folder(DETECTORS, folder)), 'scb')}"

    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        if len(item.things) != 2:
            return {}
        return {ALL: float(style_score(picture, [t.phrase for t in item.things], self.clip, self.detector, None)[0][0])}


class Questions(Judge):
    """BLIP-VQA as in T2I-CompBench: the chance of “yes” to “a red apple?” for every thing, and the product of them."""

    share = True

    def __init__(self, name: str, folder: str):
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BlipForQuestionAnswering

        path, who = model_folder(SCORERS, folder), "BLIP-VQA"
        config = part_of_folder(who, AutoConfig, path, "config.json")
        if config.model_type != "blip":
            raise ValueError(
                f"{who}: the folder “{folder}” holds a model of type “{config.model_type}”; choose a BLIP for VQA."
            )
        self.tokenizer = part_of_folder(who, AutoTokenizer, path, "tokenizer")
        self.processor = part_of_folder(who, AutoProcessor, path, "preprocessor")
        self.patcher = managed(
            network_of_folder(who, _Vqa(BlipForQuestionAnswering), path, config, "a BLIP for questions").float()
        )
        self.name, self.key = name, digest(files_of(path), "vqa")
        self.yes = int(self.tokenizer("yes", add_special_tokens=False)["input_ids"][0])

    @torch.no_grad()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        if not item.things:
            return {}
        network, device = ready(self.patcher)
        array = (picture[0, ..., :3].float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
        found = {}
        for i, thing in enumerate(item.things, 1):
            inputs = self.processor(images=array, text=f"{thing.phrase}?", return_tensors="pt").to(device)
            seen = network.vision_model(pixel_values=inputs["pixel_values"])[0]
            asked = network.text_encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoder_hidden_states=seen,
                return_dict=True,
            )[0]
            start = torch.full((1, 1), network.decoder_start_token_id, device=device)
            said = network.text_decoder(
                input_ids=start, encoder_hidden_states=asked, encoder_attention_mask=inputs["attention_mask"], return_dict=True
            )
            found[f"thing {i}"] = float(said.logits[0, -1].float().softmax(-1)[self.yes])
        product = float(torch.tensor(list(found.values())).prod())
        return {ALL: product, **found}


class _Vqa:
    """`network_of_folder` asks a class for a network of a config."""

    def __init__(self, kind: Any):
        self.kind = kind

    def from_config(self, config: Any, **_: Any) -> Any:
        return self.kind(config)


def _demo(name: str, kind: str) -> Judge:
    if kind == "bound":
        return Reader()
    if kind == "similarity":
        return Metric(name, demo.DemoScorer(), "clip_t")
    raise ValueError(f"prove: there is no scorer “{name}”; write “demo: bound” or “demo: similarity”.")


def _styles(name: str, folders: str) -> Judge:
    detector, _, clip = (part.strip() for part in folders.partition(","))
    return Styles(name, detector, clip)


KINDS: Mapping[str, Callable[[str, str], Judge]] = {
    "demo": _demo,
    "clip_t": lambda name, folder: Metric(name, ClipScorer(folder), "clip_t"),
    "clip_iqa": lambda name, folder: Metric(name, ClipScorer(folder), "clip_iqa"),
    "preference": lambda name, folder: Metric(name, PreferenceScorer(folder), "preference"),
    "detection": Detection,
    "scb": _styles,
    "vqa": Questions,
}


def judges(names: list[str]) -> tuple[list[Judge], list[str]]:
    """The scorers of a config, and a sentence for each that is not there.

    Raises:
        ValueError: for a kind of scorer that nobody knows.
    """
    found, missing = [], []
    for name in names:
        kind, _, folder = (part.strip() for part in name.partition(":"))
        if kind not in KINDS:
            raise ValueError(
                f"prove: there is no kind of scorer “{kind}”; there are {', '.join(KINDS)}, as in “clip_t: folder”."
            )
        if kind == "demo":
            found.append(_demo(name, folder))
            continue
        try:
            found.append(KINDS[kind](name, folder))
        except ValueError as error:
            missing.append(f"{name} is skipped: {error}")
    return found, missing
