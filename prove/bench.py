"""Draws the pictures of a comparison and has them judged; what is in the log already is not done again."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo import model as demo_model
from ..hunt.command import DEMO, bundled, load_model, side
from ..hunt.files import file_name
from ..hunt.head_files import pack_version
from ..patches.detail import sampler as detail
from ..patches.hook.install import model_sites
from ..patches.samplers import NONE, NORMAL, SAMPLERS, SamplerNeeds
from ..scoring.folders import digest
from .judge import Between, Judge, OfMany
from .judges import Metric, judges
from .log import Log, key_of
from .methods import Detail, Loaded, Method, listens, methods_of, named_heads, needs_prompt, on_latent, on_model
from .suites import Item, items

VERSION = 1  # of what a picture's key means
KEYS: dict[str, Any] = {
    "name": "prove",
    "model": DEMO,  # as in a config of hunt: a checkpoint's file name, or {unet, clip: [...], clip_type, vae}
    "loras": [],
    "suite": {"name": "shapes"},
    "methods": [],
    "seeds": [0],
    "seed_per_prompt": True,  # every prompt has noise of its own: the seed and the prompt's number, from 0
    "scorers": [],
    "negative": "",
    "guidance": 0.0,
    "width": 0,
    "height": 0,
    "steps": 20,
    "cfg": 5.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "batch": 1,  # pictures at once, of methods that are the same for every prompt; times and memory are then those of batches
    "preview": 20,  # pictures between two previews; 0 for none
    "ray": None,
    "output": "",
}
BOUND = {
    "shapes": ["demo: bound"],
    "stickers": ["demo: stickers bound"],
}  # scorers of the bundled models where a config names none
SAMPLING = ("negative", "guidance", "width", "height", "steps", "cfg", "sampler_name", "scheduler")
Task = tuple[int, int, int]  # method, item, seed
Wanted = tuple[
    int, int, int, bytes | None, list[str]
]  # a task, its picture as PNG if there is one, the scorers that are wanted
Picture = tuple[
    bytes, float, int
]  # PNG, seconds (setting up, sampling and decoding), bytes at the most (0 where a device does not tell)
Loader = Callable[[Mapping[str, Any]], Loaded]


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its defaults.

    Raises:
        ValueError: for an unknown key, or a value that does not fit.
    """
    if unknown := sorted(set(data) - set(KEYS)):
        raise ValueError(f"prove: the config has “{unknown[0]}”, which is not known; there are {', '.join(KEYS)}.")
    config = {**KEYS, **data}
    file_name(config["name"])
    for name in ("suite", "methods", "seeds", "scorers"):
        if not isinstance(config[name], dict if name == "suite" else list):
            raise ValueError(f"prove: {name} must be {'a table' if name == 'suite' else 'a list'}.")
    if not config["seeds"] or not all(isinstance(s, int) and s >= 0 for s in config["seeds"]):
        raise ValueError("prove: seeds must be whole numbers from 0, at least one.")
    known = comfy.samplers.KSampler
    if config["sampler_name"] not in known.SAMPLERS or config["scheduler"] not in known.SCHEDULERS:
        raise ValueError("prove: this ComfyUI has no such sampler_name or scheduler; write them as KSampler shows them.")
    if not isinstance(config["batch"], int) or config["batch"] < 1:
        raise ValueError("prove: batch must be a whole number from 1.")
    if not isinstance(config["steps"], int) or config["steps"] < 1 or not 0 <= float(config["cfg"]) <= 100:
        raise ValueError("prove: steps must be a whole number from 1, and cfg from 0 to 100.")
    return config


def files_of(model: Any, loras: Any) -> list[Path]:
    """The files that a config's model is read from."""
    if variant := bundled(model):
        names = [("", str(path)) for path in demo_model.files(variant)]
    elif isinstance(model, Mapping):
        clips = [model["clip"]] if isinstance(model["clip"], str) else model["clip"]
        names = [("diffusion_models", model["unet"]), *(("text_encoders", n) for n in clips), ("vae", model["vae"])]
    else:
        names = [("checkpoints", model)]
    names += [("loras", n) for n, _ in loras]
    paths = [n if not kind else folder_paths.get_full_path(kind, n) for kind, n in names]
    return [Path(path) for path in paths if path]


@dataclass(frozen=True)
class Drawn:
    """A finished task: its key, the picture if it is new, and what each scorer that had not judged it says."""

    key: str
    picture: Picture | None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


