"""Rules of qfx::grouped_linear_quant and qfx::grouped_linear.

%y = qfx.grouped_linear_quant(%x, ..., %offs, i8/tok, i4/g128)
->
%q = qfx_triton.quantize_dynamic(%x, None, i8/tok)
%y = qfx_triton.grouped_gemm(%q[0], %q[1], %q[2], [...], %offs, i8/tok, i4/g128, k, f16)

%y = qfx.grouped_linear_quant(%x, ..., %offs, , u4/g128)
->
%y = qfx_triton.grouped_weight_only(%x, [...], %offs, u4/g128, n)

%y = qfx.grouped_linear(%x, %w, %offs)
->
%y = qfx_triton.grouped_floats(%x, %w, %offs)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import qfx.backends.triton.experts_float  # noqa: F401  (registers its op)
from qfx import graph
from qfx.backends.triton import experts, experts_gemm
from qfx.backends.triton.rules_linear import DTYPES, quantized
from qfx.backends.triton.site import Site, Taken, once
from qfx.backends.triton.weight_only_pack import reason_against_weight
from qfx.format import Format
from qfx.passes._build import call, take_place
from qfx.passes._match import arguments

aten = torch.ops.aten
qfx_triton = torch.ops.qfx_triton


def grouped_linear_quant(site: Site) -> Taken | str:
    """qfx::grouped_linear_quant by the kernel that takes its formats, see the module."""
    given = site.given
    x, x_format, w_format = given["x"], given["x_format"], given["w_format"]
    k = graph.val(x).shape[-1]
    if not isinstance(k, int) or graph.val(given["w"]).dim() != 3:
        return "its weight has no known width"
    if graph.val(x).dtype not in DTYPES:
        return f"its input is {graph.val(x).dtype}"
    why = experts_gemm.reason_against(x_format, w_format, k) if x_format else None
    if x_format and why is None:
        return _product(site, given, k)
    if reason := reason_against_weight(w_format):
        return reason
    if why is not None:
        return _of_rounded(site, given, k, why)
    args = _weight_only(site, given, x, k)
    kernel = f"grouped_weight_only {w_format} (Triton)"
    return site.put(qfx_triton.grouped_weight_only.default, *args, kernel=kernel)


def grouped_linear(site: Site) -> Taken | str:
    """qfx::grouped_linear, experts in float, by a kernel that does not wait for the host."""
    x, w, offs = (site.given[name] for name in ("x", "w", "offs"))
    if graph.val(x).dtype not in DTYPES or graph.val(w).dtype != graph.val(x).dtype:
        return f"its input is {graph.val(x).dtype}, its weight {graph.val(w).dtype}"
    return site.put(qfx_triton.grouped_floats.default, x, w, offs, kernel="grouped_floats (Triton)")


def _product(site: Site, given: dict[str, Any], k: int) -> Taken:
    """Codes of the input, then their product."""
    x, x_format = given["x"], given["x_format"]
    weight, w_format = _packed(site, given, "grouped_gemm", experts_gemm.pack_grouped, k)
    with site.gm.graph.inserting_before(site.node):
        codes = _codes(site, x, x_format)
        rest = (weight, given["offs"], x_format, w_format, k, DTYPES[graph.val(x).dtype])
        new = call(site.gm, qfx_triton.grouped_gemm.default, *codes, *rest, like=site.node)
    take_place(site.node, new)
    return Taken(f"grouped_gemm {x_format} x {given['w_format']} (Triton)")


def _codes(site: Site, x: fx.Node, x_format: str) -> list[Any]:
    """Nodes of codes, scale and zero points of x [T, K].

    Rows that are picked from others, `y[places]`, several times each for as many experts: y is rounded, once, and the
    codes are picked. Its codes may then be those that another reader of y has, or that the norm before it gives.
    """
    fmt = Format.parse(x_format)
    picked = _picked(x) if fmt.is_integer and fmt.granularity == "tok" else None
    if picked is None:
        return list(quantized(site, x, None, None, None, x_format))
    y, places = picked
    codes, scale, zero = quantized(site, y, None, None, None, x_format)
    made = [call(site.gm, aten.index.Tensor, each, [places], like=site.node) for each in (codes, scale)]
    return [*made, call(site.gm, aten.index.Tensor, zero, [places], like=site.node) if fmt.has_zero else zero]


def _picked(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(y [M, K], places [T]) of `y[places]`."""
    if not graph.is_call(x, aten.index.Tensor):
        return None
    given = arguments(x)
    y, (places, *more) = given["self"], given["indices"]
    fits = not more and graph.val(y).dim() == 2 and graph.val(places).dim() == 1
    return (y, places) if fits and graph.val(places).dtype != torch.bool else None


def _of_rounded(site: Site, given: dict[str, Any], k: int, why: str) -> Taken:
    """Formats whose product has no kernel: torch rounds the input, the product is one of floats."""
    x, x_format, w_format = given["x"], given["x_format"], given["w_format"]
    with site.gm.graph.inserting_before(site.node):
        rounded = call(site.gm, qfx_triton.rounded_input.default, x, None, None, None, x_format, like=site.node)
        args = _weight_only(site, given, rounded, k)
        y = call(site.gm, qfx_triton.grouped_weight_only.default, *args, like=site.node)
        if graph.val(x).dtype != torch.float32:
            y = call(site.gm, torch.ops.aten._to_copy.default, y, dtype=graph.val(x).dtype, like=site.node)
    take_place(site.node, y)
    told = f"torch rounds the input and the product is one of floats, without the speed of 8 bits: {why}"
    return Taken(f"grouped_weight_only {w_format} (Triton) of an input rounded to {x_format} (torch)", told)


def _weight_only(site: Site, given: dict[str, Any], x: fx.Node, k: int) -> tuple[Any, ...]:
    """The arguments of grouped_weight_only."""
    weight, text = _packed(site, given, "grouped_weight_only", experts.pack_experts, k)
    return x, weight, given["offs"], text, graph.val(given["w"]).shape[1]


def _packed(site: Site, given: dict[str, Any], family: str, pack: Any, k: int) -> tuple[list[Any], str]:
    """Nodes of a weight in the layout of a kernel, and the format that it has then."""
    texts: dict[str, str] = site.gm.meta.setdefault("qfx_triton_formats", {})
    key = f"{family} {given['w'].target} {given['w_format']}"

    def made() -> list[Tensor]:
        tensors, texts[key] = pack(*(site.tensor(given[n]) for n in ("w", "w_scale", "w_zero")), given["w_format"], k)
        found: list[Tensor] = tensors
        return found

    return once(site, key, made), texts[key]
