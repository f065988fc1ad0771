"""Sweeps behind GPTQ: against a naive form in f64, never worse on what they minimize, on every kind of format."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.numerics import dequantize, quantize
from qfx.packing import Packed, pack_weight
from qfx.passes import _sweep
from qfx.passes._grid import Grid
from qfx.passes._hessian import Hessian
from qfx.passes._sweep import swept
from qfx.passes.gptq import round_by
from qfx.presets import presets
from qfx.rounding.method_options import GptqOptions
from qfx.storage.spill import Spill, is_mapped, rest
from tests.passes.test_gptq import INTEGERS, OTHERS, data, loss, seen, weight

DAMPENING = 0.01


def hessian(x: Tensor, dampening: float = DAMPENING) -> Tensor:
    """H with what is added to its diagonal, f64 [K, K]."""
    h = x.double().T @ x.double()
    energy = h.diagonal().clone()
    mean = energy[energy > 0].mean()
    h.diagonal().add_(torch.where(energy > 0, dampening * mean, mean))
    return h


def aim(w: Tensor, packed: Packed, x: Tensor) -> float:
    """What sweeps minimize."""
    e = w.double() - packed.dequantize().double()
    return float(((e @ hessian(x)) * e).sum())


def naive(w: Tensor, packed: Packed, x: Tensor) -> Tensor:
    """Codes [N, K] after one sweep with the scales as they are: each column against all the others, in f64."""
    fmt, h = packed.format, hessian(x)
    column, width = Format(fmt.type, "ch"), fmt.group or w.shape[1]
    scale, zero = packed.params()
    codes, values = packed.codes().clone(), packed.dequantize().double()
    for j in range(w.shape[1]):
        best = values[:, j] + ((w.double() - values) @ h[:, j]) / h[j, j]
        s, z = (None if t is None else t[:, j // width, None] for t in (scale, zero))
        assert s is not None
        found = quantize(best.float()[:, None], column, s, z)
        codes[:, j], values[:, j] = found[:, 0], dequantize(found, column, s, z)[:, 0].double()
    return codes


def after(w: Tensor, packed: Packed, x: Tensor, sweeps: int = 1, *, moving: bool = True) -> Packed:
    grid = Grid(packed.format, *packed.params(), (w.shape[0], w.shape[1]))
    return swept(w, packed, settled(x), grid, sweeps, DAMPENING, moving=moving)


def settled(x: Tensor) -> Hessian:
    found = seen(x)
    found.whole()
    return found


@pytest.mark.parametrize("text", ["u4/g16", "i4/ch", "i3/g48", "u2/g64", "u3/g10", "nf4/g16", "f8e4m3/ch"])
def test_agrees_with_the_naive_form(text: str) -> None:
    """Groups within, across and beyond the columns whose slopes are found together."""
    w, x = weight(12, 300), data(900, 300)
    start = pack_weight(w, Format.parse(text))
    found, wanted = after(w, start, x, moving=False), naive(w, start, x)
    assert (found.codes().float() == wanted.float()).double().mean() > 0.99, "all but values between two codes in f32"
    assert torch.equal(found.scale, start.scale)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", INTEGERS + OTHERS)
def test_no_sweep_is_worse(text: str, act_order: bool) -> None:
    w, x, fmt = weight(32, 72), data(600, 72), Format.parse(text)
    found = []
    for sweeps in (0, 1, 3):
        packed, told = round_by(w, [seen(x)], fmt, GptqOptions(act_order=act_order, sweeps=sweeps), name="fc")
        assert packed.shape == (32, 72) and packed.nbytes == fmt.nbytes((32, 72))
        assert told["error_after"] == pytest.approx(loss(w, packed, x), rel=1e-3)
        found.append(aim(w, packed, x))
    assert found[1] < found[0] and found[2] <= found[1] * (1 + 1e-5)


@pytest.mark.parametrize("text", ["u4/g8", "i3/ch", "i2/g8/f16"])
def test_it_ends_where_no_code_is_better(text: str) -> None:
    w, x, fmt = weight(6, 24), data(200, 24), Format.parse(text)
    packed = after(w, pack_weight(w, fmt), x, 30, moving=False)
    least, codes = aim(w, packed, x), packed.codes()
    for j in range(24):
        for step in (-1, 1):
            other = codes.clone()
            other[:, j] = (other[:, j].to(torch.int16) + step).clamp(fmt.qmin, fmt.qmax).to(codes.dtype)
            assert aim(w, Packed.from_codes(other, fmt, *packed.params()), x) >= least * (1 - 1e-4)


@pytest.mark.parametrize("text", ["u2/g64", "i3/g64", "i3/ch", "i2/g16/f16"])
def test_scales_that_move_are_better(text: str) -> None:
    w, x = weight(32, 128), data(1000, 128)
    start = pack_weight(w, Format.parse(text))
    kept, moved = (after(w, start, x, 2, moving=moving) for moving in (False, True))
    assert aim(w, moved, x) < 0.97 * aim(w, kept, x)
    assert torch.equal(kept.scale, start.scale) and not torch.equal(moved.scale, start.scale)
    assert moved.scale.dtype == start.scale.dtype
    assert bool((moved.scale * start.scale > 0).all()), "a scale keeps its sign"


def test_scales_are_least_squares_for_their_codes() -> None:
    w, x, fmt = weight(8, 40), data(300, 40), Format.parse("i3/ch")
    start = pack_weight(w, fmt)
    grid = Grid(fmt, *start.params(), (8, 40))
    work = _sweep.Sweep(settled(x), grid, DAMPENING, moving=True)
    values = start.dequantize().T.contiguous()
    work._rescale(values, w.T - values, None, slice(0, 8), 0, 40)
    best = aim(w, Packed.from_codes(start.codes(), fmt, grid.scale), x)
    assert best < aim(w, start, x)
    assert torch.allclose(values.T, dequantize(start.codes(), fmt, grid.scale), rtol=1e-5)
    for factor in (0.998, 1.002):
        assert aim(w, Packed.from_codes(start.codes(), fmt, grid.scale * factor), x) > best


def test_a_wide_group_is_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(16, 100), data(600, 100)
    narrow = after(w, pack_weight(w, Format.parse("u3/g100")), x, 2)
    monkeypatch.setattr(_sweep, "_WIDEST", 32)
    wide = after(w, pack_weight(w, Format.parse("u3/g100")), x, 2)
    row = after(w, pack_weight(w, Format.parse("u3/ch")), x, 2)
    for other in (wide, row):
        assert (narrow.codes() == other.codes()).double().mean() > 0.98
        assert torch.allclose(narrow.scale, other.scale, rtol=1e-3)


@pytest.mark.parametrize("text", ["i4/ch", "u3/g16"])
def test_what_the_float_model_would_give_is_aimed_at(text: str) -> None:
    w, fmt, x = weight(12, 200), Format.parse(text), data(900, 200)
    wanted = x + 0.3 * data(900, 200, seed=3)

    def missed(sweeps: int, *, asymmetric: bool = True) -> float:
        options = GptqOptions(asymmetric=asymmetric, sweeps=sweeps)
        packed, _ = round_by(w, [seen(x, wanted if asymmetric else None)], fmt, options, name="fc")
        return float((packed.dequantize() @ x.T - w @ wanted.T).square().sum())

    assert missed(2) < 0.99 * missed(0)
    assert missed(2) < 0.9 * missed(2, asymmetric=False)


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["i2/g8", "u3/g16", "i4/ch", "u4/g8/f16", "u8/g16", "i4", "f4e2m1/g16/e4m3", "nf4/g8/dq"]),
    rows=st.integers(1, 9), channels=st.integers(1, 40), tokens=st.integers(1, 60), sweeps=st.integers(1, 3),
    asymmetric=st.booleans(), dampening=st.sampled_from([0.0, 0.01]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    text: str, rows: int, channels: int, tokens: int, sweeps: int, asymmetric: bool, dampening: float, seed: int
) -> None:
    w, x, fmt = weight(rows, channels, seed=seed), data(tokens, channels, seed), Format.parse(text)
    x[:, seed % channels] = 0  # a channel that nothing is seen of
    found = seen(x, x + 0.1 if asymmetric else None)
    options = GptqOptions(asymmetric=asymmetric, sweeps=sweeps, dampening=dampening)
    packed, told = round_by(w, [found], fmt, options, name="fc")
    assert packed.format == fmt and packed.shape == (rows, channels) and packed.nbytes == fmt.nbytes((rows, channels))
    assert torch.isfinite(packed.dequantize()).all() and told["error_after"] >= 0
    assert packed.scale.dtype == fmt.scale_dtype


def test_many_rows_are_swept_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(50, 40), data(200, 40)
    for text in ("u4/g16", "i3/ch", "i4"):
        start = pack_weight(w, Format.parse(text))
        whole = after(w, start, x, 2)
        monkeypatch.setattr(_sweep, "_ELEMENTS", 7 * 40)
        parts = after(w, start, x, 2)
        monkeypatch.undo()
        assert (whole.codes() == parts.codes()).double().mean() > 0.99, "all but ties in f32"
        assert torch.allclose(whole.scale, parts.scale, rtol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("text", ["u4/g128", "i4/ch"])
def test_statistics_in_a_file_stay_there(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of H and D, 36 MB each, little is in memory at a time."""
    w, x = weight(16, 3072), torch.randn(64, 3072)
    start, statistics = pack_weight(w, Format.parse(text)), seen(x, x + 0.1 * torch.randn(64, 3072))
    with Spill(tmp_path) as spill:
        statistics.settle(spill.keep(w.repeat(16, 1)))
        assert statistics.cross is not None and is_mapped(statistics.matrix) and is_mapped(statistics.cross)
        rest(statistics.matrix, statistics.cross)
        before, found, own = mapped_bytes(), [], Grid.round

        def watched(self: Grid, *given: Any) -> tuple[Tensor, Tensor]:
            if given[0] % 128 == 0:
                found.append(mapped_bytes() - before)
            return own(self, *given)

        monkeypatch.setattr(Grid, "round", watched)
        grid = Grid(start.format, *start.params(), (16, 3072))
        swept(w, start, statistics, grid, 1, DAMPENING, moving=True)
        assert len(found) == 24 and max(found) < 12e6
        statistics.matrix.sum()
        assert mapped_bytes() - before > 30e6, "what is read is counted"


