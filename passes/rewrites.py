"""Apply the exact rewrites that a plan records, by name, to a graph or to a live model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qfx.errors import nearest

MODULES = {
    "untie": "qfx.passes.untie",
    "norm-fold": "qfx.passes.norm_fold",
    "smooth": "qfx.passes.smooth",
    "v-o": "qfx.passes.v_o",
    "up-down": "qfx.passes.up_down",
}


def apply_record(module: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Apply one record of `Plan.rewrites` to the module that holds the parameters.

    Raises ValueError for a rewrite or a tensor that is not known.
    """
    name = str(record.get("name"))
    if name not in MODULES:
        raise ValueError(f"unknown rewrite {name!r} in the plan, {nearest(name, MODULES)}")
    key = record.get("factor")
    if key is not None and key not in tensors:
        raise ValueError(f"the plan's rewrite {name!r} names the tensor {key!r}, which the plan does not hold")
    importlib.import_module(MODULES[name]).apply_record(module, record, tensors)
