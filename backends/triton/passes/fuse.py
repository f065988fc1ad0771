"""The passes that run on a lowered graph, in order, and what the report says of the nodes that they fuse."""

from __future__ import annotations

from torch import fx

from qfx import graph
from qfx.backends.triton.passes._nodes import computed
from qfx.backends.triton.passes.fuse_act_quantize import fuse_act_quantize
from qfx.backends.triton.passes.fuse_gate import fuse_gate
from qfx.backends.triton.passes.fuse_hadamard_quantize import fuse_hadamard_quantize
from qfx.backends.triton.passes.fuse_norm_quantize import fuse_norm_quantize
from qfx.backends.triton.passes.fuse_residual import fuse_residual
from qfx.backends.triton.passes.share_quantize import share_quantize

_FUSED = ("qfx_triton::norm_quantize", "qfx_triton::act_quantize", "qfx_triton::hadamard_quantize")


def fuse(gm: fx.GraphModule, kernels: dict[str, str]) -> bool:
    """Share and fuse the quantization of activations, and what ends products.

    kernels: by node name, told of the nodes that are fused away.
    """
    passes = (share_quantize, fuse_residual, fuse_norm_quantize, fuse_act_quantize, fuse_hadamard_quantize, fuse_gate)
    changed = [run(gm) for run in passes]
    for node in gm.graph.nodes:
        names = [name for name in computed(node) if name in kernels]
        if graph.schema_name(node) in _FUSED:
            kernels.update(dict.fromkeys(names, f"{graph.op_name(node)} (Triton)"))
        elif len(names) > 1:
            kernels.update(dict.fromkeys(names, kernels[names[0]]))
    return any(changed)
