"""Devices that costs are priced on: published figures of GPUs, and measured profiles (see `qfx.allocation.profile`).

Published, dense (without sparsity) and at boost clock, per second:

    A100 SXM 80 GB   2039 GB/s   f32 19.5 T, f16 312 T, i8 624 T              NVIDIA A100 datasheet (2021)
    H100 SXM 80 GB   3350 GB/s   f32 67 T, f16 989 T, f8 and i8 1979 T        NVIDIA H100 datasheet (2023)
    H200 SXM 141 GB  4800 GB/s   as H100                                      NVIDIA H200 datasheet (2024)
    RTX 4090 24 GB   1008 GB/s   f32 82.6 T, f16 165.2 T, f8 330.3 T,         NVIDIA Ada architecture whitepaper (2023),
                                 i8 660.6 T                                   appendix A; float sums in f32

No kernel reaches its device's peak, and the time to start a kernel is in none of these: what is predicted from them is
the least time that there can be. Ratios of two plans hold better than either time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from qfx.errors import explain, nearest
from qfx.format import Format
from qfx.storage.files import read_json, write_text

VERSION = 1
_MARK = "qfx-device"
Curve = tuple[tuple[int, float], ...]  # (where, value), ascending


@dataclass(frozen=True)
class Device:
    """What a roofline needs of a device.

    memory: bytes. bandwidth: bytes/s, by the number of bytes that are read over and over (small ones lie in a cache).
    rates: operations/s (two for a multiply-accumulate) of each kernel, by rows of the input. Kernels: "f32", "f16",
    "bf16" floats; "w2", "w4", "w8" weights of so many bits and float inputs; "w8a8", "w4a4" integers; "f8";
    "attention", by new tokens, which else counts at the rate of dtype.
    dtype: in which everything runs that is not quantized. overhead: seconds for each call. widths: bits in which
    weight-only kernels hold codes; () as they are stored. source: who says so; measured: by a profile.
    """

    name: str
    memory: int
    bandwidth: Curve
    rates: Mapping[str, Curve]
    dtype: str = "f16"
    overhead: float = 0.0
    widths: tuple[int, ...] = ()
    source: str = ""
    measured: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in self.rates:
            raise ValueError(f"a device needs the rate of its dtype {self.dtype!r}, found {', '.join(self.rates)}")
        for name, curve in (("bandwidth", self.bandwidth), *self.rates.items()):
            if not curve or any(not math.isfinite(v) or v <= 0 for _, v in curve) or list(curve) != sorted(curve):
                raise ValueError(f"{name} of device {self.name!r} is no ascending list of (where, positive): {curve}")

    def kernel(self, w: Format | None, x: Format | None) -> str:
        """The kernel that serves these formats, out of `rates`."""
        if w is None or w.is_plain:
            return self.dtype
        if x is not None and not x.is_plain:
            if w.is_float and x.is_float:
                wanted = "f8"
            elif w.is_integer and x.is_integer:
                wanted = "w4a4" if max(w.bits, x.bits) <= 4 and "w4a4" in self.rates else "w8a8"
            else:
                wanted = f"w{self.width(w)}"
        else:
            wanted = f"w{self.width(w)}"
        return wanted if wanted in self.rates else self.dtype

    def width(self, fmt: Format) -> int:
        """Bits in which a code is held."""
        return next((bits for bits in self.widths if fmt.bits <= bits), fmt.bits)

    def held(self, fmt: Format) -> Format:
        """The format in which a weight lies in this device's memory: 3 bits in 4 where no kernel reads 3."""
        if fmt.is_plain or fmt.is_float or self.width(fmt) == fmt.bits:
            return fmt
        return Format(f"{fmt.type[0]}{self.width(fmt)}", fmt.granularity, fmt.scale_type, fmt.dynamic)

    def speed(self, count: float) -> float:
        """bytes/s where so many bytes are read over and over."""
        return between(self.bandwidth, count)

    def rate(self, kernel: str, rows: float) -> float:
        """Operations/s of a kernel on an input of so many rows."""
        return between(self.rates[kernel], rows)

    def to_json(self) -> str:
        """JSON text, which `load` reads."""
        fields = {
            "format": _MARK,
            "version": VERSION,
            **{name: getattr(self, name) for name in _FIELDS if name != "rates"},
            "rates": {kernel: [list(point) for point in curve] for kernel, curve in self.rates.items()},
        }
        return json.dumps(fields, indent=1) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        write_text(path, self.to_json())