def mapped_bytes() -> int:
    """Of files, in memory."""
    found = re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def test_dead_channels_stay_rounded_to_nearest() -> None:
    w, x, fmt = weight(8, 20), data(300, 20), Format.parse("i4/ch")
    x[:, [2, 11]] = 0
    start = pack_weight(w, fmt)
    packed = after(w, start, x, 2, moving=False)
    assert torch.equal(packed.codes()[:, [2, 11]], start.codes()[:, [2, 11]])
    assert loss(w, packed, x) < loss(w, start, x)


def test_scales_that_are_kept_stay() -> None:
    w, x, fmt = weight(8, 32), data(300, 32), Format.parse("u3/g16")
    kept = pack_weight(w, fmt).params()
    packed, _ = round_by(w, [seen(x)], fmt, GptqOptions(sweeps=2), name="fc", kept=kept)
    assert torch.equal(packed.scale, kept.scale)
    free, _ = round_by(w, [seen(x)], fmt, GptqOptions(sweeps=2), name="fc")
    assert not torch.equal(free.scale, kept.scale)


def test_experts_are_swept_by_what_each_sees() -> None:
    w, fmt, options = weight(3, 16, 24), Format.parse("u4/g8"), GptqOptions(sweeps=2)
    inputs = [data(200, 24, seed=i) for i in range(3)]
    packed, _ = round_by(w, [seen(x) for x in inputs], fmt, options, name="experts")
    each = [round_by(w[i], [seen(inputs[i])], fmt, options, name="e")[0] for i in range(3)]
    assert torch.equal(packed.dequantize(), torch.stack([one.dequantize() for one in each]))


@pytest.mark.parametrize("case", ["zero weights", "constant weights", "one token", "equal inputs"])
def test_degenerate_values(case: str) -> None:
    w, x = weight(8, 20), data(300, 20)
    if case == "zero weights":
        w[:] = 0
    elif case == "constant weights":
        w[3] = -1.0
    elif case == "one token":
        x = x[:1]
    else:
        x[:, 5] = x[:, 6]
    packed, told = round_by(w, [seen(x)], Format.parse("i4/g10"), GptqOptions(sweeps=3), name="fc")
    assert torch.isfinite(packed.dequantize()).all() and told["error_after"] <= told["error_before"]
    assert case != "zero weights" or not packed.dequantize().any()


def test_presets_sweep_and_bad_numbers_are_refused() -> None:
    own = {name: recipe.gptq.sweeps for name, recipe in presets().items() if recipe.rounding == "gptq"}
    assert own and set(own.values()) == {2}
    for bad in (-1, 1.5, True, 101):
        with pytest.raises(ValueError, match="sweeps"):
            GptqOptions(sweeps=bad)  # type: ignore[arg-type]
