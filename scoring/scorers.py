"""Scorers: how well does this picture show this text. The interface, dual encoders from local folders, and their memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..methods.scores import Head, cosines, preference
from .folders import HEAD, PREPROCESSOR, SCORERS, TOKENIZER, digest, files_of, model_folder, network_of_folder, part_of_folder

CHUNK = 16  # pictures that go through a model at once
ROOM = 256 * 1024 * 1024  # bytes that a few pictures need on their way through a large one


class Scorer(ABC):
    """``ATTUNE_SCORER``. ComfyUI decides where its weights are, and may take the room for something else after every call.

    Attributes:
        name: for people, such as “clip: folder-name”.
        key: a short name of weights and settings together: another one means other scores.
        cosine: scores are cosines of a picture's and a text's vector, which CLIP-T and CLIP-IQA need.
        models: what to keep loaded beside a model that is scored while it samples (`ModelPatcher.set_additional_models`).
    """

    name: str
    key: str
    cosine: bool = False
    models: tuple[comfy.model_patcher.ModelPatcher, ...] = ()

    @abstractmethod
    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Every picture ``[B, h, w, 3]`` in [0, 1] against each of T texts: float32 ``[B, T]`` on the CPU, higher is better.

        Raises:
            ValueError: when the scorer cannot judge such pictures or texts.
        """

    def features(self, images: Tensor) -> Tensor:
        """A vector of length 1 for each picture ``[B, h, w, 3]``: float32 ``[B, D]`` on the CPU.

        Raises:
            ValueError: when the scorer has none.
        """
        raise ValueError(f"The scorer “{self.name}” only gives scores; connect CLIP Scorer, or Demo Scorer set to similarity.")

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by before a softmax, ``e^{logit scale}``. CLIP's own is the default."""
        return 100.0


# --- pictures and memory --------------------------------------------------------------------------------------------


def chunks(images: Tensor, size: int = CHUNK) -> Iterator[Tensor]:
    """The pictures as ``float32 [b, h, w, 3]`` in [0, 1], a few at a time; an alpha channel is left out.

    Raises:
        ValueError: for anything else than one or more pictures.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or not images.numel():
        raise ValueError(f"A scorer looks at pictures [B, h, w, 3], not at {list(images.shape)}: connect an IMAGE.")
    yield from images[..., :3].float().clamp(0, 1).split(size)


class _Held(nn.Module):
    """ComfyUI writes notes on a model; this takes them, because transformers' own classes do not let it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


