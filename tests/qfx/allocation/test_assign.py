from __future__ import annotations

import pytest

import qfx
from qfx import Format, annotation, graph
from qfx.allocation import assign
from qfx.allocation.predict import choices
from qfx.allocation.problem import Problem
from qfx.analysis.units import Unit, shape_of, units
from qfx.analysis.weights import Weights
from qfx.annotation import Columns
from qfx.plan import Plan
from tests.qfx.analysis.models import captured, causal, prepared

U2, U3, U4, I8 = (Format.parse(text) for text in ("u2/g16/f16", "u3/g16/f16", "u4/g16/f16", "i8/ch"))


def rows(*formats: Format) -> tuple[list[Unit], dict[str, Format]]:
    """Units of 8 rows of a weight of 32 columns, with these formats."""
    found = [Unit(f"w.q{i}", "w", "q", "", (8, 32), 0, 8 * i, 8 * i + 8, i, "a") for i in range(len(formats))]
    return found, {unit.name: fmt for unit, fmt in zip(found, formats, strict=True)}


def columns(*formats: Format) -> tuple[list[Unit], dict[str, Format]]:
    """Units of 24 columns of a weight of 8 rows, with these formats."""
    found = [Unit(f"w.o{i}", "w", "o", "", (8, 24), 1, 24 * i, 24 * i + 24, i, "a") for i in range(len(formats))]
    return found, {unit.name: fmt for unit, fmt in zip(found, formats, strict=True)}


def test_formats_are_those_of_annotations() -> None:
    assert assign.formats_of(*rows(U4, U3)) == {"w": (U4, U3)}
    assert assign.formats_of(*rows(U4, U4)) == {"w": U4}, "equal ones are one"
    assert assign.formats_of(*columns(U4, U3)) == {"w": Columns((U4, U3))}
    assert assign.formats_of([Unit("e", "e", "embedding", "", (9, 4))], {"e": I8}) == {"e": I8}


def test_shape_of_the_whole() -> None:
    assert shape_of(rows(U4, U4, U4)[0]) == (24, 32)
    assert shape_of(columns(U4, U4)[0]) == (8, 48)
    assert shape_of([Unit("e", "e", "experts", "", (4, 9, 6))]) == (4, 9, 6)


def test_bytes_are_those_of_what_is_stored() -> None:
    """Units apart are padded; side by side in one format they are not."""
    found, assignment = columns(U4, U4)
    together, apart = assign.nbytes(found, assignment), sum(unit.nbytes(U4) for unit in found)
    assert together == U4.nbytes((8, 48)) < apart
    found, assignment = columns(U4, U3)
    assert assign.nbytes(found, assignment) == U4.nbytes((8, 24)) + U3.nbytes((8, 24))


def test_bytes_of_a_model_are_those_of_its_report() -> None:
    found, _, _ = units(prepared()[0])
    own = [U2, U3, U4, I8]
    assignment = {unit.name: own[i % 4] for i, unit in enumerate(found)}
    model, _ = causal()
    recipe = {"rules": [{"target": t, "w": "i8/ch"} for t in ("linear", "embedding")]}
    made = qfx.plan(model, recipe)
    for fqn, formats in assign.formats_of(found, assignment).items():
        made.annotations[fqn]["w"] = annotation.to_json(formats)
    report = qfx.report(qfx.quantize(model, made))
    assert assign.nbytes(found, assignment) == sum(row.bytes_after for row in report)


def test_every_reader_is_annotated_on_graph_and_plan() -> None:
    gm, _, _ = captured(*causal("tied"))
    found, _, _ = units(gm)
    made = Plan.of(causal("tied")[0], qfx.Recipe.parse("w8a16"))
    assign.write(made, dict.fromkeys(("model.embed_tokens",), U4), Weights(gm, found).readers)
    assert made.annotations == {name: {"w": "u4/g16/f16"} for name in ("model.embed_tokens", "lm_head")}
    asked = {graph.fqn_of(node): annotation.get(node).get("w") for node in gm.graph.nodes if annotation.get(node)}
    assert asked == {"model.embed_tokens": U4, "lm_head": U4}


def filled(budget: int, **constraints: object) -> dict[str, Format]:
    found, assignment = columns(U3, U3, U3)
    scores = {unit.name: {str(f): 4.0**-f.bits * (1 + i) for f in (U3, U4)} for i, unit in enumerate(found)}
    problem = Problem(choices(found, {name: [U3, U4] for name in assignment}, scores), **constraints)  # type: ignore[arg-type]
    made = assign.fill(found, problem, assignment, budget)
    assert assign.nbytes(found, made) <= budget
    return made


def test_what_padding_leaves_is_spent() -> None:
    found, assignment = columns(U3, U3, U3)
    size = assign.nbytes(found, assignment)
    one = assign.nbytes(found, assignment | {"w.o2": U4})
    assert filled(size) == assignment
    assert filled(one - 1) == assignment
    assert filled(one) == assignment | {"w.o2": U4}, "that which gains most"
    assert set(filled(10**6).values()) == {U4}


def test_what_is_tied_is_spent_together() -> None:
    found, assignment = columns(U3, U3, U3)
    one = assign.nbytes(found, assignment | {"w.o2": U4})
    names = tuple(unit.name for unit in found)
    assert filled(one, ties=(names,)) == assignment
    assert set(filled(10**6, ties=(names,)).values()) == {U4}


def test_names_are_needed() -> None:
    found, assignment = rows(U4, U3)
    assignment.pop("w.q1")
    with pytest.raises(KeyError, match=r"w\.q1"):
        assign.formats_of(found, assignment)
