"""Rules of qfx::linear and qfx::embedding.

%y = qfx.linear(%x, ..., i8/tok, i8/ch)
->
%q = qfx_triton.quantize_dynamic(%x, smooth, i8/tok)
%y = qfx_triton.gemm8(%q[0], %q[1], %q[2], [...], bias, None, i8/tok, i8/ch, "", f16)

%y = qfx.linear(%x, ..., i8/tok, i4/g128)
->
%y = qfx_triton.gemm4(%q[0], %q[1], %q[2], [...], bias, None, i8/tok, i4/g128, k, "", f16)

%y = qfx.linear(%x, ..., , u4/g128)
->
%y = qfx_triton.linear_weight_only(%x, [...], bias, smooth, u4/g128, n)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

import qfx.backends.triton.weight_only  # noqa: F401  (registers its op)
from qfx import graph
from qfx.backends.triton import embedding as tables
from qfx.backends.triton import gemm4, gemm8
from qfx.backends.triton.library import define
from qfx.backends.triton.site import Site, Taken, once
from qfx.backends.triton.weight_only_pack import pack_weight_only, reason_against_weight
from qfx.format import Format
from qfx.ops.library import UNSAFE
from qfx.ops.packed import as_rounded
from qfx.passes._build import call, take_place
from qfx.passes._match import known

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
qfx_triton = torch.ops.qfx_triton


def linear(site: Site) -> Taken | str:
    """qfx::linear by the kernel that takes its formats, see the module."""
    given = site.given
    x_format, w_format = given["x_format"], given["w_format"]
    k = known(graph.val(given["x"]).shape[-1])
    if graph.val(given["w"]).dim() != 2 or not isinstance(k, int):
        return "its weight is no matrix of a known width"
    if graph.val(given["x"]).dtype not in DTYPES:
        return f"its input is {graph.val(given['x']).dtype}"
    if not x_format:
        return _weight_only(site, given, k)
    eight, narrow = (family.reason_against(x_format, w_format, k) for family in (gemm8, gemm4))
    if narrow is None and (eight is not None or Format.parse(w_format).bits <= 4):
        return _product(site, given, k, "gemm4", gemm4.pack_w4a8)
    if eight is None:
        return _product(site, given, k, "gemm8", gemm8.pack_gemm8)
    return _of_rounded(site, given, k, narrow if Format.parse(w_format).is_integer and narrow else eight)


def _product(site: Site, given: dict[str, Any], k: int, family: str, pack: Any) -> Taken:
    """Codes of the input, then gemm4 (which is told k) or gemm8."""
    x_format, w_format = given["x_format"], given["w_format"]
    weight = _packed(site, given, family, lambda *w: pack(*w, w_format, k))
    with site.gm.graph.inserting_before(site.node):
        codes, scale, zero = quantized(site, given["x"], given["smooth"], given["x_scale"], given["x_zero"], x_format)
        sizes = (k,) if family == "gemm4" else ()
        rest = (weight, given["bias"], None, x_format, w_format, *sizes, "", DTYPES[graph.val(given["x"]).dtype])
        op = getattr(qfx_triton, family).default
        new = call(site.gm, op, codes, scale, zero, *rest, like=site.node)
    take_place(site.node, new)
    return Taken(f"{family} {x_format} x {w_format} (Triton)")


def quantized(site: Site, x: fx.Node, smooth: Any, scale: Any, zero: Any, x_format: str) -> tuple[fx.Node, Any, Any]:
    """Nodes of an activation's codes, scale and zero points; inserted where the graph is being inserted."""
    if not Format.parse(x_format).dynamic:
        codes = call(site.gm, qfx_triton.quantize_static.default, x, smooth, scale, zero, x_format, like=site.node)
        return codes, scale, zero
    whole = call(site.gm, qfx_triton.quantize_dynamic.default, x, smooth, x_format, like=site.node)
    codes, scale, zero = (call(site.gm, operator.getitem, whole, i, like=site.node) for i in range(3))
    return codes, scale, zero


