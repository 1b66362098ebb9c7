"""The worlds of the bundled models, so that whatever measures them need not know which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class World:
    """A bundled model, what it draws, and the reader that judges that; `WORLDS` makes them."""

    load: Callable[[], tuple[Any, Any, Any]]
    world: Any
    read: Callable[[Tensor], list[Any]]  # pictures to readings
    regions: Callable[[Tensor], list[Tensor]]  # pictures to each found thing's pixels
    judge: Callable[[Any, Any], Any]
    phrase: Callable[[Any], str]
    place: Callable[[Any], str]
    details: tuple[str, ...]
    bag_of_words: str

    def say(self, caption: Any, things: Sequence[Any]) -> Any:
        """A caption of other things in the same place."""
        text = " and ".join(self.phrase(t) for t in things) + self.place(caption)
        return replace(caption, text=text, things=tuple(things), relation=None)

    def bare(self, thing: Any) -> Any:
        return replace(thing, **dict.fromkeys(self.details))

    def verdicts(self, pictures: Tensor, captions: Sequence[Any]) -> list[Any]:
        return [self.judge(r, c) for r, c in zip(self.read(pictures), captions, strict=True)]


def stickers() -> World:
    """The world of stickers."""
    from .stickers import model, reader, world

    net = reader.load_reader()

    def place(caption: Any) -> str:
        return f" {world.place_phrase(caption.place, caption.style)}" if caption.place else ""

    return World(
        load=model.load,
        world=world,
        read=lambda pictures: reader.read(net, pictures),
        regions=lambda pictures: reader.regions(net, pictures),
        judge=reader.judge,
        phrase=world.phrase,
        place=place,
        details=("colour", "accessory", "style"),
        bag_of_words=model.metadata("text").get("bag_of_words", ""),
    )


def shapes() -> World:
    """The world of shapes."""
    from . import model, reader, world

    net = reader.load_reader()

    def phrase(thing: Any) -> str:
        words = " ".join(filter(None, (thing.colour, thing.pattern, thing.noun)))
        return ("an " if words[0] in "aeiou" else "a ") + words

    def place(caption: Any) -> str:
        words = " ".join(filter(None, caption.background[::-1]))
        return f" on a {words} wall" if words else ""

    return World(
        load=model.load,
        world=world,
        read=lambda pictures: reader.read(net, pictures),
        regions=lambda pictures: reader.regions(net, pictures),
        judge=reader.judge,
        phrase=phrase,
        place=place,
        details=("colour", "pattern"),
        bag_of_words="",
    )


WORLDS: Mapping[str, Callable[[], World]] = {"shapes": shapes, "stickers": stickers}
