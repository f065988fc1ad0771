"""compressed-tensors' `quantization_config`: which scheme a module has, and the formats that a scheme means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qfx.errors import UnsupportedError, explain, listed
from qfx.format import Format
from qfx.interop.linear import SCALES

# What a format of compressed-tensors stores for a weight.
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)  # fmt: skip


class Schemes:
    """The groups of a `quantization_config`. Raises ValueError where one is not known, UnsupportedError for rotations
    of activations."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(explain("the quantization_config has no config_groups", found=", ".join(sorted(config))))
        _check_transforms(config)
        self.groups: list[dict[str, Any]] = []
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise ValueError(
                    explain(f"the group {name!r} is not read", expected="weights and targets, spelled out")
                )
            kind = group.get("format") or config.get("format")
            if group.get("weights") is not None and kind not in FORMATS:
                raise ValueError(explain(f"unknown format {kind!r} of compressed-tensors", expected=", ".join(FORMATS)))
            said = {key: _complete(group[key]) for key in ("weights", "input_activations") if group.get(key)}
            self.groups.append({**group, **said, "format": kind})
        self.ignore = [str(target) for target in config.get("ignore") or ()]
        parts = re.findall(r"\d+", str(config.get("version") or "0.17"))
        self.version = tuple(int(part) for part in parts[:2])

    def of(self, fqn: str, kinds: tuple[str, ...]) -> dict[str, Any] | None:
        """The group of a module of a class and its bases, `kinds`: one that names it, else by expression or class.

        None where it is ignored or none fits.
        """
        if any(_matches(target, fqn, kinds, how) for target in self.ignore for how in _WAYS):
            return None
        for how in _WAYS:
            for group in self.groups:
                if any(_matches(str(target), fqn, kinds, how) for target in group.get("targets") or ()):
                    return group
        return None


def _complete(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a quantization, with compressed-tensors' own values of those that are left out."""
    found: dict[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "dynamic": False,
    } | dict(args)
    if found.get("strategy") is None:
        size = found["group_size"]
        found["strategy"] = "tensor" if size is None else "group" if size > 0 else "channel"
    return found


def _check_transforms(config: Mapping[str, Any]) -> None:
    """Transforms of weights are in the weights; what the model would compute beside them is not read."""
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    applied = [part for group in groups.values() for part in group.get("apply") or ()]
    online = [part for part in applied if part.get("location") not in ("weight_input", "weight_output")]
    if online:
        where = listed([f"{part.get('location')} of {', '.join(part.get('targets') or ())}" for part in online])
        raise UnsupportedError(
            explain(
                "the checkpoint rotates activations while the model runs, which is not read",
                expected="transforms of weights alone",
                found=where,
                next_step="quantize the float model with qfx, whose rewrites rotate (rotate, rotate-down, rotate-qk)",
            )
        )


_WAYS = ("name", "expression", "class")


def _matches(target: str, fqn: str, kinds: tuple[str, ...], how: str) -> bool:
    if how == "expression":
        return target.startswith("re:") and re.match(target[3:], fqn) is not None
    return target == fqn if how == "name" else target in kinds


def weight_format(args: Mapping[str, Any], scale: Tensor, name: str) -> Format:
    """The format of a weight with these arguments and scales. ValueError where there is none."""
    bits, strategy = args.get("num_bits"), args.get("strategy")
    granularity = {
        "tensor": "", "channel": "ch", "group": f"g{args.get('group_size')}",
        "tensor_group": f"g{args.get('group_size')}",
        "block": "b" + "x".join(str(size) for size in args.get("block_structure") or ()),
    }.get(str(strategy))  # fmt: skip
    kind = {("float", 8): "f8e4m3", ("float", 4): "f4e2m1"}.get((str(args.get("type")), int(bits or 0)))
    if args.get("type") == "int":
        kind = f"{'i' if args.get('symmetric') else 'u'}{bits}"
    kinds = {"f4e2m1/g16": "e4m3", "f4e2m1/g32": "e8m0"}
    stored = kinds.get(f"{kind}/{granularity}") or SCALES.get(scale.dtype)
    if kind is None or granularity is None or stored is None:
        shown = {key: args.get(key) for key in ("type", "num_bits", "strategy", "group_size", "symmetric")}
        raise ValueError(
            explain(f"qfx has no format for the weight of {name!r}", found=f"{shown}, scales {scale.dtype}")
        )
    return Format(kind, granularity, stored)


def input_format(args: Mapping[str, Any] | None) -> str | None:
    """The format of an input with these arguments, "" for float; None where qfx has none."""
    if not args:
        return ""
    kind = {("int", 8): "i8" if args.get("symmetric") else "u8", ("float", 8): "f8e4m3"}.get(
        (str(args.get("type")), int(args.get("num_bits", 8)))
    )
    if kind is None:
        return None
    if args.get("dynamic") is True and args.get("strategy") == "token":
        return f"{kind}/tok"
    if args.get("strategy") == "tensor" and args.get("dynamic") in (True, False):
        return f"{kind}/dyn" if args["dynamic"] else kind
    return None