def _weight_only(site: Site, given: dict[str, Any], k: int) -> Taken | str:
    w_format = given["w_format"]
    if reason := reason_against_weight(w_format):
        return reason
    weight, now = _only(site, given, k)
    n = graph.val(given["w"]).shape[0]
    arguments = (given["x"], weight, given["bias"], given["smooth"], now, n)
    return site.put(qfx_triton.linear_weight_only.default, *arguments, kernel=f"linear_weight_only {w_format} (Triton)")


def _of_rounded(site: Site, given: dict[str, Any], k: int, why: str) -> Taken | str:
    """Formats whose product has no kernel: torch rounds the input, the product is one of floats."""
    w_format = given["w_format"]
    if reason := reason_against_weight(w_format):
        return reason
    weight, now = _only(site, given, k)
    n, x = graph.val(given["w"]).shape[0], given["x"]
    with site.gm.graph.inserting_before(site.node):
        rounded = call(
            site.gm, qfx_triton.rounded_input.default, x, given["x_scale"], given["x_zero"], given["smooth"],
            given["x_format"], like=site.node,
        )  # fmt: skip
        y = call(
            site.gm, qfx_triton.linear_weight_only.default, rounded, weight, given["bias"], None, now, n,
            like=site.node,
        )  # fmt: skip
        dtype = graph.val(x).dtype
        if dtype != torch.float32:
            y = call(site.gm, torch.ops.aten._to_copy.default, y, dtype=dtype, like=site.node)
    take_place(site.node, y)
    told = f"torch rounds the input and the product is one of floats, without the speed of 8 bits: {why}"
    return Taken(f"linear_weight_only {w_format} (Triton) of an input rounded to {given['x_format']} (torch)", told)


def _only(site: Site, given: dict[str, Any], k: int) -> tuple[list[Any], str]:
    texts: dict[str, str] = site.gm.meta.setdefault("qfx_triton_formats", {})
    key = f"{given['w'].target}"

    def pack(w: Tensor, scale: Tensor, zero: Tensor | None) -> list[Tensor]:
        tensors, texts[key] = pack_weight_only(w, scale, zero, given["w_format"], k)
        return tensors

    return _packed(site, given, "weight_only", pack), texts[key]


def _packed(site: Site, given: dict[str, Any], family: str, pack: Any) -> list[Any]:
    tensors = (site.tensor(given["w"]), site.tensor(given["w_scale"]), site.tensor(given["w_zero"]))
    return once(site, f"{family} {given['w'].target} {given['w_format']}", lambda: pack(*tensors))


def embedding(site: Site) -> Taken | str:
    """qfx::embedding by its kernel, which reads the table as it is stored."""
    given = site.given
    if given["dtype"] not in DTYPES:
        return f"its result is {given['dtype']}"
    if reason := tables.reason_against(given["w_format"]):
        return reason
    tables.prepare(given["w_format"], graph.val(given["ids"]).device)
    names = ("ids", "w", "w_scale", "w_zero", "w_format", "dim", "dtype")
    kernel = f"embedding {given['w_format']} (Triton)"
    return site.put(qfx_triton.embedding.default, *(given[name] for name in names), kernel=kernel)


def rounded_input(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None, x_format: str
) -> Tensor:
    """x [.., K] as it comes back from its format, f32, as `qfx.ops.packed.linear` rounds it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.float32)
    found = as_rounded(rows, Format.parse(x_format), x_scale, x_zero, smooth).reshape(x.shape).contiguous()
    return found.clone() if found.data_ptr() == x.data_ptr() else found  # no op gives its input back


define(
    "rounded_input(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor? smooth, str x_format) -> Tensor",
    rounded_input,
    lambda x, *rest: x.new_empty(x.shape, dtype=torch.float32),
    tags=UNSAFE,
)
