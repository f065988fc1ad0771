"""Options of ONNX Runtime's sessions, and the exact path on processors that would cut integer sums off.

On x86 without VNNI ONNX Runtime adds two products of u8 activations and s8 weights in 16 bits, which overflow. With
`session.x64quantprecision` it holds the same weights as u8, whose kernels are exact and slower; where the processor has
VNNI it would do so too, for nothing. It refuses a weight that several products share: `apart` gives each its own name.
MatMulNBits is exact everywhere.

Of DequantizeLinear before MatMul ONNX Runtime makes MatMulNBits, which rounds activations to 8 bits per block where the
session option LEVEL is not 1: files of the standard in which float activations were asked say so under FLOATS_KEY.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnxruntime as ort

from qfx import processor
from qfx.backends.onnx.branch import every_node, subgraphs
from qfx.errors import Note, explain, nearest

_ERROR = 3
EXACT = "session.x64quantprecision"
LEVEL = "session.qdq_matmulnbits_accuracy_level"
# What a user may set for a session of a file -> the values that it takes.
ENTRIES: Mapping[str, tuple[str, ...]] = {
    EXACT: ("0", "1"),
    LEVEL: ("1", "4"),
    "session.intra_op.allow_spinning": ("0", "1"),
    "session.inter_op.allow_spinning": ("0", "1"),
    "session.force_spinning_stop": ("0", "1"),
    "session.set_denormal_as_zero": ("0", "1"),
    "session.use_deterministic_compute": ("0", "1"),
}
INTEGERS_KEY = "qfx.integers"  # metadata of a file
INTEGERS = "u8 x s8: on x86 without VNNI set the session option session.x64quantprecision=1, or sums overflow"
FLOATS_KEY = "qfx.floats"  # metadata of a file
FLOATS = f"float activations: set the session option {LEVEL}=1, or ONNX Runtime rounds them to 8 bits per block"
# Products of integers -> which of their inputs are the weight and its zero point.
_INTEGER = {
    "MatMulInteger": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
    "QAttention": (1, 7),
    "QLinearMatMul": (3, 5),
    "QGemm": (3, 5),
}
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear"}


def options(threads: int, entries: Mapping[str, str] | None = None) -> Any:
    """Session options that change nothing outside their session. entries: see `checked`."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level = _ERROR
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if processor.saturates():
        chosen.add_session_config_entry(EXACT, "1")
    for key, value in (entries or {}).items():
        chosen.add_session_config_entry(key, value)
    return chosen


def checked(entries: Mapping[str, str] | None) -> dict[str, str]:
    """Config entries for a session, known to ONNX Runtime (which takes any) and right on this processor.

    Raises ValueError for an unknown key (with the nearest one), a value that it does not take, and for one that would
    give wrong numbers here.
    """
    if not isinstance(entries, Mapping | None):
        found = f"{type(entries).__name__}: {entries!r}"
        raise ValueError(explain("session options", expected="a mapping of names to values", found=found))
    for key, value in (entries or {}).items():
        if key not in ENTRIES:
            raise ValueError(
                explain(
                    f"unknown session option {key!r}, {nearest(str(key), ENTRIES)}",
                    expected=f"one of {', '.join(ENTRIES)}",
                    next_step="correct the name, or leave it out",
                )
            )
        if value not in ENTRIES[key]:
            raise ValueError(
                explain(f"session option {key!r}", expected=" or ".join(map(repr, ENTRIES[key])), found=repr(value))
            )
        if key == EXACT and value == "0" and processor.saturates():
            raise ValueError(
                explain(
                    f"session option {key!r} cannot be '0' on this processor",
                    expected="'1': x86 without VNNI cuts sums of u8 x s8 off at 16 bits",
                    found=repr(value),
                    next_step="leave it out; for speed export with w4a16, whose kernels need no VNNI",
                )
            )
    return dict(entries or {})


def has_integer_products(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether a model multiplies integers, or holds a product between Q and DQ nodes of which a reader may make one."""
    kinds = {node.op_type for node in every_node(nodes)}
    return any(kind in _INTEGER for kind in kinds) or _QUANTIZED.issubset(kinds)


def saturation_notes(nodes: Sequence[onnx.NodeProto]) -> list[Note]:
    """What to tell of a model on this processor: one note where its integer products take the exact, slower path."""
    return [saturation_note("graph")] if processor.saturates() and has_integer_products(nodes) else []


def float_note(name: str) -> Note:
    """What to tell of a file of the standard that was asked to multiply activations as floats."""
    reason = f"float activations were asked; ONNX Runtime rounds them to 8 bits (about 40 dB) unless {LEVEL} is 1"
    return Note(name, reason, "none for qfx.onnx.load, which sets it; set it in other programs", minor=True)


def saturation_note(name: str) -> Note:
    """What to tell of a graph or file with integer products on a processor that would cut them off."""
    reason = "this x86 processor has no VNNI, its sums of u8 x s8 would overflow: they run as u8 x u8, exact but slower"
    return Note(name, reason, "none needed for the result; for speed use w4a16 or w8a16", minor=True)


def apart(graph: onnx.GraphProto) -> dict[str, str]:
    """Give every integer product a weight and a zero point that no other has; returns new names -> those they repeat.

    Products in branches get theirs in the branch, which is where ONNX Runtime looks for them.

    a = MatMulIntegerToFloat(x, w), b = MatMulIntegerToFloat(y, w)  ->  b = MatMulIntegerToFloat(y, w.b/0.1)
    """
    held = {t.name: t for t in graph.initializer}
    seen: set[str] = set()
    repeated: dict[str, str] = {}
    for inner in _graphs(graph):
        for node in inner.node:
            for place in _INTEGER.get(node.op_type, ()):
                name = node.input[place] if place < len(node.input) else ""
                if name in held and (name in seen or inner is not graph):
                    again = f"{name}.{node.name}.{place}"
                    assert again not in held, again
                    inner.initializer.add().CopyFrom(held[name])
                    inner.initializer[-1].name = node.input[place] = again
                    repeated[again] = name
                seen.add(name)
    return repeated


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)