class Bench:
    """One checkpoint, one suite, methods, seeds and scorers.

    Args:
        loaded: in place of what the config's model names; ``identity`` then stands for it.

    Raises:
        ValueError: for anything that does not fit, before a picture is drawn.
    """

    def __init__(self, config: Mapping[str, Any], loaded: Loaded | None = None, identity: str = ""):
        self.config = filled(config)
        self.items: list[Item] = items(self.config["suite"])
        self.methods: list[Method] = methods_of(self.config["methods"])
        names = self.config["scorers"] or (BOUND.get(bundled(self.config["model"]), []))
        every, self.missing = judges(names)
        self.judges = [j for j in every if isinstance(j, Judge)]
        self.between = [j for j in every if isinstance(j, Between)]
        self.of_many = [j for j in every if isinstance(j, OfMany)]
        if not every:
            raise ValueError(f"prove: there is no scorer left. {' '.join(self.missing) or 'Name at least one in scorers.'}")
        try:
            self.loaded = Loaded(*load_model(self.config)) if loaded is None else loaded
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"prove: model cannot be loaded ({error}); write a checkpoint's file name, or unet, clip, clip_type and vae."
            ) from None
        if self.loaded.scorer is None:
            self.loaded.scorer = next((j.scorer for j in self.judges if isinstance(j, Metric)), None)
        self.family = model_sites(self.loaded.model)[0]
        default = side(self.config["model"])
        self.side = (self.config["height"] or default, self.config["width"] or default)
        self.heads = {m.name: text for m in self.methods if (text := named_heads(m, self.loaded.model))}
        self.model_key = identity or digest(files_of(self.config["model"], self.config["loras"]))
        for method in self.methods:
            try:
                on_model(method, self.loaded, self.items[0])
                if Detail.of(method, self.loaded, self.items[0]) is not None:
                    detail.check(self.config["sampler_name"], detail.Settings(), self.family)
            except (TypeError, KeyError) as error:
                raise ValueError(f"prove: the method “{method.name}” cannot be set up: {error}") from None

    @property
    def sampling(self) -> dict[str, Any]:
        """What all pictures have in common, beside the model."""
        return {name: self.config[name] for name in SAMPLING} | {"side": list(self.side), "loras": self.config["loras"]}

    def tasks(self) -> list[Task]:
        """Every picture: the methods of one prompt and seed after one another, so that what is there can be compared."""
        counts = range(len(self.items)), range(len(self.config["seeds"])), range(len(self.methods))
        return [(m, i, s) for i in counts[0] for s in counts[1] for m in counts[2]]

    def seed(self, item: int, seed: int) -> int:
        """Of the noise of a prompt with one of the config's seeds, both by their numbers."""
        return int(self.config["seeds"][seed]) + (item if self.config["seed_per_prompt"] else 0)

    def key(self, task: Task) -> str:
        """What a picture depends on, as a name."""
        m, i, s = task
        listening = self.loaded.scorer.key if self.loaded.scorer is not None and listens(self.methods[m]) else ""
        what = {
            "version": VERSION,
            "pack": pack_version() if self.methods[m].nodes else "",  # the plain model is ComfyUI's
            "model": self.model_key,
            "sampling": self.sampling,
            "item": asdict(self.items[i]),
            "seed": self.seed(i, s),
            "nodes": [[name, dict(settings)] for name, settings in self.methods[m].nodes],
            "scorer": listening,
        }
        if (heads := self.heads.get(self.methods[m].name)) is not None:
            what["heads"] = heads
        return key_of(what)

    def together(self, part: Sequence[Wanted]) -> list[list[Wanted]]:
        """Some of what is to do, in groups that are drawn at once."""
        out: list[list[Wanted]] = []
        open_groups: dict[int, list[Wanted]] = {}
        alone = (
            SAMPLERS.get(self.config["sampler_name"], SamplerNeeds(noise=NORMAL)).noise != NONE
        )  # rows would share its noise
        for one in part:
            m, drawn = one[0], one[3]
            group = None if drawn or alone or needs_prompt(self.methods[m]) else open_groups.get(m)
            if group is not None and len(group) < self.config["batch"]:
                group.append(one)
                continue
            out.append([one])
            if not (drawn or alone or needs_prompt(self.methods[m])):
                open_groups[m] = out[-1]
        return out

    def encode(self, text: str) -> Any:
        """A prompt's conditioning."""
        more = {"guidance": float(self.config["guidance"])} if self.config["guidance"] else {}
        clip = self.loaded.clip
        return [[t, {**options, **more}] for t, options in clip.encode_from_tokens_scheduled(clip.tokenize(text))]

    def conditionings(self, texts: Sequence[str]) -> list[tuple[Any, int]]:
        """Prompts' conditionings with how many are in each: all in one if their shapes allow it, else one by one."""
        each = [self.encode(text) for text in texts]
        joined = each[0] if len(each) == 1 else cat(each)
        return [(c, 1) for c in each] if joined is None else [(joined, len(each))]

    @torch.inference_mode()
    def draw(self, tasks: Sequence[Task]) -> list[Picture]:
        """Pictures of one method."""
        method, items = self.methods[tasks[0][0]], [self.items[i] for _, i, _ in tasks]
        out: list[Picture] = []
        c = self.config
        if (own := Detail.of(method, self.loaded, items[0])) is not None:
            positives: list[tuple[Any, int]] = [(own.positive, 1)]
        else:
            positives = self.conditionings([item.text for item in items])
        negative = self.encode(c["negative"])
        run = {name: c[name] for name in ("steps", "cfg", "sampler_name", "scheduler")} | {"negative": negative}
        for positive, count in positives:
            part = tasks[len(out) : len(out) + count]
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            patched = on_model(method, self.loaded, items[len(out)])
            seeds = [self.seed(i, s) for _, i, s in part]
            empty = self.empty(patched)
            if own is not None:
                samples = own.sample(patched, latent_image={"samples": empty}, denoise=1.0, seed=seeds[0], **run)
            else:
                noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
                latent = empty.repeat(count, *[1] * (empty.ndim - 1))
                samples = comfy.sample.sample(
                    patched, noise, positive=positive, latent_image=latent, seed=seeds[0], disable_pbar=True, **run
                )
            pictures = self.loaded.vae.decode(on_latent(method, self.loaded, items[len(out)], samples))
            pictures = pictures.reshape(count, -1, *pictures.shape[-3:])[:, :1]
            seconds = (time.perf_counter() - began) / count
            memory = torch.cuda.max_memory_allocated() if cuda else 0
            out += [(png_of(picture), seconds, memory) for picture in pictures]
        return out

    def empty(self, patched: Any) -> Tensor:
        """A latent of the run's size."""
        ratio = getattr(self.loaded.vae, "downscale_ratio", 8)
        ratio = ratio if isinstance(ratio, int) else 8
        channels = patched.get_model_object("latent_format").latent_channels
        return comfy.sample.fix_empty_latent_channels(patched, torch.zeros(1, channels, *(n // ratio for n in self.side)))

    def evaluate(self, *group: Wanted) -> list[Drawn]:
        """What is new of a group of `together`; in a worker or here."""
        tasks = [(m, i, s) for m, i, s, _, _ in group]
        drawn: list[Any] = [None] if group[0][3] else self.draw(tasks)
        out = []
        for (m, i, s, png, wanted), picture in zip(group, drawn, strict=True):
            seen = tensor_of(png or picture[0])
            scores = {j.key: j.values(seen, self.items[i]) for j in self.judges if j.key in wanted}
            out.append(Drawn(self.key((m, i, s)), picture, scores))
        return out

    def left(self, log: Log) -> Iterator[tuple[Any, ...]]:
        """What is still to do: method, item, seed, and the scorers that are wanted."""
        for task in self.tasks():
            key = self.key(task)
            wanted = [j.key for j in self.judges if log.scores(key, j.key) is None]
            if wanted or not log.has(key):
                yield (*task, wanted)


def cat(conditionings: Sequence[Any]) -> Any:
    """Conditionings of several prompts as rows of one; None where their shapes do not allow it."""
    if any(len(c) != 1 or c[0][0].shape != conditionings[0][0][0].shape for c in conditionings):
        return None
    first = conditionings[0][0][1]
    options = dict(first)
    for name, value in first.items():
        values = [c[0][1].get(name) for c in conditionings]
        if isinstance(value, Tensor):
            if any(not isinstance(v, Tensor) or v.shape != value.shape for v in values):
                return None
            options[name] = torch.cat(values)
        elif any(v != value for v in values):
            return None
    return [[torch.cat([c[0][0] for c in conditionings]), options]]


def png_of(picture: Tensor) -> bytes:
    """A picture ``[1, h, w, 3]`` as PNG."""
    file = io.BytesIO()
    array = (picture[0, ..., :3].float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def tensor_of(png: bytes) -> Tensor:
    """A PNG as ``[1, h, w, 3]`` in [0, 1]."""
    array = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.float32) / 255
    return torch.from_numpy(array)[None]
