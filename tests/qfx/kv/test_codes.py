"""Codes: what comes back of what was written, in every type, and that nothing is written twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx import numerics
from qfx.format import Format
from qfx.kv.codes import ROOM, Codes, encode
from qfx.kv.formats import CacheFormat

TYPES = ("i8", "u8", "i7", "u6", "i5", "u5", "u4", "i4", "i3", "u3", "u2", "i2", "nf4", "f4e2m1", "f8e4m3", "f8e5m2")


def states(tokens: int, width: int = 24, seed: int = 0) -> Tensor:
    """[2, 3, tokens, width], some channels far from zero."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, width, generator=g) + 4 * torch.randn(width, generator=g)


def stored(x: Tensor, text: str, *, by_tokens: bool) -> Codes:
    codes = Codes(Format.parse(text), x, by_tokens=by_tokens)
    codes.write(x, 0)
    return codes


def step(x: Tensor, fmt: Format, *, by_tokens: bool) -> Tensor:
    """The distance of codes for each value of x, by the extremes of its group."""
    y = x.transpose(-1, -2) if by_tokens else x
    low, high = numerics.value_range(y, fmt)
    spread = high - low if fmt.has_zero else 2 * torch.maximum(high, -low)
    fine = spread / (2**fmt.bits - (1 if fmt.has_zero else 2))
    if fmt.has_zero:
        fine = torch.maximum(fine, low.abs() / (127 if fmt.bits < 8 else 32767))
    out = numerics.join(numerics.split(torch.ones_like(y), fmt) * numerics.spread(fine, fmt), fmt, y.shape)
    return out.transpose(-1, -2) if by_tokens else out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("granularity", "by_tokens"), [("tok", False), ("g8", False), ("g16", True), ("g64", False)])
def test_values_come_back(kind: str, granularity: str, by_tokens: bool) -> None:
    fmt, x = Format.parse(f"{kind}/{granularity}/f16"), states(48)
    back = stored(x, str(fmt), by_tokens=by_tokens).values(0, 48)
    assert back.dtype == torch.float32 and back.shape == x.shape
    error = (back - x).abs()
    if fmt.is_integer:
        assert (error <= 0.51 * step(x, fmt, by_tokens=by_tokens) + 2e-3 * x.abs() + 1e-6).all()
    else:
        assert 0 < float(error.norm() / x.norm()) < {"nf4": 0.1, "f4e2m1": 0.12, "f8e4m3": 0.03, "f8e5m2": 0.06}[kind]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_plain_values_come_back_as_the_type_has_them(kind: str) -> None:
    x = states(7)
    codes = stored(x, kind, by_tokens=False)
    assert torch.equal(codes.values(0, 7), x.to(Format(kind).code_dtype).float())
    assert not codes.one_scale and codes.zeros(0, 7) is None


@pytest.mark.parametrize("text", ["i8/tok/f16", "i8/tok", "f8e4m3/tok/f16", "f8e5m2/tok/bf16", "nf4/tok/e8m0", "i4/g8"])
def test_symmetric_values_are_those_of_numerics(text: str) -> None:
    fmt, x = Format.parse(text), states(16)
    scale, zero = numerics.run_time_qparams(x, fmt)
    expected = numerics.dequantize(numerics.quantize(x, fmt, scale, zero), fmt, scale, zero)
    assert torch.allclose(stored(x, text, by_tokens=False).values(0, 16), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 6e4])
@pytest.mark.parametrize("text", ["i8/tok/f16", "u4/g8/f16", "u2/tok", "u8/tok", "f8e4m3/tok/f16"])
def test_constant_tokens(text: str, value: float) -> None:
    x = torch.full((1, 1, 16, 8), value)
    for by_tokens in (False, True) if "/g" in text else (False,):
        back = stored(x, text, by_tokens=by_tokens).values(0, 16)
        assert torch.allclose(back, x, rtol=0.01, atol=1e-7)


def test_a_channel_far_from_zero_has_all_its_steps() -> None:
    x = states(32)
    x[..., 3] = 100 + torch.rand(2, 3, 32)
    near = stored(x, "u4/g32/f16", by_tokens=True).values(0, 32)
    assert (near[..., 3] - x[..., 3]).abs().max() < 0.5, "half of the 100 / 127 that zero points reach"
    plain = numerics.fake_quantize(x.transpose(-1, -2), Format.parse("u4/g32")).transpose(-1, -2)
    assert (plain[..., 3] - x[..., 3]).abs().max() > 0.9, "with zero among the codes they are 7 apart"


