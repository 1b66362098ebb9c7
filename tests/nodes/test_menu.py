"""Where nodes are in the menu, and what they are found by."""

import dataclasses

import pytest
from comfy_api.latest import io

from attune import nodes
from attune.nodes.base import MENU, in_menu

EVERY = [node for node in vars(nodes).values() if isinstance(node, type) and issubclass(node, io.ComfyNode)]


@pytest.mark.parametrize("node", EVERY, ids=lambda node: node.__name__)
def test_every_node_is_in_a_submenu(node):
    category = node.define_schema().category
    assert category.startswith("Attune/") and category.partition("/")[2] in MENU


def test_aliases_are_given_where_the_editor_knows_them(monkeypatch):
    fields = {"search_aliases": dataclasses.field()}
    monkeypatch.setattr(io.Schema, "__dataclass_fields__", {**io.Schema.__dataclass_fields__, **fields})
    assert in_menu("Guidance", "PAG") == {"category": "Attune/Guidance", "search_aliases": ["PAG"]}
    monkeypatch.setattr(io.Schema, "__dataclass_fields__", {})
    assert in_menu("Guidance", "PAG") == {"category": "Attune/Guidance"}
