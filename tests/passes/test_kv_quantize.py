"""qfx.passes.kv_quantize: caches of fused attention are stored as integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfx import run
from qfx.format import Format
from qfx.ops.cached import encode
from qfx.passes.cleanup import cleanup
from qfx.passes.kv_quantize import kv_quantize
from tests.graphs import counts, error, text
from tests.passes.test_kv_cache import attend, elsewhere, fused, inputs

GOLDEN = """\
%inputs_0: i64[2,3] = input
%inputs_1: b1[2,8] = input
%inputs_2: f32[2,4,3,8] = input
%inputs_3: f32[2,2,3,8] = input
%inputs_4: u8[2,2,5,4] = input
%inputs_5: u8[2,2,5,4] = input
%mul: f32[2,2,3,8] = aten.mul.Tensor(%inputs_3, 2)
%unsqueeze: b1[2,1,8] = aten.unsqueeze(%inputs_1, 1)
%unsqueeze_1: b1[2,1,1,8] = aten.unsqueeze(%unsqueeze, 2)
%quantized_cached_attention: (f32[2,4,3,8], u8[2,2,8,4], u8[2,2,8,4]) = qfx.quantized_cached_attention(%inputs_2, \
%inputs_3, %mul, %inputs_4, %inputs_5, @inputs_4.scale, @inputs_5.scale, %unsqueeze_1, None, 0.3, False, 0.0, \
i4/ch, i4/ch)
"""


def quantized(
    bits: int, function: Any = attend, names: tuple[str, ...] = ("inputs_4", "inputs_5"), dynamic: bool = True
) -> Any:
    gm = fused(function, dynamic=dynamic)
    fmt = Format.parse(f"i{bits}/ch")
    changed = kv_quantize(gm, formats={"k": fmt, "v": fmt}, scales=scales(bits, names))
    run.run(gm, [cleanup])
    return gm, changed


def scales(bits: int, names: tuple[str, ...] = ("inputs_4", "inputs_5")) -> dict[str, torch.Tensor]:
    """Of channels of different sizes, as wide as the values."""
    grid = torch.linspace(4.0, 8.0, 16).reshape(2, 8)
    return {name: grid * (1 + i) / 1.5 / Format.parse(f"i{bits}").qmax for i, name in enumerate(names)}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("old", [5, 9])
def test_results_are_near_those_in_float(bits: int, old: int) -> None:
    gm, changed = quantized(bits)
    assert changed
    assert counts(gm)["quantized_cached_attention"] == 1
    assert "cached_attention" not in counts(gm)
    given = inputs(old)
    fmt, steps = Format.parse(f"i{bits}/ch"), scales(bits)
    pasts = [encode(t, steps[f"inputs_{i}"][None, :, None], fmt) for i, t in zip((4, 5), given[4:], strict=True)]
    expected, found = attend(None, *given), gm(*given[:4], *pasts)
    assert [t.dtype for t in found[1:]] == [torch.int8 if bits == 8 else torch.uint8] * 2
    assert error(expected[:1], found[:1]) < (0.03 if bits == 8 else 0.5)


def test_golden_text() -> None:
    assert text(quantized(4, dynamic=False)[0]).startswith(GOLDEN)


def test_attention_without_scales_stays_in_float() -> None:
    gm, changed = quantized(8, names=("inputs_4",))
    assert not changed
    assert counts(gm)["cached_attention"] == 1
    assert text(gm) == text(fused(attend, dynamic=True))


def test_a_cache_that_others_read_stays_in_float() -> None:
    gm, changed = quantized(8, elsewhere)
    assert not changed
    assert counts(gm).get("quantized_cached_attention", 0) == 0
    assert error(elsewhere(None, *inputs()), gm(*inputs())) < 1e-5
