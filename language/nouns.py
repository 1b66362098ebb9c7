"""The nouns of a text."""

from __future__ import annotations

from .english import english


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
