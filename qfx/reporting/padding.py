"""A note on bytes that groups of weights take beyond the columns that there are."""

from __future__ import annotations

from collections.abc import Iterable

from qfx.errors import Note
from qfx.format import Format
from qfx.reporting.rows import Row

_WORTH = 0.03  # share of the bytes from which on a note is worth reading


def padding_note(rows: Iterable[Row]) -> list[Note]:
    """The note, where groups that do not divide the columns of weights take over 3 % more bytes than the format says.

    Rows of several formats, and those whose weight another row counts, are left out.
    """
    filled, held = [], 0.0
    for row in rows:
        fmt = _grouped(row)
        whole = 0.0 if fmt is None else row.elements * _bytes_each(fmt)
        if fmt is not None and row.bytes_after > (1 + _WORTH) * whole:
            filled.append((row, fmt))
            held += whole
    if not held:
        return []
    more = sum(row.bytes_after for row, _ in filled) / held - 1
    row, fmt = filled[0]
    which = f"{row.node} in {fmt}" + (f" and {len(filled) - 1} more" if filled[1:] else "")
    what = f"{more:.0%} more bytes than formats say: {which}"
    why = "columns are filled up to whole groups"
    step = f"smaller groups that divide the columns take less and round better (g{(fmt.group or 2) // 2}, ...)"
    return [Note("report", f"{what}; {why}", step, minor=True)]


def _bytes_each(fmt: Format) -> float:
    """Bytes of one value, its share of scale and zero point included."""
    columns = 8 * (fmt.group or 1)  # zero points of 8 groups are whole bytes
    return fmt.nbytes((1, columns)) / columns


def _grouped(row: Row) -> Format | None:
    """The one format of a row's own weight, if it has groups."""
    found = [word[2:] for word in row.asked.split() if word.startswith("w=")]
    if row.shared or not row.quantized or not row.elements or len(found) != 1 or not found[0][:1].isalpha():
        return None
    try:
        fmt = Format.parse(found[0])
    except ValueError:  # several formats
        return None
    return fmt if fmt.group else None
