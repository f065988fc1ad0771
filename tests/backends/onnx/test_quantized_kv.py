"""Quantized caches in ONNX Runtime: the results of the reference, the memory that past and present share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from qfx import run
from qfx.backends import reference
from qfx.backends.onnx import lowering
from qfx.backends.onnx.branch import every_node
from qfx.backends.onnx.graph import made
from qfx.backends.onnx.session import DISABLED, _wrap, options
from qfx.format import Format
from qfx.ops.cached import PROMPT, encode
from qfx.passes.cleanup import cleanup
from qfx.passes.kv_cache import kv_cache
from qfx.passes.kv_quantize import kv_quantize
from qfx.passes.masks import masks
from tests.backends.onnx.checks import sqnr
from tests.backends.onnx.test_gqa import KINDS, attend, inputs
from tests.graphs import Function, capture

PASTS = ("inputs_3", "inputs_4")
CASES = [(0, 4, 2), (0, 1, 1), (5, 1, 2), (9, 1, 3), (4, 3, 1), (6, PROMPT, 1)]  # cached, new, sequences


def scales(bits: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    most = Format.parse(f"i{bits}").qmax
    return {name: (torch.rand(2, 8, generator=g) + 8) / most for name in PASTS}


@cache
def built(kind: str, runtime: str, bits: int) -> tuple[Any, ort.InferenceSession, onnx.ModelProto]:
    """(the reference on a list of all inputs, a session, its model) of attention over a cache of `bits`."""
    torch.manual_seed(0)
    function = Function(attend, q=torch.randn(16, 32), k=torch.randn(16, 16), v=torch.randn(16, 16))
    function.kind = kind  # type: ignore[assignment]
    gm = capture(function, *inputs(5, 3), dynamic=True)
    run.run(gm, [cleanup, masks, cleanup])
    kv_cache(gm, pasts=list(PASTS), total="inputs_1", new="inputs_0")
    fmt = Format.parse(f"i{bits}/ch")
    assert kv_quantize(gm, formats={"k": fmt, "v": fmt}, scales=scales(bits))
    run.run(gm, [cleanup])
    builder, stage = lowering.build(gm, runtime=runtime)
    chosen = options(1)
    weights = {name: made(weight) for name, weight in builder.external.items()}
    if weights:
        chosen.add_external_initializers(list(weights), [_wrap(weight) for weight in weights.values()])
    session = ort.InferenceSession(
        stage.model.SerializeToString(), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED[:1]
    )
    read = [int(n.name.removeprefix("inputs_")) for n in gm.graph.nodes if n.op == "placeholder"]
    expect = reference.lower(gm)
    return lambda given: expect(*(given[i] for i in read)), session, stage.model


def stored(old: int, new: int, batch: int, bits: int) -> list[Tensor]:
    """Inputs whose caches are codes."""
    given, steps, fmt = inputs(old, new, batch), scales(bits), Format.parse(f"i{bits}/ch")
    for i, name in zip((3, 4), PASTS, strict=True):
        given[i] = encode(given[i], steps[name][None, :, None], fmt)
    return given


def fed(session: ort.InferenceSession, given: list[Tensor]) -> dict[str, np.ndarray]:
    names = {i.name for i in session.get_inputs()}
    return {f"inputs_{i}": t.numpy() for i, t in enumerate(given) if f"inputs_{i}" in names}


COMBINED = [
    pytest.param(kind, runtime, bits, marks=[] if bits == 8 or kind == "causal" else pytest.mark.slow)
    for kind in KINDS
    for runtime in ("onnxruntime", "standard")
    for bits in (8, 4)
]


@pytest.mark.parametrize(("kind", "runtime", "bits"), COMBINED)
def test_as_the_reference(kind: str, runtime: str, bits: int) -> None:
    expect, session, model = built(kind, runtime, bits)
    fused = [n for n in every_node(model.graph.node) if n.op_type == "GroupQueryAttention"]
    assert len(fused) == (2 if runtime == "onnxruntime" else 0)
    if runtime == "standard":
        assert {n.domain for n in every_node(model.graph.node)} == {""}
    for old, new, batch in CASES:
        given = stored(old, new, batch, bits)
        y, *grown = (torch.from_numpy(np.array(t)) for t in session.run(None, fed(session, given)))
        expected = expect(given)
        assert sqnr(expected[0], y) > 90, (old, new)
        for e, f in zip(expected[1:], grown, strict=True):
            assert e.dtype == f.dtype
            apart = (e != f).float().mean()  # a sum that lies between two codes
            assert float(apart) < 0.01, (old, new)


@pytest.mark.parametrize("bits", [8, 4])
def test_prompts_and_tokens_take_different_ways(bits: int) -> None:
    """The kernel over codes and the one in float are told apart by what they read of the new tokens."""
    model = built("causal", "onnxruntime", bits)[2]
    (chosen,) = [n for n in model.graph.node if n.op_type == "If"]
    ways = {a.name: list(every_node(a.g.node)) for a in chosen.attribute}
    attributes = {
        name: {a.name for n in nodes if n.op_type == "GroupQueryAttention" for a in n.attribute}
        for name, nodes in ways.items()
    }
    assert "kv_cache_bit_width" not in attributes["then_branch"]
    assert "kv_cache_bit_width" in attributes["else_branch"]
    (fused,) = [n for n in ways["else_branch"] if n.op_type == "GroupQueryAttention"]
    types = {a.s.decode() for a in fused.attribute if a.name.endswith("quant_type")}
    around = sorted(n.op_type for n in ways["else_branch"] if n is not fused)
    assert (types, around) == (({"PER_TENSOR"}, ["Div", "Div", "Mul", "Mul"]) if bits == 8 else ({"PER_CHANNEL"}, []))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("old", "new"), [(0, 5), (5, 1), (6, PROMPT)])
def test_caches_grow_where_they_lie(old: int, new: int, bits: int) -> None:
    _, session, _ = built("causal", "onnxruntime", bits)
    given = stored(old, new, 1, bits)
    plain = session.run(None, fed(session, given))
    binding = session.io_binding()
    memory = []
    for name, value in fed(session, given).items():
        if name in PASTS:
            wide = np.full((1, 2, 64, value.shape[3]), 77, dtype=value.dtype)
            wide[:, :, :old] = value
            memory.append(ort.OrtValue.ortvalue_from_numpy(wide))
            binding.bind_ortvalue_input(name, memory[-1])
        else:
            binding.bind_cpu_input(name, value)
    names = [o.name for o in session.get_outputs()]
    binding.bind_output(names[0])
    for name, shared in zip(names[1:], memory, strict=True):
        binding.bind_ortvalue_output(name, shared)
    session.run_with_iobinding(binding)
    assert np.array_equal(binding.get_outputs()[0].numpy(), plain[0])
    for shared, alone in zip(memory, plain[1:], strict=True):
        assert np.array_equal(shared.numpy()[:, :, : old + new], alone)
        assert bool((shared.numpy()[:, :, old + new :] == 77).all())


def test_codes_of_the_cache_are_read() -> None:
    """A negative control: half the values in the cache are other results."""
    _, session, _ = built("causal", "onnxruntime", 8)
    given = stored(9, 1, 1, 8)
    y = session.run(None, fed(session, given))[0]
    given[4] = (given[4] // 2).to(torch.int8)
    other = session.run(None, fed(session, given))[0]
    assert sqnr(torch.from_numpy(y), torch.from_numpy(other)) < 40
