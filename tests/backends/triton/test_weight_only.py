"""linear_weight_only: the reference's results, for every format, number of rows, type of activation and odd shape."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import weight_only, weight_only_config
from qfx.backends.triton.device import A100, H100, Device
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.weight_only import linear_weight_only
from qfx.backends.triton.weight_only_config import (
    ABREAST,
    DEQUANTIZE,
    DOT,
    FRAGMENTS,
    GEMV,
    candidates,
    choose,
    has_fragments,
)
from qfx.backends.triton.weight_only_pack import pack_weight_only, reason_against_weight
from qfx.errors import QfxWarning, UnsupportedError
from qfx.format import Format
from qfx.ops.packed import linear
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import DEVICE, INTERPRETED

FORMATS = (
    *("i8/ch", "u8/ch", "i4/ch", "i4/g128", "i4/g32", "u4/g128", "u4/g16/f16", "i4/g64/bf16", "u4/g256"),
    *("i3/g128", "u3/g64", "i3/g32", "i2/g128", "u2/g16", "i2/g64", "i6/ch", "i8", "u8/g32", "i8/b128x64"),
    *("nf4/g64", "nf4/g64/dq", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/ch", "f8e4m3/b128x128", "f8e5m2/g32"),
    *("i4/g96", "u3/ch", "i3/g256", "i4/g128/e8m0"),
)
# of the sum of |x w|: bf16 is truncated in the interpreter; weights in small groups are rounded to the type
STEP = {torch.float32: 2.0**-19, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6.5}


def run(x: Tensor, packed: Packed, bias: Tensor | None = None, smooth: Tensor | None = None) -> Tensor:
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, str(packed.format), x.shape[-1])
    found = torch.ops.qfx_triton.linear_weight_only(x, w, bias, smooth, text, packed.shape[0])
    assert isinstance(found, Tensor)
    return found


def error(x: Tensor, packed: Packed, bias: Tensor | None = None, smooth: Tensor | None = None) -> float:
    """The greatest difference to the reference, against the sum of |x w| + |bias| + |y|."""
    due = linear(x.float(), packed.data, packed.scale, packed.zero, bias, None, None, smooth, "", str(packed.format))
    got = run(x, packed, bias, smooth)
    assert got.dtype == x.dtype and got.shape == due.shape
    size = (x.float() if smooth is None else x.float() / smooth).abs() @ packed.dequantize().abs().t() + due.abs()
    if bias is not None:
        size += bias.float().abs()
    return float(((got.float() - due).abs() / size.clamp(min=1e-30)).max()) if got.numel() else 0.0


def weight(n: int, k: int, text: str) -> Packed:
    fmt = Format.parse(text)
    return pack_weight(torch.randn(n, k, device=DEVICE) / k**0.5 + 0.01, fmt)


def now_of(text: str) -> Format:
    """The format as it is packed."""
    return Format.parse(pack_weight_only(*_parts(weight(2, 256, text)), text, 256)[1])


def _parts(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    return packed.data, packed.scale, packed.zero


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str) -> None:
    torch.manual_seed(1)
    packed = weight(7, 300, text)
    bias = torch.randn(7, device=DEVICE)
    for m, dtype in ((1, torch.float32), (1, torch.float16), (6, torch.bfloat16), (13, torch.float16)):
        assert error(torch.randn(m, 300, device=DEVICE).to(dtype), packed, bias) < STEP[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 17])
def test_every_format_type_and_number_of_rows(text: str, m: int) -> None:
    torch.manual_seed(m)
    packed = weight(21, 410, text)
    for dtype, step in STEP.items():
        assert error(torch.randn(m, 410, device=DEVICE).to(dtype), packed) < step


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(0, 5) | st.integers(5, 300), n=st.integers(1, 40), k=st.integers(1, 400),
    text=st.sampled_from(FORMATS), dtype=st.sampled_from(list(STEP)), seed=st.integers(0, 99),
    extras=st.booleans(),
)  # fmt: skip
def test_every_shape(m: int, n: int, k: int, text: str, dtype: torch.dtype, seed: int, extras: bool) -> None:
    torch.manual_seed(seed)
    packed = weight(n, k, text)
    x = torch.randn(m, k + 3, device=DEVICE).to(dtype)[:, 3:]
    bias = torch.randn(n, device=DEVICE).to(dtype) if extras else None
    smooth = torch.rand(k, device=DEVICE) + 0.5 if extras else None
    assert error(x, packed, bias, smooth) < (1 if smooth is None else 2) * STEP[dtype]


@pytest.mark.parametrize(
    ("text", "dtype"), [("i4/g128", torch.float16), ("u3/g64", torch.float32), ("f4e2m1/g16/e4m3", torch.bfloat16)]
)
@pytest.mark.parametrize(("path", "m"), [(GEMV, 3), (GEMV, 4), (DOT, 3), (DOT, 20), (DEQUANTIZE, 5)])
def test_every_path(text: str, dtype: torch.dtype, path: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        GEMV: {"BN": 4, "CHUNKS": 16, "num_warps": 4, "num_stages": 1},
        DOT: {"BM": 16, "BN": 32, "SPLITS": 3, "FIRST": int(m > 16), "num_warps": 4, "num_stages": 2},
        DEQUANTIZE: {},
    }[path]
    kept = {"PATH": path, **config}
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: kept)
    torch.manual_seed(0)
    packed = weight(33, 520, text)
    x = torch.randn(m, 520, device=DEVICE).to(dtype)
    assert error(x, packed, torch.randn(33, device=DEVICE)) < STEP[dtype]


SERVED = [text for text in FORMATS if has_fragments(now_of(text), torch.float16)]


def in_turn(*others: tuple[int, int]) -> list[Any]:
    """Each format of `SERVED` with one of `others` after the other; the rest of the pairs are slow tests."""
    return [
        pytest.param(text, *other, marks=[] if (i - j) % len(others) == 0 else pytest.mark.slow)
        for i, text in enumerate(SERVED)
        for j, other in enumerate(others)
    ]


@pytest.mark.parametrize(("text", "rows", "warps"), in_turn((1, 1), (2, 4), (4, 2)))
def test_fragments_of_every_format(text: str, rows: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PATH": FRAGMENTS, "ROWS": rows, "num_warps": warps, "num_stages": 1}
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: kept)
    torch.manual_seed(rows)
    packed, bias = weight(37, 1024 if rows == 2 else 777, text), torch.randn(37, device=DEVICE)
    for m, dtype in ((3, torch.float16), (26, torch.bfloat16)):
        assert error(torch.randn(m, packed.shape[1], device=DEVICE).to(dtype), packed, bias) < STEP[dtype]


@pytest.mark.parametrize(("text", "warps", "splits"), in_turn((4, 1), (4, 3), (8, 2)))
def test_warps_abreast_of_every_format(text: str, warps: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PATH": ABREAST, "SPLITS": splits, "num_warps": warps, "num_stages": 1}
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: kept)
    torch.manual_seed(warps)
    packed, bias = weight(75, 1024 if splits == 3 else 777, text), torch.randn(75, device=DEVICE)
    for m, dtype in ((16, torch.float16), (26, torch.bfloat16)):
        assert error(torch.randn(m, packed.shape[1], device=DEVICE).to(dtype), packed, bias) < STEP[dtype]


@pytest.mark.parametrize(("text", "k", "splits"), [("u4/g32", 5, 3), ("u3/g512", 513, 4), ("u8/ch", 384, 4)])
def test_warps_abreast_of_fewer_blocks_than_parts(
    text: str, k: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"PATH": ABREAST, "SPLITS": splits, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: kept)
    torch.manual_seed(k)
    for n, m in ((1, 1), (33, 20)):
        packed, bias = weight(n, k, text), torch.randn(n, device=DEVICE)
        assert error(torch.randn(m, k, device=DEVICE).half(), packed, bias) < STEP[torch.float16]


def test_fragments_serve_integers_and_tables_in_groups_that_blocks_hold() -> None:
    assert {"i4/g32", "i4/g64/bf16", "i3/g32", "u8/ch", "u8/g32", "i6/ch", "i8", "nf4/g64", "u3/ch"} <= set(SERVED)
    assert not {"u2/g16", "f8e4m3/ch", "f4e2m1/g16/e4m3", "u4/g16/f16"} & set(SERVED)
    assert not has_fragments(Format.parse("i4/g128"), torch.float32)


def test_a_wrong_scale_or_zero_point_shows() -> None:
    torch.manual_seed(0)
    packed = weight(19, 300, "u4/g64")
    x = torch.randn(2, 300, device=DEVICE).half()
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, "u4/g64", 300)
    due = linear(x.float(), packed.data, packed.scale, packed.zero, None, None, None, None, "", "u4/g64")
    for dtype, close in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        for which in (0, 1, 3):
            changed = [t.clone() for t in w]
            changed[which][7, 2] += 1
            got = linear_weight_only(x.to(dtype), changed, None, None, text, 19)
            assert (got - due)[:, 7].abs().min() > (1e-3 if which == 0 else 5 * close)
            assert torch.allclose(got[:, :7].float(), due[:, :7], atol=close)


def test_nothing_leaks_from_beyond_the_input() -> None:
    packed = weight(9, 100, "i4/g32")
    wide = torch.full((3, 128), float("nan"), device=DEVICE)
    wide[:, :100] = 1.0
    for m in (1, 3):
        assert run(wide[:m, :100], packed).isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="notes of all of that memory would be kept")
@pytest.mark.parametrize("m", [3, 4, 17])
def test_rows_that_lie_far_apart(m: int) -> None:
    """As the last tokens of long prompts do: farther than 32 bits count. Of that memory the rows alone are used."""
    torch.manual_seed(m)
    packed, far = weight(9, 64, "f8e4m3/ch"), 2**31 // (m - 1) + 16
    held = torch.empty((m - 1) * far + 64, dtype=torch.float16, device=DEVICE)
    x = held.as_strided((m, 64), (far, 1))
    x.copy_(torch.randn(m, 64, device=DEVICE))
    assert torch.equal(run(x, packed), run(x.contiguous(), packed))


def test_batches_and_empty_ones() -> None:
    packed = weight(9, 64, "i8/ch")
    x = torch.randn(2, 3, 64, device=DEVICE)
    assert torch.equal(run(x, packed), run(x.reshape(6, 64), packed).reshape(2, 3, 9))
    assert run(x[:0], packed).shape == (0, 3, 9)


def test_without_memory_for_the_weight_it_is_unpacked_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        try:
            return torch.empty(1 << 59, device=DEVICE)
        except RuntimeError as refused:  # of a CPU
            raise torch.OutOfMemoryError(str(refused)) from None

    monkeypatch.setattr(weight_only, "_dequantized", fail)
    packed = weight(9, 64, "i4/g32")
    with pytest.warns(QfxWarning, match="no memory for a weight"):
        assert error(torch.randn(70, 64, device=DEVICE), packed) < STEP[torch.float32]
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, "i4/g32", 64)
    for _ in range(2):  # the second time there could be memory, so the op asks for it again
        with pytest.warns(QfxWarning, match="no memory for a weight"):
            torch.ops.qfx_triton.linear_weight_only(torch.randn(70, 64, device=DEVICE), w, None, None, text, 9)


def test_what_does_not_fit_is_refused() -> None:
    packed = weight(9, 64, "i4/g32")
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, "i4/g32", 64)
    x = torch.randn(2, 64, device=DEVICE)
    with pytest.raises(ValueError, match="x does not fit"):
        linear_weight_only(x.double(), w, None, None, text, 9)
    with pytest.raises(ValueError, match="codes \\[9, 128\\] for K = 200"):
        linear_weight_only(torch.randn(2, 200, device=DEVICE), w, None, None, text, 9)
    with pytest.raises(ValueError, match="bias does not fit"):
        linear_weight_only(x, w, x[0], None, text, 9)
    with pytest.raises(ValueError, match="3 tensors"):
        linear_weight_only(x, w[:2], None, None, text, 9)
    with pytest.raises(UnsupportedError, match="no multiples of 16"):
        pack_weight_only(packed.data, packed.scale, None, "i4/g24", 64)
    assert "no multiples" in str(reason_against_weight("i4/g24"))
    assert reason_against_weight("i4/g48") is None


@pytest.mark.parametrize(("text", "used"), [("u3/g128", False), ("u4/g128", True)])
def test_three_bits_of_codes_that_begin_anywhere_are_read_one_by_one(
    text: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = weight(24, 256, text)
    w, now = pack_weight_only(packed.data, packed.scale, packed.zero, text, 256)
    x = torch.randn(1, 256, dtype=torch.float16, device=DEVICE)
    beside = torch.cat([w[0].new_zeros(1), w[0].flatten()])[1:].reshape(w[0].shape)
    found = []
    monkeypatch.setattr(weight_only_config, "_MOST_FRAGMENTS", 0)
    for codes in (w[0], beside):
        with recorded(H100) as launches:
            linear_weight_only(x, [codes, *w[1:]], None, None, now, 24)
        found.append(bool(launches[0].arguments["ASM"]))
    assert found == [True, used]


@pytest.mark.parametrize("text", ["i4/g128", "u3/g64"])
def test_codes_that_begin_anywhere_are_no_fragments(text: str) -> None:
    torch.manual_seed(0)
    packed = weight(24, 256, text)
    w, now = pack_weight_only(packed.data, packed.scale, packed.zero, text, 256)
    x = torch.randn(3, 256, dtype=torch.float16, device=DEVICE)
    beside = torch.cat([w[0].new_zeros(1), w[0].flatten()])[1:].reshape(w[0].shape)
    kernels = []
    for codes in (w[0], beside):
        with recorded(H100) as launches:
            linear_weight_only(x, [codes, *w[1:]], None, None, now, 24)
        kernels.append(launches[0].kernel.fn.__name__)
    assert kernels == ["fragments", "dot_tiles"]
    both = [linear_weight_only(x, [codes, *w[1:]], None, None, now, 24) for codes in (w[0], beside)]
    torch.testing.assert_close(*both, rtol=1e-2, atol=1e-2)


def test_paths_by_the_number_of_rows() -> None:
    def paths(text: str, dtype: torch.dtype = torch.float16) -> list[int]:
        fmt = Format.parse(text)
        return [choose(H100, fmt, m, 4096, 4096, dtype)["PATH"] for m in (1, 2, 4, 5, 63, 64, 512, 4096)]

    assert paths("i4/g128") == [FRAGMENTS, FRAGMENTS, FRAGMENTS, FRAGMENTS, ABREAST, ABREAST, DOT, DEQUANTIZE]
    assert paths("i3/g128") == [FRAGMENTS, FRAGMENTS, FRAGMENTS, FRAGMENTS, DOT, DOT, DOT, DEQUANTIZE]
    later = Device("NVIDIA B200", (10, 0), 148, 232448)
    for device, m, path in ((A100, 16, FRAGMENTS), (A100, 17, DOT), (later, 16, FRAGMENTS), (later, 64, DOT)):
        assert choose(device, Format.parse("i4/g128"), m, 4096, 4096, torch.float16)["PATH"] == path
    assert paths("i4/g16") == [GEMV, GEMV, DOT, DOT, DOT, DOT, DOT, DEQUANTIZE]
    assert paths("f8e4m3/ch") == [GEMV, GEMV, GEMV, DOT, DOT, DOT, DOT, DEQUANTIZE]
    assert paths("i4/g128", torch.float32) == [GEMV, GEMV, DOT, DOT, DOT, DEQUANTIZE, DEQUANTIZE, DEQUANTIZE]
    for m, text in itertools.product((1, 4, 16, 64, 4096), ("i4/g128", "i4/g16")):
        found = candidates(Format.parse(text), m, 4096, torch.float16)
        assert any(c["PATH"] == FRAGMENTS for c in found) == (text == "i4/g128" and m <= 32)
        assert any(c["PATH"] == ABREAST for c in found) == (text == "i4/g128" and 4 < m <= 64)
        assert 1 < len(found) <= 20 and len({tuple(c.items()) for c in found}) == len(found)
