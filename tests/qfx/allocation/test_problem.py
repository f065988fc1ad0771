from __future__ import annotations

import dataclasses

import pytest

from qfx import Format
from qfx.allocation.problem import Choice, Problem, Tile, ties_of
from qfx.analysis.units import Unit, units
from tests.qfx.analysis.models import prepared

U2, U4, I8 = (Format.parse(text) for text in ("u2/g16", "u4/g16", "i8/ch"))


def choice(unit: str, fmt: Format, size: int = 1, score: float = 1.0) -> Choice:
    return Choice(unit, fmt, size, score)


def three() -> dict[str, list[Choice]]:
    """Units a, b, c of 10 bytes a bit, each with two or three formats."""
    found = {n: [choice(n, f, 10 * f.bits, 4.0**-f.bits) for f in (U2, U4, I8)] for n in "abc"}
    found["c"] = found["c"][1:]
    return found


def test_tied_units_are_one_group_with_the_formats_of_all() -> None:
    problem = Problem(three(), ties=(("a", "b"), ("b", "c")))
    (group,) = problem.groups
    assert group.units == ("a", "b", "c")
    assert group.formats == (U4, I8)
    assert group.bytes.tolist() == [120, 240]
    assert group.score.tolist() == pytest.approx([3 * 4.0**-4, 3 * 4.0**-8])


def test_units_without_a_tie_keep_their_order() -> None:
    assert [group.units for group in Problem(three(), ties=(("c", "a"),)).groups] == [("a", "c"), ("b",)]


def test_a_group_across_layers_is_in_none() -> None:
    layers = {"a": "layers.0", "b": "layers.0", "c": "layers.1"}
    found = Problem(three(), ties=(("b", "c"),), layers=layers).groups
    assert [group.layer for group in found] == ["layers.0", ""]


def test_value_adds_up() -> None:
    size, score = Problem(three()).value({"a": U2, "b": U4, "c": I8})
    assert size == 140
    assert score == pytest.approx(4**-2 + 4**-4 + 4**-8)


def test_violations_say_what_is_not_kept() -> None:
    layers = dict.fromkeys("abc", "layers.0")
    problem = Problem(three(), (("a", "b"),), 1, layers, (Tile(("a", "b", "c"), 3),))
    assert problem.violations(dict.fromkeys("abc", U4)) == []
    found = problem.violations({"a": U2, "b": U4, "c": U4})
    assert found[0] == "a, b are tied and differ"
    assert found[1] == "layers.0 has 2 numbers of bits, 1 are allowed"
    assert found[2:] == [f"{n} units of a, ... are {f}: no multiple of 3" for n, f in ((1, U2), (2, U4))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": {"a": []}}, "unit 'a' has no format to choose from"),
        ({"choices": {"a": [choice("a", U2, 1, float("nan"))]}}, "format 'u2/g16' of unit 'a' has the score nan"),
        ({"choices": {"a": [choice("a", U2, -1)]}}, "-1 bytes"),
        ({"classes": 0}, "1 or more, found 0"),
        ({"ties": (("a", "x"),)}, "there is no unit 'x' to be tied"),
        ({"tiles": (Tile(("y",), 2),)}, "there is no unit 'y' to be tied"),
    ],
)
def test_bad_problems_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Problem(three()), **change)  # type: ignore[arg-type]


def test_ties_without_a_common_format_are_refused() -> None:
    found = {"a": [choice("a", U2)], "b": [choice("b", I8)]}
    with pytest.raises(ValueError, match=r"tied have no format in common[\s\S]*a: u2/g16; b: i8/ch"):
        _ = Problem(found, ties=(("a", "b"),)).groups


def heads(kv: int, query: int) -> list[Unit]:
    counts = {"q": query, "k": kv, "v": kv, "o": query}
    return [
        Unit(f"{r}{h}", r, r, "", (4, 8), int(r == "o"), 4 * h, 4 * h + 4, h, "attn")
        for r, n in counts.items()
        for h in range(n)
    ]


def test_ties_of_query_heads_that_share_a_kv_head() -> None:
    found = ties_of([*heads(2, 4), Unit("mlp", "mlp", "linear", "", (4, 4))], ["groups"])
    assert found == [("q0", "q1"), ("q2", "q3"), ("o0", "o1"), ("o2", "o3")]


def test_ties_of_a_fused_projection() -> None:
    assert ties_of(heads(1, 2), ["qkv"]) == [("q0", "q1", "k0", "v0")]
    assert ties_of(heads(2, 2), ["groups"]) == [], "each query head has its own"
    assert ties_of(heads(2, 2), []) == []


def test_ties_of_a_real_model_name_its_units() -> None:
    found, _, _ = units(prepared()[0])
    names = {unit.name for unit in found}
    ties = ties_of(found, ["groups"])
    assert ties and all(names.issuperset(tie) for tie in ties)
    assert {len(tie) for tie in ties} == {2}, "two query heads, one KV head"


def test_unknown_ties_are_refused() -> None:
    with pytest.raises(ValueError, match="ties are 'qkv' and 'groups', found 'gate'"):
        ties_of([], ["gate"])
