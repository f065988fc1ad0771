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

Runs before the rules, on all segments or none. Sums of channels stay the same bit for bit; the bias is added before the
result is rounded to its dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton.device import Device
from qfx.backends.triton.mixed_rows import Piece, pack_mixed, reason_against
from qfx.backends.triton.passes._nodes import computed, note_computed
from qfx.backends.triton.rules_linear import DTYPES, quantized
from qfx.backends.triton.site import Site, once
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, take_place

_aten = torch.ops.aten
_OPS = torch.ops.qfx_triton
_ALIKE = ("x", "x_scale", "x_zero", "smooth", "x_format")


def join_rows(gm: fx.GraphModule, device: Device, kernels: dict[str, str]) -> bool:
    """See the module. kernels: by node name, told of the nodes that are joined."""
    count = 0
    for node in list(gm.graph.nodes):
        found = _segments(node)
        if found is None:
            continue
        linears, pieces = found
        given = [m.arguments(linear) for linear in linears]
        k = graph.val(given[0]["x"]).shape[-1]
        formats = [one["w_format"] for one in given]
        fixed = all(n.op == "get_attr" for one in given for n in (one["w"], one["w_scale"], one["w_zero"]) if n)
        if not fixed or not isinstance(k, int) or reason_against(given[0]["x_format"], formats, device, k):
            continue
        end = _with_bias(node) or node
        names = [name for n in (*linears, *node.all_input_nodes, node, end) for name in computed(n)]
        kernel = f"{_put(Site(gm, end, device), given, pieces, k)} of {','.join(formats)} (Triton)"
        kernels.update(dict.fromkeys(names, kernel))
        count += 1
    if count:
        graph.clean(gm)
    return matched(gm, "join_rows", count)


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


def _put(site: Site, given: list[dict[str, Any]], pieces: list[Piece], k: int) -> str:
    """The product in place of the site's node; its name."""
    first, gm = given[0], site.gm
    x_format, formats = first["x_format"], ",".join(one["w_format"] for one in given)
    rest: tuple[Any, ...]
    weight = once(
        site,
        f"mixed {[str(one['w'].target) for one in given]} {pieces} {bool(x_format)}",
        lambda: pack_mixed([_stored(site, one) for one in given], pieces, k, floats=not x_format),
    )
    bias = site.node.args[1] if is_call(site.node, _aten.add.Tensor) else None
    with gm.graph.inserting_before(site.node):
        if x_format:
            codes = quantized(site, first["x"], first["smooth"], first["x_scale"], first["x_zero"], x_format)
            dtype = DTYPES[graph.val(first["x"]).dtype]
            rest = (weight, bias, None, x_format, formats, k, "", dtype)
            new = call(gm, _OPS.gemm_mixed.default, *codes, *rest, like=site.node)
        else:
            rest = (weight, bias, None, None, None, first["smooth"], "", formats, "")
            new = call(gm, _OPS.linear_mixed.default, first["x"], *rest, like=site.node)
    note_computed(new, site.node)
    take_place(site.node, new)
    return f"gemm_mixed {x_format}" if x_format else "linear_mixed"


def _stored(site: Site, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, str]:
    codes, scale, zero = (site.tensor(given[name]) for name in ("w", "w_scale", "w_zero"))
    assert codes is not None and scale is not None
    return codes, scale, zero, given["w_format"]
