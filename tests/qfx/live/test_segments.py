"""qfx.live.segments: which rows or columns of a weight of several formats lie together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.annotation import Columns
from qfx.format import Format
from qfx.live.segments import Segment, along, asked, number_of, pieces, segments, stem_of, take

I4, I8, U8, WHOLE, BLOCK = (Format.parse(t) for t in ("i4/g32", "i8/ch", "u8/ch", "i8", "i4/b4x32"))
GLOBAL = Format.parse("f4e2m1/g16/e4m3")


def test_neighbours_are_one() -> None:
    assert segments((I4, I4, I8, I8), (8, 64), "fc") == [Segment(I4, ((0, 4),)), Segment(I8, ((4, 8),))]
    assert segments(Columns((I4, I8, I8)), (8, 96), "fc") == [Segment(I4, ((0, 32),)), Segment(I8, ((32, 96),))]


def test_one_format_is_one_segment() -> None:
    for formats in (I4, (I4,), (I4, I4, I4, I4), Columns((I4, I4))):
        assert segments(formats, (8, 64), "fc") == [Segment(I4, ((0, 64 if isinstance(formats, Columns) else 8),))]


def test_rows_of_one_format_lie_together_wherever_they_are() -> None:
    found = segments((I4, I8, I4, I8, I8, I4), (12, 64), "fc")
    assert found == [Segment(I4, ((0, 2), (4, 6), (10, 12))), Segment(I8, ((2, 4), (6, 10)))]
    assert [s.size for s in found] == [6, 6]


@pytest.mark.parametrize("fmt", [WHOLE, BLOCK, GLOBAL])
def test_rows_that_share_a_scale_stay_apart(fmt: Format) -> None:
    """Put together they would have another scale than they have alone."""
    found = segments((fmt, I8, fmt, fmt), (16, 64), "fc")
    assert found == [Segment(fmt, ((0, 4),)), Segment(I8, ((4, 8),)), Segment(fmt, ((8, 16),))]


def test_columns_that_share_a_scale_stay_apart() -> None:
    found = segments(Columns((I8, I4, I8)), (4, 96), "fc")
    assert found == [Segment(I8, ((0, 32),)), Segment(I4, ((32, 64),)), Segment(I8, ((64, 96),))]
    found = segments(Columns((I4, I8, I4)), (4, 48), "fc")  # 16 columns are no whole group
    assert found == [Segment(I4, ((0, 16),)), Segment(I8, ((16, 32),)), Segment(I4, ((32, 48),))]


def test_columns_of_whole_groups_lie_together_wherever_they_are() -> None:
    found = segments(Columns((I4, I8, I4, I4)), (4, 256), "fc")
    assert found == [Segment(I4, ((0, 64), (128, 256))), Segment(I8, ((64, 128),))]


@pytest.mark.parametrize(
    ("formats", "shape", "message"),
    [
        (
            (I4, I8, I4),
            (8, 64),
            r"(?s)the 8 output rows of 'a.fc' .* 3 equal parts.*divides 8.*w=\[i4/g32,i8/ch,i4/g32\]",
        ),
        ((I4,) * 16, (8, 64), "8 output rows of 'a.fc' cannot be cut into 16"),
        (Columns((I4, I8)), (8, 63), r"(?s)63 input columns of 'a.fc'.*w=columns\[i4/g32,i8/ch\].*next step"),
        (Columns((I4, I8)), (4, 8, 64), "weight of 'a.fc' has 3 axes"),
    ],
)
def test_what_does_not_fit_is_refused(
    formats: tuple[Format, ...] | Columns, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        segments(formats, shape, "a.fc")


@given(
    formats=st.lists(st.sampled_from([I4, I8, U8, WHOLE]), min_size=1, max_size=8),
    width=st.integers(1, 4),
    columns=st.booleans(),
)
def test_every_row_or_column_has_its_format_and_comes_back(formats: list[Format], width: int, columns: bool) -> None:
    size = len(formats) * width
    asked_for = Columns(tuple(formats)) if columns else tuple(formats)
    axis = along(asked_for)
    shape = (3, size) if columns else (size, 3)
    found = segments(asked_for, shape, "fc")
    where = torch.arange(size)
    of = {int(i): s.format for s in found for i in take(where, s, 0)}
    assert of == {i: formats[i // width] for i in range(size)}
    value = torch.arange(3 * size).reshape(shape)
    parts = [take(value, s, axis) for s in found]
    assert torch.equal(torch.cat([parts[i].narrow(axis, a, b - a) for i, a, b in pieces(found)], axis), value)
    assert sum(s.size for s in found) == size and len(found) <= len(formats)


def test_names() -> None:
    assert [stem_of(None, 0), stem_of(0, 3), stem_of(1, 12)] == ["w", "rows3", "columns12"]
    assert number_of("fc.rows3_codes") == (0, 3) and number_of("columns12_codes") == (1, 12)
    assert number_of("a.w_rows0_codes_1") == (0, 0)
    for other in ("fc.w_codes", "fc.rows3_scale", "fc.rows3_codes_x", "fc.arrows3_codes", "rows_codes"):
        assert number_of(other) is None


def test_text_for_reports() -> None:
    assert asked([(I4, 48), (I8, 16)], 0) == "[i4/g32:48,i8/ch:16]"
    assert asked([("i8/ch", 32), ("i4/g32", 32)], 1) == "columns[i8/ch:32,i4/g32:32]"
