"""QAttention: where three static 8-bit projections of one input feed an attention, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx.backends.onnx import OnnxLowered, lower
from qfx.capture import capture_export
from qfx.passes.normalize import normalize
from tests.graphs import error

KERNEL = "QAttention u8 x s8, attention f32"
HEADS = 4


class Attention(nn.Module):
    """Self-attention as encoders have it, [B, S, 32]."""

    def __init__(self, *, bias: bool = True, causal: bool = False, size: int = 8, key_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.causal, self.key_heads = size, causal, key_heads
        self.q = nn.Linear(32, HEADS * size, bias=bias)
        self.k = nn.Linear(32, key_heads * size, bias=bias)
        self.v = nn.Linear(32, key_heads * size, bias=bias)
        self.out = nn.Linear(HEADS * size, 32)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        mask = None if keep is None else keep[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=self.key_heads != HEADS)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return attended


def batch(n: int = 3, length: int = 6) -> Tensor:
    return torch.randn(n, length, 32, generator=torch.Generator().manual_seed(n * 10 + length))


def lengths(n: int = 3, length: int = 6) -> Tensor:
    """bool [n, length]: later sequences are shorter, the last is empty where there are enough."""
    return torch.arange(length) < (torch.arange(n).flip(0)[:, None] * 2)


def lowered(model: nn.Module, *inputs: Tensor, recipe: str = "w8a8-static", dynamic: bool = False) -> OnnxLowered:
    """Quantized on its own inputs and lowered; the live module is quantized too."""
    qfx.quantize(model.eval(), recipe, data=[inputs])
    gm = capture_export(model, inputs, {}, dynamic=dynamic).gm
    normalize(gm)
    return lower(gm)


def kernels(found: OnnxLowered) -> list[str]:
    return sorted(k for k in found.kernels.values() if "MatMul" in k or "Attention" in k)


def agrees(model: nn.Module, found: OnnxLowered, *inputs: Tensor) -> None:
    """The output equals the live module's: only its last linear can round differently."""
    with torch.no_grad():
        expected = model(*inputs)
    assert error(expected, found(*inputs)[0]) < 0.01


@pytest.mark.parametrize("recipe", ["w8a8-static", "w8a8-smooth"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_kernel_for_projections_and_attention(recipe: str, masked: bool, bias: bool) -> None:
    inputs = (batch(), lengths()) if masked else (batch(),)
    model = Attention(bias=bias)
    found = lowered(model, *inputs, recipe=recipe)
    assert kernels(found) == ["MatMulIntegerToFloat u8 x s8", *[KERNEL] * 4]  # three linears and the attention
    agrees(model, found, *inputs)


def test_transposes_are_gone() -> None:
    found = lowered(Attention(), batch())
    (built,) = found.models
    assert "Transpose" not in {node.op_type for node in built.model.graph.node}
    assert len([n for n in built.weights if "packed" in n]) == 1


def test_an_empty_sequence_gives_what_torch_gives() -> None:
    model = Attention()
    keep = lengths()
    assert not keep[-1].any()
    found = lowered(model, batch(), keep)
    agrees(model, found, batch(), keep)


def test_causal() -> None:
    model = Attention(causal=True)
    found = lowered(model, batch())
    assert KERNEL in kernels(found)
    agrees(model, found, batch())
    other = Attention(causal=False)
    other.load_state_dict(Attention(causal=True).state_dict())
    assert error(other.eval()(batch()), found(batch())[0]) > 0.05  # the control: another function


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 4), st.integers(2, 9))
def test_other_shapes_than_the_traced_ones(n: int, length: int) -> None:
    agrees(DYNAMIC[0], DYNAMIC[1], batch(n, length), lengths(n, length))


def _dynamic() -> tuple[nn.Module, OnnxLowered]:
    model = Attention()
    return model, lowered(model, batch(), lengths(), dynamic=True)


DYNAMIC = _dynamic()


class PerRow(Attention):
    """A mask that differs between rows, which QAttention cannot take."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1])
        q, k, v = (p(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, (places[:, None] >= places - 1)[None, None])
        attended: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return attended


class TwoInputs(Attention):
    """Keys and values of something else."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        other = torch.flip(x, [1])
        q, k, v = (
            p(t).view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for p, t in ((self.q, x), (self.k, other), (self.v, other))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return attended


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activations per token": (Attention, "w8a8"),
    "shared key heads": (lambda: Attention(key_heads=2), "w8a8-static"),
    "a mask per row": (PerRow, "w8a8-static"),
    "cross-attention": (TwoInputs, "w8a8-static"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_cannot_take_runs_as_before(name: str) -> None:
    make, recipe = OTHERS[name]
    model = make()
    found = lowered(model, batch(), recipe=recipe)
    assert KERNEL not in kernels(found)
    agrees(model, found, batch())
