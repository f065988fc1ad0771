"""Rows of the report from a graph: what every linear-like node, embedding and attention asked for and what runs it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qfx import annotation, graph
from qfx.errors import Note
from qfx.format import Format
from qfx.live.segments import asked, number_of

KINDS = {
    "aten::linear": "linear",
    "qfx::linear": "linear",
    "aten::embedding": "embedding",
    "qfx::embedding": "embedding",
    "qfx::grouped_linear": "experts",
    "qfx::grouped_linear_quant": "experts",
    "aten::scaled_dot_product_attention": "attention",
    "qfx::attention": "attention",
    "qfx::quantized_attention": "attention",
    "aten::conv1d": "conv",
    "aten::conv2d": "conv",
    "aten::conv3d": "conv",
    "aten::convolution": "conv",
    "aten::conv_transpose1d": "conv",
    "aten::conv_transpose2d": "conv",
    "aten::conv_transpose3d": "conv",
    "aten::addmm": "matmul",
    "aten::baddbmm": "matmul",
    "aten::mm": "matmul",
    "aten::mv": "matmul",
    "aten::bmm": "matmul",
    "aten::matmul": "matmul",
    "aten::einsum": "matmul",
    "qfx::dequantize": "dequantize",
}
_ADDING = ("aten::addmm", "aten::baddbmm")


@dataclass(frozen=True)
class Row:
    """One node.

    node: FQN. op: a kind of KINDS; "matmul" is a product with a parameter that is no linear. asked: formats by role
    ("x=i8/tok w=i8/ch"), "" where the recipe asks for nothing. kernel: what executes it. reason: why that differs from
    what was asked, else "". elements, bytes_before, bytes_after: of the weight; scales and zero points are counted.
    macs: multiply-accumulates of one call at the traced shapes. sqnr_db: of the node's output against float, None where
    it was not measured.
    """

    node: str
    op: str
    asked: str = ""
    kernel: str = ""
    reason: str = ""
    elements: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int = 0
    sqnr_db: float | None = None
    shared: bool = False  # the weight's bytes are counted at another row
    as_asked: bool = True  # a reason, where there is one, concerns the input or the kernel, not the weight's format

    @property
    def quantized(self) -> bool:
        """Whether the node has a weight in the format that was asked."""
        return "w=" in self.asked and self.as_asked


def graph_rows(gm: fx.GraphModule, kernels: Mapping[str, str], notes: Iterable[Note]) -> list[Row]:
    """One row for each node of KINDS in a quantized or float graph, products of activations left out.

    kernels: what executes a node, by its name. notes: why a node is not as asked, by FQN; major ones win.
    """
    told: dict[str, Note] = {}
    for note in sorted(notes, key=lambda n: n.minor):
        told.setdefault(note.node, note)
    rows: list[Row] = []
    seen: set[str] = set()
    parts: dict[str, list[tuple[str, int]]] = {}  # by name: (format, size) of the weight's segments
    for node in gm.graph.nodes:
        kind = KINDS.get(graph.schema_name(node)) if node.op == "call_function" else None
        if kind is None or (kind == "matmul" and _weight_of(node) is None):
            continue
        row = _row(gm, node, kind, kernels.get(node.name, ""), told, seen)
        segment = segment_of(node)
        if segment is None:
            rows.append(row)
        elif segment[1] == 0:
            parts[row.node] = [segment[2]]
            rows.append(replace(row, asked=_asked_of_segments(row, segment[0], parts[row.node])))
        else:
            parts[row.node].append(segment[2])
            at = max(i for i, r in enumerate(rows) if r.node == row.node)
            joined = _joined(rows[at], row)
            rows[at] = replace(joined, asked=_asked_of_segments(joined, segment[0], parts[row.node]))
    return rows


def segment_of(node: fx.Node) -> tuple[int, int, tuple[str, int]] | None:
    """(axis, number, (format, size)) of an op that computes a segment of a weight; None for other nodes."""
    weight = graph.weight_of(node) if graph.schema_name(node) == "qfx::linear" else None
    found = None if weight is None else number_of(str(weight.target))
    if found is None:
        return None
    given = dict(zip(_names(node), node.args, strict=False))
    size = graph.val(given["x"] if found[0] else node).shape[-1]
    return *found, (str(given["w_format"]), int(size))


def _asked_of_segments(row: Row, axis: int, parts: list[tuple[str, int]]) -> str:
    words = [word for word in row.asked.split(" ") if not word.startswith("w=")]
    return " ".join([*words, f"w={asked(parts, axis)}"])


def _joined(first: Row, more: Row) -> Row:
    """One row for the segments of one weight."""
    kernels = dict.fromkeys(k for row in (first, more) for k in row.kernel.split(" + ") if k)
    return replace(
        first,
        kernel=" + ".join(kernels),
        reason=first.reason or more.reason,
        elements=first.elements + more.elements,
        bytes_before=first.bytes_before + more.bytes_before,
        bytes_after=first.bytes_after + more.bytes_after,
        macs=first.macs + more.macs,
        shared=first.shared and more.shared,
        as_asked=first.as_asked and more.as_asked,
    )


def _row(gm: fx.GraphModule, node: fx.Node, kind: str, kernel: str, told: Mapping[str, Note], seen: set[str]) -> Row:
    fqn = graph.fqn_of(node)
    note = told.get(fqn)
    weight = _weight_of(node)
    elements = before = after = 0
    shared = False
    if weight is not None:
        shared = str(weight.target) in seen
        seen.add(str(weight.target))
        elements, before, after = _bytes(gm, node, weight)
    return Row(
        node=fqn,
        op=kind,
        asked=asked_of(node),
        kernel=kernel,
        reason=note.reason if note else "",
        elements=elements,
        bytes_before=before,
        bytes_after=after,
        macs=_macs(node, kind),
        shared=shared,
        as_asked=note is None or note.minor or "w_format" in _names(node),
    )


def asked_of(node: fx.Node) -> str:
    """The formats a node asks for: its annotation, or those that a qfx op carries ("x=i8/tok w=i8/ch")."""
    told = annotation.text(node)
    if told or not graph.schema_name(node).startswith("qfx::"):
        return told
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    pairs = [(role, given.get(f"{role}_format")) for role in annotation.ALL_ROLES]
    return " ".join(f"{role}={fmt}" for role, fmt in pairs if fmt)


def _bytes(gm: fx.GraphModule, node: fx.Node, weight: fx.Node) -> tuple[int, int, int]:
    """Elements, bytes as float (in the type of the activations) and bytes as stored."""
    tensor = graph.get_tensor(gm, str(weight.target))
    if not graph.schema_name(node).startswith("qfx::") or "w_format" not in _names(node):
        size = tensor.numel() * tensor.element_size()
        return tensor.numel(), size, size
    given = dict(zip(_names(node), node.args, strict=False))
    fmt = Format.parse(str(given["w_format"]))
    last = _last_dim(given)
    shape = (*tensor.shape[:-1], last)
    elements = torch.Size(shape).numel()
    value = node.meta["val"]
    return elements, elements * value.element_size(), fmt.nbytes(shape)


def _names(node: fx.Node) -> list[str]:
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


def _last_dim(given: Mapping[str, Any]) -> int:
    if "dim" in given:
        return int(given["dim"])
    if "last_dim" in given:
        return int(given["last_dim"])
    return int(graph.val(given["x"]).shape[-1])


def _weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter that a node multiplies, on whichever side it stands."""
    name = graph.schema_name(node)
    if KINDS[name] != "matmul":
        return graph.weight_of(node)
    operands = node.args[1:] if name in _ADDING else node.args  # without what is added
    found = (graph.parameter_behind(operand) for operand in pytree.tree_leaves(operands))
    return next((weight for weight in found if weight is not None), None)


def _macs(node: fx.Node, kind: str) -> int:
    """Multiply-accumulates at the sizes of the traced call; 0 where there are none, or not known (einsum)."""
    name = graph.schema_name(node)
    if kind == "conv":
        turned = "transpose" in name or (name == "aten::convolution" and bool(node.args[6]))
        each = _numel(graph.val(node.args[1]).shape[1:])
        return each * _numel(graph.val(node.args[0] if turned else node).shape)
    if kind not in ("linear", "experts", "matmul") or name == "aten::einsum":
        return 0
    left = graph.val(node.args[1 if name in _ADDING else 0])
    return _numel(node.meta["val"].shape) * _hint(left.shape[-1])


def _numel(shape: Iterable[Any]) -> int:
    return math.prod(_hint(size) for size in shape)


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        hint = size.node.hint if size.node.has_hint() else 1
        return int(hint)
    return int(size)
