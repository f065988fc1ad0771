"""What ONNX Runtime really executes: its optimized graph read back, told per FX node."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime as ort

from qfx.backends.onnx.branch import every_node
from qfx.backends.onnx.session import DISABLED
from qfx.backends.onnx.session_options import options
from qfx.backends.onnx.slow_forms import SlowForm, slow_forms
from qfx.errors import first_line

if TYPE_CHECKING:
    from qfx.backends.onnx.graph import StageModel

_GHOST = "weights"
_ROUNDED = 4  # MatMulNBits' accuracy level that rounds activations to 8 bits
# Kernels that do the work of a node; what stands around them is told only where a node has none of these.
_MAIN = {
    "MatMulIntegerToFloat": "u8 x s8",
    "DynamicQuantizeMatMul": "u8 x s8",
    "MatMulInteger": "u8 x s8",
    "FusedMatMul": "f32",
    "MatMul": "f32",
    "Gemm": "f32",
    "FusedGemm": "f32",
    "Conv": "f32",
    "FusedConv": "f32",
    "QAttention": "u8 x s8, attention f32",
    "MultiHeadAttention": "f32",
    "GroupQueryAttention": "f32",
}


def inspected(
    built: StageModel, names: list[str], integers: Collection[str], floats: Collection[str] = ()
) -> tuple[dict[str, str], list[SlowForm]]:
    """(FX node name -> its kernels in the optimized graph, slow forms among them). "" where nothing of it is left.

    integers: the nodes that shall be products of integers; floats: those whose activations shall stay floats.
    """
    try:
        graph = optimized_graph(built)
    except Exception as error:  # noqa: BLE001  (OSError, ONNX Runtime's own, protobuf's; only the report needs them)
        what = f"{type(error).__name__}: {first_line(error)}"
        reason = f"ONNX Runtime; its kernels are not known, its graph could not be written to look at: {what}"
        return dict.fromkeys(names, reason), []
    return _kernels(built, graph, names), slow_forms(graph, integers, floats)


def _kernels(built: StageModel, graph: onnx.GraphProto, names: list[str]) -> dict[str, str]:
    codes = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.UINT8: "uint8"}
    integers = {t.name: codes[t.data_type] for t in graph.initializer if t.data_type in codes}
    unsigned = {name for name, kind in integers.items() if kind == "uint8"}
    found: dict[str, list[str]] = {name: [] for name in names}
    main: dict[str, list[str]] = {name: [] for name in names}
    for node in every_node(graph.node):
        owner = node.name.split("/")[0]
        if owner not in found:
            continue
        found[owner].append(node.op_type)
        if node.op_type in ("MatMulNBits", "QMoE"):
            main[owner].append(_nbits(node))
        elif node.op_type == "GatherBlockQuantized":
            main[owner].append(f"GatherBlockQuantized {_attributes(node)['bits']}-bit")
        elif node.op_type in _MAIN:
            main[owner].append(f"{node.op_type} {_operands(node, unsigned)}")
        elif node.op_type == "Gather" and node.input[0] in integers:
            main[owner].append(f"Gather {integers[node.input[0]]}")
    for name, owner in built.fused.items():
        main[name] = main.get(name) or main[owner]
    return {name: _text(main[name] or found[name]) for name in [*names, *(n for n in main if n not in found)]}


def _operands(node: onnx.NodeProto, unsigned: Collection[str]) -> str:
    """What a kernel multiplies; where s8 weights would overflow ONNX Runtime holds them as u8."""
    text = _MAIN[node.op_type]
    return text.replace("s8", "u8") if node.input[1] in unsigned else text


def _nbits(node: onnx.NodeProto) -> str:
    attrs = _attributes(node)
    inner = f", {'8-bit' if attrs.get('accuracy_level') == _ROUNDED else 'float'} activations"
    bits = attrs.get("bits", attrs.get("expert_weight_bits"))
    return f"{node.op_type} {bits}-bit, blocks of {attrs['block_size']}{inner}"


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


def _text(kernels: list[str]) -> str:
    """Each kernel once, with its count."""
    return " + ".join(f"{kernel} (x{n})" if n > 1 else kernel for kernel, n in Counter(kernels).items())


def optimized_graph(built: StageModel) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a model.

    A sparse file stands in for large weights: kernels depend on their types and shapes only, and on whether integers
    are so large that their sums could overflow, as the first byte of the file is.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = [t.numel() * t.element_size() for t in built.weights.values()]
        with (Path(folder) / _GHOST).open("wb") as ghost:
            ghost.write(b"\x7f")
            ghost.truncate(max(sizes, default=0))
        chosen = options(1)
        path = Path(folder) / "optimized.onnx"
        chosen.optimized_model_filepath = str(path)
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        chosen.add_session_config_entry("session.disable_prepacking", "1")
        ort.InferenceSession(
            built.model.SerializeToString(), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
        return onnx.load(str(path), load_external_data=False).graph
