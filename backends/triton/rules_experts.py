"""Rules of qfx::grouped_linear_quant.

%y = qfx.grouped_linear_quant(%x, ..., %offs, , u4/g128)
->
%y = qfx_triton.grouped_weight_only(%x, [...], %offs, u4/g128, n)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton import experts
from qfx.backends.triton.rules_linear import DTYPES
from qfx.backends.triton.site import Site, Taken, once
from qfx.backends.triton.weight_only import reason_against
from qfx.passes._build import call, take_place

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
    if reason := reason_against("", w_format, site.device):
        return reason
    if not x_format:
        args = _weight_only(site, given, x, k)
        op, kernel = qfx_triton.grouped_weight_only.default, f"grouped_weight_only {w_format} (Triton)"
        return site.put(op, *args, kernel=kernel)
    return _of_rounded(site, given, k, "experts have no product of 8 bits")


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
    texts: dict[str, str] = site.gm.meta.setdefault("qfx_triton_formats", {})
    key = f"{given['w'].target}"

    def pack() -> list[Tensor]:
        w, scale, zero = (site.tensor(given[name]) for name in ("w", "w_scale", "w_zero"))
        assert w is not None and scale is not None
        tensors, texts[key] = experts.pack_experts(w, scale, zero, given["w_format"], k)
        return tensors

    weight = once(site, f"grouped_weight_only {key} {given['w_format']}", pack)
    return x, weight, given["offs"], texts[key], graph.val(given["w"]).shape[1]
