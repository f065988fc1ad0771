"""qfx.passes.quantize_attention: annotated attention becomes the op; what cannot is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qfx import annotation, graph, run
from qfx.errors import Note, UnsupportedError
from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.passes.annotate import annotate
from qfx.passes.normalize import normalize
from qfx.passes.quantize import quantize, refuse
from qfx.passes.quantize_attention import BY_HAND, SDPA, is_attention, numbers, way_of
from qfx.recipe import Recipe
from tests.graphs import Function, capture, counts, text
from tests.seeded import randn

BEFORE = """\
%inputs_0: f32[2,4,5,8] = input
%inputs_1: f32[2,2,7,8] = input
%inputs_2: f32[2,2,7,6] = input
%scaled_dot_product_attention: f32[2,4,5,6] = aten.scaled_dot_product_attention(%inputs_0, %inputs_1, \
%inputs_2, None, 0.0, True, enable_gqa=True)  # q=i8/tok k=i8 v=u8/head p=u8
return [%scaled_dot_product_attention]
"""
AFTER = """\
%inputs_0: f32[2,4,5,8] = input
%inputs_1: f32[2,2,7,8] = input
%inputs_2: f32[2,2,7,6] = input
%quantized_attention: f32[2,4,5,6] = qfx.quantized_attention(%inputs_0, %inputs_1, %inputs_2, None, \
None, [], [], [0.03125], [], [0.5, 0.25], [128, 7], 0.35355339059327373, True, 0.0, i8/tok, i8, u8/head, \
u8)  # q=i8/tok k=i8 v=u8/head p=u8
return [%quantized_attention]
"""
NAME = "scaled_dot_product_attention"
SCALES = {
    f"{NAME}/k_scale": torch.tensor(0.03125),
    f"{NAME}/v_scale": torch.tensor([0.5, 0.25]).reshape(2, 1, 1),
    f"{NAME}/v_zero": torch.tensor([128, 7], dtype=torch.uint8).reshape(2, 1, 1),
}
ASKED = {"target": "attention", "q": "i8/tok", "k": "i8", "v": "u8/head", "p": "u8"}


QKV = (randn(2, 4, 5, 8), randn(2, 2, 7, 8, seed=1), randn(2, 2, 7, 6, seed=2))


def sdpa(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def spelled(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def asked(gm: fx.GraphModule, **rule: Any) -> list[Note]:
    return [*annotate(gm, Recipe.parse({"rules": [{**ASKED, **rule}]})), *refuse(gm)]


def quantized(gm: fx.GraphModule, **tensors: Tensor) -> fx.GraphModule:
    run.run(gm, [lambda g: quantize(g, tensors={**SCALES, **tensors})])
    return gm


def test_the_text_before_and_after() -> None:
    gm = capture(Function(sdpa), *QKV)
    assert asked(gm) == []
    assert text(gm) == BEFORE
    assert text(quantized(gm)) == AFTER


def test_the_result_is_near_float() -> None:
    gm = capture(Function(sdpa), *QKV)
    asked(gm, k="i8/tok", v="i8/head/dyn")
    wanted = sdpa(None, *QKV)
    assert sqnr_db(wanted, quantized(gm)(*QKV)[0]) > 32


def test_spelled_out_attention_is_attention() -> None:
    given = (QKV[0], randn(2, 4, 7, 8, seed=1), randn(2, 4, 7, 6, seed=2))
    gm = capture(Function(spelled), *given)
    normalize(gm)
    (node,) = [n for n in gm.graph.nodes if is_attention(n)]
    assert way_of(node) == BY_HAND
    assert asked(gm, k="i8/tok", v="i8/dyn") == []
    name = graph.fqn_of(node)
    (new,) = [n for n in quantized(gm).graph.nodes if n.op == "call_function"]
    assert (graph.fqn_of(new), graph.op_name(new)) == (name, "quantized_attention")
    assert sqnr_db(spelled(None, *given), gm(*given)[0]) > 32


def test_names_stay_inside_modules() -> None:
    gm = capture(Function(lambda own, *x: own.inner(*x), inner=Function(sdpa)), *QKV)
    (node,) = [n for n in gm.graph.nodes if is_attention(n)]
    assert graph.fqn_of(node) == f"inner.{NAME}" and way_of(node) == SDPA
    asked(gm, k="i8/tok", v="i8/tok")
    (new,) = [n for n in quantized(gm).graph.nodes if n.op == "call_function"]
    assert graph.fqn_of(new) == f"inner.{NAME}"
    again = capture(Function(lambda own, *x: own.inner(*x), inner=Function(lambda own, *x: gm(*x)[0])), *QKV)
    (seen,) = [n for n in again.graph.nodes if n.op == "call_function"]
    assert graph.fqn_of(seen) == f"inner.{NAME}"


def test_attention_without_formats_stays() -> None:
    gm = capture(Function(sdpa), *QKV)
    assert not quantize(gm, tensors={})
    assert counts(gm) == {NAME: 1}


def test_a_scale_that_is_missing_is_named() -> None:
    gm = capture(Function(sdpa), *QKV)
    asked(gm)
    with pytest.raises(UnsupportedError, match=r"(?s)v_zero of 'scaled.*'u8/head'.*next step: calibrate.*'u8/tok'"):
        run.run(gm, [lambda g: quantize(g, tensors={k: t for k, t in SCALES.items() if not k.endswith("zero")})])
    assert numbers({}, "a", "p", Format.parse("u8")) == ([], [])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"k": "i8/g8/dyn"}, "scales of groups stand inside"),
    "channels": ({"v": "i8/ch"}, "scales of channels stand inside"),
    "short scales": ({"q": "i8/tok/f16"}, "scales in f32"),
    "tables": ({"q": "nf4/tok"}, "integers or 8-bit floats"),
    "weights by head": ({"p": "u8/head"}, "one fixed scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_attention_does_not_take_are_told(name: str) -> None:
    rule, reason = REFUSED[name]
    gm = capture(Function(sdpa), *QKV)
    (note,) = asked(gm, **rule)
    ((role, text_),) = rule.items()
    assert note.node == NAME and f"{role}={text_} was asked, but" in note.reason and reason in note.reason
    assert note.next_step == f"give role {role!r} another format"
    assert counts(quantized(gm)) == {NAME: 1}


OTHERS: dict[str, tuple[Any, tuple[Tensor, ...], str]] = {
    "dropout": (lambda own, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), QKV[:1] * 3, "dropout"),
    "3 dimensions": (lambda own, *x: F.scaled_dot_product_attention(*x), (QKV[0][0],) * 3, "4 dimensions, found 3"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_attention_of_another_kind_is_told(name: str) -> None:
    function, given, reason = OTHERS[name]
    gm = capture(Function(function), *given)
    (note,) = asked(gm)
    assert "q=i8/tok k=i8 v=u8/head p=u8 was asked, but" in note.reason and reason in note.reason
    assert "Recipe.ignore" in note.next_step
    assert counts(gm) == {NAME: 1} and not any(annotation.get(n) for n in gm.graph.nodes)


def test_columns_of_an_operand_are_refused() -> None:
    gm = capture(Function(sdpa), *QKV)
    (node,) = [n for n in gm.graph.nodes if is_attention(n)]
    node.meta["custom"] = {"qfx": {"k": {"columns": ["i8", "i4"]}}}
    (note,) = refuse(gm)
    assert "k=columns[i8,i4] was asked, but attention takes formats for q, k, v and p" in note.reason
