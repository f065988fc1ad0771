from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from qfx import annotation
from qfx.annotation import Columns
from qfx.format import Format

I8 = Format.parse("i8/tok")
I4 = Format.parse("i4/g128")
FORMATS = st.sampled_from([Format.parse(t) for t in ("i8/tok", "i4/g128", "u8", "nf4/g64", "f32", "f4e2m1/g16/e4m3")])
SEVERAL = st.lists(FORMATS, min_size=1, max_size=4).map(tuple)
VALUES = st.one_of(FORMATS, SEVERAL)


def make_node() -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(torch.relu, (graph.placeholder("a"),))


def test_set_get_text() -> None:
    node = make_node()
    annotation.set(node, "w", I4)
    annotation.set(node, "x", I8)
    assert annotation.get(node) == {"x": I8, "w": I4}
    assert annotation.text(node) == "x=i8/tok w=i4/g128"
    assert node.meta["custom"]["qfx"] == {"x": "i8/tok", "w": "i4/g128"}


def test_no_annotation() -> None:
    node = make_node()
    assert annotation.get(node) == {}
    assert annotation.text(node) == ""
    annotation.clear(node)
    annotation.clear(node, "x")
    assert "custom" not in node.meta


def test_one_format_per_head() -> None:
    node = make_node()
    annotation.set(node, "k", [Format.parse("i8"), Format.parse("i4")])
    annotation.set(node, "v", Format.parse("i8"))
    assert annotation.get(node)["k"] == (Format.parse("i8"), Format.parse("i4"))
    assert annotation.text(node) == "k=[i8,i4] v=i8"


@given(st.dictionaries(st.sampled_from(annotation.ALL_ROLES), VALUES))
def test_round_trip_through_json(formats: dict[str, Format | tuple[Format, ...]]) -> None:
    node = make_node()
    for role, fmt in formats.items():
        annotation.set(node, role, fmt)
    node.meta = json.loads(json.dumps(node.meta))
    assert annotation.get(node) == formats
    assert list(annotation.get(node)) == [role for role in annotation.ALL_ROLES if role in formats]


@given(st.one_of(FORMATS, SEVERAL, SEVERAL.map(Columns)))
def test_formats_of_a_weight_come_back(formats: annotation.Formats) -> None:
    node = make_node()
    annotation.set(node, "w", formats)
    node.meta = json.loads(json.dumps(node.meta))
    assert annotation.get(node) == {"w": formats}
    assert annotation.from_json(json.loads(json.dumps(annotation.to_json(formats)))) == formats


def test_rows_and_columns_are_told_apart() -> None:
    node = make_node()
    annotation.set(node, "w", Columns((I8, I4)))
    assert annotation.text(node) == "w=columns[i8/tok,i4/g128]"
    assert node.meta["custom"]["qfx"] == {"w": {"columns": ["i8/tok", "i4/g128"]}}
    annotation.set(node, "w", (I8, I4))
    assert annotation.text(node) == "w=[i8/tok,i4/g128]" and annotation.get(node)["w"] != Columns((I8, I4))


def test_only_a_weight_has_columns() -> None:
    node = make_node()
    with pytest.raises(ValueError, match=r"(?s)role 'x' has no input columns.*columns\[i8/tok\].*%relu"):
        annotation.set(node, "x", Columns((I8,)))
    with pytest.raises(ValueError, match="at least one format"):
        Columns(())


def test_copied_nodes_share_nothing() -> None:
    node = make_node()
    annotation.set(node, "k", (I8, I4))
    copied = node.graph.node_copy(node, lambda n: n)
    assert copied.meta["custom"] is node.meta["custom"]  # fx copies shallowly: this is what `set` guards against
    annotation.set(copied, "x", I4)
    annotation.clear(copied, "k")
    assert annotation.get(node) == {"k": (I8, I4)}
    assert annotation.get(copied) == {"x": I4}


def test_lists_of_heads_are_not_shared() -> None:
    node = make_node()
    annotation.set(node, "k", (I8, I4))
    other = make_node()
    other.meta = copy.copy(node.meta)
    annotation.set(other, "x", I8)
    assert other.meta["custom"]["qfx"]["k"] is not node.meta["custom"]["qfx"]["k"]


def test_result_of_get_is_a_copy() -> None:
    node = make_node()
    annotation.set(node, "x", I8)
    annotation.get(node).clear()
    assert annotation.get(node) == {"x": I8}


def test_entries_of_others_stay() -> None:
    node = make_node()
    node.meta["custom"] = {"other": {"a": 1}}
    annotation.set(node, "x", I8)
    annotation.clear(node)
    assert node.meta["custom"] == {"other": {"a": 1}}


def test_survives_graph_copy() -> None:
    node = make_node()
    annotation.set(node, "x", I8)
    node.graph.output(node)
    copied = copy.deepcopy(fx.GraphModule({}, node.graph))
    assert [annotation.text(n) for n in copied.graph.nodes] == ["", "x=i8/tok", ""]


def test_clear_of_one_role() -> None:
    node = make_node()
    annotation.set(node, "x", I8)
    annotation.set(node, "w", I4)
    annotation.clear(node, "x")
    assert annotation.text(node) == "w=i4/g128"
    annotation.clear(node, "w")
    assert "custom" not in node.meta


def test_roles_of_kinds_are_known_roles() -> None:
    assert {role for roles in annotation.ROLES.values() for role in roles} == {*annotation.ALL_ROLES}


@pytest.mark.parametrize("role", ["weight", "X", "", "qfx"])
def test_unknown_role_is_refused(role: str) -> None:
    node = make_node()
    with pytest.raises(ValueError, match="unknown role"):
        annotation.set(node, role, I8)
    with pytest.raises(ValueError, match="unknown role"):
        annotation.clear(node, role)


@pytest.mark.parametrize("value", ["i8", ["i8"], [], (), None, 8])
def test_only_formats_are_taken(value: object) -> None:
    node = make_node()
    with pytest.raises(ValueError, match="takes a Format or one per head"):
        annotation.set(node, "x", value)  # type: ignore[arg-type]
    assert annotation.get(node) == {}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"x": "int8"}, "did you mean 'i8'"),
        ({"x": []}, "role 'x' cannot be read"),
        ({"x": 8}, "role 'x' cannot be read"),
        ({"x": [8]}, "role 'x' cannot be read"),
        ({"w": {"columns": []}}, "role 'w' cannot be read"),
        ({"w": {"columns": "i8"}}, "role 'w' cannot be read"),
        ({"w": {"rows": ["i8"]}}, "role 'w' cannot be read"),
        ({"w": {"columns": ["i8"], "rows": ["i8"]}}, "role 'w' cannot be read"),
        ({"w": {"columns": ["int8"]}}, "did you mean 'i8'"),
        ({"z": "i8"}, "unknown role"),
        (["x"], "no dictionary"),
    ],
)
def test_foreign_entries_are_refused_with_the_node(stored: object, message: str) -> None:
    node = make_node()
    node.meta["custom"] = {"qfx": stored}
    with pytest.raises(ValueError, match=message) as caught:
        annotation.get(node)
    assert "%relu" in str(caught.value)
