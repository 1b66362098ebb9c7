"""CLIP's tokens for the captions of a world, and the text tower's summary of them with gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Words:
    """CLIP's own BPE tokens for the grammar's sentences, one look-up a word (CLIP never joins words)."""

    LENGTH, START, END = 77, 49406, 49407

    def __init__(self) -> None:
        from comfy.sd1_clip import SD1Tokenizer

        self.tokenizer = SD1Tokenizer()
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """A sentence as LENGTH token numbers, padded with END as SD1 does."""
        out = [self.START]
        for word in text.split():
            if word not in self.known:
                chunk = self.tokenizer.tokenize_with_weights(word)["l"][0]
                self.known[word] = [t for t, _ in chunk if t not in (self.START, self.END)]
            out += self.known[word]
        if len(out) >= self.LENGTH:
            raise ValueError(f"longer than {self.LENGTH} tokens: {text}")
        return out + [self.END] * (self.LENGTH - len(out))

    def batch(self, texts: list[str]) -> Tensor:
        return torch.tensor([self.ids(t) for t in texts])


def encode(tower: nn.Module, tokens: Tensor) -> Tensor:
    """The text tower's projected summary of ``tokens [B, L]``, L up to the first END.

    Written out because ComfyUI's own forward asks for all 77 tokens and adds in place, which gradients do not survive.
    """
    from comfy.ldm.modules.attention import optimized_attention_for_device

    body = tower.text_model
    length = tokens.shape[1]
    x = body.embeddings.token_embedding(tokens) + body.embeddings.position_embedding.weight[:length]
    mask = torch.full((length, length), -torch.finfo(x.dtype).max, device=x.device).triu_(1)
    attention = optimized_attention_for_device(x.device, mask=True, small_input=True)
    for layer in body.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        x = x + layer.mlp(layer.layer_norm2(x))
    first_end = (tokens == Words.END).int().argmax(dim=1)
    return tower.text_projection(body.final_layer_norm(x)[torch.arange(len(x), device=x.device), first_end])
