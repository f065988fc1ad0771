"""Format: how one tensor is stored, as a frozen value with an exact text form.

    <type>[/<granularity>][/<scale type>][/dyn][/cN]   i8   i4/g128   u4/g32/f16   i8/tok   nf4/g64   f4e2m1/g32/e8m0

types: i2..i8 (symmetric signed), u2..u8 (affine, with a zero point), nf4, f8e4m3, f8e5m2, f4e2m1 (floats with a
scale), f16, bf16, f32 (plain: no scale at all). Granularity of the scale: nothing (one for the tensor), `ch` (channel),
`gN` (groups of N along the last axis), `bMxN` (blocks over the last two axes), `tok` (a row over the last axis, found
at run time), `head` (axis -3). Scale types: f32 (not printed), f16, bf16, e8m0 (a power of two), e4m3 (with one f32
scale for the whole tensor on top), dq (double quantization, see `qfx.rounding.nested`). `dyn`: the scale is found at
run time. `cN`: such a scale is that of N percent of the extremes, and values beyond saturate (`u4/tok/c90`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qfx.errors import nearest
from qfx.rounding import nested

_FLOATS: dict[str, tuple[int, int, torch.dtype]] = {  # by type: bits, greatest magnitude, dtype of the codes
    "nf4": (4, 1, torch.uint8),
    "f4e2m1": (4, 6, torch.uint8),
    "f8e4m3": (8, 448, torch.float8_e4m3fn),
    "f8e5m2": (8, 57344, torch.float8_e5m2),
}
_PLAIN: dict[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_SIGNED = tuple(f"i{b}" for b in range(2, 9))
_AFFINE = tuple(f"u{b}" for b in range(2, 9))
_SCALES: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
    "dq": torch.uint8,
}
TYPES: tuple[str, ...] = (*_SIGNED, *_AFFINE, *_FLOATS, *_PLAIN)
SCALE_TYPES: tuple[str, ...] = tuple(_SCALES)
_CLIP = re.compile(r"c([1-9]\d)")
_GRANULARITY = re.compile(r"|ch|tok|head|g([1-9]\d*)|b([1-9]\d*)x([1-9]\d*)")
_ALIASES = {
    "half": "f16",
    "fp8": "f8e4m3",
    "e4m3": "f8e4m3",
    "e5m2": "f8e5m2",
    "fp4": "f4e2m1",
    "e2m1": "f4e2m1",
    "mxfp4": "f4e2m1",
    "nvfp4": "f4e2m1",
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Format:
    """How one tensor is stored. `Format.parse(str(f)) == f`; the fields are the parts of the text.

    type: the element type. granularity: "", "ch", "gN", "bMxN", "tok" or "head". scale_type: one of SCALE_TYPES.
    dynamic: the scale is found at run time ("tok" implies it). clip: percent of the extremes that such a scale spans,
    10 to 100. Raises ValueError for parts that do not go together.
    """

    type: str
    granularity: str = ""
    scale_type: str = "f32"
    dynamic: bool = False
    clip: int = 100

    def __post_init__(self) -> None:
        if self.granularity == "tok":
            object.__setattr__(self, "dynamic", True)
        if reason := self._reason_against():
            raise ValueError(f"bad format {str(self)!r}: {reason}")

    def _reason_against(self) -> str | None:
        if self.type not in TYPES:
            return f"unknown type {self.type!r}, {nearest(self.type, TYPES)}"
        if _GRANULARITY.fullmatch(self.granularity) is None:
            return f"unknown granularity {self.granularity!r}, valid: ch, gN, bMxN, tok, head"
        if self.scale_type not in _SCALES:
            return f"unknown scale type {self.scale_type!r}, {nearest(self.scale_type, _SCALES)}"
        if self.is_plain and (self.granularity or self.scale_type != "f32" or self.dynamic):
            return f"{self.type} has no scale; write {self.type!r}"
        if not 10 <= self.clip <= 100:
            return f"10 to 100 percent of the extremes are kept, found {self.clip}"
        if self.clip < 100 and not (self.dynamic and self.is_integer):
            return "only integers whose scale is found at run time are clipped; write 'u4/tok/c90'"
        if not self.symmetric and self.scale_type == "e4m3":
            return f"e4m3 scales need a type without a zero point; write '{self.type}/{self.granularity or 'g16'}/f16'"
        if self.nested and (not self.symmetric or self.dynamic or self.granularity in ("", "head")):
            return "double-quantized scales are those of weights in groups without zero points; write 'nf4/g64/dq'"
        return None

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format of a text such as `i4/g128`. Raises ValueError with the nearest valid spelling."""
        if not isinstance(text, str):
            raise ValueError(f"a format is a text such as 'i4/g128', found {type(text).__name__}: {text!r}")
        return _parse(text)

    def __str__(self) -> str:
        parts = [self.type, self.granularity, self.scale_type if self.scale_type != "f32" else ""]
        if self.dynamic and self.granularity != "tok":
            parts.append("dyn")
        if self.clip != 100:
            parts.append(f"c{self.clip}")
        return "/".join(part for part in parts if part)

    @property
    def bits(self) -> int:
        """Bits of one element, without the scales."""
        if self.is_plain:
            return _PLAIN[self.type].itemsize * 8
        return _FLOATS[self.type][0] if self.is_float else int(self.type[1:])

    @property
    def is_plain(self) -> bool:
        """f16, bf16, f32: no scale."""
        return self.type in _PLAIN

    @property
    def is_float(self) -> bool:
        """nf4, f8e4m3, f8e5m2, f4e2m1: float elements with a scale."""
        return self.type in _FLOATS

    @property
    def is_integer(self) -> bool:
        """i2..i8 and u2..u8."""
        return not self.is_plain and not self.is_float

    @property
    def symmetric(self) -> bool:
        """There is no zero point (every type but u2..u8)."""
        return self.type not in _AFFINE

    @property
    def has_zero(self) -> bool:
        """There is a zero point (u2..u8)."""
        return self.type in _AFFINE

    @property
    def has_global_scale(self) -> bool:
        """f32 values stand above the scales: one for e4m3, several for dq. They travel in the zero point's place."""
        return self.scale_type in ("e4m3", "dq")

    @property
    def nested(self) -> bool:
        """Double quantization: the scales are 8-bit codes (see `qfx.rounding.nested`)."""
        return self.scale_type == "dq"

    @property
    def qmax(self) -> int:
        """Greatest code of an integer type, greatest value of a float type."""
        if self.is_float:
            return _FLOATS[self.type][1]
        assert self.is_integer, f"{self.type} has no range of codes"
        return (1 << self.bits) - 1 if self.has_zero else (1 << (self.bits - 1)) - 1

    @property
    def qmin(self) -> int:
        """Smallest code of an integer type (-127 for i8), smallest value of a float type."""
        if self.has_zero:
            return 0
        return -self.qmax if self.is_float or self.bits == 8 else -self.qmax - 1

    @property
    def reach(self) -> int:
        """The greatest |code - zero point| of an integer type."""
        return self.qmax if self.has_zero else -self.qmin

    @property
    def group(self) -> int | None:
        """N of `gN`, else None."""
        return int(self.granularity[1:]) if self.granularity.startswith("g") else None

    @property
    def block(self) -> tuple[int, int] | None:
        """(M, N) of `bMxN`, else None."""
        if not self.granularity.startswith("b"):
            return None
        rows, columns = self.granularity[1:].split("x")
        return int(rows), int(columns)

    @property
    def by_row(self) -> bool:
        """Every scale serves values of one row alone, so that rows can be rounded apart from each other."""
        return self.is_plain or ((self.granularity == "ch" or self.group is not None) and not self.has_global_scale)

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of unpacked codes: int8, uint8, a float8 type, or the plain type itself."""
        if self.is_plain:
            return _PLAIN[self.type]
        if self.is_float:
            return _FLOATS[self.type][2]
        return torch.uint8 if self.has_zero else torch.int8

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype in which scales are stored."""
        return _SCALES[self.scale_type]

    def padded(self, last_dim: int) -> int:
        """`last_dim` rounded up to a whole number of groups (or of block columns)."""
        unit = self.group or (self.block[1] if self.block else 1)
        return -(-last_dim // unit) * unit

    def row_bytes(self, last_dim: int) -> int:
        """Bytes of the codes of one row: dense bits over padded groups below 8 bits, else whole elements."""
        if self.bits < 8:
            return -(-self.padded(last_dim) * self.bits // 8)
        return last_dim * (self.bits // 8)

    def zero_width(self, groups: int) -> int:
        """Bytes of a row's zero points, of which there are `groups`: as dense as the codes."""
        return -(-groups * self.bits // 8) if self.has_zero else 0

    def scale_shape(self, shape: Sequence[int], *, activation: bool = False) -> tuple[int, ...]:
        """Shape of the scales of such a tensor. `ch` is every leading index, or the last axis of an activation."""
        assert not self.is_plain, f"{self.type} has no scale"
        lead = tuple(shape[:-1])
        if self.granularity == "":
            return ()
        if self.granularity == "head":
            _need_dims(self, shape, 3)
            return (shape[-3], 1, 1)
        _need_dims(self, shape, 2 if self.block else 1)
        if self.granularity == "ch" and activation:
            return (shape[-1],)
        if self.group:
            return (*lead, -(-shape[-1] // self.group))
        if self.block:
            return (*lead[:-1], -(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1]))
        return (*lead, 1)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape in this format: codes, scales, zero points and padding, all counted."""
        _need_dims(self, shape, 1)
        codes = math.prod(shape[:-1]) * self.row_bytes(shape[-1])
        if self.is_plain:
            return codes
        each = self.scale_shape(shape)
        scales = math.prod(each)
        if self.nested:
            return codes + nested.nbytes(scales)
        zeros = math.prod(each[:-1]) * self.zero_width(each[-1] if each else 1)
        return codes + scales * self.scale_dtype.itemsize + zeros + (4 if self.has_global_scale else 0)

    def fitted(self, columns: int) -> Format:
        """Itself, or with groups of 1/2 or 1/4 the length (32 at least) where rows of so many columns are fewer bytes.

        Groups that do not divide the columns are filled up: 576 columns are 640 in groups of 128, and 576 in those of
        64. Formats without groups, and those whose groups have a scale in 8 bits (MXFP4, NVFP4), stay as they are.
        """
        if not self.group or self.scale_type in ("e8m0", "e4m3"):
            return self
        shorter = [self.group // part for part in (2, 4) if self.group % part == 0 and self.group // part >= 32]
        return min((self, *(replace(self, granularity=f"g{n}") for n in shorter)), key=lambda f: f.nbytes((1, columns)))


def _need_dims(fmt: Format, shape: Sequence[int], dims: int) -> None:
    if len(shape) < dims:
        raise ValueError(f"format '{fmt}' needs a tensor of at least {dims} dimensions, found shape {list(shape)}")


@lru_cache(maxsize=1024)
def _parse(text: str) -> Format:
    fields = _fields(text.split("/"))
    if fields is not None:
        fmt = Format(**fields)  # type: ignore[arg-type]
        if str(fmt) == text:
            return fmt
    raise ValueError(f"bad format {text!r}: {_suggestion(text)}")


def _fields(parts: list[str]) -> dict[str, str | bool | int] | None:
    """The fields of well-ordered parts, None where a part has no meaning or is out of order."""
    kind, *rest = parts
    fields: dict[str, str | bool | int] = {"type": kind}
    for name, accepts in (
        ("granularity", lambda part: bool(part) and _GRANULARITY.fullmatch(part) is not None),
        ("scale_type", lambda part: part in _SCALES),
        ("dynamic", lambda part: part == "dyn"),
        ("clip", lambda part: _CLIP.fullmatch(part) is not None),
    ):
        if rest and accepts(rest[0]):
            part = rest.pop(0)
            fields[name] = True if name == "dynamic" else int(part[1:]) if name == "clip" else part
    return None if rest or kind not in TYPES else fields


def _suggestion(text: str) -> str:
    """`did you mean 'i4/g128'?` by repairing each part and putting the parts in order, else the grammar."""
    parts = [part for part in re.split(r"[/\s:,]+", text.strip().lower().replace("_", "")) if part]
    kind = _repair_type(parts[0]) if parts else None
    if kind is None:
        return nearest(parts[0] if parts else text, TYPES)
    fields: dict[str, str | bool | int] = {"type": kind}
    for part in parts[1:]:
        name, value = _repair_part(part)
        if name is not None and name not in fields:
            fields[name] = value
    try:
        return f"did you mean {str(Format(**fields))!r}?"  # type: ignore[arg-type]
    except ValueError as error:
        return str(error).partition(": ")[2]


def _repair_type(part: str) -> str | None:
    if part in TYPES:
        return part
    if part in _ALIASES:
        return _ALIASES[part]
    stems = {"uint": "u", "int": "i", "bfloat": "bf", "float": "f", "fp": "f", "w": "i"}
    short = re.sub(r"^(uint|int|bfloat|float|fp|w(?=[2-8]$))", lambda match: stems[match[0]], part)
    short = re.sub(r"[^a-z0-9]", "", short)
    short = _ALIASES.get(short, short)
    return short if short in TYPES else None


def _repair_part(part: str) -> tuple[str | None, str | bool | int]:
    """What a part after the type was meant to be: (field, value), or (None, "")."""
    if clip := re.fullmatch(r"(?:c|clip)-?(?:0?\.(\d)|0?\.?([1-9]\d)%?)", part):
        return "clip", int(clip[1]) * 10 if clip[1] else int(clip[2])
    if part in _SCALES:
        return "scale_type", part
    if part in ("double", "doublequant", "nested"):
        return "scale_type", "dq"
    if _repair_type(part) in _PLAIN:
        return "scale_type", str(_repair_type(part))
    if block := re.fullmatch(r"\D*0*([1-9]\d*)\D+0*([1-9]\d*)", part):
        return "granularity", f"b{block[1]}x{block[2]}"
    if group := re.fullmatch(r"(?:g|group|gs|groupsize)?-?0*([1-9]\d*)", part):
        return "granularity", f"g{group[1]}"
    for stem, name, value in (
        ("dyn", "dynamic", True),
        ("tok", "granularity", "tok"),
        ("row", "granularity", "tok"),
        ("ch", "granularity", "ch"),
        ("head", "granularity", "head"),
    ):
        if stem in part:
            return name, value
    return None, ""
