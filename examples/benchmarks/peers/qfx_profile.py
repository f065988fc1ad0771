"""Where the time of a qfx encoder goes: ONNX Runtime's own profile of the sessions, by operator and by part.

Profiling costs time itself: read the shares, and take the milliseconds of a call from the race.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime

import qfx
from examples.benchmarks.peers import qfx_encoder
from examples.benchmarks.peers.encoding import EncoderJob
from examples.benchmarks.peers.worker import Built
from qfx.backends.onnx import session

CALLS = 10
KERNEL = "_kernel_time"
PRODUCTS = "products"
ATTENTION = "attention"
QUANTIZE = "quantize, scales, bias"
REST = "rest"
_MATRIX = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"}
_MATRIX |= {"DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
_WHOLE = {  # kernels that are a part by themselves, whatever node they come from
    "QAttention": "attention with its q, k, v products",
    "Attention": "attention with its q, k, v products",
    "MultiHeadAttention": ATTENTION,
    "Softmax": ATTENTION,
    "Gelu": "GELU",
    "BiasGelu": "GELU",
    "FastGelu": "GELU",
    "LayerNormalization": "norms",
    "SkipLayerNormalization": "norms",
    "QuantizeLinear": QUANTIZE,
    "DynamicQuantizeLinear": QUANTIZE,
}
_NODES = {"scaled_dot_product_attention": ATTENTION, "gelu": "GELU", "layer_norm": "norms", "linear": QUANTIZE}


def build(job: EncoderJob, option: str) -> Built:
    """option: the recipe. facts: "operators" and "parts", each name -> (nodes in a call, milliseconds of a call)."""
    plain = session.options

    def profiling(threads: int, entries: Any = None) -> Any:
        chosen = plain(threads, entries)
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(job.path / "profile")
        return chosen

    session.options = profiling  # of this process, which does nothing else
    built = qfx_encoder.build(job, option)
    for _ in range(CALLS):
        built.time()
    names = [s.end_profiling() for s in gc.get_objects() if isinstance(s, onnxruntime.InferenceSession)]
    events = [event for name in names for event in json.loads(Path(name).read_text(encoding="utf-8"))]
    for name in names:
        Path(name).unlink()
    facts = {"operators": by_operator(events, CALLS), "parts": by_part(events, CALLS)}
    return Built(built.time, None, built.size, qfx.__version__, facts)


def by_operator(events: list[dict[str, Any]], calls: int) -> dict[str, tuple[float, float]]:
    """Of the last `calls` runs in a profile: each operator's nodes in a run, and its milliseconds."""
    return _summed(events, calls, lambda operator, _: operator)


def by_part(events: list[dict[str, Any]], calls: int) -> dict[str, tuple[float, float]]:
    """The same by what the nodes are for; products inside of attention count as attention."""
    return _summed(events, calls, part)


def part(operator: str, node: str) -> str:
    """What a kernel is for. node: `<FX node>/<number>`, with more around it where ONNX Runtime has fused it."""
    if operator in _WHOLE:
        return _WHOLE[operator]
    if ATTENTION in node:
        return ATTENTION
    if operator in _MATRIX:
        return PRODUCTS
    return next((name for start, name in _NODES.items() if node.startswith(start)), REST)


def _summed(
    events: list[dict[str, Any]], calls: int, group: Callable[[str, str], str]
) -> dict[str, tuple[float, float]]:
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            runs[event["args"]["op_name"], event["name"].removesuffix(KERNEL)].append(event["dur"] / 1e3)
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for (operator, node), durations in runs.items():
        last, name = durations[-calls:], group(operator, node)
        count, ms = found[name]
        found[name] = (count + 1, ms + sum(last) / len(last))
    return dict(found)
