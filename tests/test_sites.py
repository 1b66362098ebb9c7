"""Names of attention sites, and the grammar that selects heads."""

import families
import pytest

from attune.patches.attention import model_sites
from attune.patches.sites import check, select

EXPECTED = {
    "sd15": ("input.1.0 input.3.0 middle.0.0 output.0.0 output.1.0 output.2.0 output.3.0", ("self", "cross"), 4),
    "sdxl": (
        "input.3.0 input.3.1 middle.0.0 middle.0.1 output.0.0 output.0.1 output.1.0 output.1.1",
        ("self", "cross"),
        4,
    ),
    "sd3": ("joint.0 joint.1 joint.2", ("joint",), 3),
    "flux": ("double.0 double.1 single.0 single.1 single.2", ("joint",), 4),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_sites_in_order_of_execution(name):
    names, kinds, heads = EXPECTED[name]
    family, sites = model_sites(families.shared(name))
    assert family == {"sd15": "unet", "sdxl": "unet"}.get(name, name)
    assert [s.name for s in sites] == names.split()
    assert [s.layer for s in sites] == list(range(len(sites)))
    assert {s.kinds for s in sites} == {kinds} and {s.heads for s in sites} == {heads}


def test_sd35_medium_attends_twice_in_its_first_blocks():
    _, sites = model_sites(families.shared("sd35"))
    assert [s.kinds for s in sites] == [("joint", "self"), ("joint", "self"), ("joint",)]


def chosen(selection, name="sd15"):
    family, sites = model_sites(families.shared(name))
    return select(selection, sites, family)


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ("middle.0.0", "middle.0.0:0-3"),
        ("middle.0.0:0-1,3", "middle.0.0:0-1,3"),
        (
            "output.*.*:1 ; input.3.0:*\nmiddle.0.0:2",
            "input.3.0:0-3 middle.0.0:2 " + " ".join(f"output.{i}.0:1" for i in range(4)),
        ),
        ("output.1-2.0:3 output.2.0:0", "output.1.0:3 output.2.0:0,3"),
        ("L2H3 L0H0-1", "input.1.0:0-1 middle.0.0:3"),
        ("l1-2h0", "input.3.0:0 middle.0.0:0"),
        ("L2", "middle.0.0:0-3"),
    ],
)
def test_grammar(selection, text):
    heads = chosen(selection)
    assert heads.text == text
    assert chosen(heads.text) == heads


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("", "empty"),
        (" ;\n", "empty"),
        ("middle.1.0", "input.1.0, input.3.0, middle.0.0"),
        ("joint.1:0", "middle.0.0"),
        ("middle.0.0:4", "heads 0 to 3, not 4"),
        ("middle.0.0:2-9", "heads 0 to 3"),
        ("middle.0.0:3-1", "backwards"),
        ("middle.0.0:a", "not a number"),
        ("L7H0", "no layer L7.*L0 to L6"),
        ("L0-99H0", "no layer L7"),
    ],
)
def test_mistakes_are_explained(selection, words):
    with pytest.raises(ValueError, match=words):
        chosen(selection)


def test_heads_of_another_model_are_refused():
    family, sites = model_sites(families.shared("sd15"))
    for heads in (chosen("double.0:1", "flux"), chosen("middle.0.1", "sdxl")):
        with pytest.raises(ValueError, match="another model"):
            check(heads, sites, family)
    assert check(chosen("middle.0.0:1"), sites, family) == {"middle.0.0": (1,)}
