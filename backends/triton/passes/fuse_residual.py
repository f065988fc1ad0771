"""A sum of a product and what goes around it is made where the product is.

    %gemm8: f16[2,64] = qfx_triton.gemm8(..., None, i8/tok, i8/ch, , f16)
    %add: f16[2,64] = aten.add.Tensor(%x, %gemm8)
    ->
    %gemm8: f16[2,64] = qfx_triton.gemm8(..., %x, i8/tok, i8/ch, , f16)

The product is not written and read again, and is not rounded before the sum. Not where something else reads it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qfx import graph
from qfx.backends.triton.passes._nodes import note_computed
from qfx.passes import _match as m
from qfx.passes._build import call, matched, take_place

_PRODUCTS = ("qfx_triton::gemm8", "qfx_triton::gemm4", "qfx_triton::gemm_mixed")


def fuse_residual(gm: fx.GraphModule) -> bool:
    """See the module."""
    count = 0
    for node in list(gm.graph.nodes):
        found = _product_and_other(node)
        if found is None:
            continue
        product, other = found
        names = [a.name for a in product.target._schema.arguments]  # type: ignore[union-attr]
        given = {**m.arguments(product), "residual": other}
        with gm.graph.inserting_before(node):
            new = call(gm, product.target, *(given[name] for name in names), like=product)
        note_computed(new, product, node)
        take_place(node, new)
        gm.graph.erase_node(product)
        count += 1
    return matched(gm, "fuse_residual", count)


def _product_and_other(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(product, other) of a sum of a product that nothing else reads and a tensor of its shape and dtype."""
    if not m.plain_binary(node, *m.ADD):
        return None
    for product, other in m.orders(node):
        if not isinstance(product, fx.Node) or not isinstance(other, fx.Node):
            return None
        alone = graph.schema_name(product) in _PRODUCTS and m.only_user(product) is node and other is not product
        alike = m.dtype(other) == m.dtype(product) and m.same_sizes(m.shape(other), m.shape(product))
        if alone and alike and m.arguments(product)["residual"] is None:
            return product, other
    return None
