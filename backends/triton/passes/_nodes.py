"""What the passes share: quantizing nodes, equal operands, and which nodes of the graph before a node computes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import qfx.backends.triton.quantize_rows  # noqa: F401  (registers the ops)
from qfx import graph
from qfx.backends.triton import row_codes
from qfx.format import Format
from qfx.graph import is_call
from qfx.passes._build import call, plain
from qfx.passes._match import arguments, known, same_size

_COMPUTES = "qfx_triton_computes"
_OPS = torch.ops.qfx_triton


@dataclass(frozen=True)
class Quantize:
    """A node that makes codes of x. scale, zero: of a static format, else None."""

    node: fx.Node
    x: fx.Node
    smooth: fx.Node | None
    scale: fx.Node | None
    zero: fx.Node | None
    format: Format

    @classmethod
    def of(cls, node: Any) -> Quantize | None:
        """The parts of a call of quantize_dynamic or quantize_static; None for other nodes."""
        if not is_call(node, _OPS.quantize_dynamic.default, _OPS.quantize_static.default):
            return None
        given = arguments(node)
        static = (given.get("scale"), given.get("zero"))
        return cls(node, given["x"], given["smooth"], *static, Format.parse(given["format"]))

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads besides x."""
        return [n for n in (self.smooth, self.scale, self.zero) if n is not None]

    def reason_against_fusing(self) -> str | None:
        """Why no op makes its codes together with x, or None."""
        value = graph.val(self.x)
        k = known(value.shape[-1]) if value.dim() else None
        if not isinstance(k, int):
            return "x has no known width"
        if value.dtype not in row_codes.FLOATS:
            return f"x is {value.dtype}"
        return row_codes.reason_against_rows(self.format)

    def read_from(self, gm: fx.GraphModule, fused: fx.Node) -> None:
        """Let the readers of this node's results read those of a fused op, which begin with the same, and erase it."""
        if is_call(self.node, _OPS.quantize_static.default):
            with gm.graph.inserting_after(fused):
                codes = plain(call(gm, operator.getitem, fused, 0, like=self.node))
            self.node.replace_all_uses_with(codes)
        else:
            self.node.replace_all_uses_with(fused)
        gm.graph.erase_node(self.node)


def same(gm: fx.GraphModule, one: Any, other: Any) -> bool:
    """Are two operands the same: one node, or constants of equal values (torch.equal)?"""
    if one is other or not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return bool(one is other or one == other)
    if not one.op == other.op == "get_attr":
        return False
    a, b = (graph.get_tensor(gm, str(n.target)) for n in (one, other))
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device or a.device.type == "meta":
        return False
    return torch.equal(a, b)


def position(order: dict[fx.Node, int], inputs: Iterable[fx.Node], readers: Iterable[fx.Node]) -> fx.Node | None:
    """The first reader, before which a node with these inputs can stand; None where an input comes after it."""
    first = min(readers, key=order.__getitem__, default=None)
    if first is None or any(n.op != "get_attr" and order[n] >= order[first] for n in inputs):
        return None
    return first


def bring_before(order: dict[fx.Node, int], inputs: Iterable[fx.Node], place: fx.Node) -> None:
    """Move the constants among these inputs before `place` where they stand after it."""
    for node in dict.fromkeys(inputs):
        if node.op == "get_attr" and order[node] > order[place]:
            place.prepend(node)


def take(gm: fx.GraphModule, old: fx.Node, fused: fx.Node, index: int) -> None:
    """Let the readers of `old` read result number `index` of a fused op."""
    with gm.graph.inserting_after(fused):
        part = plain(call(gm, operator.getitem, fused, index, like=old))
    old.replace_all_uses_with(part)


def computed(node: fx.Node) -> tuple[str, ...]:
    """Names of the nodes of the graph before any of these passes that a node computes: its own where nothing is noted.

    For the report: what executes the node executes them.
    """
    return tuple(node.meta.get(_COMPUTES, (node.name,)))


def note_computed(node: fx.Node, *old: fx.Node) -> None:
    """Note that a new node computes what these did."""
    node.meta[_COMPUTES] = tuple(dict.fromkeys(name for n in old for name in computed(n)))


def are_alike(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Have q, k, v [B, H, S, D] of attention one batch, and k and v as many heads and tokens, as kernels take them?

    No: one sequence or one head of values that torch repeats for several, or that a mask with a batch makes several.
    """
    pairs = [(q.shape[0], k.shape[0]), *zip(k.shape[:3], v.shape[:3], strict=True)]
    if any(same_size(a, 1) != same_size(b, 1) for a, b in pairs):
        return False
    if mask is None or mask.dim() < 4:
        return mask is None or mask.dim() > 0
    return same_size(mask.shape[0], 1) or not same_size(q.shape[0], 1)


def gives_views(node: fx.Node) -> bool:
    """Whether what a node gives may share memory with what it reads. Operators that torch takes apart (einsum) may give
    views and do not say so."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return node.target._can_decompose() or any(a.alias_info is not None for a in node.target._schema.arguments)


def is_row_vector(node: Any, x: fx.Node) -> bool:
    """Is it None or a tensor [K] for x [.., K]?"""
    value = graph.val(node)
    return node is None or (isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == graph.val(x).shape[-1])
