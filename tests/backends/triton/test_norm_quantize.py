"""norm_quantize: the codes of the norm's own rounded result, bit for bit, and that result near torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.norm_quantize import norm_quantize
from qfx.format import Format
from qfx.numerics import quantize
from tests.backends.triton.cases import DEVICE, INTERPRETED
from tests.backends.triton.row_codes import DTYPES, FORMATS, STEP, drawn, expected_codes, same, static_of


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(0, 300), k=st.integers(1, 300), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES),
    text=st.sampled_from(FORMATS), layer=st.booleans(), summed=st.booleans(), smoothed=st.booleans(),
    plain=st.booleans(),
)  # fmt: skip
def test_codes_are_those_of_the_rounded_norm(
    m: int, k: int, seed: int, dtype: torch.dtype, text: str, layer: bool, summed: bool, smoothed: bool, plain: bool
) -> None:
    x, residual, w, b, smooth = drawn(m if k < 64 else m % 24, k, dtype, seed)
    fmt = Format.parse(text)
    total = x + residual if summed else x
    weight, bias = (None, None) if plain else (w, b if layer else None)
    reference = _norm(total, weight, bias, layer)
    static = static_of(reference, fmt)
    args = (x, residual if summed else None, weight, bias, 1e-5, layer, *static, smooth if smoothed else None, text)
    *made, y, s = norm_quantize(*args, True, True)
    assert same(made, expected_codes(y, text, smooth if smoothed else None, static))
    assert same(norm_quantize(*args, False, False), made), "keeping the float result changes the codes"
    assert torch.equal(s, total)
    near = STEP[dtype] * (reference.double().abs() + 8)
    if layer:  # less a mean near to them, numbers keep of their digits what lies behind the common ones
        wide = total.double()
        spread = (wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
        size = wide.abs() * (spread + 1e-5).rsqrt()
        near = near + STEP[dtype] * size * (1 if plain else w.double().abs())
    assert ((y.double() - reference.double()).abs() <= near).all()


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: bool) -> Tensor:
    """The norm in f64, rounded once."""
    w, b = (None if t is None else t.double() for t in (weight, bias))
    shape = [x.shape[-1]]
    y = F.layer_norm(x.double(), shape, w, b, 1e-5) if layer else F.rms_norm(x.double(), shape, w, 1e-5)
    return y.to(x.dtype)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("text", ["i8/tok", "u8/tok", "i8"])
def test_rows_that_no_program_holds(monkeypatch: pytest.MonkeyPatch, layer: bool, text: str) -> None:
    x, residual, weight, bias, smooth = drawn(3, 333, torch.bfloat16, 5)
    fmt = Format.parse(text)
    static = static_of(_norm(x, weight, bias, layer), fmt)
    args = (x, residual, weight, bias if layer else None, 1e-5, layer, *static, smooth, text, True, True)
    whole = norm_quantize(*args)
    monkeypatch.setattr(row_codes, "WHOLE", 128)
    monkeypatch.setattr(row_codes, "_LONG_BLOCK", 128)
    *made, y, s = norm_quantize(*args)
    assert same(made, expected_codes(y, text, smooth, static))
    assert torch.equal(s, whole[-1])
    torch.testing.assert_close(y.float(), whole[-2].float(), rtol=STEP[x.dtype], atol=STEP[x.dtype])


def test_programs_that_walk_over_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, weight, _, _ = drawn(37, 100, torch.float16, 1)
    args = (x, residual, weight, None, 1e-6, False, None, None, None, "i8/tok", True, True)
    alone = norm_quantize(*args)
    walked = {"ROWS": 2, "BLOCK": 128, "PARTS": 1, "STAGES": 3, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(row_codes, "settings", lambda *_: (5, walked))
    walking = norm_quantize(*args)
    if INTERPRETED:
        assert same(walking, alone)
        return
    for found, due in zip(walking, alone, strict=True):  # sums in another order: a code at a tie may be the next one
        assert (found.float() - due.float()).abs().gt(0).float().mean().nan_to_num() < 1e-3


def test_rows_need_not_lie_side_by_side() -> None:
    x, residual, weight, _, _ = drawn(24, 80, torch.float16, 2)
    x, residual = x.reshape(2, 12, 80)[:, :, :40], residual.reshape(2, 12, 80)[:, 1::2].repeat(1, 2, 1)[:, :, 20:60]
    rest = (weight[:40], None, 1e-6, False, None, None, None, "i8/tok", True, True)
    found = norm_quantize(x, residual, *rest)
    assert same(found, norm_quantize(x.contiguous(), residual.contiguous(), *rest))
    assert found[0].shape == (2, 12, 48) and found[1].shape == (2, 12, 1)


def test_a_zero_row_has_the_scale_1_and_a_wrong_scale_is_found() -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    codes, scale, _ = norm_quantize(x, None, None, None, 1e-6, False, None, None, None, "i8/tok", False, False)
    assert not codes.any() and scale.flatten().tolist() == [1.0, 1.0]
    x, _, weight, _, _ = drawn(4, 32, torch.float32, 3)
    codes, scale, _, y = norm_quantize(x, None, weight, None, 1e-6, False, None, None, None, "i8/tok", True, False)
    assert not torch.equal(codes[:, : y.shape[1]], quantize(y, Format.parse("i8/tok"), scale * 1.05))
    other = norm_quantize(x, None, weight, None, 1.0, False, None, None, None, "i8/tok", False, False)
    assert not torch.equal(scale, other[1]), "eps has no effect"


def test_refusals() -> None:
    x, residual, weight, _, _ = drawn(4, 32, torch.float16, 0)
    rest = (1e-6, False, None, None, None, "i8/tok", False, False)
    with pytest.raises(
        ValueError, match=r"residual does not fit x[\s\S]*expected: float16 \[4, 32\][\s\S]*float16 \[3, 32"
    ):
        norm_quantize(x, residual[:3], weight, None, *rest)
    with pytest.raises(ValueError, match=r"weight does not fit x[\s\S]*shape \[32\]"):
        norm_quantize(x, None, weight[:4], None, *rest)
    with pytest.raises(ValueError, match="takes no such x"):
        norm_quantize(x.double(), None, None, None, *rest)
    with pytest.raises(ValueError, match="static format 'u8' has no zero point"):
        norm_quantize(x, None, None, None, 1e-6, False, torch.ones((), device=DEVICE), None, None, "u8", False, False)
    with pytest.raises(ValueError, match="a scale for the tensor or for each token|in groups"):
        norm_quantize(x, None, None, None, 1e-6, False, None, None, None, "i8/g32", False, False)


def test_the_fake_has_the_same_shapes() -> None:
    x, residual, weight, _, _ = drawn(4, 32, torch.bfloat16, 0)
    for text in FORMATS:
        fmt = Format.parse(text)
        args = (residual, weight, None, 1e-6, False, *static_of(x, fmt), None, text, True, True)
        found = torch.ops.qfx_triton.norm_quantize(x, *args)
        fakes = torch.ops.qfx_triton.norm_quantize(
            x.to("meta"), *(t.to("meta") if isinstance(t, Tensor) else t for t in args)
        )
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in fakes]
