"""The ordered list of all passes that bring a captured graph to one normal form."""

from __future__ import annotations

from torch import fx

from qfx import run
from qfx.graph import op_name
from qfx.passes.attention import attention
from qfx.passes.cleanup import cleanup
from qfx.passes.complex_pairs import complex_pairs
from qfx.passes.einsum import einsum
from qfx.passes.experts import experts
from qfx.passes.gelu import gelu
from qfx.passes.linear import is_parameter, linear
from qfx.passes.lookup import lookup
from qfx.passes.masks import masks
from qfx.passes.patch_embedding import patch_embedding
from qfx.passes.rms_norm import rms_norm
from qfx.passes.rope import rope
from qfx.passes.sentinels import sentinels
from qfx.passes.strided import strided

NORMALIZE: tuple[run.Pass, ...] = (
    strided,
    cleanup,
    complex_pairs,
    einsum,
    cleanup,
    linear,
    patch_embedding,
    sentinels,
    lookup,
    experts,
    rms_norm,
    rope,
    attention,
    gelu,
    masks,
    cleanup,
)


_PRODUCTS = {"mm", "bmm", "mv", "addmm", "baddbmm", "matmul", "einsum", "_grouped_mm", "grouped_mm_fallback"}
_CONVOLUTIONS = {
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}
_OTHERS = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "bilinear"}


def normalize(gm: fx.GraphModule) -> dict[str, int]:
    """Run them all in place; returns how often each one matched."""
    gm.meta["qfx_matches"] = {}
    run.run(gm, NORMALIZE)
    return dict(gm.meta["qfx_matches"])


def left_over(gm: fx.GraphModule) -> list[fx.Node]:
    """Products with a parameter, convolutions and recurrent layers included, that normalization did not bring to a
    linear layer."""
    names = _PRODUCTS | _CONVOLUTIONS | _OTHERS
    calls = [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n) in names]
    return [n for n in calls if any(is_parameter(argument) for argument in n.all_input_nodes)]
