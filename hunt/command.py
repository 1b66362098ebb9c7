"""HeadHunter without a graph: a search from a config file, here or on a Ray cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..patches.hook.install import model_sites
from ..patches.hook.sites import select
from ..scoring.scorers import ClipScorer, PreferenceScorer, Scorer
from .engine import Engine
from .files import file_error, printable
from .head_files import PACK, HeadFile, folder, save
from .log import Log, log_path
from .prompts import products, texts_of
from .report import report, sheet, story, time_left
from .search import Found, Progress, search
from .settings import CUSTOM, PRESETS, Plan, Settings

DEMO = "demo"
BUILDER = f"{__name__}:engine_of"
SETTINGS = [f.name for f in fields(Settings)]
KEYS: dict[str, Any] = {
    "name": "search",
    "model": DEMO,  # or a checkpoint's file name, or {unet, clip: [...], clip_type, vae} by their file names
    "loras": [],  # [file name, strength] pairs
    "prompts": [],
    "styles": [],  # each prompt is then drawn in every style, “style, prompt”
    "negative": "",
    "guidance": 0.0,  # FLUX's guidance input in a search, as in the paper
    "width": 0,
    "height": 0,
    "scorer": "",  # "demo: all bound", "clip: folder", "preference: folder", or a list of them
    "objective": "",
    "candidates": "",
    "preset": CUSTOM,  # of rounds, heads_per_round and images_per_candidate
    "rounds": Plan.rounds,
    "heads_per_round": Plan.heads_per_round,
    "images_per_candidate": Plan.images,
    "halving": Plan.halving,
    "ranking": Plan.ranking,
    "thresholds": [],
    "rows": 0,
    "ray": None,  # {address, cpus, gpus}
    "output": "",
}


def parse(path: Path) -> dict[str, Any]:
    """What is in a config file, TOML or JSON.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ImportError:
                raise ValueError(f"{path}: TOML needs Python 3.11 or newer; write the config as JSON.") from None
            data = tomllib.loads(text)
        else:
            data = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a config: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a config: it must have names and values.")
    return data


def read(path: Path) -> dict[str, Any]:
    """A config file, TOML or JSON, with the defaults filled in.

    Raises:
        ValueError: when it cannot be read, or has a key that nobody knows.
    """
    return filled(parse(path))


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config with defaults.

    Raises:
        ValueError: for an unknown key.
    """
    known = [*KEYS, *SETTINGS]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"the config has “{unknown[0]}”, which is not known; there are {', '.join(known)}.")
    return {**KEYS, **data}


def _file(kind: str, name: str) -> str:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise ValueError(
            f"there is no “{name}” in ComfyUI's models/{kind}; there are: {', '.join(folder_paths.get_filename_list(kind))}."
        )
    return path


def bundled(model: Any) -> str:
    """The bundled model's variant that a config's ``model`` names, as “demo” or “demo: stickers”; empty for other models."""
    kind, _, variant = (part.strip() for part in model.partition(":")) if isinstance(model, str) else ("", "", "")
    return (variant or "shapes") if kind == DEMO else ""


def side(model: Any) -> int:
    """Pixels of a picture's sides where a config does not say."""
    from ..demo.model import SIDES

    return SIDES[variant] if (variant := bundled(model)) else 1024


