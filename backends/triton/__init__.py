"""The GPU backend: quantized nodes as kernels in Triton, what stays in float as torch's own compiler has it."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import fx

from qfx.errors import UnsupportedError, explain


def lower(gm: fx.GraphModule, *, mode: str | None = None, share: bool = False) -> Any:
    """Lower a quantized graph in normal form, see `qfx.backends.triton.lowering.lower`; needs Triton only now.

    Raises UnsupportedError where Triton is not installed or its kernels cannot run on the graph's device.
    """
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError(explain("Triton is not installed", next_step="pip install triton"))
    from qfx.backends.triton import lowering

    return lowering.lower(gm, mode=mode, share=share)
