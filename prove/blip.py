"""Judges that read a picture and a text together, with BLIP from a local folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scoring.folders import SCORERS, digest, files_of, model_folder, network_of_folder, part_of_folder
from ..scoring.scorers import head_of, managed, ready
from .judge import ALL, Judge
from .suites import Item


def first_token(config: Any) -> int:
    """BLIP's own mark of a text that is read with a picture; transformers' tokenizer writes BERT's instead."""
    text = config.text_config
    return int(text.bos_token_id) + 1 if int(text.bos_token_id) + 1 < text.vocab_size else int(text.bos_token_id)


def inputs_of(processor: Any, picture: Tensor, text: str, device: torch.device) -> Any:
    """What a network gets for ``[1, h, w, 3]`` and a text."""
    array = (picture[0, ..., :3].float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).numpy()
    return processor(images=array, text=text, truncation=True, max_length=LONGEST, return_tensors="pt").to(device)


def _read(network: Any, inputs: Any) -> Tensor:
    """A text's states ``[1, T, d]`` that have seen the picture."""
    seen = network.vision_model(pixel_values=inputs["pixel_values"])[0]
    return network.text_encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], encoder_hidden_states=seen, return_dict=True
    )[0]


LONGEST = 35  # tokens, as in T2I-CompBench and ImageReward


class Questions(Judge):
    """BLIP-VQA as in T2I-CompBench: “yes” against “no” to “a red apple?” for every thing, and the product of them.

    Its code asks about spaCy's noun chunks at 480×480; here things are those of the suite, and the size is what the folder says.
    """

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
            network_of_folder(who, _Kind(BlipForQuestionAnswering), path, config, "a BLIP for questions").float()
        )
        self.name, self.key = name, digest(files_of(path), "vqa yes or no")
        self.answers = [int(self.tokenizer(word, add_special_tokens=False)["input_ids"][0]) for word in ("yes", "no")]
        self.first = first_token(config)

    @torch.no_grad()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        if not item.things:
            return {}
        network, device = ready(self.patcher)
        found = {}
        for i, thing in enumerate(item.things, 1):
            inputs = inputs_of(self.processor, picture, f"{thing.phrase}?", device)
            inputs["input_ids"][:, 0] = self.first
            asked = _read(network, inputs)
            start = torch.full((1, 1), network.decoder_start_token_id, device=device)
            said = network.text_decoder(
                input_ids=start, encoder_hidden_states=asked, encoder_attention_mask=inputs["attention_mask"], return_dict=True
            )
            yes, no = said.logits[0, -1, self.answers].float().softmax(-1).tolist()
            found[f"thing {i}"] = yes / (yes + no)
        product = float(torch.tensor(list(found.values())).prod())
        return {ALL: product, **found}


class Matching(Judge):
    """ImageReward (arXiv 2304.05977): an MLP, ``head.safetensors``, on a text's first state; without one BLIP's own chance that both match."""

    def __init__(self, name: str, folder: str):
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BlipForImageTextRetrieval

        path, who = model_folder(SCORERS, folder), "BLIP reward"
        config = part_of_folder(who, AutoConfig, path, "config.json")
        if config.model_type != "blip":
            raise ValueError(
                f"{who}: the folder “{folder}” holds a model of type “{config.model_type}”; choose a BLIP for matching."
            )
        part_of_folder(who, AutoTokenizer, path, "tokenizer")
        self.processor = part_of_folder(who, AutoProcessor, path, "preprocessor")
        self.head, self.first = head_of(path, who), first_token(config)
        network = network_of_folder(who, _Kind(BlipForImageTextRetrieval), path, config, "a BLIP for matching")
        self.patcher = managed(network.float())
        self.name, self.key = name, digest(files_of(path), "reward")

    @torch.no_grad()
    def values(self, picture: Tensor, item: Item) -> dict[str, float]:
        network, device = ready(self.patcher)
        inputs = inputs_of(self.processor, picture, item.text, device)
        if self.head is None:
            inputs["input_ids"][:, 0] = self.first
        read = _read(network, inputs)[:, 0].float()
        if self.head is not None:
            return {ALL: float(self.head.rewards(read.cpu(), read.cpu())[0, 0])}
        return {ALL: float(network.itm_head(read).softmax(-1)[0, 1])}


class _Kind:
    """`network_of_folder` asks a class for a network of a config."""

    def __init__(self, kind: Any):
        self.kind = kind

    def from_config(self, config: Any, **_: Any) -> Any:
        return self.kind(config)
