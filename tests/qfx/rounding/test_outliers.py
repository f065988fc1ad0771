"""Input channels beyond a threshold stay in 16 bits: found, in both doors, saved, told, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Plan, QfxWarning, Recipe, annotation
from qfx.annotation import Outliers
from qfx.format import Format
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear
from qfx.live.segments import Segment, segments
from qfx.measuring.measure import sqnr_db
from tests.outliers import scale_channels

LOUD = [3, 4, 20]
I8, F16 = Format.parse("i8/ch"), Format.parse("f16")


class Block(nn.Module):
    """A norm, linears that read it, and one behind a tanh, whose inputs are small."""

    def __init__(self, factor: float = 100.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(64),
            nn.Linear(64, 48),
            nn.Linear(64, 48),
            nn.Linear(48, 64),
        )
        if factor != 1:
            readers = [self.up.weight, self.gate.weight]
            scale_channels([self.norm.weight, self.norm.bias], readers, torch.tensor(LOUD), factor)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        found: Tensor = self.down(torch.tanh(self.up(h)) * torch.sigmoid(self.gate(h)))
        return found


def rows(count: int = 40) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)


def planned(**fields: Any) -> Plan:
    return qfx.plan(Block().eval(), "int8-outliers", [rows()], **fields)


def test_outliers_are_found_and_recorded(tmp_path: Path) -> None:
    plan = planned()
    assert plan.annotations["up"] == {"x": "i8/tok", "w": {"outliers": LOUD, "kept": "f16", "rest": "i8/ch"}}
    assert plan.annotations["down"] == {"x": "i8/tok", "w": "i8/ch"}
    assert plan.sensitivities["outliers"] == {"up": 3, "gate": 3}
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert plan.formats("up")["w"] == Outliers(I8, F16, tuple(LOUD))


@torch.no_grad()
def test_the_error_is_that_of_a_model_without_outliers() -> None:
    x = rows()
    wanted = Block(1.0).eval()(x)
    assert float((Block().eval()(x) - wanted).abs().max()) < 1e-5, "the function in float is the same"
    asked: Any = ((Block(), "int8-outliers", [x]), (Block(1.0), "w8a8", [x]), (Block(), "w8a8", [x]))
    kept, without, hurt = (sqnr_db(wanted, qfx.quantize(m.eval(), recipe, data)(x)) for m, recipe, data in asked)
    assert kept > without - 1
    assert hurt < without - 12


@torch.no_grad()
def test_what_the_live_model_holds_and_computes() -> None:
    x = rows()
    float_model: Any = Block().eval()
    model: Any = qfx.quantize(Block().eval(), planned())
    assert isinstance(model.up, QuantMixed) and isinstance(model.down, QuantLinear)
    assert model.up.columns0_codes.shape == (48, 61) and model.up.columns0_codes.dtype == torch.int8
    assert model.up.columns1_codes.shape == (48, 3) and model.up.columns1_codes.dtype == torch.float16
    kept: Any = float_model.up.weight[:, LOUD]
    codes: Any = model.up.columns1_codes
    assert torch.equal(codes, kept.half())
    h = float_model.norm(x)
    others = [i for i in range(64) if i not in LOUD]
    from qfx.numerics import fake_quantize

    rest = fake_quantize(h[:, others], Format.parse("i8/tok"), activation=True)
    by_hand = rest @ fake_quantize(float_model.up.weight[:, others], I8).T + h[:, LOUD] @ kept.half().float().T
    assert torch.allclose(model.up(h), by_hand + float_model.up.bias, atol=1e-4)


@pytest.mark.parametrize("backend", ["onnx", "reference"])
@torch.no_grad()
def test_both_doors_compute_the_same(backend: str) -> None:
    x, plan = rows(), planned()
    live = qfx.quantize(Block().eval(), plan)
    options: dict[str, Any] = {"plan": plan, "backend": backend}
    torch._dynamo.reset()
    compiled: Any = torch.compile(Block().eval(), backend="qfx", options=options)
    both: Any = torch.compile(live, backend="qfx", options={"backend": backend})
    wanted = live(x)
    for found in (compiled(x), both(x)):
        assert sqnr_db(wanted, found) > (40 if backend == "onnx" else 90)
    report = {row.node: row.asked for row in qfx.report(compiled)}
    assert report["up"] == "x=i8/tok w=columns[i8/ch:61,f16:3]" == {r.node: r.asked for r in qfx.report(live)}["up"]
    torch._dynamo.reset()


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
@torch.no_grad()
def test_exported_to_onnx(tmp_path: Path, runtime: Any) -> None:
    x, plan = rows(), planned()
    file = tmp_path / "model.onnx"
    qfx.export_onnx(Block().eval(), (x,), file, plan=plan, runtime=runtime)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert sqnr_db(qfx.quantize(Block().eval(), plan)(x), torch.from_numpy(found)) > 40


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = qfx.quantize(Block().eval(), planned()), rows()
    qfx.save(model, tmp_path)
    loaded: Any = qfx.load(tmp_path, Block())
    assert torch.equal(loaded(x), model(x))
    assert loaded.up.segments[1].float_input and not loaded.up.segments[0].float_input
    assert [r.bytes_after for r in qfx.report(loaded)] == [r.bytes_after for r in qfx.report(model)]


def test_none_and_others_are_told() -> None:
    with pytest.warns(QfxWarning, match=r"no input channel of a linear exceeds 6: none is kept apart"):
        qfx.plan(Block(1.0).eval(), "int8-outliers", [rows()])
    static = Recipe.parse("w8a8-static").override(outliers=6.0)
    with pytest.warns(QfxWarning, match=r"3 of its input channels exceed 6, .* the scale of x=u8 is fixed"):
        plan = qfx.plan(Block().eval(), static, [rows()])
    assert plan.annotations["up"]["w"] == "i8/ch"


@torch.no_grad()
def test_a_layer_of_outliers_alone_stays_in_16_bits() -> None:
    x = rows() * 100
    plan = qfx.plan(nn.Linear(64, 8).eval(), "int8-outliers", [x])
    assert plan.annotations["weight"] == {"w": "f16"}
    torch.manual_seed(0)
    layer = nn.Linear(64, 8).eval()
    wanted = layer(x)
    plan = qfx.plan(layer, "int8-outliers", [x])
    assert sqnr_db(wanted, qfx.quantize(layer, plan)(x)) > 60


def test_segments_of_outliers() -> None:
    found = segments(Outliers(I8, F16, (0, 3, 4, 9)), (8, 10), "fc")
    assert found == [Segment(I8, ((1, 3), (5, 9))), Segment(F16, ((0, 1), (3, 5), (9, 10)), float_input=True)]
    assert segments(Outliers(I8, F16, ()), (8, 10), "fc") == [Segment(I8, ((0, 10),))]
    with pytest.raises(ValueError, match="'fc' has 10 input columns, no column 10"):
        segments(Outliers(I8, F16, (10,)), (8, 10), "fc")


def test_annotations_of_outliers() -> None:
    one = Outliers(I8, F16, (1, 5))
    assert annotation.from_json(annotation.to_json(one)) == one
    assert annotation.show(one) == "outliers[f16:2,i8/ch]" and annotation.each(one) == (I8, F16)
    for columns in ((3, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="ascending numbers"):
            Outliers(I8, F16, columns)
    with pytest.raises(ValueError, match="kept in f16, bf16 or f32, found 'i8/ch'"):
        Outliers(I8, I8, (1,))
    for bad in ({"outliers": "3", "kept": "f16", "rest": "i8"}, {"outliers": [1.5], "kept": "f16", "rest": "i8"}):
        with pytest.raises(ValueError, match="a list of numbers"):
            annotation.from_json(bad)
