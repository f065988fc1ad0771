"""qfx.ops.floats: reference semantics, fake kernels, gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.ops import floats as float_ops
from qfx.packing import pack_weight
from qfx.rounding.nearest import round_weight
from tests.seeded import randn

ops = torch.ops.qfx


def test_rope_turns_halves_and_pairs_by_the_angle() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cos, sin = torch.zeros(4), torch.ones(4)  # a quarter turn
    assert ops.rope(x, cos, sin, False).tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert ops.rope(x, cos, sin, True).tolist() == [-2.0, 1.0, -4.0, 3.0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_lengths(interleaved: bool) -> None:
    x, angles = randn(2, 3, 5, 8), torch.rand(5, 4)
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    y = ops.rope(x, wide.cos(), wide.sin(), interleaved)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "float", "bool"])
def test_attention_without_extras_is_sdpa(masked: str | None, causal: bool) -> None:
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 7, 8, seed=1), randn(2, 2, 7, 6, seed=2)
    keep = torch.rand(2, 1, 5, 7) > 0.4
    mask = {None: None, "bool": keep, "float": randn(2, 4, 5, 7)}[masked]
    both = mask
    if causal and mask is not None:  # scaled_dot_product_attention takes one of them
        past = torch.ones(5, 7, dtype=torch.bool).tril()
        both = mask & past if masked == "bool" else mask.masked_fill(~past, -torch.inf)
        both[..., 0] = mask[..., 0] = True if masked == "bool" else 0.0  # no row without any
    expected = F.scaled_dot_product_attention(
        q, k, v, both, is_causal=causal and mask is None, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(ops.attention(q, k, v, mask, None, 0.3, causal, 0.0), expected, atol=1e-5)


def test_sinks_take_their_share() -> None:
    q, k, v = randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2)
    sinks = torch.tensor([0.5, -torch.inf])
    y = ops.attention(q, k, v, None, sinks, 0.5, False, 0.0)
    scores = (q @ k.mT * 0.5).exp()
    share = scores.sum(-1, keepdim=True) + sinks.exp().reshape(1, 2, 1, 1)
    assert torch.allclose(y, scores / share @ v, atol=1e-5)


def test_softcap_bounds_scores() -> None:
    q, k, v = 50 * randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2)
    y = ops.attention(q, k, v, None, None, 1.0, False, 2.0)
    weights = (2.0 * torch.tanh(q @ k.mT / 2.0)).softmax(-1)
    assert torch.allclose(y, weights @ v, atol=1e-5)


def test_quick_gelu() -> None:
    x = torch.linspace(-4, 4, 33)
    assert torch.equal(ops.quick_gelu(x), x * torch.sigmoid(1.702 * x))


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), rest=st.integers(0, 2))
def test_grouped_linear_is_a_linear_for_each_expert(counts: list[int], rest: int) -> None:
    w, x = randn(len(counts), 3, 4), randn(sum(counts) + rest, 4, seed=1)
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    y = ops.grouped_linear(x, w, offs)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("tk,tnk->tn", x[: sum(counts)], w[expert])
    assert torch.allclose(y[: sum(counts)], expected, atol=1e-5)
    assert y[sum(counts) :].eq(0).all()


OFFS = torch.tensor([2, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x_format", "w_format"),
    [
        ("i8/tok", "i8/ch"),
        ("i8/dyn", "i8/ch"),
        ("u8/dyn", "i4/ch"),
        ("", "i4/g16"),
        ("i8/tok", "u4/g16"),
        ("", "nf4/g16"),
    ],
)
def test_grouped_linear_quant_is_qfx_linear_for_each_expert(x_format: str, w_format: str) -> None:
    w, x = randn(3, 8, 32), randn(7, 32, seed=1)
    packed = round_weight(w, Format.parse(w_format), "rtn", name="w")
    y = ops.grouped_linear_quant(x, packed.data, packed.scale, packed.zero, OFFS, x_format, w_format)
    whole = ops.grouped_linear(
        x, ops.dequantize(packed.data, packed.scale, packed.zero, w_format, 32, torch.float32), OFFS
    )
    assert y[6:].eq(0).all()
    assert (y - whole).abs().max() <= (0.03 if x_format else 1e-5) * whole.abs().max()
    if not x_format.endswith("dyn"):
        zero = None if packed.zero is None else packed.zero[0]
        one = (packed.data[0], packed.scale[0], zero, None, None, None, None, x_format, w_format)
        assert torch.equal(y[:2], ops.linear(x[:2], *one))


def test_scales_of_two_levels_go_across_experts() -> None:
    packed = round_weight(randn(3, 8, 32), Format.parse("nf4/g16/dq"), "rtn", name="w")
    x = randn(7, 32, seed=1)
    y = ops.grouped_linear_quant(x, packed.data, packed.scale, packed.zero, OFFS, "", "nf4/g16/dq")
    assert torch.allclose(y, ops.grouped_linear(x, packed.dequantize(), OFFS), atol=1e-5)


def test_one_dynamic_scale_is_that_of_all_rows() -> None:
    w, x = randn(3, 8, 32), randn(6, 32, seed=1)
    x[0] *= 100
    packed = round_weight(w, Format.parse("i8/ch"), "rtn", name="w")
    arguments = (packed.data, packed.scale, None, OFFS)
    y = ops.grouped_linear_quant(x, *arguments, "i8/dyn", "i8/ch")
    scale = x.abs().max() / 127
    rounded = (x / scale).round() * scale
    expected = ops.grouped_linear_quant(rounded, *arguments, "", "i8/ch")
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-3)


def test_a_static_input_format_without_scale_is_refused() -> None:
    packed = round_weight(randn(3, 8, 32), Format.parse("i8/ch"), "rtn", name="w")
    with pytest.raises(ValueError, match="static input format 'i8' has no scale"):
        ops.grouped_linear_quant(randn(6, 32), packed.data, packed.scale, None, OFFS, "i8", "i8/ch")


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "rope": lambda x: ops.rope(x, torch.rand(6, 8).cos(), torch.rand(6, 8).sin(), False),
    "rope of pairs": lambda x: ops.rope(x, torch.rand(6, 8).cos(), torch.rand(6, 8).sin(), True),
    "quick_gelu": ops.quick_gelu,
    "grouped_linear": lambda x: ops.grouped_linear(x, randn(3, 5, 8).to(x.dtype), OFFS),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return CALLS[name](x)

    assert torch.autograd.gradcheck(call, (randn(6, 8).double().requires_grad_(),))


def test_the_gradient_of_attention() -> None:
    def gradient(function: Callable[..., Tensor]) -> Tensor:
        q, sinks = randn(1, 1, 6, 8).requires_grad_(), torch.ones(1)
        found = torch.autograd.grad(function(q, q, q, None, sinks, 0.3, True, 5.0).sum(), q)
        return found[0]

    assert torch.allclose(gradient(ops.attention), gradient(float_ops.attention), atol=1e-6)


def test_the_gradient_of_expert_weights() -> None:
    x, w = randn(7, 4).double(), randn(3, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.grouped_linear(x, v, OFFS), (w,))


def test_fake_kernels_agree_with_real_ones() -> None:
    x, cos = randn(2, 3, 6, 8), randn(6, 8)
    torch.library.opcheck(ops.rope.default, (x, cos, cos, False))
    torch.library.opcheck(ops.quick_gelu.default, (x,))
    torch.library.opcheck(ops.attention.default, (x, x[:, :1], x[:, :1], None, randn(3), 0.3, True, 5.0))
    torch.library.opcheck(ops.grouped_linear.default, (randn(6, 8), randn(3, 5, 8), OFFS))
    packed = round_weight(randn(3, 8, 32), Format.parse("i4/g16"), "rtn", name="w")
    quantized = (randn(6, 32), packed.data, packed.scale, packed.zero, OFFS, "", "i4/g16")
    torch.library.opcheck(ops.grouped_linear_quant.default, quantized)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_mixture_is_the_sum_of_its_experts(interleaved: bool) -> None:
    torch.manual_seed(0)
    up, down = (pack_weight(torch.randn(shape), Format.parse("i8/ch")) for shape in ((3, 12, 8), (3, 8, 6)))
    biases = torch.randn(3, 12), torch.randn(3, 8)
    x, ids, weights = torch.randn(4, 8), torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2]]), torch.rand(4, 2)
    expected = torch.zeros(4, 8)
    for t, i in itertools.product(range(4), range(2)):
        e = ids[t, i]
        both = up.dequantize()[e] @ x[t] + biases[0][e]
        gate, value = (both[::2], both[1::2]) if interleaved else both.chunk(2)
        gate, value = gate.clamp(max=1.0), value.clamp(-1.0, 1.0)
        hidden = gate * torch.sigmoid(1.5 * gate) * (value + 0.5)
        expected[t] += weights[t, i] * (down.dequantize()[e] @ hidden + biases[1][e])
    packed = (up.data, up.scale, None, biases[0], down.data, down.scale, None, biases[1])
    found = torch.ops.qfx.moe(x, ids, weights, *packed, interleaved, 1.5, 0.5, 1.0, "i8/ch", "i8/ch")
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    other = torch.ops.qfx.moe(x, ids, weights, *packed, not interleaved, 1.5, 0.5, 1.0, "i8/ch", "i8/ch")
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)  # negative control
    empty = torch.ops.qfx.moe(x[:0], ids[:0], weights[:0], *packed, interleaved, 1.5, 0.5, 1.0, "i8/ch", "i8/ch")
    assert empty.shape == (0, 8)
