"""The segments of a weight of several formats, one product each, become one product of rows of several widths.

    %linear_1: f16[2,128] = qfx.linear(%x, @fc.rows0_codes, @fc.rows0_scale, ..., i8/tok, i4/ch)
    %linear_2: f16[2,64] = qfx.linear(%x, @fc.rows1_codes, @fc.rows1_scale, ..., i8/tok, i8/ch)
    %slice: f16[2,64] = aten.slice(%linear_1, 1, 0, 64)
    %slice_1: f16[2,64] = aten.slice(%linear_1, 1, 64, 128)
    %cat: f16[2,192] = aten.cat([%slice, %linear_2, %slice_1], 1)
    %linear: f16[2,192] = aten.add.Tensor(%cat, @fc.bias)
    ->
    %quantize_dynamic = qfx_triton.quantize_dynamic(%x, None, i8/tok)
    %linear: f16[2,192] = qfx_triton.gemm_mixed(%quantize_dynamic[0], ..., @fc.bias, None, i8/tok, i4/ch,i8/ch, ...)

Runs before the rules, on all segments or none. Several such weights that read one input (q, k and v) become one
product, whose result is cut. Sums of channels stay the same bit for bit; the bias is added before the
result is rounded to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton.device import Device
from qfx.backends.triton.mixed_rows import Piece, pack_mixed, reason_against
from qfx.backends.triton.passes._nodes import bring_before, computed, note_computed
from qfx.backends.triton.rules_linear import DTYPES, quantized
from qfx.backends.triton.site import Site, once
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, plain, take_place

_aten = torch.ops.aten
_OPS = torch.ops.qfx_triton
_ALIKE = ("x", "x_scale", "x_zero", "smooth", "x_format")


@dataclass(frozen=True)
class _Join:
    """Linears whose results, cut into pieces, `node` joins, and the addition of a constant bias, or the node itself."""

    linears: list[fx.Node]
    pieces: list[Piece]
    node: fx.Node
    end: fx.Node

    @property
    def given(self) -> list[dict[str, Any]]:
        """The arguments of the linears."""
        return [m.arguments(linear) for linear in self.linears]

    @property
    def bias(self) -> Any:
        """The node of the bias, or None."""
        return None if self.end is self.node else self.end.args[1]

    @property
    def names(self) -> list[str]:
        """Names of all that it takes the place of."""
        old = (*self.linears, *self.node.all_input_nodes, self.node, self.end)
        return [name for n in old for name in computed(n)]


def join_rows(gm: fx.GraphModule, device: Device, kernels: dict[str, str]) -> bool:
    """See the module. kernels: by node name, told of the nodes that are joined."""
    groups: dict[tuple[Any, ...], list[_Join]] = {}
    for node in gm.graph.nodes:
        found = _segments(node)
        if found is not None and _reason(join := _Join(*found, node, _with_bias(node) or node)) is None:
            groups.setdefault(tuple(join.given[0][name] for name in _ALIKE), []).append(join)
    count = 0
    for group in groups.values():
        whole = len(group) > 1 and _reason(group[0], group) is None
        for joins in [group] if whole else [[join] for join in group]:
            names, formats = [n for join in joins for n in join.names], ",".join(_formats(joins))
            kernels.update(dict.fromkeys(names, f"{_put(gm, device, joins)} of {formats} (Triton)"))
            count += 1
    if count:
        graph.clean(gm)
    return matched(gm, "join_rows", count)


def _reason(join: _Join, joins: Sequence[_Join] = ()) -> str | None:
    """Why the kernel does not take a join, or several at once; None."""
    given = join.given
    k = graph.val(given[0]["x"]).shape[-1]
    if not isinstance(k, int):
        return "its width is not known"
    if graph.val(given[0]["x"]).dtype not in DTYPES:
        return "its input is of another dtype"
    held = (one[name] for one in given for name in ("w", "w_scale", "w_zero") if one[name] is not None)
    if any(n.op != "get_attr" for n in held):
        return "a weight is computed"
    return reason_against(given[0]["x_format"], _formats(joins or [join]), k)


def _formats(joins: Sequence[_Join]) -> list[str]:
    return [one["w_format"] for join in joins for one in join.given]


def _segments(node: fx.Node) -> tuple[list[fx.Node], list[Piece]] | None:
    """The linears whose results a node joins along the last axis, and what it takes of each, in order.

    None where it joins anything else, or the linears read different inputs or have a bias or other readers.
    """
    if not is_call(node, _aten.cat.default) or len(node.args) < 2:
        return None
    parts: Any = node.args[0]
    axis = node.args[1]
    if not isinstance(parts, list | tuple) or axis not in (-1, m.rank(node) - 1):
        return None
    linears: dict[fx.Node, int] = {}
    pieces = []
    for part in parts:
        made, start, stop = _cut(part, m.rank(node) - 1)
        if not is_call(made, torch.ops.qfx.linear.default):
            return None
        pieces.append((linears.setdefault(made, len(linears)), start, stop))
    given = [m.arguments(linear) for linear in linears]
    alike = all(one[name] is given[0][name] or one[name] == given[0][name] for one in given for name in _ALIKE)
    inner = {*linears, *(part for part in parts if part not in linears)}
    own = all(user is node or user in inner for n in inner for user in n.users)
    whole = sum(stop - start for _, start, stop in pieces) == m.shape(node)[-1]
    if len(linears) < 2 or not (alike and own and whole) or any(one["bias"] is not None for one in given):
        return None
    return list(linears), pieces


def _cut(part: Any, axis: int) -> tuple[Any, int, int]:
    """What a node is a slice of along the last axis, from where to where; a node itself is all of it."""
    if is_call(part, _aten.slice.Tensor) and len(part.args) == 4 and part.args[1] in (axis, -1):
        value, _, start, stop = part.args
        return value, int(start), min(int(stop), int(m.shape(value)[-1]))
    return part, 0, int(m.shape(part)[-1]) if isinstance(part, fx.Node) else 0


def _with_bias(node: fx.Node) -> fx.Node | None:
    """The addition of a constant vector that is the only reader of a node."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if not is_call(user, _aten.add.Tensor) or user.args[0] is not node or user.kwargs or len(user.args) != 2:
        return None
    bias = user.args[1]
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    fits = m.shape(bias) == m.shape(node)[-1:] and graph.val(user).dtype == graph.val(node).dtype
    return user if fits else None


