"""ComfyUI's own tokenizers and its ways of laying out contexts, with encoders that write down which token is where."""

from functools import cache
from importlib.util import find_spec
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


# --- encoders that are language models ---

PROMPTS_OF_VOCABULARY = "a red car and a firetruck under a zebra, ein größerer Stern, 一只红色的猫, blue green oil of Kyoto"


@cache
def spiece():
    """A small SentencePiece model with bytes for what it does not know, as Gemma's."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentences = iter([PROMPTS_OF_VOCABULARY, *PROMPTS_OF_VOCABULARY.split(" ")])
    quiet = {"byte_fallback": True, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=420,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        **quiet,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


class Mistral(comfy.sd1_clip.SDTokenizer):
    """FLUX.2's, in small: its vocabulary comes with the checkpoint. Bytes, a few longer tokens, and padding on the left."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        settings = {
            "pad_with_end": False,
            "has_end_token": False,
            "pad_to_max_length": False,
            "pad_token": 11,
            "pad_left": True,
        }
        settings |= {"max_length": 99999999, "min_length": 1, "embedding_size": 5120, "embedding_key": "mistral3_24b"}
        super().__init__("", tokenizer_class=Mistral, **settings)

    @staticmethod
    def from_pretrained(path):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        special = [
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[SYSTEM_PROMPT]",
            "[/SYSTEM_PROMPT]",
            *(f"<{i}>" for i in range(5)),
        ]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [
            ("Ġ", "a"),
            ("Ġ", "c"),
            ("Ġc", "a"),
            ("Ġca", "r"),
            ("Ġ", "r"),
            ("Ġr", "e"),
            ("Ġre", "d"),
            ("Ġ", "z"),
            ("e", "b"),
        ]
        vocabulary = [*special, *letters, *("".join(m) for m in merges)]
        inner = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
        inner.add_special_tokens([AddedToken(t, special=True) for t in special])
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=inner)


def language_model(name):
    """A CLIP of a family whose encoder is a language model: ComfyUI's tokenizer and its layout, with encoders that write down tokens."""
    from comfy.text_encoders import cosmos, flux, hunyuan_image, lumina2, omnigen2, pixart_t5, qwen_image, wan, z_image

    kinds = {
        "qwen_image": (qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel, {"qwen25_7b": True}),
        "z_image": (z_image.ZImageTokenizer, z_image.ZImageTEModel, {"qwen3_4b": True}),
        "flux2": (flux.Flux2Tokenizer, flux.Flux2TEModel, {"mistral3_24b": [10, 20, 30]}),
        "lumina2": (lumina2.LuminaTokenizer, lumina2.LuminaModel, {"gemma2_2b": True}),
        "hunyuan_image": (
            hunyuan_image.HunyuanImageTokenizer,
            hunyuan_image.HunyuanImageTEModel,
            {"qwen25_7b": True, "byt5_small": False},
        ),
        "omnigen2": (omnigen2.Omnigen2Tokenizer, omnigen2.Omnigen2Model, {"qwen25_3b": True}),
        "pixart": (pixart_t5.PixArtTokenizer, pixart_t5.PixArtT5XXL, {"clip_t5xxl": False}),
        "cosmos": (cosmos.CosmosT5Tokenizer, cosmos.CosmosT5XXL, {"clip_t5xxl": True}),
        "wan": (wan.WanT5Tokenizer, wan.WanT5Model, {"clip_umt5xxl": False}),
    }
    if name == "qwen_image21":
        from comfy.text_encoders import qwen_image21

        kinds[name] = (qwen_image21.QwenImage21Tokenizer, qwen_image21.QwenImage21TEModel, {"qwen3vl_8b": True})
    kind, model, parts = kinds[name]
    one = kind(tokenizer_data={"spiece_model": spiece(), "mistral3_24b_tokenizer_class": Mistral})
    whole = model.__new__(model)
    torch.nn.Module.__init__(whole)
    main = next(iter(parts))
    whole.clip, whole.clip_name = main, main.removeprefix("clip_")
    for part, layers in parts.items():
        setattr(whole, part, LanguageModel(layers))
    return SimpleNamespace(tokenizer=one, cond_stage_model=whole, tokenize=one.tokenize_with_weights)


LANGUAGE_MODELS = ("qwen_image", "z_image", "flux2", "lumina2", "hunyuan_image", "omnigen2", "pixart", "cosmos", "wan")
if find_spec("comfy.text_encoders.qwen_image21"):  # not in this version of ComfyUI otherwise
    LANGUAGE_MODELS += ("qwen_image21",)


class LanguageModel:
    """`Encoder` for these: some give an attention mask, and FLUX.2's several layers."""

    def __init__(self, layers):
        self.image_spans = []  # of pictures among the text
        self.layer, self.return_attention_masks = layers if isinstance(layers, list) else "last", bool(layers)

    def encode_token_weights(self, chunks):
        ids = torch.tensor([token for chunk in chunks for token, *_ in chunk])
        out = ids[None, :, None].expand(1, -1, 8).double()
        out = out[:, None].expand(1, 3, -1, -1) if isinstance(self.layer, list) else out
        extra = ({"attention_mask": torch.ones(1, len(ids))},) if self.return_attention_masks else ()
        return out, torch.zeros(1, 8), *extra