_FIELDS: dict[str, Any] = {
    "name": str, "memory": int, "bandwidth": list, "rates": dict, "dtype": str, "overhead": int | float,
    "widths": list, "source": str, "measured": bool, "facts": dict,
}  # fmt: skip


_STEP = "write one: qfx profile -o FILE"


def load(path: str | os.PathLike[str]) -> Device:
    """A device that `Device.save` wrote. Raises FileNotFoundError, and ValueError for anything else."""
    file = Path(path)
    fields = read_json(file, _STEP)
    if fields.pop("format", None) != _MARK:
        raise ValueError(explain(f'{file} is no profile of a device: it lacks "format": "{_MARK}"', next_step=_STEP))
    if (version := fields.pop("version", None)) != VERSION:
        raise ValueError(
            f"{file} has version {version!r}, this qfx reads {VERSION}\n  next step: measure again: qfx profile -o FILE"
        )
    for name in {**fields, **_FIELDS}:
        if name not in _FIELDS:
            raise ValueError(f"unknown key {name!r} in {file}, {nearest(name, _FIELDS)}")
        if not isinstance(fields.get(name), _FIELDS[name]):
            raise ValueError(f"{name!r} in {file}: expected {_FIELDS[name]}, found {fields.get(name)!r}")
    try:
        fields["bandwidth"] = _curve(fields["bandwidth"])
        fields["rates"] = {kernel: _curve(points) for kernel, points in fields["rates"].items()}
        return Device(**{**fields, "widths": tuple(fields["widths"])})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} is no profile of a device: {error}\n  next step: {_STEP}") from error


def device(name: str | os.PathLike[str] | Device) -> Device:
    """A device by the name of a preset or by the file of a profile. Raises ValueError with the nearest name."""
    if isinstance(name, Device):
        return name
    text = str(name)
    if text in DEVICES:
        return DEVICES[text]
    if text.endswith(".json"):
        return load(text)
    raise ValueError(
        explain(
            f"unknown device {text!r}, {nearest(text, DEVICES)}",
            expected=f"{', '.join(DEVICES)}, or the .json file of a profile",
            next_step="measure this CPU: qfx profile -o cpu.json",
        )
    )


def _curve(points: Any) -> Curve:
    return tuple((int(where), float(value)) for where, value in points)


def between(curve: Sequence[tuple[int, float]], at: float) -> float:
    """Linear between the points on logarithmic axes; the first and last value beyond them."""
    if at <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if at <= x1:
            part = math.log(at / x0) / math.log(x1 / x0)
            return y0 * math.exp(part * math.log(y1 / y0))
    return curve[-1][1]


def _published(name: str, memory: float, bandwidth: float, source: str, **rates: float) -> Device:
    """memory in GB, bandwidth in GB/s, rates in 10^12 operations/s, by kernel (bf16 as f16)."""
    tera = {**rates, "bf16": rates["f16"]}
    return Device(
        name=name,
        memory=int(memory * 1e9),
        bandwidth=((1, bandwidth * 1e9),),
        rates={kernel: ((1, rate * 1e12),) for kernel, rate in tera.items()},
        source=f"published peak: {source}",
    )


DEVICES: dict[str, Device] = {
    "a100": _published("a100", 80, 2039, "NVIDIA A100 datasheet", f32=19.5, f16=312, w8a8=624, w4a4=1248),
    "h100": _published("h100", 80, 3350, "NVIDIA H100 datasheet", f32=67, f16=989, f8=1979, w8a8=1979),
    "h200": _published("h200", 141, 4800, "NVIDIA H200 datasheet", f32=67, f16=989, f8=1979, w8a8=1979),
    "rtx4090": _published(
        "rtx4090",
        24,
        1008,
        "NVIDIA Ada architecture whitepaper",
        f32=82.6,
        f16=165.2,
        f8=330.3,
        w8a8=660.6,
        w4a4=1321.2,
    ),
}
