"""Trace a function to a graph in normal form, lower it, and compare with torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qfx.backends.onnx import OnnxLowered, lower
from qfx.graph import clean
from qfx.trace import retrace

Case = tuple[str, Callable[..., Any], Callable[[int], Sequence[Any]]]


def traced(function: Callable[..., Any], inputs: Sequence[Any], others: Sequence[Any] | None = None) -> fx.GraphModule:
    """The function as functional pre-dispatch ATen; sizes in which `inputs` differ from `others` are symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    pairs = zip(inputs, inputs if others is None else others, strict=True)
    fakes = [_fake(mode, one, other) if isinstance(one, Tensor) else one for one, other in pairs]

    def flat(*args: Any) -> tuple[Any, ...]:
        return tuple(torch.utils._pytree.tree_leaves(function(*args)))

    whole = fx.Graph()
    call = whole.call_function(flat, tuple(whole.placeholder(f"x{i}") for i in range(len(inputs))))
    whole.output(call)
    gm, mutated = retrace(fx.GraphModule(torch.nn.Module(), whole), fakes)
    assert not mutated, "the function writes into its inputs"
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        if not isinstance(node.meta.get("val"), Tensor):
            gm.graph.erase_node(node)
    clean(gm)
    return gm


def _fake(mode: FakeTensorMode, value: Tensor, other: Tensor) -> Any:
    pairs = zip(value.shape, other.shape, strict=True)
    sizes = [DimDynamic.STATIC if a == b else DimDynamic.DUCK for a, b in pairs]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def check(
    function: Callable[..., Any],
    make: Callable[[int], Sequence[Any]],
    *,
    dynamic: bool = False,
    strict: bool = True,
    tolerance: float = 2e-6,
) -> OnnxLowered:
    """Lower, run, and compare with torch in dtype, shape and values; with `dynamic` also on inputs of another size."""
    sizes = [3, 5] if dynamic else [3]
    lowered = lower(traced(function, make(sizes[0]), make(sizes[-1])), strict=strict)
    for size in sizes:
        inputs = make(size)
        expected = torch.utils._pytree.tree_leaves(function(*[_copied(v) for v in inputs]))
        found = lowered(*[v for v in inputs if isinstance(v, Tensor)])
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, tolerance)
    return lowered


def same(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Equal in type, dtype and shape; floats within `tolerance` of the greatest expected value, NaN and Inf alike."""
    if not isinstance(expected, Tensor):
        assert type(found) is type(expected)
        assert found == expected
        return
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if not expected.dtype.is_floating_point:
        assert torch.equal(found, expected), f"{found} is not {expected}"
        return
    finite = expected[torch.isfinite(expected)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def sqnr(expected: Tensor, found: Tensor) -> float:
    """Signal to noise in dB; inf where they are equal."""
    noise = float((expected.double() - found.double()).pow(2).sum())
    signal = float(expected.double().pow(2).sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def in_ort(path: Path, **inputs: Tensor) -> Tensor:
    """The first output of a file in ONNX Runtime as any program opens it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, low: int = -9, high: int = 10, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    """Seeded integers in [low, high)."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
