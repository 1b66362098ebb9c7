"""Model folders in transformers' layout with very small random models in them."""

from __future__ import annotations

import torch

WORDS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "red", "star", "cat", "photo", "of", "good", "bad", ".")


def tiny_tokenizer(length):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **names)


def tiny_model(kind):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        return CLIPModel(config), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    config = SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)
    return SiglipModel(config), SiglipImageProcessor(size={"height": 32, "width": 32})


def tiny_folder(path, kind="clip", pieces=("model", "tokenizer", "preprocessor")):
    network, preprocessor = tiny_model(kind)
    if "model" in pieces:
        with torch.no_grad():  # random encoders of 16 numbers all look one way: spread them out
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
        network.save_pretrained(path)
    if "tokenizer" in pieces:
        tiny_tokenizer(12).save_pretrained(path)
    if "preprocessor" in pieces:
        preprocessor.save_pretrained(path)
    return path