def managed(network: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network in the hands of ComfyUI's model management."""
    device = comfy.model_management.text_encoder_device()
    away = comfy.model_management.text_encoder_offload_device()
    return comfy.model_patcher.ModelPatcher(_Held(network.eval().requires_grad_(False).to(away)), device, away)


def ready(patcher: comfy.model_patcher.ModelPatcher) -> tuple[Any, torch.device]:
    """The network, loaded to where it computes, and that device."""
    comfy.model_management.load_models_gpu([patcher], memory_required=ROOM, force_full_load=True)
    return patcher.model.network, patcher.load_device


# --- dual encoders --------------------------------------------------------------------------------------------------


class ClipScorer(Scorer):
    """Any model of transformers with ``get_image_features`` and ``get_text_features``: CLIP, SigLIP and their kin. Scores are cosines.

    Raises:
        ValueError: when the folder is missing, unsafe, incomplete or something else.
    """

    cosine = True
    who = "CLIP Scorer"

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        path = model_folder(SCORERS, name)
        config = part_of_folder(self.who, AutoConfig, path, "config.json")
        # Only a config of two towers: a large language model would be read for nothing.
        if not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
            raise ValueError(
                f"{self.who}: the folder “{name}” holds a model of type “{config.model_type}”, which has no encoders for both texts and "
                "pictures. Choose a CLIP or SigLIP model, whole and not only its vision or text half."
            )
        self.tokenizer = part_of_folder(self.who, AutoTokenizer, path, "tokenizer", TOKENIZER)
        self.preprocessor = part_of_folder(self.who, AutoImageProcessor, path, "preprocessor", PREPROCESSOR)
        network = network_of_folder(self.who, AutoModel, path, config, "a CLIP or SigLIP model")
        if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
            raise ValueError(
                f"{self.who}: the folder “{name}” holds a “{config.model_type}”, which cannot compare a picture with a text."
            )
        self.length = getattr(config.text_config, "max_position_embeddings", None)
        half = comfy.model_management.should_use_fp16(comfy.model_management.text_encoder_device())
        self.patcher = managed(network.to(torch.float16 if half else torch.float32))
        self.models = (self.patcher,)
        self.path, self.name = path, f"clip: {name}"

    @property
    def key(self) -> str:  # type: ignore[override]  # a large file takes a few seconds to read: only when asked for
        return digest(files_of(self.path), type(self).__name__)

    @property
    def scale(self) -> float:
        known = getattr(self.patcher.model.network, "logit_scale", None)
        return 100.0 if known is None else float(known.detach().float().exp())

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return cosines(self.features(images), self.text_features(texts))

    def features(self, images: Tensor) -> Tensor:
        out = []
        for part in chunks(images):
            network, device = ready(self.patcher)
            arrays = list((part.cpu() * 255).round().to(torch.uint8).numpy())
            out.append(self._vectors(network.get_image_features, self.preprocessor(images=arrays, return_tensors="pt"), device))
        return torch.cat(out)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """A vector of length 1 for each text: float32 ``[T, D]`` on the CPU. What is beyond the model's length is not read."""
        out = []
        for start in range(0, len(texts), 4 * CHUNK):
            network, device = ready(self.patcher)
            some = list(texts[start : start + 4 * CHUNK])  # SigLIP was trained with texts filled up to their full length
            tokens = self.tokenizer(some, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
            tokens.pop("token_type_ids", None)
            out.append(self._vectors(network.get_text_features, tokens, device))
        return torch.cat(out)

    def _vectors(self, encode: Any, inputs: Any, device: torch.device) -> Tensor:
        dtype = next(self.patcher.model.parameters()).dtype
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        with torch.no_grad():
            found = encode(**moved)
        found = getattr(found, "pooler_output", found)  # transformers 5 gives more than the vectors
        return F.normalize(found.float(), dim=-1).cpu()


class PreferenceScorer(ClipScorer):
    """What people would prefer: ``logit scale · cosine`` of a dual encoder tuned on choices (PickScore), or an MLP head on its vectors.

    The head is ``head.safetensors`` beside the encoder: linear layers ``layers.<n>.weight`` and ``.bias`` down to one number, on the
    picture's vector or on the picture's and the text's after one another. Its metadata may say ``activation`` (none, relu, gelu) and
    ``mean`` and ``std``, which its rewards are brought to 0 and 1 by.
    """

    cosine = False
    who = "Preference Scorer"

    def __init__(self, name: str):
        super().__init__(name)
        self.name = f"preference: {name}"
        self.head = head_of(self.path, self.who)
        config = self.patcher.model.network.config
        size = getattr(config, "projection_dim", None) or getattr(config.text_config, "projection_size", None)
        if self.head is not None and size:
            self.head.rewards(torch.zeros(1, size), torch.zeros(1, size))  # an error now rather than after sampling

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        seen, said = self.features(images), self.text_features(texts)
        return preference(seen, said, self.scale) if self.head is None else self.head.rewards(seen, said)


def head_of(path: Path, who: str) -> Head | None:
    """The ``head.safetensors`` of a model folder, if it has one.

    Raises:
        ValueError: when it cannot be used.
    """
    file_path = path / HEAD
    if not file_path.is_file():
        return None
    try:
        with safe_open(str(file_path), framework="pt") as file:
            state = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return Head.of(state, metadata)
    except Exception as error:
        raise ValueError(f"{who}: {HEAD} in “{path.name}” cannot be used: {error}") from None