def load_model(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE that a config names.

    Raises:
        ValueError: when a file is not there.
    """
    model = config["model"]
    if variant := bundled(model):
        from ..demo import model as demo

        loaded = demo.load(variant)
    elif isinstance(model, Mapping):
        unet = comfy.sd.load_diffusion_model(_file("diffusion_models", model["unet"]))
        kind = getattr(comfy.sd.CLIPType, str(model.get("clip_type", "stable_diffusion")).upper())
        names = [model["clip"]] if isinstance(model["clip"], str) else model["clip"]
        folders = folder_paths.get_folder_paths("embeddings")
        clip = comfy.sd.load_clip([_file("text_encoders", n) for n in names], embedding_directory=folders, clip_type=kind)
        loaded = unet, clip, comfy.sd.VAE(sd=comfy.utils.load_torch_file(_file("vae", model["vae"]), safe_load=True))
    else:
        folders = folder_paths.get_folder_paths("embeddings")
        loaded = comfy.sd.load_checkpoint_guess_config(_file("checkpoints", model), embedding_directory=folders)[:3]
    patched, clip, vae = loaded
    for name, strength in config["loras"]:
        lora = comfy.utils.load_torch_file(_file("loras", name), safe_load=True)
        patched, clip = comfy.sd.load_lora_for_models(patched, clip, lora, strength, strength)
    if clip is None or vae is None:
        raise ValueError(f"“{model}” has no text encoder or no VAE; name unet, clip, clip_type and vae apart.")
    return patched, clip, vae


def load_scorer(text: str) -> Scorer:
    """``demo: similarity``, ``demo: all present``, ``demo: all bound``, ``clip: folder`` or ``preference: folder``.

    Raises:
        ValueError: for anything else.
    """
    kind, _, name = (part.strip() for part in text.partition(":"))
    if kind == DEMO:
        from ..demo import scorer

        if name.startswith("share "):
            return scorer.ReaderScorer(name.removeprefix("share "), share=True)
        return scorer.scorer(name or scorer.KINDS[0])
    if kind in ("clip", "preference") and name:
        return (ClipScorer if kind == "clip" else PreferenceScorer)(name)
    raise ValueError(
        f"scorer is “{text}”; write “clip: folder”, “preference: folder”, “demo: all present” or “demo: all bound”."
    )


def load_scorers(given: str | list[str], model: Any) -> list[Scorer]:
    """The scorers that a config names; the bundled model has one of its own."""
    names = [given] if isinstance(given, str) else list(given)
    return [load_scorer(name or (DEMO if bundled(model) else "")) for name in names]


def plan_of(config: Mapping[str, Any]) -> Plan:
    """How a config goes through the heads.

    Raises:
        ValueError: for an unknown preset.
    """
    if config["preset"] not in PRESETS:
        raise ValueError(f"there is no preset “{config['preset']}”; there are {', '.join(PRESETS)}.")
    numbers = {
        "rounds": config["rounds"],
        "heads_per_round": config["heads_per_round"],
        "images": config["images_per_candidate"],
        **PRESETS[config["preset"]],
    }
    return Plan(
        **numbers, halving=config["halving"], ranking=config["ranking"], thresholds=tuple(map(float, config["thresholds"]))
    )


@torch.inference_mode()
def engine_of(config: Mapping[str, Any]) -> Engine:
    """What a config searches with; a Ray worker makes it from the same config.

    Raises:
        ValueError: when something is missing or does not fit.
    """
    config = filled(config)
    if not config["prompts"]:
        raise ValueError("the config has no prompts; give a list of them.")
    prompts = products(config["styles"], config["prompts"])
    patched, clip, vae = load_model(config)
    more = {"guidance": float(config["guidance"])} if model_sites(patched)[0] == "flux" else {}

    def encode(text: str) -> Any:
        return [[t, {**options, **more}] for t, options in clip.encode_from_tokens_scheduled(clip.tokenize(text))]

    default = side(config["model"])
    sides = (config["height"] or default, config["width"] or default)
    channels = patched.get_model_object("latent_format").latent_channels
    return Engine(
        patched,
        vae=vae,
        positives=[encode(text) for text in prompts],
        negative=encode(config["negative"]),
        latent={"samples": torch.zeros(1, channels, sides[0] // 8, sides[1] // 8)},
        scorers=load_scorers(config["scorer"], config["model"]),
        texts=texts_of(config["objective"], prompts, len(prompts)),
        settings=Settings(**{name: config[name] for name in SETTINGS if name in config}),
        rows=config["rows"],
    )


def run(config: Mapping[str, Any], show: Progress | None = None, log_at: Path | None = None) -> tuple[Engine, Found]:
    """Search; errors as in `engine_of` and `search`."""
    config = filled(config)
    plan = plan_of(config)
    made = engine_of(config)
    candidates = select(config["candidates"], made.sites, made.family) if config["candidates"].strip() else None
    workers = None
    log = Log(log_at or log_path(config["name"]))
    try:
        if config["ray"]:
            from .cluster import Cluster

            options = dict(config["ray"])
            workers = Cluster(options.pop("address", "auto"), BUILDER, {**config, "ray": None, "rows": made.rows}, **options)
        found = search(made, log.evaluations(made.identities()), plan, candidates=candidates, workers=workers, progress=show)
    finally:
        log.close()
        if workers is not None:
            workers.close()
    return made, found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py hunt", description=__doc__)
    parser.add_argument("config", type=Path, help="TOML or JSON; see web/docs/AttuneHeadHunter.md")
    parser.add_argument("--output", type=Path, help="folder for the head set, the sheet and the report (default: output)")
    args = parser.parse_args(argv)
    last = 0.0

    def show(done: int, total: int, left: float) -> None:
        nonlocal last
        if time.monotonic() - last > 5 or done == total:
            last = time.monotonic()
            print(f"{done} of {total} pictures{time_left(left)}", file=sys.stderr, flush=True)

    try:
        config = read(args.config)
        made, found = run(config, show)
        about = config["objective"].strip() or "the prompts"
        place = args.output or Path(config["output"] or PACK / "output")
        told = HeadFile(found.heads.family, found.heads.chosen, story(made, found, about))
        path = save(told, made.sites, made.family, config["name"], place)
        words = printable(report(made, found, about))
        try:
            path.with_suffix(".txt").write_text(words + "\n", encoding="utf-8")
            sheet(made, found).save(path.with_suffix(".png"))
        except OSError as error:
            raise file_error("HeadHunter", path, error) from None
    except ValueError as error:
        print(printable(f"{error}"), file=sys.stderr)
        return 1
    print(f"{words}\n{path} (copy it to {folder()} for Load Heads), and .png and .txt beside it")
    return 0