def _put(gm: fx.GraphModule, device: Device, joins: list[_Join]) -> str:
    """One product in place of joins that read one input, whose result is cut where there are several; its name."""
    end, given = joins[0].end, [one for join in joins for one in join.given]
    first, site = given[0], Site(gm, end, device)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    bring_before(order, [n for n in (first["x_scale"], first["x_zero"], first["smooth"], joins[0].bias) if n], end)
    offset, pieces = 0, []
    for join in joins:
        pieces += [(offset + i, start, stop) for i, start, stop in join.pieces]
        offset += len(join.linears)
    x_format, k = first["x_format"], graph.val(first["x"]).shape[-1]
    weight = once(
        site,
        f"mixed {[str(one['w'].target) for one in given]} {pieces} {bool(x_format)}",
        lambda: pack_mixed([_stored(site, one) for one in given], pieces, k, floats=not x_format),
    )
    bias = joins[0].bias if len(joins) == 1 else site.constant(_biases(site, joins))
    rest: tuple[Any, ...]
    formats = ",".join(_formats(joins))
    with gm.graph.inserting_before(end):
        if x_format:
            codes = quantized(site, first["x"], first["smooth"], first["x_scale"], first["x_zero"], x_format)
            rest = (weight, bias, None, x_format, formats, k, "", DTYPES[graph.val(first["x"]).dtype])
            new = call(gm, _OPS.gemm_mixed.default, *codes, *rest, like=end)
        else:
            rest = (weight, bias, None, first["smooth"], formats, "")
            new = call(gm, _OPS.linear_mixed.default, first["x"], *rest, like=end)
    note_computed(new, *(join.end for join in joins))
    _cut_up(gm, new, joins)
    return f"gemm_mixed {x_format}" if x_format else "linear_mixed"


def _cut_up(gm: fx.GraphModule, new: fx.Node, joins: list[_Join]) -> None:
    """Each join reads its part of the product."""
    if len(joins) == 1:
        take_place(joins[0].end, new)
        return
    start, axis = 0, m.rank(new) - 1
    for join in joins:
        stop = start + m.shape(join.node)[-1]
        with gm.graph.inserting_before(join.end):
            cut = plain(call(gm, _aten.slice.Tensor, new, axis, start, stop, like=join.end))
        take_place(join.end, cut)
        start = stop


def _biases(site: Site, joins: list[_Join]) -> Tensor | None:
    """The biases of all, zeros where one has none; None where none has any."""
    found = [site.tensor(join.bias) for join in joins]
    there = next((bias for bias in found if bias is not None), None)
    if there is None:
        return None
    sizes = [int(m.shape(join.node)[-1]) for join in joins]
    return torch.cat([there.new_zeros(n) if bias is None else bias for bias, n in zip(found, sizes, strict=True)])


def _stored(site: Site, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, str]:
    codes, scale, zero = (site.tensor(given[name]) for name in ("w", "w_scale", "w_zero"))
    assert codes is not None and scale is not None
    return codes, scale, zero, given["w_format"]
