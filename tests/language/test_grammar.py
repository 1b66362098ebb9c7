"""The grammar of prompts: what its rooms promise each other, and that its work grows with the prompt's length alone."""

import sys

import pytest

from attune.language.decompose import LONGEST, decompose
from attune.language.grammar import reading
from attune.language.grammar.details import Detail
from attune.language.grammar.modifiers import modifiers_of
from attune.language.grammar.noun_phrases import parse
from attune.language.grammar.units import Sentence, Unit, units_of


def sentence(text: str) -> Sentence:
    return Sentence(units_of(text))


def steps(work, *arguments) -> int:
    """How many lines of the pack's language code are run."""
    count = 0

    def inside(frame, event, argument):
        nonlocal count
        count += event == "line"
        return inside

    def calls(frame, event, argument):
        return inside if ".language." in frame.f_globals.get("__name__", "") else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        work(*arguments)
    finally:
        sys.settrace(before)
    return count


REPEATED = [
    "red ",
    "red, ",
    "dog that ",
    "hat of gold of ",
    "cat on a mat wearing a hat on ",
    "cat in shades of red, ",
    "a red car, ",
]
REPEATED += ["cat is red and ", "old oil painting style ", "cat, black and "]


@pytest.mark.parametrize("words", REPEATED)
def test_the_work_grows_with_the_length(words):
    reading.read("a cat")  # spaCy is loaded
    few, many = (steps(reading.read, words * n) for n in (200, 600))
    assert 0 < many < 3.6 * few  # the square would be 9


@pytest.mark.parametrize("words", ["red ", "a red car, ", "cat, black and ", "cat is red and "])
@pytest.mark.parametrize("granularity", ["subject", "attribute"])
def test_the_longest_prompt_is_taken_apart_or_refused_in_few_steps(words, granularity):
    def work():
        try:
            decompose((words * LONGEST)[:LONGEST], granularity)
        except ValueError as error:
            assert "branches" in str(error)

    assert steps(work) < 6_000_000


def test_the_reading_does_not_change():
    found = reading.read("a red dog with sunglasses and a blue cat")
    assert found == reading.read("a red dog with sunglasses and a blue cat") and hash(found.details)
    for whole in (found, found.units[0], found.nouns[0], found.details[0]):
        with pytest.raises(AttributeError):
            whole.units = ()


def test_units_beyond_the_text_are_nothing():
    s = sentence("a dog")
    assert (s.low(-1), s.pos(2), s.looks(99), s.nominal(-5), s.closes(7)) == ("", "", False, False, False)
    assert s[2] == Unit("", -1, -1, "", "")


def test_an_and_between_two_phrases_goes_with_both():
    found = reading.read("a man wearing a hat and holding a cane")
    words = [u.text for u in found.units]
    assert [[words[i] for i in d.units] for d in found.details] == [["wearing", "a", "hat"], ["holding", "a", "cane"]]
    assert found.needs[words.index("and")] == {0, 1}
    assert [" ".join(words[i] for i in reading.shown(found, {d})) for d in (0, 1)] == [
        "a man wearing a hat",
        "a man holding a cane",
    ]


def test_modifiers_and_the_commas_between_them():
    s = sentence("a big, light blue and red striped car")
    (noun,) = parse(s).nouns
    assert [[s.low(i) for i in m] for m in noun.modifiers] == [["big"], ["light", "blue", "and", "red", "striped"]]
    assert noun.links == {2: (0, 1)} and modifiers_of(s, 1, noun.name[0]) == (noun.modifiers, noun.links)


def test_rules_take_turns():
    """A phrase that another rule has taken is no detail once more."""
    found = reading.read("a cat, black and fluffy, wearing a hat, in the style of Monet, highly detailed")
    taken = [i for d in found.details for i in d.units]
    assert len(taken) == len(set(taken)) and all(isinstance(d, Detail) and d.nouns for d in found.details)
