"""qfx::quantized_attention in ONNX Runtime: the reference's result for every mask and format; which kernels multiply.

Tolerance: keys are centred and weights found in another order of sums, so that a code on a tie may be one off: 50 dB,
and nothing further away than 1 % of the greatest value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from qfx import processor
from qfx.backends.onnx import lower
from qfx.backends.onnx.lowering import build
from qfx.errors import UnsupportedError
from qfx.format import Format
from tests.backends.onnx.checks import floats, sqnr, traced
from tests.qfx.ops.test_attention import ALIBI, HOW, INTEGERS, attend, qkv

TABLE = [
    INTEGERS,
    "q=i8/tok k=i8/tok",
    "q=i8/dyn k=i8/dyn v=i8/dyn p=u8",
    "q=i8 k=i8/head v=i8 p=u8",
    "q=i8/head k=i8 v=i8/head p=u8/tok",
    "q=i8/head/dyn k=i8/head/dyn v=i8/head/dyn p=i8",
    "q=i4/tok k=i4/tok/c90 v=i4/dyn p=i8/tok",
    "k=i8/tok v=i8/tok",
    "q=u8/tok k=u8 v=u8/head p=u8",
    "q=i8/tok k=u4/head/dyn v=u4/dyn p=u8/tok/c90",
    "q=f8e4m3/tok k=f8e4m3 v=f8e4m3/head/dyn p=f8e4m3",
    "q=f8e5m2/dyn k=f8e5m2/tok v=f8e5m2/tok p=f8e4m3/tok",
    "q=f16 k=bf16 v=f32 p=bf16",
    "q=[i8/tok,f16,i8/tok,i8/tok] k=[i8/tok,f8e4m3/tok] v=[i8/head/dyn,f32] p=[u8,u8/tok]",
    "p=u8",
]
STEPS = {
    "q": ([0.03] * 4, [120, 128, 130, 140]), "k": ([0.02, 0.03], [128, 100]), "v": ([0.025, 0.02], [128, 120]),
}  # fmt: skip


def steps_of(formats: str) -> dict[str, tuple[list[float], list[int]]]:
    """Scales for the static ones."""
    found = {}
    for word in formats.split():
        role, text = word.split("=")
        if role == "p" or text not in ("i8", "u8", "f8e4m3", "i8/head", "u8/head"):
            continue
        scales, zeros = STEPS[role]
        count = len(scales) if text.endswith("head") else 1
        found[role] = (scales[:count], zeros[:count] if text.startswith("u") else [])
    return found


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert sqnr(expected, found) > 50
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


def call(formats: str, **how: Any) -> Any:
    return lambda q, k, v: attend(q, k, v, formats=formats, steps=steps_of(formats), **how)


@pytest.mark.parametrize("formats", TABLE)
def test_every_format_gives_the_reference(formats: str) -> None:
    function, given = call(formats), qkv(9, 12)
    lowered = lower(traced(function, given), strict=True)
    near(lowered(*given)[0], function(*given))


@pytest.mark.parametrize("own", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
def test_every_mask_gives_the_reference(how: str, own: int) -> None:
    function, given = call(INTEGERS, **HOW[how]), qkv(own=own)
    lowered = lower(traced(function, given), strict=True)
    near(lowered(*given)[0], function(*given))


@pytest.mark.parametrize("fmt", ["f8e4m3", "f8e5m2"])
def test_eight_bit_floats_are_rounded_as_torch_rounds_them(fmt: str) -> None:
    """Every code, every tie, their neighbours and subnormals; products with 1 show what is left of v."""
    dtype = Format(fmt).code_dtype
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort()[0]
    near = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    up, down = near, near
    for _ in range(4):
        up, down = (torch.nextafter(x, torch.tensor(end)) for x, end in ((up, torch.inf), (down, -torch.inf)))
        near = torch.cat((near, up, down))
    top = codes.abs().max().item()
    v = torch.cat((near, torch.randn(999) * 2.0 ** torch.arange(-20, 13).float().repeat(31)[:999])).clamp(-top, top)
    given = [torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), v.reshape(1, 1, 1, -1)]
    found = lower(traced(lambda q, k, v: attend(q, k, v, formats=f"v={fmt}", steps={"v": ([1.0], [])}), given))(*given)
    assert torch.equal(found[0].flatten(), v.to(dtype).float())


def test_rows_that_see_nothing_are_zero() -> None:
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1] = False
    function, given = call(INTEGERS, mask=mask), qkv()
    found = lower(traced(function, given), strict=True)(*given)[0]
    near(found, function(*given))
    assert found[0, :, 1].eq(0).all()


@pytest.mark.parametrize("formats", TABLE[:3])
def test_sizes_may_change(formats: str) -> None:
    function = call(formats, causal=True)
    lowered = lower(traced(function, qkv(5, 7), qkv(6, 9)), strict=True)
    for new, old in ((5, 7), (1, 33), (8, 8), (3, 1)):
        given = qkv(new, old)
        near(lowered(*given)[0], function(*given))


def test_grouped_heads_whose_number_may_change_run_in_torch() -> None:
    function, given = call(INTEGERS), qkv(own=2)
    other = [torch.cat((x, x), 1) for x in given]
    gm = traced(function, given, other)
    with pytest.raises(UnsupportedError, match="grouped heads whose number is not fixed"):
        lower(gm, strict=True)
    near(lower(gm)(*other)[0], function(*other))


def test_halves_are_computed_in_f32() -> None:
    function = call(INTEGERS, mask=ALIBI.half())
    given = [x.half() for x in qkv()]
    found = lower(traced(function, given), strict=True)(*given)[0]
    assert found.dtype == torch.float16 and sqnr(function(*given), found) > 45


def test_products_of_integers_are_kernels_of_integers() -> None:
    lowered = lower(traced(call(INTEGERS), qkv()), strict=True)
    assert set(lowered.kernels.values()) - {""} == {"MatMulIntegerToFloat u8 x s8 (x2)"}
    assert lowered.notes == []


def test_products_of_floats_are_told() -> None:
    lowered = lower(traced(call("k=i8/tok v=i8/tok"), qkv()), strict=True)
    assert [n.minor for n in lowered.notes] == [True]
    assert "k=i8/tok v=i8/tok: rounded as asked, multiplied in f32" in str(lowered.notes[0])
    assert not any("Integer" in kernel for kernel in lowered.kernels.values())
    (note,) = lower(traced(call("q=f8e4m3/tok k=f8e4m3/tok"), qkv()), strict=True).notes
    assert note.minor and "q=f8e4m3/tok k=f8e4m3/tok: rounded" in note.reason
    assert lower(traced(call("q=bf16"), qkv()), strict=True).notes == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
def test_files_multiply_u8_by_u8(runtime: str) -> None:
    _, built = build(traced(call(INTEGERS), qkv()), runtime=runtime)
    product = "MatMulInteger" if runtime == "standard" else "MatMulIntegerToFloat"
    kinds = [n.op_type for n in built.model.graph.node]
    assert kinds.count(product) == 2
    assert {n.domain for n in built.model.graph.node} == ({""} if runtime == "standard" else {"", "com.microsoft"})
    held = {t.data_type for t in built.model.graph.initializer}
    assert TensorProto.UINT8 in held and TensorProto.INT8 not in held
    _, own = build(traced(call(INTEGERS), qkv()), runtime="session")
    assert TensorProto.INT8 in {t.data_type for t in own.model.graph.initializer} or processor.saturates()


def test_outliers_stay_where_they_are() -> None:
    q, k, v = qkv(16, 24)
    k = k + 40 * floats(1, 2, 1, 8, seed=5)
    function = call("q=i8/tok k=i8/tok")
    near(lower(traced(function, [q, k, v]), strict=True)(q, k, v)[0], function(q, k, v))
