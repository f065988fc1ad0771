"""Fake quantization: the numbers of `qfx.numerics`, and the gradients of the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.qat import fake_quantize
from qfx.backends.qat.fake_quant import fake_cast, fake_quantize_run_time, gradient_factor
from qfx.format import Format
from qfx.numerics import choose_qparams, effective_scale, run_time_qparams
from qfx.numerics import fake_quantize as numerics_fake
from tests.seeded import randn

WEIGHTS = (
    "i2/ch", "i3/g8", "i4/g32", "i8/ch", "i8", "u2/g8", "u3/ch", "u4/g16/f16", "u8/b4x8", "nf4/g16", "f8e4m3/ch",
    "f8e5m2/ch", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "nf4/g64/dq", "i4/g24",
)  # fmt: skip


def given_params(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    scale, zero = choose_qparams(x, fmt)
    return effective_scale(scale, zero, fmt), zero.to(torch.float32) if fmt.has_zero and zero is not None else None


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_numerics(text: str, dtype: torch.dtype) -> None:
    fmt, x = Format.parse(text), randn(8, 64).to(dtype)
    found = fake_quantize(x, fmt, *given_params(x, fmt))
    assert found.dtype == dtype
    assert torch.equal(found, numerics_fake(x, fmt, *choose_qparams(x, fmt)))


@pytest.mark.parametrize("text", ["i8/tok", "u8/tok", "i8/dyn", "u4/tok/c90", "f8e4m3/tok", "i8/g16/dyn"])
def test_run_time_scales_are_those_of_numerics(text: str) -> None:
    fmt, x = Format.parse(text), randn(2, 3, 32)
    assert torch.equal(fake_quantize_run_time(x, fmt), numerics_fake(x, fmt, activation=True))


def lsq(x: Tensor, scale: float, g: Tensor, qmin: int, qmax: int) -> tuple[Tensor, float]:
    """The gradients by x and by the scale of one scale for the tensor, element by element, as the paper has them."""
    by_x, by_scale = torch.zeros_like(x), 0.0
    for i, value in enumerate(x.tolist()):
        steps = value / scale
        if steps < qmin:
            by_scale += qmin * float(g[i])
        elif steps > qmax:
            by_scale += qmax * float(g[i])
        else:
            by_x[i] = g[i]
            by_scale += (round(steps) - steps) * float(g[i])
    return by_x, by_scale


@pytest.mark.parametrize(("bits", "scale"), [(2, 0.9), (3, 0.3), (4, 0.1), (8, 0.015)])
def test_gradients_are_those_of_lsq(bits: int, scale: float) -> None:
    fmt = Format(f"i{bits}")
    x, g = randn(50).requires_grad_(), randn(50, seed=1)
    s = torch.tensor(scale, requires_grad=True)
    fake_quantize(x, fmt, s).backward(g)
    by_x, by_scale = lsq(x.detach(), scale, g, fmt.qmin, fmt.qmax)
    clipped = int((by_x == 0).sum())
    assert 0 < clipped < 50, "both kinds of values shall be there"
    assert x.grad is not None and torch.equal(x.grad, by_x)
    assert s.grad is not None and math.isclose(float(s.grad), by_scale, rel_tol=1e-4, abs_tol=1e-4)


def test_gradient_of_a_zero_point_comes_from_clipped_values_alone() -> None:
    """LSQ+ with the offset in codes: y = (q - z) s, where q does not move once it is clipped."""
    fmt = Format("u2")
    x = torch.tensor([-5.0, -0.2, 0.1, 0.4, 9.0], requires_grad=True)
    s, z = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = fake_quantize(x, fmt, s, z)
    assert y.tolist() == [-0.5, 0.0, 0.0, 0.5, 1.0]
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    y.backward(g)
    assert z.grad is not None and s.grad is not None and x.grad is not None
    assert z.grad.item() == pytest.approx(-0.5 * (1 + 5))
    assert s.grad.item() == pytest.approx(-1 * 1 + 0.4 * 2 - 0.2 * 3 + (1 - 0.8) * 4 + 2 * 5)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WEIGHTS), st.integers(0, 10_000), st.floats(0.3, 1.5))
def test_each_scale_gets_the_gradient_of_its_own_elements(text: str, seed: int, share: float) -> None:
    """dL/ds against differences of the loss, where nothing changes its code: y is linear in s there."""
    fmt, x = Format.parse(text), randn(4, 48, seed=seed)
    scale, zero = given_params(x, fmt)
    scale = (scale * share).requires_grad_()
    g = randn(4, 48, seed=seed + 1)
    y = fake_quantize(x, fmt, scale, zero)
    y.backward(g)
    assert scale.grad is not None and scale.grad.shape == scale.shape
    smooth = x.clone().requires_grad_()
    fake_quantize(smooth, fmt, scale.detach(), zero).backward(g)
    assert smooth.grad is not None
    total = (g * y.detach()).sum() - (smooth.grad * x).sum()  # Euler: s dL/ds, summed over all scales
    assert float((scale.grad * scale.detach()).sum()) == pytest.approx(float(total), rel=1e-3, abs=1e-3)


def test_the_gradient_scale_of_lsq() -> None:
    fmt, x = Format.parse("i4/ch"), randn(3, 16)
    assert gradient_factor(16, fmt) == 1 / math.sqrt(16 * 7)
    grads = []
    for factor in (1.0, gradient_factor(16, fmt)):
        scale = torch.full((3, 1), 0.1, requires_grad=True)
        fake_quantize(x, fmt, scale, factor=factor).sum().backward()
        assert scale.grad is not None
        grads.append(scale.grad)
    assert torch.allclose(grads[0] * gradient_factor(16, fmt), grads[1])


def test_scales_found_at_run_time_clip_nothing_unless_they_should() -> None:
    x = randn(2, 64).requires_grad_()
    fake_quantize_run_time(x, Format.parse("i4/tok")).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())
    clipped = x.detach().clone().requires_grad_()
    fake_quantize_run_time(clipped, Format.parse("u4/tok/c50")).sum().backward()
    assert clipped.grad is not None and 0 < int((clipped.grad == 0).sum()) < 64
    scale, _ = run_time_qparams(x, Format.parse("i4/tok"))
    assert scale.shape == (2, 1)


def test_a_plain_format_is_a_cast_with_the_gradient_of_the_identity() -> None:
    x = randn(20).requires_grad_()
    y = fake_cast(x, Format.parse("bf16"))
    assert torch.equal(y, x.detach().bfloat16().float()) and not torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_gradients_come_in_the_dtype_of_the_values() -> None:
    x = randn(4, 8).bfloat16().requires_grad_()
    scale = torch.full((4, 1), 0.2, requires_grad=True)
    fake_quantize(x, Format.parse("i4/ch"), scale).float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert scale.grad is not None and scale.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, on any such function
@pytest.mark.parametrize("text", ["i4/g16", "u2/g8", "nf4/g16", "f8e4m3/ch"])
def test_compiled_forward_and_backward_are_those_of_eager(text: str) -> None:
    """One graph, so that Inductor fuses what it likes."""
    torch._dynamo.reset()
    fmt, x = Format.parse(text), randn(8, 48)
    scale, zero = given_params(x, fmt)

    def loss(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return fake_quantize(x, fmt, scale * 0.9, zero).square().sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        value: Tensor = run(inputs[0], inputs[1], zero)
        value.backward()
        found.append([value.detach(), *(i.grad for i in inputs)])
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        assert eager is not None and compiled is not None
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)
