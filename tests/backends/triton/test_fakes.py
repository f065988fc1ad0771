"""Every op's fake says what the op gives: sizes, dtypes and strides; no result is an input. Inductor relies on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map

from qfx.backends.triton import embedding as tables
from qfx.ops.library import UNSAFE
from tests.backends.triton.every_op import CALLS, OPS, K, floats, one


def test_every_op_is_among_the_calls() -> None:
    registered = {
        s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("qfx_triton::")
    }
    assert registered == {name for name, _ in CALLS}


@pytest.mark.parametrize(("name", "given"), CALLS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CALLS)])
def test_the_fake_and_the_op_give_the_same(name: str, given: Callable[[], tuple[Any, ...]]) -> None:
    call = given()
    plain = not any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in call)  # torch cannot compare them
    tests = ("test_schema", "test_faketensor") if plain else ("test_faketensor",)
    torch.library.opcheck(getattr(OPS, name).default, call, test_utils=tests)


# The memory of a cache has fixed sizes.
@pytest.mark.parametrize(
    ("name", "given"),
    [pytest.param(*c, id=f"{i}-{c[0]}") for i, c in enumerate(CALLS) if not c[0].startswith("cache_")],
)
def test_the_fake_leaves_the_number_of_rows_open(name: str, given: Callable[[], tuple[Any, ...]]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)

    def fake(x: Any, first: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        rows = (
            x.dim() > 0 and x.shape[:-1] == first.shape[:-1] and name not in ("quantized_attention", "float_attention")
        )
        kinds = [DimDynamic.DUCK if rows and i < x.dim() - 1 else DimDynamic.STATIC for i in range(x.dim())]
        if name in ("quantized_attention", "float_attention") and x.dim() == 4:
            kinds[2] = DimDynamic.DUCK
        if name == "embedding" and x is first:
            kinds = [DimDynamic.DUCK] * 2
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    call = given()
    with mode:
        found = getattr(OPS, name).default(*tree_map(lambda x: fake(x, call[0]), call))
    out = found if isinstance(found, Tensor) else found[0]
    open_ = [isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None for s in out.shape[:-1]]
    one = call[0].shape[0] == 1
    assert any(open_) or (one and len(open_) == 1), out.shape


@pytest.mark.parametrize("text", ["i8/tok", "i8/dyn", "f8e4m3/g32/dyn", "i8"])
def test_a_smoothing_vector_of_any_strides(text: str) -> None:
    x, smooth = floats(3, K), (floats(2 * K).abs() + 1)[::2]
    more = (one(), None) if text == "i8" else ()
    op = OPS.quantize_static if text == "i8" else OPS.quantize_dynamic
    found, expected = (op(x, s, *more, text) for s in (smooth, smooth.clone()))
    codes = [t if isinstance(t, Tensor) else t[0] for t in (found, expected)]
    assert torch.equal(*(t.view(torch.uint8) for t in codes))


@pytest.mark.parametrize("name", ["gemm8", "gemm4", "gemm_mixed", "linear_mixed", "linear_weight_only"])
def test_a_bias_of_any_strides(name: str) -> None:
    call = list(dict(CALLS)[name]())
    place = [a.name for a in getattr(OPS, name).default._schema.arguments].index("bias")
    bias = floats(2 * (16 if "mixed" in name else 24))[::2]
    found, expected = (
        [*call[:place], b, *call[place + 1 :]] for b in (bias, bias.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(getattr(OPS, name)(*found), getattr(OPS, name)(*expected))


def test_no_op_with_values_from_the_device_is_recorded_in_a_graph_of_cuda() -> None:
    grouped = ("moe", "grouped_linear", "grouped_linear_quant")
    for name in ("linear", "embedding", *grouped, "quantized_attention", "cache_append"):
        assert set(UNSAFE) <= set(getattr(torch.ops.qfx, name).default.tags), name
    assert set(UNSAFE) <= set(OPS.rounded_input.default.tags)
    for name in ("gemm8", "grouped_weight_only", "grouped_gemm", "grouped_floats"):
        assert not set(UNSAFE) & set(getattr(OPS, name).default.tags), name


def test_what_an_embedding_looks_up_is_there_before_its_first_call() -> None:
    """Made by the call it would lie in the memory of a CUDA graph, and be copied from the host while that records."""
    name, given = next(call for call in CALLS if call[0] == "embedding")
    tables._values.cache_clear()
    call = given()
    tables.prepare(call[4], call[0].device)
    made = tables._values.cache_info().misses
    getattr(OPS, name)(*call)
    assert made == tables._values.cache_info().misses == 2
