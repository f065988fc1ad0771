"""Double quantization: scales in 8 bits, their bytes, and weights that have them in every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx import Recipe, Rule
from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.packing import pack_weight
from qfx.rounding import nested
from qfx.rounding.nearest import round_weight

DQ = Format.parse("nf4/g64/dq")


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def test_the_table_is_that_of_the_dynamic_type() -> None:
    table = nested.dynamic_map()
    assert len(table) == len(table.unique()) == 256 and bool((table.diff() > 0).all())
    assert float(table[-1]) == 1.0 and float(table[127]) == 0.0
    assert float(table[0]) == pytest.approx(-(0.1 + 0.9 * 63.5 / 64)) and float(table[128]) == pytest.approx(5.5e-7)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 700), seed=st.integers(0, 99))
def test_scales_come_back_near(count: int, seed: int) -> None:
    scale = weight(count, seed=seed).abs()
    whole = nested.above(scale)
    assert whole.shape == (1 + -(-count // 256),) and whole.dtype == torch.float32
    codes = nested.encode(scale, whole)
    assert codes.dtype == torch.uint8 and codes.shape == scale.shape
    back = nested.decode(codes, whole)
    near = whole[1:].repeat_interleave(256)[:count] * 0.0071  # half of the widest step, 0.9 / 64
    assert bool(((back - scale).abs() <= near + 1e-7).all())
    assert torch.equal(nested.encode(back, whole), codes)


@pytest.mark.parametrize("text", ["nf4/g64/dq", "nf4/g32/dq", "f4e2m1/g32/dq", "i4/g64/dq", "i8/ch/dq", "nf4/b2x64/dq"])
def test_a_weight_loses_little_by_it_and_bytes_are_counted(text: str) -> None:
    w = weight(96, 320)
    double = pack_weight(w, Format.parse(text))
    plain = pack_weight(w, Format.parse(text.removesuffix("/dq")))
    assert double.scale.dtype == torch.uint8 and double.scale.shape == plain.scale.shape
    assert double.zero is not None and double.zero.dtype == torch.float32
    count = plain.scale.numel()
    assert double.nbytes == Format.parse(text).nbytes(w.shape) == plain.nbytes - 3 * count + 4 * (1 + -(-count // 256))
    assert sqnr_db(w, double.dequantize()) > sqnr_db(w, plain.dequantize()) - 0.5


def test_text_and_bad_combinations() -> None:
    assert str(DQ) == "nf4/g64/dq" and DQ.nested and DQ.has_global_scale and not DQ.by_row
    assert not Format.parse("nf4/g64").nested
    for bad in ("u4/g64/dq", "nf4/dq", "i8/tok/dq", "i8/head/dq"):
        with pytest.raises(ValueError, match="bad format"):
            Format.parse(bad)
    with pytest.raises(ValueError, match=r"write 'nf4/g64/dq'"):
        Format("u4", "g64", "dq")
    with pytest.raises(ValueError, match="did you mean 'nf4/g64/dq'"):
        Format.parse("nf4/g64/double")


def test_zero_rows_and_bad_values() -> None:
    w = weight(8, 128)
    w[3] = 0
    assert bool((pack_weight(w, DQ).dequantize()[3] == 0).all())
    assert bool((pack_weight(torch.zeros(4, 64), DQ).dequantize() == 0).all())
    w[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"(?s)'fc'.*not finite"):
        pack_weight(w, DQ, name="fc")


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_searched_scales_stay_in_their_codes(method: str) -> None:
    w = weight(32, 256, seed=1)
    found = round_weight(w, DQ, method, name="w")
    assert found.scale.dtype == torch.uint8
    near = pack_weight(w, DQ)
    power = 2 if method == "mse" else 1
    assert float((found.dequantize() - w).abs().pow(power).sum()) < float(
        (near.dequantize() - w).abs().pow(power).sum()
    )


class Model(nn.Module):
    """An embedding and linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(40, 128), nn.Linear(128, 96), nn.Linear(96, 40)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.down(torch.tanh(self.up(self.table(ids))))
        return found


RECIPE = Recipe(name="dq", rules=tuple(Rule(target=kind, w="nf4/g64/dq") for kind in ("linear", "embedding")))
IDS = torch.arange(40).reshape(2, 20)


def test_rows_of_a_table_are_those_of_the_whole() -> None:
    packed = pack_weight(weight(300, 128), DQ)
    ids = torch.tensor([[0, 299], [130, 7]])
    rows = torch.ops.qfx.embedding(ids, packed.data, packed.scale, packed.zero, str(DQ), 128, torch.float32)
    assert torch.equal(rows, packed.dequantize()[ids])


@pytest.mark.parametrize("backend", ["onnx", "reference"])
@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
@torch.no_grad()
def test_live_compiled_and_saved(tmp_path: Path, backend: str) -> None:
    wanted = Model().eval()(IDS)
    model: Any = qfx.quantize(Model().eval(), RECIPE, [IDS])
    found = model(IDS)
    assert sqnr_db(wanted, found) > 14
    assert model.up.w_scale.dtype == torch.uint8 and model.up.w_zero.shape == (2,)
    qfx.save(model, tmp_path)
    assert torch.equal(qfx.load(tmp_path, Model())(IDS), found)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="qfx", options={"backend": backend})
    assert sqnr_db(found, compiled(IDS)) > 90
    rows = {row.node: row.bytes_after for row in qfx.report(model)}
    assert rows["up"] == 96 * 64 + 96 * 2 + 4 * 2
    torch._dynamo.reset()
