"""The text form of a format is exact, wrong text is answered with the right spelling, and bytes are true bytes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.format import SCALE_TYPES, TYPES, Format

INTEGERS = [t for t in TYPES if t[0] in "iu"]
PLAIN = ["f16", "bf16", "f32"]


@st.composite
def formats(draw: st.DrawFn) -> Format:
    kind = draw(st.sampled_from(TYPES))
    if kind in PLAIN:
        return Format(kind)
    size = st.integers(1, 4096)
    granularity = draw(
        st.sampled_from(["", "ch", "tok", "head"])
        | size.map(lambda n: f"g{n}")
        | st.tuples(size, size).map(lambda mn: f"b{mn[0]}x{mn[1]}")
    )
    without = {"e4m3", "dq"} if kind[0] == "u" else {"dq"} if granularity in ("", "tok", "head") else set()
    scale = draw(st.sampled_from([s for s in SCALE_TYPES if s not in without]))
    dynamic = scale != "dq" and draw(st.booleans())
    clips = kind[0] in "iu" and (dynamic or granularity == "tok")
    return Format(kind, granularity, scale, dynamic, draw(st.integers(10, 100)) if clips else 100)


@given(formats())
def test_parse_undoes_str(fmt: Format) -> None:
    assert Format.parse(str(fmt)) == fmt
    assert hash(Format.parse(str(fmt))) == hash(fmt)


@given(formats())
def test_kinds_exclude_each_other(fmt: Format) -> None:
    assert [fmt.is_integer, fmt.is_float, fmt.is_plain].count(True) == 1
    assert fmt.has_zero == (not fmt.symmetric)
    if not fmt.is_plain:
        assert fmt.qmin <= 0 < fmt.qmax


@given(st.text(alphabet="iufnbd48216/gchtoke0mx x", max_size=14))
def test_any_text_is_parsed_exactly_or_refused(text: str) -> None:
    try:
        fmt = Format.parse(text)
    except ValueError as error:
        message = str(error)
    else:
        message = repr(str(fmt))
    assert repr(text) in message


@given(formats(), st.sampled_from(["//", " ", ", ", ":"]), st.booleans())
def test_suggestions_are_valid(fmt: Format, separator: str, upper: bool) -> None:
    text = separator.join(str(fmt).split("/")) + separator
    with pytest.raises(ValueError, match="did you mean") as caught:
        Format.parse(text.upper() if upper else text)
    suggestion = str(caught.value).split("did you mean '")[1].rstrip("'?")
    assert Format.parse(suggestion) == fmt


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("i8", ("i8", "", "f32", False, 100)),
        ("i4/g128", ("i4", "g128", "f32", False, 100)),
        ("u4/g32/f16", ("u4", "g32", "f16", False, 100)),
        ("i8/tok", ("i8", "tok", "f32", True, 100)),
        ("u8/dyn", ("u8", "", "f32", True, 100)),
        ("nf4/g64/bf16", ("nf4", "g64", "bf16", False, 100)),
        ("f4e2m1/g16/e4m3", ("f4e2m1", "g16", "e4m3", False, 100)),
        ("f8e4m3/b128x128", ("f8e4m3", "b128x128", "f32", False, 100)),
        ("i4/g32/dyn", ("i4", "g32", "f32", True, 100)),
        ("i8/head", ("i8", "head", "f32", False, 100)),
        ("u4/tok/c90", ("u4", "tok", "f32", True, 90)),
        ("i8/dyn/c85", ("i8", "", "f32", True, 85)),
        ("bf16", ("bf16", "", "f32", False, 100)),
    ],
)
def test_fields(text: str, fields: tuple[str, str, str, bool, int]) -> None:
    fmt = Format.parse(text)
    assert dataclasses.astuple(fmt) == fields
    assert str(fmt) == text


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("int4", "i4"),
        ("uint4/g32", "u4/g32"),
        ("w4", "i4"),
        ("fp8", "f8e4m3"),
        ("float8_e5m2", "f8e5m2"),
        ("e5m2", "f8e5m2"),
        ("fp4/g16/e4m3", "f4e2m1/g16/e4m3"),
        ("float16", "f16"),
        ("bfloat16", "bf16"),
        ("half", "f16"),
        ("I4/G128", "i4/g128"),
        ("i4/128", "i4/g128"),
        ("i4/g0128", "i4/g128"),
        ("i4/group128/float16", "i4/g128/f16"),
        ("i4/f16/g32", "i4/g32/f16"),
        ("i4/b16*32", "i4/b16x32"),
        ("i8/channel", "i8/ch"),
        ("i8/per_token", "i8/tok"),
        ("i8/tok/dyn", "i8/tok"),
        ("i8/f32", "i8"),
        ("i8/dynamic", "i8/dyn"),
        ("i8/heads", "i8/head"),
        ("i4/", "i4"),
        ("i4/ch/foo", "i4/ch"),
        ("i4/g32/e8m0/g64", "i4/g32/e8m0"),
        ("u4/tok/c0.9", "u4/tok/c90"),
        ("u4/tok/clip85%", "u4/tok/c85"),
        ("u4/c90/tok", "u4/tok/c90"),
        ("u4/tok/c100", "u4/tok"),
    ],
)
def test_refusal_with_the_right_spelling(text: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match="bad format") as caught:
        Format.parse(text)
    assert f"did you mean '{suggestion}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "valid: bf16, f16"),
        ("i9", "valid: bf16, f16"),
        ("f16/ch", "f16 has no scale; write 'f16'"),
        ("f32/dyn", "f32 has no scale"),
        ("u4/g16/e4m3", "write 'u4/g16/f16'"),
        ("uint4/g16/e4m3", "write 'u4/g16/f16'"),
        ("fp16/channel", "f16 has no scale; write 'f16'"),
        ("u4/c90", "only integers whose scale is found at run time are clipped; write 'u4/tok/c90'"),
        ("f8e4m3/tok/c90", "only integers whose scale is found at run time are clipped"),
        ("i4/g32/c90", "only integers whose scale"),
    ],
)
def test_refusal_with_a_reason(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Format.parse(text)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (("i1", "", "f32"), "unknown type 'i1'"),
        (("i8", "g0", "f32"), "unknown granularity 'g0'"),
        (("i8", "", "f64"), "unknown scale type 'f64'"),
        (("i8", "tok", "f32", True, 9), "10 to 100 percent of the extremes are kept, found 9"),
        (("i8", "tok", "f32", True, 101), "10 to 100 percent"),
    ],
)
def test_constructor_refuses(fields: tuple[str, str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Format(*fields)


def test_parse_refuses_other_than_text() -> None:
    with pytest.raises(ValueError, match="a format is a text such as 'i4/g128', found int"):
        Format.parse(4)  # type: ignore[arg-type]


def test_frozen() -> None:
    fmt = Format("i8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.type = "i4"  # type: ignore[misc]
    assert copy.deepcopy(fmt) == fmt
    assert dataclasses.replace(Format("i4", "g128"), type="u4") == Format("u4", "g128")


@pytest.mark.parametrize(
    ("kind", "bits", "qmin", "qmax"),
    [
        *((f"i{b}", b, -(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in range(2, 8)),
        ("i8", 8, -127, 127),
        *((f"u{b}", b, 0, 2**b - 1) for b in range(2, 9)),
        ("nf4", 4, -1, 1),
        ("f4e2m1", 4, -6, 6),
        ("f8e4m3", 8, -448, 448),
        ("f8e5m2", 8, -57344, 57344),
    ],
)
def test_ranges(kind: str, bits: int, qmin: int, qmax: int) -> None:
    fmt = Format(kind)
    assert (fmt.bits, fmt.qmin, fmt.qmax) == (bits, qmin, qmax)


def test_float_ranges_are_those_of_torch() -> None:
    for fmt in (Format("f8e4m3"), Format("f8e5m2")):
        assert fmt.qmax == torch.finfo(fmt.code_dtype).max


def test_dtypes() -> None:
    assert Format("i4").code_dtype == torch.int8
    assert Format("u4").code_dtype == torch.uint8
    assert Format("nf4").code_dtype == torch.uint8
    assert Format("bf16").code_dtype == torch.bfloat16
    assert Format("f8e5m2").code_dtype == torch.float8_e5m2
    assert Format("i4", "g32", "e8m0").scale_dtype == torch.float8_e8m0fnu
    assert [Format(t).bits for t in PLAIN] == [16, 16, 32]


def test_groups_and_blocks() -> None:
    assert Format("i4", "g32").group == 32
    assert Format("i4", "g32").block is None
    assert Format("i4", "b16x64").block == (16, 64)
    assert Format("i4", "b16x64").group is None
    assert Format("i4", "ch").group is None
    assert [Format("i4", "g32").padded(k) for k in (1, 32, 33)] == [32, 32, 64]
    assert Format("i4", "b16x64").padded(65) == 128
    assert Format("i4", "ch").padded(65) == 65


@pytest.mark.parametrize(
    ("text", "shape", "activation", "expected"),
    [
        ("i8", (3, 4, 5), False, ()),
        ("i8/ch", (3, 4, 5), False, (3, 4, 1)),
        ("i8/ch", (3, 4, 5), True, (5,)),
        ("i8/tok", (3, 4, 5), True, (3, 4, 1)),
        ("i8/g2", (3, 4, 5), False, (3, 4, 3)),
        ("i8/b3x2", (3, 4, 5), False, (3, 2, 3)),
        ("i8/head", (2, 3, 4, 5), True, (3, 1, 1)),
        ("i8/ch", (5,), False, (1,)),
    ],
)
def test_scale_shape(text: str, shape: tuple[int, ...], activation: bool, expected: tuple[int, ...]) -> None:
    assert Format.parse(text).scale_shape(shape, activation=activation) == expected


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("f32", (10, 7), 280),
        ("bf16", (10, 7), 140),
        ("i8", (10, 7), 70 + 4),
        ("i8/ch", (10, 7), 70 + 40),
        ("i8/ch/f16", (10, 7), 70 + 20),
        ("u8/ch", (10, 7), 70 + 10 * 5),
        ("i4/ch", (10, 7), 40 + 40),
        ("i3/ch", (10, 7), 30 + 40),
        ("i4/g128/f16", (4096, 4096), 4096 * 2048 + 4096 * 32 * 2),
        ("u4/g128/f16", (4096, 4096), 4096 * 2048 + 4096 * 32 * 2 + 4096 * 16),
        ("u2/g64/f16", (8, 4096), 8 * 4096 * 73 // 256),  # 2 + 16 / 64 + 2 / 64 = 2.28125 bits
        ("u3/g4", (5, 12), 5 * 5 + 5 * 3 * 4 + 5 * 2),
        ("u5/b2x4", (3, 12), 3 * 8 + 2 * 3 * 4 + 2 * 2),
        ("i4/g32", (10, 33), 10 * 32 + 10 * 2 * 4),
        ("f4e2m1/g32/e8m0", (4, 64), 4 * 32 + 4 * 2),
        ("f4e2m1/g16/e4m3", (4, 64), 4 * 32 + 4 * 4 + 4),
        ("f8e4m3/b128x128", (256, 130), 256 * 130 + 2 * 2 * 4),
        ("i4/g32", (8, 10, 64), 80 * 32 + 80 * 2 * 4),
        ("i8/head", (2, 3, 4, 5), 120 + 12),
    ],
)
def test_nbytes(text: str, shape: tuple[int, ...], expected: int) -> None:
    assert Format.parse(text).nbytes(shape) == expected


@given(st.sampled_from(INTEGERS), st.integers(1, 300), st.integers(1, 20))
def test_nbytes_is_the_least_that_holds_the_bits(kind: str, k: int, n: int) -> None:
    fmt = Format(kind, "ch")
    row = fmt.nbytes((n, k)) / n - (5 if fmt.has_zero else 4)
    assert k * fmt.bits <= row * 8 < k * fmt.bits + 8


@pytest.mark.parametrize(("text", "shape"), [("i8", ()), ("i8/b4x4", (5,)), ("i8/head", (4, 5))])
def test_nbytes_refuses_too_few_dimensions(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs a tensor of at least \d dimensions, found shape"):
        Format.parse(text).nbytes(shape)


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("u4/g128/f16", 576, "u4/g64/f16"),  # 640 columns in groups of 128
        ("u4/g128/f16", 1600, "u4/g64/f16"),
        ("u4/g128/f16", 96, "u4/g32/f16"),
        ("u4/g128/f16", 4096, "u4/g128/f16"),
        ("u4/g128/f16", 4544, "u4/g128/f16"),  # 64 of 4608 columns are less than twice the scales
        ("u4/g128", 1600, "u4/g128"),  # of which scales in f32 make more
        ("i3/g128/f16", 192, "i3/g64/f16"),
        ("nf4/g64/f16", 96, "nf4/g32/f16"),
        ("u2/g32/f16", 48, "u2/g32/f16"),  # none is shorter than 32
        ("i4/g96/f16", 48, "i4/g48/f16"),
        ("f4e2m1/g128/e8m0", 96, "f4e2m1/g128/e8m0"),
        ("i8/ch", 100, "i8/ch"),
        ("f32", 100, "f32"),
    ],
)
def test_fitted(text: str, columns: int, expected: str) -> None:
    assert str(Format.parse(text).fitted(columns)) == expected


@given(st.sampled_from(["u4/g128/f16", "i4/g128", "u2/g64/f16", "nf4/g64/dq", "u3/g256/bf16"]), st.integers(1, 5000))
def test_fitted_takes_no_more_bytes_and_changes_the_group_alone(text: str, columns: int) -> None:
    fmt = Format.parse(text)
    found = fmt.fitted(columns)
    assert found.nbytes((7, columns)) <= fmt.nbytes((7, columns))
    assert (found.type, found.scale_type) == (fmt.type, fmt.scale_type)
    assert found == fmt or 32 <= (found.group or 0) < (fmt.group or 0)
    assert found == fmt or columns % (fmt.group or 1), "groups that divide the columns stay"
