"""The segments of a weight [N, K] of several formats: which of its rows or columns lie together, packed as one.

A tuple of formats cuts the rows (N) into that many equal parts, `Columns` the columns (K). Neighbouring parts of equal
format are one segment. So are parts of equal format anywhere, where no scale serves more than one of them (rows with
scales of their own; columns of whole groups): one product then computes them, and its result (its input) is cut and
put in order. `Outliers` are a segment of the columns kept apart, whose inputs stay float, beside one of all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.annotation import Columns, Formats, Outliers, show
from qfx.annotation import each as each_of
from qfx.errors import explain
from qfx.format import Format

Range = tuple[int, int]

_CODES = re.compile(r"(?:^|[._])(rows|columns)(\d+)_codes(?:_\d+)?$")


@dataclass(frozen=True)
class Segment:
    """Rows or columns of one format: [start, stop) in order, `size` of them together."""

    format: Format
    ranges: tuple[Range, ...]
    float_input: bool = False  # the input of these columns is not rounded, whatever format the input has

    @property
    def size(self) -> int:
        """Number of rows or columns."""
        return sum(stop - start for start, stop in self.ranges)


def along(formats: Formats) -> int:
    """The axis of the weight [N, K] that several formats cut: 0 rows, 1 columns."""
    return 1 if isinstance(formats, Columns | Outliers) else 0


def stem_of(axis: int | None, number: int) -> str:
    """What stands before `_codes`, `_scale`, `_zero` in the names of packed tensors: `w`, `rows0`, `columns1`, ..."""
    return "w" if axis is None else f"{('rows', 'columns')[axis]}{number}"


def number_of(name: str) -> tuple[int, int] | None:
    """(axis, number) of the segment whose codes have this name; None for other tensors."""
    found = _CODES.search(name)
    return (("rows", "columns").index(found[1]), int(found[2])) if found else None


def segments(formats: Formats, shape: Sequence[int], name: str) -> list[Segment]:
    """The segments of a weight of this shape [N, K], in the order in which they begin; one where there is one format.

    Raises ValueError, naming `name`, where the rows or columns cannot be cut into as many equal parts.
    """
    axis = along(formats)
    size = int(shape[axis])
    if isinstance(formats, Outliers):
        return _apart(formats, size, name)
    each = each_of(formats)
    if len(shape) != 2 and len(each) > 1:
        raise ValueError(f"the weight of {name!r} has {len(shape)} axes: its formats {show(formats)} cut [N, K] only")
    if size % len(each):
        what = ("output rows", "input columns")[axis]
        raise ValueError(
            explain(
                f"the {size} {what} of {name!r} cannot be cut into {len(each)} equal parts",
                expected=f"a number of formats that divides {size}",
                found=f"{len(each)}: w={show(formats)}",
                next_step="give one format for each head (or for each of several heads), or name the layers that fit",
            )
        )
    width = size // len(each)
    found: list[Segment] = []
    for i, fmt in enumerate(each):
        _add(found, fmt, (i * width, (i + 1) * width), apart=stands_alone(fmt, axis, width))
    return found


def stands_alone(fmt: Format, axis: int, width: int) -> bool:
    """Whether no scale of a part of `width` rows (axis 0) or columns (axis 1) serves another part."""
    return fmt.by_row and (axis == 0 or fmt.is_plain or (fmt.group is not None and width % fmt.group == 0))


def nbytes(formats: Formats, shape: Sequence[int], name: str, held: Callable[[Format], Format] | None = None) -> int:
    """Bytes of a weight [.., N, K]: codes, scales, zero points and padding of every segment.

    held: the format in which a device holds codes of another. Raises ValueError as `segments` does.
    """
    if isinstance(formats, Format):
        return (formats if held is None else held(formats)).nbytes(shape)
    axis = along(formats)
    total = 0
    for part in segments(formats, shape, name):
        fmt = part.format if held is None else held(part.format)
        total += fmt.nbytes((shape[0], part.size) if axis else (part.size, *shape[1:]))
    return total


def _apart(formats: Outliers, size: int, name: str) -> list[Segment]:
    """The columns that are no outliers, then those that are."""
    if formats.columns and formats.columns[-1] >= size:
        raise ValueError(f"{name!r} has {size} input columns, no column {formats.columns[-1]} to keep apart")
    kept, rest = _ranges(formats.columns), _ranges(sorted(set(range(size)).difference(formats.columns)))
    return [
        *([Segment(formats.rest, rest)] if rest else []),
        *([Segment(formats.kept, kept, float_input=True)] if kept else []),
    ]


def _ranges(numbers: Sequence[int]) -> tuple[Range, ...]:
    """Runs of neighbours among ascending numbers."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    stops = [*starts[1:], len(numbers)][: len(starts)]
    return tuple((numbers[a], numbers[b - 1] + 1) for a, b in zip(starts, stops, strict=True))


def _add(found: list[Segment], fmt: Format, part: Range, *, apart: bool) -> None:
    """Join a part to the last segment, or (apart) to an earlier one of its format; else it is a new one."""
    for i, segment in enumerate(found):
        start, stop = segment.ranges[-1]
        touches = stop == part[0]
        if segment.format == fmt and (touches or apart):
            ranges = (*segment.ranges[:-1], (start, part[1])) if touches else (*segment.ranges, part)
            found[i] = Segment(fmt, ranges)
            return
    found.append(Segment(fmt, (part,)))


def take(value: Tensor, segment: Segment, axis: int) -> Tensor:
    """The rows (axis 0) or columns (axis 1) of a segment; a view where they are neighbours."""
    pieces = [value.narrow(axis, start, stop - start) for start, stop in segment.ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def pieces(found: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """(segment, start, stop) of each piece of the segments' results, in the order of the whole result's features."""
    placed = []
    for i, segment in enumerate(found):
        offset = 0
        for start, stop in segment.ranges:
            placed.append((start, i, offset, offset + stop - start))
            offset += stop - start
    return [piece[1:] for piece in sorted(placed)]


def in_order(parts: Sequence[Tensor], found: Sequence[Segment], axis: int) -> Tensor:
    """What each segment gave, put together along `axis` in the order of the whole."""
    cut = [parts[i].narrow(axis, start, stop - start) for i, start, stop in pieces(found)]
    return cut[0] if len(cut) == 1 else torch.cat(cut, axis)


def asked(found: Sequence[tuple[object, int]], axis: int) -> str:
    """The formats of (format, size) for reports: `[i4/g128:3072,i8/ch:1024]`, with `columns` before it."""
    return f"{('', 'columns')[axis]}[{','.join(f'{fmt}:{size}' for fmt, size in found)}]"
