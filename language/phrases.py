"""The phrases of a prompt whose words belong together, each occurrence on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .grammar.reading import read
from .text import WORD, plain_text, starts_of, without_embeddings, word_key, word_keys
from .words import Phrase, Words


def fusable(words: Words) -> Words:
    """The same words with every occurrence of a phrase as a phrase of its own, and only those with several columns.

    Nouns that were found automatically are widened to their noun phrases: the words before them that say what they are like, without
    articles and numbers ("two big red fire trucks": big red fire trucks).

    Raises:
        RuntimeError: when noun phrases are wanted and spaCy is not installed.
    """
    places = _noun_phrases(words.text) if words.automatic else _written(words)
    parts = ([words.words[i] for i in members] for members in places)
    found = (joined(" ".join(m.text for m in members), members) for members in parts)
    return replace(words, phrases=tuple(p for p in found if any(len(c) > 1 for c in p.encoders.values())))


def joined(text: str, members: Sequence[Phrase]) -> Phrase:
    """Words as one phrase, written as ``text``."""

    def merged(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(sorted(set().union(*parts)))

    encoders = {n: merged(m.encoders[n] for m in members) for n in members[0].encoders}
    return Phrase(text, merged(m.columns for m in members), encoders)


def _written(words: Words) -> Iterator[list[int]]:
    """Every occurrence of the phrases that were asked for, as word numbers."""
    keys = [word_key(w.text) for w in words.words]
    for phrase in words.phrases:
        wanted = word_keys(plain_text(phrase.text))
        after = 0
        for i in starts_of(wanted, keys):
            if i >= after:
                after = i + len(wanted)
                yield list(range(i, after))


def _noun_phrases(text: str) -> Iterator[list[int]]:
    """The noun phrases of a prompt, as word numbers."""
    plain = plain_text(text)
    matches = list(WORD.finditer(plain))
    reading = read(without_embeddings(plain))
    for noun in reading.nouns:
        units = reading.units
        before = [i for modifier in noun.modifiers for i in modifier if noun.start <= i < noun.name.start]
        start, end = units[min(before, default=noun.name.start)].start, units[noun.end - 1].end
        members = [i for i, m in enumerate(matches) if start <= m.start() and m.end() <= end]
        if members:
            yield members
