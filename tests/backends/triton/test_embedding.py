"""embedding: bit for bit the reference's rows, in every format that a table can have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.embedding import embedding, reason_against
from qfx.format import TYPES, Format
from qfx.ops import packed as ops
from qfx.packing import Packed, pack_weight
from tests.backends.triton.cases import DEVICE

FORMATS = (
    *("f16", "bf16", "f32", "i8", "u8", "i3", "u3", "i8/ch", "u4/ch", "i5/ch", "i4/g32", "u4/g24", "u3/g40/f16"),
    *("u2/g16", "u7/g64", "i6/g100", "i4/b8x32", "u4/b8x16", "u3/b3x5", "nf4/g64", "nf4/g64/dq", "nf4/ch/dq"),
    *("i4/b4x16/dq", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/ch", "f8e4m3/g16/e4m3", "f8e5m2/g32/bf16"),
    *("i4/g128/e8m0", "f8e4m3"),
)


def table(rows: int, dim: int, text: str) -> Packed:
    return pack_weight(torch.randn(rows, dim, device=DEVICE) + 0.1, Format.parse(text))


def run(ids: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    given = ids, packed.data, packed.scale, packed.zero, str(packed.format), packed.shape[1], dtype
    found = torch.ops.qfx_triton.embedding(*given)
    assert isinstance(found, Tensor)
    return found


def reference(ids: Tensor, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    return ops.embedding(ids, packed.data, packed.scale, packed.zero, str(packed.format), packed.shape[1], dtype)


def test_all_types_are_among_the_formats() -> None:
    assert {Format.parse(text).type for text in FORMATS} >= set(TYPES) - {"i2", "i7", "u5", "u6"}


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str) -> None:
    torch.manual_seed(0)
    packed = table(21, 75, text)
    ids = torch.tensor([[0, 20, 7], [7, 13, 1]], device=DEVICE)
    assert torch.equal(run(ids, packed), reference(ids, packed))
    assert torch.equal(run(ids.to(torch.int32), packed, torch.float16), reference(ids, packed, torch.float16))
    step = 2.0**-7  # the interpreter truncates f32 to bf16
    assert torch.allclose(
        run(ids, packed, torch.bfloat16).float(), reference(ids, packed).float(), rtol=step, atol=1e-30
    )


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 30), dim=st.integers(1, 1100), text=st.sampled_from(FORMATS), seed=st.integers(0, 99),
    count=st.integers(0, 6),
)  # fmt: skip
def test_every_shape(rows: int, dim: int, text: str, seed: int, count: int) -> None:
    torch.manual_seed(seed)
    packed = table(rows, dim, text)
    ids = torch.randint(0, rows, (count,), device=DEVICE)
    assert torch.equal(run(ids, packed), reference(ids, packed))


def test_a_wrong_scale_shows() -> None:
    packed = table(9, 64, "u4/g32")
    ids = torch.arange(9, device=DEVICE)
    changed = Packed(packed.data, packed.scale * 2, packed.zero, packed.format, packed.shape)
    assert not torch.equal(run(ids, changed), reference(ids, packed))


def test_ids_that_are_no_rows_give_nan() -> None:
    packed = table(9, 64, "i8/ch")
    found = run(torch.tensor([-1, 3, 9], device=DEVICE), packed)
    assert found[0].isnan().all() and found[2].isnan().all()
    assert torch.equal(found[1], packed.dequantize()[3])


def test_what_does_not_fit_is_refused() -> None:
    packed = table(9, 64, "u4/g32")
    w, scale, zero = packed.data, packed.scale, packed.zero
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="int32 or int64"):
        embedding(ids.float(), w, scale, zero, "u4/g32", 64, torch.float32)
    with pytest.raises(ValueError, match="the type of the result"):
        embedding(ids, w, scale, zero, "u4/g32", 64, torch.float64)
    with pytest.raises(ValueError, match="w_zero for 'u4/g32'"):
        embedding(ids, w, scale, None, "u4/g32", 64, torch.float32)
    with pytest.raises(ValueError, match="does not fit format"):
        embedding(ids, w, scale, zero, "u4/g32", 128, torch.float32)
    assert "run time" in str(reason_against("i4/tok"))
    assert reason_against("nf4/g64/dq") is None
