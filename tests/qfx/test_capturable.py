"""Operators that wait for nothing on the host and copy nothing from there, so that a CUDA graph can capture them.

Looked for with tensors without data, on which a value cannot be read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qfx  # noqa: F401  (registers the operators)
from qfx.ops import attention as attention_ops
from qfx.ops import cached as cache_ops
from qfx.ops import floats as float_ops
from tests.backends.triton.cases import meta

_FROM_HOST = ("tensor", "as_tensor", "from_numpy", "item", "tolist", "numpy", "cpu", "nonzero", "__bool__")


class OnHost(TorchFunctionMode):
    """Collects calls that go through the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1] if name == "__getitem__" else ()
        if name in _FROM_HOST or any(
            isinstance(i, list) for i in (indices if isinstance(indices, tuple) else [indices])
        ):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


class Elsewhere(TorchDispatchMode):
    """Collects calls with tensors of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in leaves):
            self.found.add(str(func))
        return result


def through_host(call: Callable[[], object]) -> set[str]:
    """What a call does by way of the host."""
    with OnHost() as seen, Elsewhere() as dispatched:
        call()
    found: set[str] = seen.found | dispatched.found
    return found


Q, K, MASK, SINKS = meta(1, 8, 16, 64), meta(1, 2, 16, 64), meta(1, 1, 16, 16, dtype=torch.bool), meta(8)


def cached(tokens: int, fmt: str) -> object:
    q, k = meta(1, 8, tokens, 64), meta(1, 2, tokens, 64)
    past = meta(1, 2, 7, 64 if fmt == "i8" else 32, dtype=torch.int8 if fmt == "i8" else torch.uint8)
    scale = meta(1, 2, 1, 64, dtype=torch.float32)
    return cache_ops.quantized_cached_attention(
        q, k, k, past, past, scale, scale, None, None, 0.1, False, 0.0, fmt, fmt
    )


def rounded(formats: tuple[str, ...], steps: Any = ((), (), (), (), (), ())) -> object:
    rest: Any = (*steps, 0.1, True, 30.0, *formats)
    return attention_ops.quantized_attention(Q, K, K, MASK, SINKS, *rest)


CALLS: dict[str, Callable[[], object]] = {
    "rope": lambda: float_ops.rope(Q, meta(16, 64), meta(16, 64), False),
    "rope, interleaved": lambda: float_ops.rope(Q, meta(16, 64), meta(16, 64), True),
    "attention": lambda: float_ops.attention(Q, K, K, MASK, SINKS, 0.1, True, 30.0),
    "cached_attention": lambda: float_ops.cached_attention(
        Q, K, K, meta(1, 2, 7, 64), meta(1, 2, 7, 64), None, SINKS, 0.1, False, 0.0
    ),
    "quantized_cached_attention, a token": lambda: cached(1, "i8"),
    "quantized_cached_attention, a prompt": lambda: cached(40, "i4"),
    "quantized_attention, scales at run time": lambda: rounded(("i8/tok", "i8/tok", "i8/head/dyn", "u8/tok")),
    "quantized_attention, 8-bit floats": lambda: rounded(("f8e4m3/tok", "f8e4m3/dyn", "f8e4m3/tok", "f8e4m3")),
    "quick_gelu": lambda: float_ops.quick_gelu(Q),
    "hadamard": lambda: torch.ops.qfx.hadamard(Q, 64, 64, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_goes_through_the_host(name: str) -> None:
    assert through_host(CALLS[name]) == set()


def test_what_does_is_found() -> None:
    """Negative control. Scales that are numbers are copied at each call, so are indices of heads: see the kernels."""
    assert through_host(lambda: rounded(("i8", "", "", ""), ((0.1,), (), (), (), (), ()))) == {"tensor"}
    assert through_host(lambda: rounded(("[i8/tok,f16]", "", "", ""))) == {"__getitem__"}
    with pytest.raises(Exception, match="no data"):
        float_ops.grouped_linear(meta(16, 64), meta(4, 32, 64), meta(4, dtype=torch.int32))
