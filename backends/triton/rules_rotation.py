"""The rule of qfx::hadamard.

%h = qfx.hadamard(%x, 4096, 0, False)
->
%h = qfx_triton.hadamard(%x, [matrices], 4096, False)
"""

from __future__ import annotations

import torch

from qfx import graph
from qfx.backends.triton.hadamard import pack_hadamard, reason_against
from qfx.backends.triton.site import Site, Taken, once


def hadamard(site: Site) -> Taken | str:
    """qfx::hadamard by its kernel; one rotation's matrices are shared."""
    x, size, seed, inverse = (site.given[name] for name in ("x", "size", "seed", "inverse"))
    value = graph.val(x)
    if reason := reason_against(value.dtype):
        return reason
    packed = once(
        site,
        f"hadamard {size} {seed} {inverse}",
        lambda: pack_hadamard(size, seed, inverse=inverse, device=value.device),
    )
    kernel = f"hadamard of {size} channels (Triton)"
    return site.put(torch.ops.qfx_triton.hadamard.default, x, packed, size, inverse, kernel=kernel)
