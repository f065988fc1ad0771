"""qfx.ops.heads: attention whose heads have formats of their own is attention head by head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import qfx
import qfx.onnx
from qfx import run
from qfx.annotation import show
from qfx.backends.onnx import lower
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.live import attending
from qfx.measuring.measure import sqnr_db
from qfx.numerics import choose_qparams
from qfx.ops.attention import centre
from qfx.ops.heads import check, qparams, read, reason_against, shares
from qfx.passes.annotate import annotate
from qfx.passes.quantize import quantize, refuse
from qfx.recipe import Recipe
from tests.backends.onnx.checks import traced
from tests.graphs import Function, capture
from tests.qfx.live.test_attending import Net, X, ran, recipe
from tests.qfx.ops.test_attention import HOW, attend, qkv
from tests.seeded import randn

LISTS = "q=[i8/tok,f16,i8/tok,i8/tok] k=[i8/dyn,f8e4m3/tok] v=[u8/tok,f32] p=[u8,u8/tok]"
TEXTS = st.sampled_from(["i8/tok", "u8/dyn", "f16", "f8e4m3/tok"])


def one_by_one(operands: list[Tensor], formats: str, **how: Any) -> Tensor:
    """Each query head alone, in the formats of its own."""
    given: dict[str, str] = dict(word.split("=") for word in formats.split())
    q, k, v = operands
    heads, own = q.shape[1], k.shape[1]
    found = []
    for h in range(heads):
        g = h * own // heads
        texts = []
        for role, text in given.items():
            each = text.strip("[]").split(",")
            texts.append(f"{role}={each[h if len(each) == heads else g] if len(each) > 1 else text}")
        one = dict(how)
        if one.get("mask") is not None and one["mask"].dim() == 4 and one["mask"].shape[1] > 1:
            one["mask"] = one["mask"][:, h : h + 1]
        if one.get("sinks") is not None:
            one["sinks"] = one["sinks"][h : h + 1]
        found.append(attend(q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], formats=" ".join(texts), **one))
    return torch.cat(found, 1)


@pytest.mark.parametrize("how", ["plain", "float mask", "ALiBi", "everything"])
def test_it_is_attention_head_by_head(how: str) -> None:
    found = attend(*qkv(), formats=LISTS, **HOW[how])
    assert torch.allclose(found, one_by_one(qkv(), LISTS, **HOW[how]), atol=1e-6)
    other = attend(*qkv(), formats=LISTS.replace("k=[i8/dyn,f8e4m3/tok]", "k=[f8e4m3/tok,i8/dyn]"), **HOW[how])
    assert not torch.allclose(found, other, atol=1e-6)  # negative control: the order of the heads counts


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]))
def test_every_head_stands_in_one_share_with_its_own_formats(data: st.DataObject, sizes: tuple[int, int]) -> None:
    heads, own = sizes
    counts = (heads, own, own, data.draw(st.sampled_from(sizes)))
    lists = [data.draw(st.lists(TEXTS, min_size=n, max_size=n)) for n in counts]
    asked = [tuple(Format.parse(text) for text in texts) for texts in lists]
    found = shares(asked, heads, own)
    assert sorted(h for share in found for h in share.heads) == list(range(heads))
    assert len({share.formats for share in found}) == len(found)
    for share in found:
        times = len(share.heads) // len(share.own)
        for at, head in enumerate(share.heads):
            assert share.own[at // times] == head * own // heads
            rows = (head, share.own[at // times], share.own[at // times], head * len(asked[3]) // heads)
            types = [fmt.type for fmt in share.formats if fmt is not None]
            assert types == [formats[row].type for formats, row in zip(asked, rows, strict=True)]


def test_scales_are_those_of_each_head() -> None:
    x = randn(2, 4, 5, 8) * torch.tensor([1.0, 8.0, 0.1, 3.0]).reshape(1, 4, 1, 1) + 1
    formats = tuple(Format.parse(text) for text in ("i8", "u4/head", "f16", "i8/tok"))
    ends = x.amin((0, 2, 3)).reshape(4, 1, 1), x.amax((0, 2, 3)).reshape(4, 1, 1)
    found = qparams("v", formats, lambda fmt: ends)
    assert found.zero is not None and found.scale.shape == found.zero.shape == (4, 1, 1)
    for head, text in ((0, "i8"), (1, "u4")):
        alone = choose_qparams(x[:, head], Format.parse(text))
        assert found.scale[head].item() == alone.scale.item()
        assert found.zero[head].item() == (0 if alone.zero is None else alone.zero.item())
    assert found.scale[2:].eq(1).all() and found.zero[2:].eq(0).all()
    shared = qparams("q", formats[:2], lambda fmt: ends).scale.flatten()  # query heads 0, 1 and 2, 3 have one format
    assert shared[0] == found.scale[0] and shared[1] != found.scale[1]
    assert qparams("k", formats[:1], lambda fmt: ends).zero is None


def test_texts_are_read_back() -> None:
    for text in ("", "i8/tok", "[i8/tok,f8e4m3/head]", "[f16]"):
        given = read(text)
        assert (show(given) if given is not None else "") == text


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "k": ("k=[i8/tok,i8/tok,i8/tok]", {}, r"(?s)other heads: k.*expected: 2 formats, one for each head.*found: 3"),
    "q": ("q=[i8/tok]", {}, "expected: 4 formats, one for each query head, or 2, one for each head of keys"),
    "a scale of all": ("q=i8/dyn k=[i8/tok,f16]", {}, "q=i8/dyn would need all heads at once; write q=i8/head/dyn"),
    "weights": ("p=[u8,u8/dyn]", {}, "one fixed scale"),
    "no scales": ("k=[i8,i8/tok]", {}, r"k=\[i8,i8/tok\] has not the scales"),
    "few scales": ("k=[i8,i8/tok]", {"k": ([1.0], [])}, r"expected: 2 scale\(s\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_lists_are_refused(name: str) -> None:
    formats, steps, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        attend(*qkv(), formats=formats, steps=steps)


def test_heads_that_a_plan_does_not_know_are_an_error() -> None:
    def asked(**rule: Any) -> fx.GraphModule:
        gm = capture(Function(lambda own, *x: attend_float(*x)), *qkv(5, 5))
        annotate(gm, Recipe.parse(recipe({"target": "attention", **rule})))
        assert refuse(gm) == []
        run.run(gm, [lambda g: quantize(g, tensors={})])
        return gm

    def attend_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert "[i8/tok,f16]" in str(asked(k=["i8/tok", "f16"]).code)
    with pytest.raises(ValueError, match=r"(?s)attention scaled_dot.* has formats for other heads: v.*found: 3"):
        asked(v=["i8/tok"] * 3)
    check({"q": (Format("f16"),) * 4, "k": Format("i8")}, 4, 2, "x")
    assert reason_against({"q": Format.parse("i8/dyn"), "k": Format.parse("i8")}) is None
    moved = recipe({"target": "attention", "k": ["i8/tok"] * 4}) | {"rewrites": ["permute-heads"]}
    with pytest.raises(ValueError, match=r"(?s)lists formats by heads, and the recipe gives heads.*'permute-heads'"):
        qfx.plan(Net(), moved, data=[X])


STATIC = {"target": "attention", "q": "i8/tok", "k": ["i8", "i8/tok", "f16", "u8"], "v": "i8/head", "p": "u8/tok"}


def test_a_plan_carries_lists_to_every_place(tmp_path: Path) -> None:
    """Calibrated, saved as JSON and safetensors, read back, in a live model, its report, its file, and compiled."""
    net: Any = Net().eval()
    wanted, name = ran(net, X), "layers.0.scaled_dot_product_attention"
    plan = qfx.plan(net, recipe(STATIC), data=[X])
    assert plan.annotations[name]["k"] == STATIC["k"]
    keys = net.layers[0].qkv(X).chunk(3, -1)[1].view(2, 16, 4, 8).transpose(1, 2)
    centred = centre(keys)[0]
    assert plan.tensors[f"{name}/k_scale"][0].item() == pytest.approx(centred[:, 0].abs().max().item() / 127)
    zeros = plan.tensors[f"{name}/k_zero"].flatten().tolist()
    assert zeros[:3] == [0, 0, 0] and zeros[3] != 0
    plan.save(tmp_path / "plan")
    plan = qfx.Plan.load(tmp_path / "plan")
    model = qfx.quantize(Net().eval(), plan)
    found = ran(model, X)
    assert 35 < sqnr_db(wanted, found) < 80
    (row, _) = (row for row in qfx.report(model) if row.op == "attention")
    assert row.asked == "q=i8/tok k=[i8,i8/tok,f16,u8] v=i8/head p=u8/tok"
    qfx.save(model, tmp_path / "model")
    assert torch.equal(ran(qfx.load(tmp_path / "model", Net().eval()), X), found)
    options: Any = {"plan": plan}
    with warnings.catch_warnings():  # of heads whose products are of floats
        warnings.simplefilter("ignore", QfxWarning)
        assert sqnr_db(found, ran(torch.compile(Net().eval(), backend="qfx", options=options), X)) > 40
        qfx.export_onnx(Net().eval(), (X,), tmp_path / "file.onnx", plan=plan)
    file: Any = qfx.onnx.load(tmp_path / "file.onnx")
    (exported,) = file(x=X).values()
    assert sqnr_db(found, exported) > 40
    other = torch.nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match="no module 'layers.0'"):
        attending.check(other, attending.specs_of(model))


@pytest.mark.parametrize("how", ["everything", "ALiBi"])
def test_onnx_runtime_gives_the_reference(how: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, formats=LISTS, **HOW[how])

    given = qkv(5, 7)
    found = lower(traced(function, given), strict=True)(*given)[0]
    assert sqnr_db(function(*given), found) > 50
