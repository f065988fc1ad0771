"""act_quantize: the codes of the activation's own rounded result, bit for bit, and that result near torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.act_quantize import ACTS, act_quantize
from qfx.format import Format
from qfx.numerics import quantize
from tests.backends.triton.row_codes import DTYPES, FORMATS, STEP, drawn, expected_codes, same, static_of

REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def reference(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    """The activation in f64, rounded once, then the product, rounded once."""
    y = REFERENCES[act](x.double()).to(x.dtype)
    return y if up is None else (y.double() * up.double()).to(x.dtype)


def test_all_functions_have_a_reference() -> None:
    assert list(ACTS) == list(REFERENCES)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 300), k=st.integers(1, 300), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES),
    text=st.sampled_from(FORMATS), act=st.sampled_from(list(ACTS)), gated=st.booleans(), smoothed=st.booleans(),
)  # fmt: skip
def test_codes_are_those_of_the_rounded_activation(
    m: int, k: int, seed: int, dtype: torch.dtype, text: str, act: str, gated: bool, smoothed: bool
) -> None:
    x, up, _, _, smooth = drawn(m if k < 64 else m % 24, k, dtype, seed)
    fmt = Format.parse(text)
    wanted = reference(x, up if gated else None, act)
    static = static_of(wanted, fmt)
    args = (x, up if gated else None, act, *static, smooth if smoothed else None, text)
    *made, y = act_quantize(*args, True)
    assert same(made, expected_codes(y, text, smooth if smoothed else None, static))
    assert same(act_quantize(*args, False), made), "keeping the float result changes the codes"
    torch.testing.assert_close(y.float(), wanted.float(), rtol=4 * STEP[dtype], atol=STEP[dtype])


@pytest.mark.parametrize("text", ["f8e4m3/tok", "u8/tok", "u8"])
def test_rows_that_no_program_holds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    x, up, _, _, smooth = drawn(3, 333, torch.float16, 5)
    static = static_of(reference(x, up, "silu"), Format.parse(text))
    args = (x, up, "silu", *static, smooth, text, True)
    whole = act_quantize(*args)
    monkeypatch.setattr(row_codes, "WHOLE", 128)
    monkeypatch.setattr(row_codes, "_LONG_BLOCK", 128)
    assert same(act_quantize(*args), whole)


def test_gate_and_up_may_be_parts_of_one_tensor() -> None:
    x, _, _, _, _ = drawn(12, 120, torch.bfloat16, 1)
    both = x.reshape(3, 4, 120)
    gate, up = both[..., :60], both[..., 60:]
    found = act_quantize(gate, up, "silu", None, None, None, "i8/tok", False)
    assert same(found, act_quantize(gate.clone(), up.clone(), "silu", None, None, None, "i8/tok", False))
    assert found[0].shape == (3, 4, 64) and found[1].shape == (3, 4, 1)


def test_far_values_have_their_limits_and_a_wrong_function_is_found() -> None:
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], device=drawn(1, 1, torch.float32, 0)[0].device)
    for act in ACTS:
        y = act_quantize(x, None, act, None, None, None, "i8/tok", True)[3]
        torch.testing.assert_close(y, x.clamp(min=0.0), rtol=1e-6, atol=1e-6)
    x, _, _, _, _ = drawn(4, 64, torch.float32, 2)
    found = [act_quantize(x, None, act, None, None, None, "i8/tok", True) for act in ACTS]
    assert not any(torch.equal(a[3], b[3]) for i, a in enumerate(found) for b in found[:i])
    codes, scale, _, y = found[0]
    assert not torch.equal(codes[:, : y.shape[1]], quantize(y, Format.parse("i8/tok"), scale * 1.05))


def test_refusals() -> None:
    x, up, _, _, _ = drawn(4, 32, torch.float16, 0)
    with pytest.raises(ValueError, match=r"unknown function, did you mean 'gelu'\?"):
        act_quantize(x, None, "gelo", None, None, None, "i8/tok", False)
    with pytest.raises(ValueError, match="up does not fit x"):
        act_quantize(x, up.float(), "silu", None, None, None, "i8/tok", False)
    with pytest.raises(ValueError, match="neither integers nor f8e4m3"):
        act_quantize(x, None, "silu", None, None, None, "f8e5m2/tok", False)


def test_the_fake_has_the_same_shapes() -> None:
    x, up, _, _, _ = drawn(4, 32, torch.bfloat16, 0)
    for text in FORMATS:
        args = ("silu", *static_of(x, Format.parse(text)), None, text, True)
        found = torch.ops.qfx_triton.act_quantize(x, up, *args)
        without = [t.to("meta") if isinstance(t, Tensor) else t for t in (x, up, *args)]
        fakes = torch.ops.qfx_triton.act_quantize(*without)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in fakes]
