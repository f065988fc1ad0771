"""fuse_gate: a gated layer of float inputs is one product that ends with its gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx.backends.triton import lower
from qfx.backends.triton.passes._nodes import computed
from qfx.backends.triton.passes.fuse_act_quantize import fuse_act_quantize
from qfx.backends.triton.passes.fuse_gate import fuse_gate
from qfx.backends.triton.passes.merge_siblings import merge_siblings
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.passes.lowered import Gated, K, inputs, lowered, outputs, quantized, ran
from tests.graphs import Function, counts, error, text

AFTER = """\
%inputs_0: f32[3,32] = input
%linear_weight_only: f32[3,24] = qfx_triton.linear_weight_only(%inputs_0, [@triton.t0, @triton.t1, @triton.t2, \
@triton.t3], @fc.bias, None, u4/g32, 48, silu)  # w=u4/g32
return [%linear_weight_only]
"""


def product(function: Any, n: int = 48, text: str = "u4/g32", x_format: str = "") -> fx.GraphModule:
    """The lowered graph of a function of a linear `fc` [n, 32] and x."""
    torch.manual_seed(0)
    model = Function(function, fc=nn.Linear(K, n, device=DEVICE))
    return lowered(quantized(model, inputs(), x_format, text))


def halves(own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = own.fc(x).chunk(2, -1)
    return gate, up


def test_golden_text() -> None:
    def layer(own: Any, x: Tensor) -> Tensor:
        gate, up = halves(own, x)
        return up * F.silu(gate)

    gm = product(layer)
    found = ran(gm, fuse_gate)
    node = next(n for n in found.graph.nodes if "qfx_triton" in str(n.target))
    assert computed(node) == ("linear", "split", "getitem_1", "getitem", "silu", "mul")
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 1e-6
    assert text(found) == AFTER
    assert text(ran(found, fuse_gate)) == AFTER


def split(own: Any, x: Tensor) -> Any:
    gate, up = own.fc(x).split(24, 1)
    return F.gelu(gate) * up


def sizes(own: Any, x: Tensor) -> Any:
    gate, up = own.fc(x).split([24, 24], -1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: F.silu(own.fc(x)[..., :24]) * own.fc(x)[..., 24:],
        lambda own, x: own.fc(x)[:, 24:] * F.gelu(own.fc(x)[:, 0:24], approximate="tanh"),
        split,
        sizes,
    ],
)
def test_other_spellings(function: Any) -> None:
    gm = product(function)
    found = ran(gm, fuse_gate)
    assert set(counts(found)) == {"linear_weight_only"}
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 1e-6


def read_twice(own: Any, x: Tensor) -> Any:
    gate, up = halves(own, x)
    return F.silu(gate) * up, gate


def activation_read_twice(own: Any, x: Tensor) -> Any:
    gate, up = halves(own, x)
    act = F.silu(gate)
    return act * up, act


def rows(own: Any, x: Tensor) -> Any:
    y = own.fc(x)
    return F.silu(y[:1]) * y[1:2]


def thirds(own: Any, x: Tensor) -> Any:
    first, second, _ = own.fc(x).split(16, 1)
    return F.silu(first) * second


def whole_read_too(own: Any, x: Tensor) -> Any:
    y = own.fc(x)
    return F.silu(y[:, :24]) * y[:, 24:], y


def whole_of_split_read_too(own: Any, x: Tensor) -> Any:
    gate, up = (y := own.fc(x)).split(24, 1)
    return F.silu(gate) * up, y


def halves_of_two(own: Any, x: Tensor) -> Any:
    y, other = own.fc(x), own.fc(2 * x)
    return F.silu(y[:, :24]) * other[:, 24:], y


def part_of_split_read_too(own: Any, x: Tensor) -> Any:
    gate, up = own.fc(x).split(24, 1)
    return F.silu(gate) * up, up


def second_half(own: Any, x: Tensor) -> Any:
    up, gate = halves(own, x)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    "function",
    [
        read_twice,
        activation_read_twice,
        second_half,
        whole_read_too,
        whole_of_split_read_too,
        part_of_split_read_too,
        halves_of_two,
        lambda own, x: F.silu(own.fc(x)[:, :24]) * own.fc(2 * x)[:, 24:],
        lambda own, x: F.silu(own.fc(x)[:, 12:36]) * own.fc(x)[:, 24:],
        lambda own, x: F.silu(own.fc(x)[:, :24]) * own.fc(x)[:, 12:36],
        lambda own, x: F.silu(own.fc(x)[:, :24].float().to(torch.float64)) * own.fc(x)[:, 24:].to(torch.float64),
        lambda own, x: torch.ops.qfx.quick_gelu(own.fc(x)[:, :24]) * own.fc(x)[:, 24:],
        lambda own, x: F.silu(own.fc(x)[:, :24]) * own.fc(x)[:, :24],
        lambda own, x: F.silu(own.fc(x)[:, :16]) * own.fc(x)[:, 16:32],
        lambda own, x: F.silu(own.fc(x)[:, ::2]) * own.fc(x)[:, 1::2],
        lambda own, x: F.relu(own.fc(x)[:, :24]) * own.fc(x)[:, 24:],
        lambda own, x: F.silu(own.fc(x)[:, :24]) * x[:, :24],
        rows,
        thirds,
    ],
)
def test_other_graphs_stay(function: Any) -> None:
    gm = product(function)
    assert counts(ran(gm, fuse_gate)) == counts(gm)


def test_a_product_ends_with_one_gate() -> None:
    def twice(own: Any, x: Tensor) -> Tensor:
        gate, up = halves(own, x)
        gate, up = (F.silu(gate) * up).chunk(2, -1)
        return F.silu(gate) * up

    gm = product(twice)
    found = ran(gm, fuse_gate, fuse_gate)
    assert counts(found)["linear_weight_only"] == counts(found)["silu"] == 1
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 1e-6


def test_the_report_names_the_kernel_of_all_that_it_computes() -> None:
    """Of two linears that are merged, too: their product has another name than the rows of the report."""
    kernels = lower(quantized(Gated(), inputs(), "", "u4/g32")).kernels
    own = {name: kernel for name, kernel in kernels.items() if "(torch)" in kernel}
    assert own == {"add": "aten::add (torch)", "rms_norm": "aten::rms_norm (torch)", "add_1": "aten::add (torch)"}
    assert {kernels[name] for name in kernels.keys() - own} == {"linear_weight_only u4/g32 (Triton)"}


def test_products_of_codes_stay() -> None:
    gm = product(lambda own, x: F.silu(own.fc(x)[:, :24]) * own.fc(x)[:, 24:], text="i8/ch", x_format="i8/tok")
    assert counts(ran(gm, fuse_gate)) == counts(gm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_linears_become_one_product(dtype: torch.dtype) -> None:
    given = quantized(Gated(dtype=dtype), inputs(dtype), "", "i4/g32")
    gm = lowered(ran(given, merge_siblings))
    found = ran(gm, fuse_act_quantize, fuse_gate)
    assert not {"silu", "mul", "slice"} & set(counts(found))
    assert error(outputs(gm, inputs(dtype)), outputs(found, inputs(dtype))) < (1e-6 if dtype == torch.float32 else 2e-2)
