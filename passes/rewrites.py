"""Apply the exact rewrites that a plan records, by name, to a graph or to a live model."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from qfx.errors import nearest
from qfx.passes import rotate, rotate_down
from qfx.passes._sites import holds

MODULES = {
    "untie": "qfx.passes.untie",
    "norm-fold": "qfx.passes.norm_fold",
    "smooth": "qfx.passes.smooth",
    "smooth-k": "qfx.passes.smooth_k",
    "v-o": "qfx.passes.v_o",
    "up-down": "qfx.passes.up_down",
    "centre": "qfx.passes.centre",
    "permute-heads": "qfx.passes.permute_heads",
    "rotate": "qfx.passes.rotate",
    "rotate-heads": "qfx.passes.rotate_heads",
    "rotate-down": "qfx.passes.rotate_down",
    "rotate-qk": "qfx.passes.rotate_qk",
    "bias-correction": "qfx.passes.bias_correction",
    "low-rank": "qfx.passes.low_rank",
}


def apply_record(module: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Apply one record of `Plan.rewrites` to the module that holds the parameters.

    A graph without these layers, being another part of the model, is left as it is. Raises ValueError for a rewrite or
    a tensor that is not known.
    """
    found = _pass_of(record, tensors)
    site = found.Site.from_record(record)
    if site.present(module):
        found.apply(module, site, *(tensors[record[key]] for key in site.TENSORS))


def check_record(module: nn.Module, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise what `apply_record` would raise for names that the module does not have; nothing is changed."""
    site = _pass_of(record, tensors).Site.from_record(record)
    names = [site.table, site.weight] if record["name"] == "untie" else []
    if not site.present(module) or any(not holds(module, name) for name in names):
        raise ValueError(f"the plan's rewrite {record['name']!r} names {names}, which the model does not have")


def rotations(records: Collection[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """FQN of a linear that rotates its own input in a live model -> (block, seed), of a plan's records."""
    return rotate.rotations(records) | rotate_down.rotations(records)


def _pass_of(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The module of the rewrite that a record names."""
    name = str(record.get("name"))
    if name not in MODULES:
        raise ValueError(f"unknown rewrite {name!r} in the plan, {nearest(name, MODULES)}")
    for key in (record.get("factor"), record.get("second")):
        if key is not None and key not in tensors:
            raise ValueError(f"the plan's rewrite {name!r} names the tensor {key!r}, which the plan does not hold")
    return importlib.import_module(MODULES[name])
