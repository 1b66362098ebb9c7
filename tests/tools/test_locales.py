"""The words of the nodes in every language: the frontend's translations, and the help pages."""

import re
from collections import Counter

import pytest

from attune.tools import locales
from attune.tools.runtime.setup import ROOT

LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
DOCS = ROOT / "web" / "docs"
NODES = locales.schemas()
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def page(node: str, language: str):
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def test_english_is_what_the_nodes_say():
    advice = "run: python3 run.py locales"
    assert locales.load("en", "nodeDefs") == NODES, advice
    assert locales.load("en", "settings") == locales.settings(), advice


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["nodeDefs", "settings"])
def test_a_language_says_everything(language, file):
    texts, english = (locales.leaves(locales.load(name, file)) for name in (language, "en"))
    assert texts.keys() == english.keys()
    assert all(text.strip() for text in texts.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_has_what_the_frontend_takes_for_markup(language):
    """vue-i18n reads | as the border of plural forms, {} as a place for a value, and @ as a link."""
    texts = locales.leaves(locales.load(language, "nodeDefs")) | locales.leaves(locales.load(language, "settings"))
    assert [place for place, text in texts.items() if re.search(r"[|{}@]", text)] == []


def test_chinese_is_chinese():
    """Every sentence; names may be those of methods."""
    texts = locales.leaves(locales.load("zh", "nodeDefs"))
    assert [
        place for place, text in texts.items() if place[-1] in ("description", "tooltip") and not CHINESE.search(text)
    ] == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_explains_every_input(node, language):
    text = page(node, language).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert language == "en" or CHINESE.search(text)
    missing = [name for name in NODES[node]["inputs"] if not re.search(rf"\*\*[^*]*\b{name}\b[^*]*\*\*", text)]
    assert missing == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_has_a_picture(node, language):
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page(node, language).read_text(encoding="utf-8"))
    assert pictures and all(
        (DOCS / path).is_file() for path in pictures
    )  # the frontend takes them from docs, in every language


@pytest.mark.parametrize("node", NODES)
def test_a_help_page_says_the_same_in_every_language(node):
    """The same parts in the same order, the same pictures, and every number of the English one (Chinese writes some words as numbers too)."""
    marks = re.compile(r"^(#+ |\s*- |\|[^-]|!\[|```|\d+\. )", re.MULTILINE)
    parts, numbers, pictures = {}, {}, {}
    for language in LANGUAGES:
        text = page(node, language).read_text(encoding="utf-8")
        blocks = re.split(r"\n\s*\n", text.strip())
        parts[language] = [marks.findall(block) for block in blocks]
        numbers[language] = Counter(re.findall(r"\d+(?:\.\d+)?", text))
        pictures[language] = re.findall(r"\]\(([^)]*)\)", text)
    for language in LANGUAGES:
        assert parts[language] == parts["en"] and pictures[language] == pictures["en"]
        assert numbers["en"] <= numbers[language]


def test_no_page_without_a_node():
    assert {path.stem for path in DOCS.glob("*.md")} == set(NODES)
    for language in set(LANGUAGES) - {"en"}:
        assert {path.parent.name for path in DOCS.glob(f"*/{language}.md")} == set(NODES)
