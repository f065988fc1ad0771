"""A rotation whose result is rounded becomes one op with the rounding.

    %hadamard: f16[2,512] = qfx_triton.hadamard(%x, [@m.0, @m.1, @m.2], 512, False)
    %quantize_dynamic = qfx_triton.quantize_dynamic(%hadamard, None, i8/tok)
    ->
    %hadamard_quantize = qfx_triton.hadamard_quantize(%x, [@m.0, @m.1, @m.2], 512, False, i8/tok)

Only where nothing else reads the rotated values. Codes are those of the result rounded to its dtype, as before.
"""

from __future__ import annotations

import torch
from torch import fx

from qfx.backends.triton import hadamard
from qfx.backends.triton.passes._nodes import Quantize, note_computed
from qfx.graph import is_call
from qfx.passes._build import call, matched

_OPS = torch.ops.qfx_triton


def fuse_hadamard_quantize(gm: fx.GraphModule) -> bool:
    """See the module."""
    count = 0
    for node in list(gm.graph.nodes):
        found = Quantize.of(node)
        if found is None or not is_call(node, _OPS.quantize_dynamic.default) or found.smooth is not None:
            continue
        rotated = found.x
        if not is_call(rotated, _OPS.hadamard.default) or len(rotated.users) > 1:
            continue
        if found.reason_against_fusing() is not None or found.format not in hadamard.IN_ONE_LAUNCH:
            continue
        with gm.graph.inserting_before(node):
            new = call(gm, _OPS.hadamard_quantize.default, *rotated.args, str(found.format), like=rotated)
        note_computed(new, rotated, node)
        found.read_from(gm, new)
        gm.graph.erase_node(rotated)
        count += 1
    return matched(gm, "fuse_hadamard_quantize", count)
