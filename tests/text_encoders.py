"""ComfyUI's own tokenizers and its ways of laying out contexts, with encoders that write down which token is where."""

from functools import cache
from types import SimpleNamespace

import comfy.sd1_clip
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLClipModel, SDXLRefinerClipModel, SDXLTokenizer
from comfy.text_encoders.flux import FluxClipModel, FluxTokenizer
from comfy.text_encoders.sd3_clip import SD3ClipModel, SD3Tokenizer

WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}
FAMILIES = {
    "sd15": (SD1Tokenizer, comfy.sd1_clip.SD1ClipModel, ("clip_l",)),
    "sdxl": (SDXLTokenizer, SDXLClipModel, ("clip_l", "clip_g")),
    "refiner": (SDXLTokenizer, SDXLRefinerClipModel, ("clip_g",)),
    "sd3": (SD3Tokenizer, SD3ClipModel, ("clip_l", "clip_g", "t5xxl")),
    "sd3 without t5": (SD3Tokenizer, SD3ClipModel, ("clip_l", "clip_g")),
    "sd3 without g": (SD3Tokenizer, SD3ClipModel, ("clip_l", "t5xxl")),
    "sd3 t5 only": (SD3Tokenizer, SD3ClipModel, ("t5xxl",)),
    "flux": (FluxTokenizer, FluxClipModel, ("clip_l", "t5xxl")),
}


class Encoder:
    """In place of a text encoder with weights: writes each token's id into the first channel of its column."""

    def __init__(self, width):
        self.width = width
        table = SimpleNamespace(weight=torch.empty(1, width))
        self.transformer = SimpleNamespace(get_input_embeddings=lambda: table)

    def encode_token_weights(self, chunks):
        ids = []
        for chunk in chunks:
            kept = [t if isinstance(t, int) else -2 for t, *_ in chunk if isinstance(t, int) or t.shape[-1] == self.width]
            ids += kept + [-1] * (len(chunk) - len(kept))
        out = torch.zeros(1, len(ids), self.width)
        out[0, :, 0] = torch.tensor(ids)
        return out, torch.zeros(1, self.width)


@cache
def tokenizer(kind, folder=None):
    return kind(embedding_directory=folder)


def make(name, folder=None):
    """A CLIP with ComfyUI's tokenizers and its own way of putting the encoders' outputs together."""
    kind, model, parts = FAMILIES[name]
    whole = model.__new__(model)
    torch.nn.Module.__init__(whole)
    whole.clip_name, whole.clip, whole.t5_attention_mask = parts[0][-1], parts[0], False
    for part in ("clip_l", "clip_g", "t5xxl"):
        if part in parts or "sd3" in name:
            setattr(whole, part, Encoder(WIDTHS[part]) if part in parts else None)
    one = tokenizer(kind, folder)
    return SimpleNamespace(tokenizer=one, cond_stage_model=whole, tokenize=one.tokenize_with_weights)
