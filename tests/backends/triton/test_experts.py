"""grouped_weight_only: the reference's results for any number of rows of each expert, and no value read by the host."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import experts
from qfx.backends.triton.device import A100, H100, Device
from qfx.backends.triton.experts import FRAGMENTS, TILES, VECTORS, candidates, choose, grouped_weight_only, pack_experts
from qfx.backends.triton.launch import recorded
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.ops import floats as float_ops
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import DEVICE, meta

FORMATS = (
    *("i8/ch", "i4/g128", "u4/g32/f16", "u4/g256", "i3/g32", "u3/ch", "i2/g64", "u2/g16", "i8", "i8/b128x64"),
    *("nf4/g64", "nf4/g64/dq", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/b128x128", "f8e5m2/g32", "i4/g96"),
)
# of the sum of |x w|: as in test_weight_only
STEP = {torch.float32: 2.0**-19, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6.5}


def weight(e: int, n: int, k: int, text: str) -> Packed:
    return pack_weight(torch.randn(e, n, k, device=DEVICE) / k**0.5 + 0.01, Format.parse(text))


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


def run(x: Tensor, packed: Packed, offs: Tensor) -> Tensor:
    w, text = pack_experts(packed.data, packed.scale, packed.zero, str(packed.format), x.shape[1])
    found = torch.ops.qfx_triton.grouped_weight_only(x, w, offs, text, packed.shape[1])
    assert isinstance(found, Tensor)
    return found


def error(x: Tensor, packed: Packed, offs: Tensor) -> float:
    """The greatest difference to the reference, against the sum of |x w| + |y|."""
    due = float_ops.grouped_linear_quant(
        x.float(), packed.data, packed.scale, packed.zero, offs, "", str(packed.format)
    )
    got = run(x, packed, offs)
    assert got.dtype == x.dtype and got.shape == due.shape
    last = int(offs[-1])
    assert got[last:].eq(0).all(), "rows after the last end"
    if not last:
        return 0.0
    size = (float_ops.grouped_linear(x.float().abs(), packed.dequantize().abs(), offs) + due.abs())[:last]
    return float(((got.float() - due)[:last].abs() / size.clamp(min=1e-30)).max())


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str) -> None:
    torch.manual_seed(1)
    packed = weight(3, 7, 300, text)
    for counts, rest, dtype in (([0, 2, 1], 0, torch.float16), ([5, 0, 9], 2, torch.float32)):
        x = torch.randn(sum(counts) + rest, 300, device=DEVICE).to(dtype)
        assert error(x, packed, ends(counts)) < STEP[dtype]


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.just(0) | st.integers(0, 6) | st.integers(0, 60), min_size=1, max_size=5),
    rest=st.just(0) | st.integers(0, 5), n=st.integers(1, 40), k=st.integers(1, 300),
    text=st.sampled_from(FORMATS), dtype=st.sampled_from(list(STEP)), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_shape(counts: list[int], rest: int, n: int, k: int, text: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    packed = weight(len(counts), n, k, text)
    x = torch.randn(sum(counts) + rest, k + 3, device=DEVICE).to(dtype)[:, 3:]
    assert error(x, packed, ends(counts)) < STEP[dtype]


@pytest.mark.parametrize("counts", [[0, 17, 0], [17, 0, 0], [0, 0, 17], [0, 0, 0], [1, 15, 3]], ids=str)
@pytest.mark.parametrize("path", [VECTORS, TILES, FRAGMENTS])
@pytest.mark.parametrize("rest", [0, 3])
def test_every_path(counts: list[int], path: int, rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2, "FIRST": rest % 2}
    vectors = {"ROWS": 1 + rest % 2, "BN": 4, "CHUNKS": 32, "num_warps": 1, "num_stages": 1}
    fragments = {"ROWS": 1 + rest % 2, "num_warps": 2, "num_stages": 1}
    kept = {"PATH": path, **{TILES: tile, VECTORS: vectors, FRAGMENTS: fragments}[path]}
    monkeypatch.setattr(experts, "heuristic", lambda *_: kept)
    torch.manual_seed(0)
    packed = weight(3, 9, 260, "u4/g128")
    dtype = torch.float16 if path == FRAGMENTS else torch.float32
    x = torch.randn(sum(counts) + rest, 260, device=DEVICE).to(dtype)
    assert error(x, packed, ends(counts)) < STEP[dtype]


def test_an_expert_too_far_or_a_wrong_scale_shows() -> None:
    torch.manual_seed(0)
    packed, x, offs = weight(3, 8, 64, "u4/g32"), torch.randn(9, 64, device=DEVICE), ends([3, 3, 3])
    w, text = pack_experts(packed.data, packed.scale, packed.zero, "u4/g32", 64)
    due = grouped_weight_only(x, w, offs, text, 8)
    assert (grouped_weight_only(x, w, ends([2, 4, 3]), text, 8) - due)[2].abs().min() > 1e-3
    for which in (0, 1, 3):
        changed = [t.clone() for t in w]
        changed[which][1, 5, 1] += 1
        off = (grouped_weight_only(x, changed, offs, text, 8) - due).abs() > 1e-4
        assert off[3:6, 5].all() and int(off.sum()) == 3


def test_nothing_leaks_from_beyond_the_input_or_the_last_end() -> None:
    packed = weight(2, 9, 100, "i4/g32")
    wide = torch.full((40, 128), float("nan"), device=DEVICE)
    wide[:35, :100] = 1.0
    for counts in ([1, 0], [17, 18]):
        found = run(wide[: sum(counts) + 5, :100], packed, ends(counts))
        assert found[: sum(counts)].isfinite().all() and found[sum(counts) :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_no_expert_are_zeros_whatever_the_scales_are(dtype: torch.dtype) -> None:
    packed, x = weight(2, 8, 64, "i4/ch"), torch.randn(40, 64, device=DEVICE).to(dtype)
    w, text = pack_experts(packed.data, packed.scale, packed.zero, "i4/ch", 64)
    w[1] = torch.full_like(w[1], torch.nan)
    for counts in ([1, 1], [17, 18]):
        found = grouped_weight_only(x[: sum(counts) + 3], w, ends(counts), text, 8)
        assert found[: sum(counts)].isnan().all() and found[sum(counts) :].eq(0).all()


def test_ends_beyond_the_rows_read_nothing_there() -> None:
    packed, x = weight(2, 9, 64, "i8/ch"), torch.randn(6, 64, device=DEVICE)
    found = run(x, packed, torch.tensor([2, 50], device=DEVICE))
    assert torch.equal(found, run(x, packed, ends([2, 4])))


@pytest.mark.parametrize("t", [1, 4, 40])
def test_the_host_reads_no_value(t: int) -> None:
    """Tensors without data stand for those of the device: reading one would fail, as it stops a CUDA graph."""
    w, text = pack_experts(meta(4, 8, 32, dtype=torch.uint8), meta(4, 8, 1, dtype=torch.float32), None, "i4/ch", 64)
    with recorded(H100) as launches:
        grouped_weight_only(meta(t, 64), w, meta(4, dtype=torch.int32), text, 8)
    assert len(launches) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        float_ops.grouped_linear(meta(t, 64), meta(4, 8, 64), meta(4, dtype=torch.int32))


@pytest.mark.parametrize("device", [A100, H100], ids=lambda d: d.name)
def test_paths_by_the_number_of_rows(device: Device) -> None:
    def path(t: int, e: int, text: str = "i4/g128") -> int:
        return choose(device, Format.parse(text), t, e, 4096, 2048, torch.bfloat16)["PATH"]

    assert [path(t, 8) for t in (1, 2, 128, 129, 512)] == [FRAGMENTS] * 3 + [TILES] * 2
    assert [path(t, 128) for t in (8, 2048, 2049, 100_000)] == [FRAGMENTS] * 2 + [TILES] * 2
    assert [path(t, 8, "i4/g16") for t in (1, 2, 8, 9, 512)] == [VECTORS] * 3 + [TILES] * 2
    assert [path(t, 128, "f8e4m3/ch") for t in (8, 128, 129, 100_000)] == [VECTORS] * 2 + [TILES] * 2
    for (t, e), text in itertools.product(((1, 8), (8, 8), (64, 8), (32, 128), (8192, 8)), ("i4/g128", "i4/g16")):
        found = candidates(Format.parse(text), t, e, torch.float16)
        assert 1 < len(found) <= 20 and len({tuple(c.items()) for c in found}) == len(found)


@pytest.mark.parametrize("t", [1, 7, 8, 30, 1000])
def test_there_is_a_tile_for_every_row(t: int) -> None:
    """The bound of the grid holds for any ends: each row is in one tile, as the kernel counts them."""
    for counts in ([t, 0, 0, 0], [0, 0, 0, t], [t // 4] * 4, [0, t // 3, t // 2, 0], [0, 0, 0, 0]):
        for height in (2, 16):
            starts = [0, *ends(counts).tolist()]
            ends_ = [*starts[1:], t]
            begins = [start // height + e for e, start in enumerate(starts)]
            tiles = [
                (b + i) for b, s, e in zip(begins, starts, ends_, strict=True) for i in range(-(-(e - s) // height))
            ]
            assert len(set(tiles)) == len(tiles)
            assert max(tiles) < t // height + len(counts) + 1


def test_what_does_not_fit_is_refused() -> None:
    packed = weight(2, 9, 64, "i4/g32")
    w, text = pack_experts(packed.data, packed.scale, packed.zero, "i4/g32", 64)
    x, offs = torch.randn(3, 64, device=DEVICE), ends([1, 2])
    with pytest.raises(ValueError, match="x is no matrix of floats"):
        grouped_weight_only(x.double(), w, offs, text, 9)
    with pytest.raises(ValueError, match="where the rows of each expert end"):
        grouped_weight_only(x, w, offs.float(), text, 9)
    with pytest.raises(ValueError, match=r"(?s)where the rows of each expert end.*integers \[2\]"):
        grouped_weight_only(x, w, ends([1, 1, 1]), text, 9)
    with pytest.raises(ValueError, match=r"codes \[E, 8, 64\] for K = 64"):
        grouped_weight_only(x, w, offs, text, 8)
    with pytest.raises(ValueError, match="3 tensors"):
        grouped_weight_only(x, w[:2], offs, text, 9)
    with pytest.raises(UnsupportedError, match="no multiples of 16"):
        pack_experts(packed.data, packed.scale, None, "i4/g24", 64)
    assert run(x[:0], packed, ends([0, 0])).shape == (0, 9)