def test_clipped_scales_serve_less_than_the_extremes() -> None:
    x = states(8)
    full, clipped = (stored(x, text, by_tokens=False) for text in ("u4/tok/f16", "u4/tok/f16/c80"))
    assert torch.allclose(clipped._float_scale(0, 8), 0.8 * full._float_scale(0, 8), rtol=2e-3)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(TYPES), group=st.sampled_from(["tok", "g4", "g7", "g8", "g100"]), by_tokens=st.booleans(),
    parts=st.lists(st.integers(1, 3), min_size=1, max_size=5), width=st.integers(1, 20), data=st.data(),
)  # fmt: skip
def test_parts_of_any_size_read_back_anywhere(
    kind: str, group: str, by_tokens: bool, parts: list[int], width: int, data: st.DataObject
) -> None:
    fmt = Format.parse(f"{kind}/{group}")
    by_tokens = by_tokens and group in ("g4", "g7", "g8")
    x = torch.randn(1, 2, 0, width)
    codes = Codes(fmt, x, by_tokens=by_tokens)
    expected, at = [], 0
    for part in parts:
        new = torch.randn(1, 2, part * codes.unit, width, generator=torch.Generator().manual_seed(part))
        codes.write(new, at)
        alone = Codes(fmt, new, by_tokens=by_tokens)
        alone.write(new, 0)
        expected.append(alone.values(0, new.shape[2]))
        at += new.shape[2]
    whole = torch.cat(expected, 2)
    start = data.draw(st.integers(0, at - 1))
    end = data.draw(st.integers(start + 1, at))
    assert torch.equal(codes.values(start, end), whole[:, :, start:end])


def test_history_stays_as_it_is() -> None:
    x = states(600)
    for text, by_tokens in (("u4/g32/f16", True), ("u3/g8/f16", False), ("i8/tok/f16", False)):
        codes = stored(x[:, :, :256], text, by_tokens=by_tokens)
        before = [t.clone() for t in (codes.data, codes.scale)]
        codes.write(1e3 * x[:, :, 256:576], 256)
        assert codes.room == 3 * ROOM
        for old, new in zip(before, (codes.data, codes.scale), strict=True):
            assert torch.equal(new[:, :, : old.shape[2]], old)


def test_memory_is_that_of_the_format_and_grows_by_steps() -> None:
    x = states(512, 32)
    for text in ("u4/g32/f16", "u3/g32/f16", "u2/g32/f16", "i8/tok/f16", "f16"):
        fmt = Format.parse(text)
        held = sum(stored(x, text, by_tokens=bool(fmt.group) and keys).nbytes for keys in (True, False))
        assert held == CacheFormat((fmt,), (fmt,)).nbytes(3, 32, 512, batch=2)
    codes = stored(x[:, :, :1], "i8/tok/f16", by_tokens=False)
    assert codes.room == ROOM
    address = codes.data.data_ptr()
    codes.write(x[:, :, 1:ROOM], 1)
    assert codes.data.data_ptr() == address, "nothing moves while there is room"


def test_the_first_tokens_can_be_left_out() -> None:
    x = states(128)
    for text in ("u4/g32/f16", "u3/g32/f16"):
        codes = stored(x, text, by_tokens=True)
        fewer = codes.without(64)
        assert torch.equal(fewer.values(0, 64), codes.values(64, 128))
        fewer.write(0 * x[:, :, :32], 0)
        assert codes.values(64, 96).abs().max() > 1, "what reads the old memory is undisturbed"


def test_sequences_can_be_selected() -> None:
    x = states(8)
    codes = stored(x, "u8/tok/f16", by_tokens=False)
    other = codes.each(lambda t: t[torch.tensor([1, 1, 0])])
    assert torch.equal(other.values(0, 8), codes.values(0, 8)[[1, 1, 0]])


def test_tiles_leave_out_what_the_reader_folds_in() -> None:
    x, room = states(8), torch.empty(2 * 3 * 8 * 24)
    codes = stored(x, "u4/tok/f16", by_tokens=False)
    tile = codes.tile(0, 8, room)
    assert tile.shape == (2, 3, 2, 4, 24) and torch.equal(tile, tile.round()) and tile.min() >= 0 and tile.max() <= 15
    zero = codes.zeros(0, 8)
    assert zero is not None
    natural = tile.transpose(2, 3).flatten(2, 3)
    assert torch.allclose((natural - zero) * codes.scales(0, 8).transpose(-1, -2), codes.values(0, 8))


def test_half_precision_is_rounded_from_its_own_values() -> None:
    x = states(16).to(torch.bfloat16)
    data, params = encode(x, Format.parse("i8/tok/f16"), by_tokens=False)
    assert params is not None
    same, _ = encode(x.float(), Format.parse("i8/tok/f16"), by_tokens=False)
    assert torch.equal(data, same)
