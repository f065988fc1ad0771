"""Rows of the report from a graph: what every linear-like node, embedding and attention asked for and what runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx import annotation, graph
from qfx.errors import Note
from qfx.format import Format

KINDS = {
    "aten::linear": "linear",
    "qfx::linear": "linear",
    "aten::embedding": "embedding",
    "qfx::embedding": "embedding",
    "qfx::grouped_linear": "experts",
    "qfx::grouped_linear_quant": "experts",
    "aten::scaled_dot_product_attention": "attention",
    "qfx::attention": "attention",
    "aten::conv1d": "conv",
    "aten::conv2d": "conv",
    "aten::conv3d": "conv",
    "aten::convolution": "conv",
    "aten::addmm": "matmul",
    "aten::mm": "matmul",
    "aten::bmm": "matmul",
    "aten::matmul": "matmul",
    "aten::einsum": "matmul",
    "qfx::dequantize": "dequantize",
}


@dataclass(frozen=True)
class Row:
    """One node.

    node: FQN. op: linear, embedding, conv, attention, experts. asked: formats by role ("x=i8/tok w=i8/ch"), "" where
    the recipe asks for nothing. kernel: what executes it. reason: why that differs from what was asked, else "".
    elements, bytes_before, bytes_after: of the weight; scales and zero points are counted. macs: multiply-accumulates
    of one call at the traced shapes. sqnr_db: of the node's output against float, None where it was not measured.
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
    as_asked: bool = True  # no reason, or one that changes neither format nor result

    @property
    def quantized(self) -> bool:
        """Whether the node has a weight in the format that was asked."""
        return "w=" in self.asked and self.as_asked


def graph_rows(gm: fx.GraphModule, kernels: Mapping[str, str], notes: Iterable[Note]) -> list[Row]:
    """One row for each node of KINDS in a quantized (or float) graph; `kernels` says what executes a node, by name."""
    told: dict[str, Note] = {}
    for note in sorted(notes, key=lambda n: n.minor):
        told.setdefault(note.node, note)
    rows = []
    seen: set[str] = set()
    for node in gm.graph.nodes:
        kind = KINDS.get(graph.schema_name(node)) if node.op == "call_function" else None
        if kind is None or (kind == "matmul" and not _reads_parameter(node)):
            continue
        rows.append(_row(gm, node, kind, kernels.get(node.name, ""), told, seen))
    return rows


def _row(gm: fx.GraphModule, node: fx.Node, kind: str, kernel: str, told: Mapping[str, Note], seen: set[str]) -> Row:
    fqn = graph.fqn_of(node)
    note = told.get(fqn)
    weight = graph.weight_of(node)
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
        macs=_macs(node, elements),
        shared=shared,
        as_asked=note is None or note.minor,
    )


def asked_of(node: fx.Node) -> str:
    """The formats a node asks for: its annotation, or those that a qfx op carries ("x=i8/tok w=i8/ch")."""
    told = annotation.text(node)
    if told or not graph.schema_name(node).startswith("qfx::"):
        return told
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    pairs = (("x", given.get("x_format")), ("w", given.get("w_format")))
    return " ".join(f"{role}={fmt}" for role, fmt in pairs if fmt)


def _bytes(gm: fx.GraphModule, node: fx.Node, weight: fx.Node) -> tuple[int, int, int]:
    """Elements, bytes as float (in the type of the activations) and bytes as stored."""
    tensor = graph.get_tensor(gm, str(weight.target))
    if not graph.schema_name(node).startswith("qfx::") or "w_format" not in _names(node):
        size = tensor.numel() * tensor.element_size()
        return tensor.numel(), size, size
    given = dict(zip(_names(node), node.args, strict=False))
    fmt = Format.parse(str(given["w_format"]))
    last = _last_dim(node, given)
    shape = (*tensor.shape[:-1], last)
    elements = torch.Size(shape).numel()
    value = node.meta["val"]
    return elements, elements * value.element_size(), fmt.nbytes(shape)


def _names(node: fx.Node) -> list[str]:
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


def _last_dim(node: fx.Node, given: Mapping[str, Any]) -> int:
    if "dim" in given:
        return int(given["dim"])
    if "last_dim" in given:
        return int(given["last_dim"])
    return int(graph.val(given["x"]).shape[-1])


def _macs(node: fx.Node, elements: int) -> int:
    """Multiply-accumulates of one call: weight elements times rows, at the sizes of the traced call."""
    if KINDS[graph.schema_name(node)] not in ("linear", "experts", "conv", "matmul") or not elements:
        return 0
    value = node.meta["val"]
    if KINDS[graph.schema_name(node)] == "conv":
        outputs = [_hint(s) for s in (value.shape[0], *value.shape[2:])]
    else:
        outputs = [_hint(s) for s in value.shape[:-1]]
    rows = 1
    for size in outputs:
        rows *= size
    return rows * elements


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        hint = size.node.hint if size.node.has_hint() else 1
        return int(hint)
    return int(size)


def _reads_parameter(node: fx.Node) -> bool:
    return any(isinstance(a, fx.Node) and (a.op == "get_attr" or _behind(a)) for a in node.args)


def _behind(node: fx.Node) -> bool:
    while node.op == "call_function" and graph.op_name(node) in ("t", "transpose", "permute", "view", "reshape"):
        inner = node.args[0]
        if not isinstance(inner, fx.Node):
            return False
        node = inner
    return node.op == "get_attr"
