"""Where a prompt's characters are among tokens inside a template, by the tokens' own letters: for encoders that are language models.

Nothing has to be known of the template: the tokens of the prompt and those of an empty prompt tell where the prompt begins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Literal

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes as (GPT-2's table): printable ones as they are, the rest from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _bytes(piece: str, byte_level: bool) -> bytes:
    """What a token stands for."""
    table = _bytes_of_letters()
    if byte_level and all(c in table for c in piece):
        return bytes(table[c] for c in piece)
    if match := _BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def letters(numbers: Sequence[int], vocabulary: Mapping[int, str]) -> list[tuple[str, tuple[int, ...]]]:
    """The letters that tokens stand for, without white space, each with the tokens that it is made of.

    Raises:
        KeyError: for a token that is not in the vocabulary.
    """
    byte_level = "Ġ" in vocabulary.values()
    whole = [(byte, i) for i, number in enumerate(numbers) for byte in _bytes(vocabulary[number], byte_level)]
    out: list[tuple[str, tuple[int, ...]]] = []
    at = 0
    for char in bytes(byte for byte, _ in whole).decode(errors="replace"):
        size = len(char.encode())
        if char == "\ufffd":  # half a letter
            size = 1
        if not char.isspace():
            out.append((char, tuple(sorted({i for _, i in whole[at : at + size]}))))
        at += size
    return out


Form = Literal["", "NFC", "NFKC"]


def _normal(text: str, form: Form) -> Iterator[tuple[str, int]]:
    """The letters of a text as an encoder may write them, without white space, each with the character it came from."""
    for cluster in re.finditer(r"[^\u0300-\u036f][\u0300-\u036f]*|[\u0300-\u036f]+", text, re.DOTALL):
        written = unicodedata.normalize(form, cluster.group()) if form else cluster.group()
        alike = written == cluster.group()
        for i, char in enumerate(written):
            if not char.isspace():
                yield char, cluster.start() + (i if alike else 0)


def places(
    text: str, numbers: Sequence[int], empty: Sequence[int], vocabulary: Mapping[int, str]
) -> list[tuple[int, tuple[int, ...]]] | None:
    """The tokens of each character of a text, white space left out; None when the tokens are not of this text.

    Args:
        numbers: tokens of the text in its template.
        empty: tokens of the template alone.
        vocabulary: each token as its tokenizer writes it.
    """
    found = letters(numbers, vocabulary)
    around = "".join(c for c, _ in letters(empty, vocabulary))
    whole = "".join(c for c, _ in found)
    forms: tuple[Form, ...] = ("", "NFC", "NFKC")
    for form in forms:
        own = list(_normal(text, form))
        written = "".join(c for c, _ in own)
        for template in (around, ""):  # a text that brings a template of its own
            start = _start(whole, written, template)
            if start is not None:
                return [(place, found[start + i][1]) for i, (_, place) in enumerate(own)]
    return None


def _start(whole: str, inner: str, template: str) -> int | None:
    """Where ``inner`` has been put into ``template`` to make ``whole``."""
    if len(whole) != len(inner) + len(template):
        return None
    for start in range(len(template) + 1):
        if whole.startswith(inner, start) and whole[start + len(inner) :] == template[start:]:
            return start if whole[:start] == template[:start] else None
        if start < len(template) and whole[start] != template[start]:
            return None
    return None
