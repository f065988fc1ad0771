"""Attention of few queries goes to the kernel that splits the keys; what torch has a kernel for stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.backends.triton.passes.few_queries import KERNEL, few_queries
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture, counts, text


class Attention(nn.Module):
    """Torch's; layers: how often, one after the other."""

    def __init__(self, layers: int = 1, **given: Any) -> None:
        super().__init__()
        self.layers, self.given = layers, {"scale": 0.3, "enable_gqa": True, **given}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        for _ in range(self.layers):
            q = F.scaled_dot_product_attention(q, k, v, mask, **self.given)
        return q


class OfHeads(Attention):
    """Six heads of queries and two of keys, all of width 8, however many there are of the rest."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (x.reshape(x.shape[0], 2, x.shape[2], 8) for x in (k, v))
        return super().forward(q.reshape(q.shape[0], 6, 1, 8), k, v, mask)


class Capped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.qfx.attention(q, k, v, mask, None, 0.3, False, 20.0)
        return y


def operands(queries: int = 1, tokens: int = 70, heads: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, 8), (2, 2, tokens, 8), (2, 2, tokens, 8))
    return [torch.randn(*s, generator=g).to(DEVICE, dtype) for s in shapes]


def mask(tokens: int = 70, shown: int = 50) -> Tensor:
    return (torch.arange(tokens, device=DEVICE) < shown)[None, None, None]


def test_a_step_of_decoding() -> None:
    inputs = (*operands(), mask())
    gm = capture(Attention(layers=2), *inputs)
    (expected,) = gm(*inputs)
    kernels: dict[str, str] = {}
    assert few_queries(gm, kernels)
    gm.recompile()
    assert kernels == dict.fromkeys(("scaled_dot_product_attention", "scaled_dot_product_attention_1"), KERNEL)
    assert (
        text(gm)
        == """\
%q: f32[2,6,1,8] = input
%k: f32[2,2,70,8] = input
%v: f32[2,2,70,8] = input
%mask: b1[1,1,1,70] = input
%mask_spans: i32[1,2] = qfx_triton.mask_spans(%mask)
%float_attention: f32[2,6,1,8] = \
qfx_triton.float_attention(%q, %k, %v, %mask, %mask_spans, None, 0.3, False, 0.0)
%float_attention_1: f32[2,6,1,8] = \
qfx_triton.float_attention(%float_attention, %k, %v, %mask, %mask_spans, None, 0.3, False, 0.0)
return [%float_attention_1]
"""
    )
    torch.testing.assert_close(gm(*inputs)[0], expected)


@pytest.mark.parametrize("given", [mask(), None], ids=["mask", "no mask"])
def test_what_torch_has_no_kernel_for(given: Tensor | None) -> None:
    inputs = tuple(operands(3)) if given is None else (*operands(3), given)
    gm = capture(Capped(), *inputs)
    (expected,) = gm(*inputs)
    assert few_queries(gm, {})
    gm.recompile()
    found = counts(gm)
    assert found["float_attention"] == 1 and found.get("mask_spans", 0) == (given is not None)
    torch.testing.assert_close(gm(*inputs)[0], expected)


def test_the_usual_scale_and_a_mask_of_one_place() -> None:
    inputs = (*operands(2), torch.ones(2, 1, 2, 1, dtype=torch.bool, device=DEVICE))
    gm = capture(Attention(scale=None), *inputs)
    (expected,) = gm(*inputs)
    assert few_queries(gm, {})
    gm.recompile()
    assert "mask_spans" not in counts(gm)
    torch.testing.assert_close(gm(*inputs)[0], expected)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Attention(), operands()),
        (Attention(is_causal=True), operands(3)),
        (Attention(dropout_p=0.1), [*operands(), mask()]),
        (Attention(), [*operands(17, 200), mask(200)]),
        (Attention(), [*operands(1, 63), mask(63)]),
        (Attention(), [*operands(40, 70), mask()]),
        (Attention(), [*operands(dtype=torch.float64), mask()]),
        (Attention(enable_gqa=False), [operands(heads=2)[0], *(x[:, :1] for x in operands()[1:]), mask()]),
        (Attention(enable_gqa=False), [x[0] for x in (*operands(heads=2), mask())]),
        (Attention(), [operands()[0], *(x[:1] for x in operands()[1:]), mask()]),
        (Attention(), [operands()[0][:1], *operands()[1:], mask()]),
        (Attention(enable_gqa=False), [*operands(heads=2)[:2], operands()[2][:, :1], mask()]),
        (Capped(), [operands()[0], *(x[:1] for x in operands()[1:]), mask()]),
        (Capped(), [*(x[:1] for x in operands()), mask().repeat(2, 1, 1, 1)]),
        (Capped(), [*operands(), torch.ones((), dtype=torch.bool, device=DEVICE)]),
    ],
    ids=["no mask", "causal", "dropout", "queries", "few keys", "half as many keys", "f64", "one head", "three axes",
         "one sequence of keys", "one sequence of queries", "one head of values", "one sequence and a cap",
         "two of masks", "no axes"],
)  # fmt: skip
def test_what_stays(module: nn.Module, inputs: list[Tensor]) -> None:
    gm = capture(module, *inputs)
    before = text(gm)
    assert not few_queries(gm, {})
    assert text(gm) == before


class Sunk(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        y: Tensor = torch.ops.qfx.attention(q, k, v, None, sinks, 0.3, False, 0.0)
        return y


def test_sinks_of_any_stride() -> None:
    inputs = (*operands(), torch.arange(12.0, device=DEVICE)[::2])
    gm = capture(Sunk(), *inputs)
    (expected,) = gm(*inputs)
    assert few_queries(gm, {})
    gm.recompile()
    torch.testing.assert_close(gm(*inputs)[0], expected)


def test_a_varying_batch_and_length() -> None:
    inputs = (*operands(), mask().expand(2, 1, 1, 70))
    gm = capture(OfHeads(), *inputs, dynamic=True)
    assert few_queries(gm, {})
    gm.recompile()
    more = tuple(torch.cat([x, x]) for x in inputs)
    torch.testing.assert_close(gm(*more)[0], Attention()(*more))


@pytest.mark.parametrize("groups", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_with_a_cache_of_fixed_length(groups: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=groups, vocab_size=50, max_position_embeddings=128)  # fmt: skip
    model = qfx.quantize(LlamaForCausalLM(config).eval(), "w8a16").to(DEVICE)
    ids = torch.randint(50, (1, 9), device=DEVICE)
    fast = torch.compile(model, backend="qfx", options={"backend": "triton", "cache": False})
    found = []
    for run_ in (model, fast):
        cache = StaticCache(config, max_cache_len=96)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            steps = [
                run_(input_ids=ids[:, :1], position_ids=torch.tensor([[9 + i]], device=DEVICE), past_key_values=cache)
                for i in range(2)
            ]
        found.append(torch.cat([step.logits for step in steps]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-4
    rows = [row for row in qfx.report(fast).rows if row.op == "attention"]
    assert [row.kernel for row in rows] == [KERNEL] * 2
