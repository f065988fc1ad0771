"""qfx.rounding.parts: rounding in parts gives what rounding at once gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qfx.format import Format
from qfx.rounding.nearest import round_weight
from qfx.rounding.parts import check_finite, dequantize_in_parts, round_in_parts
from qfx.storage.spill import Spill, is_mapped, map_file
from tests.seeded import randn


@pytest.mark.parametrize(
    "fmt", ["i8/ch", "i4/g4", "u3/g8", "nf4/g4", "f4e2m1/g32/e8m0", "f8e4m3/ch", "f16", "i8", "i4/b2x4"]
)
@pytest.mark.parametrize("shape", [(9, 6), (3, 5, 6), (2, 2, 3, 6), (1, 1)], ids=str)
def test_parts_are_the_whole(fmt: str, shape: tuple[int, ...]) -> None:
    value, form = randn(*shape), Format.parse(fmt)
    wanted = round_weight(value, form, "rtn", name="w")
    found = round_in_parts(value, form, "rtn", name="w", elements=13)
    assert found.shape == wanted.shape and found.format == wanted.format
    assert torch.equal(found.data, wanted.data) and torch.equal(found.scale, wanted.scale)
    assert (found.zero is None) == (wanted.zero is None)
    assert found.zero is None or torch.equal(found.zero, wanted.zero)  # type: ignore[arg-type]


def test_views_are_taken_as_they_are() -> None:
    value = randn(3, 6, 5).transpose(1, 2)
    wanted = round_weight(value.contiguous(), Format.parse("i8/ch"), "rtn", name="w")
    assert torch.equal(round_in_parts(value, wanted.format, "rtn", name="w", elements=4).data, wanted.data)


def test_the_best_clip_of_parts_is_not_worse() -> None:
    value, form = randn(16, 8), Format.parse("i3/ch")

    def error(found: Tensor) -> float:
        return float((found - value).square().sum())

    whole, parts = (round_in_parts(value, form, "mse", name="w", elements=n).dequantize() for n in (1000, 16))
    plain = round_in_parts(value, form, "rtn", name="w", elements=16).dequantize()
    assert error(parts) <= error(whole) * 1.0001 < error(plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_are_refused_by_name(bad: float) -> None:
    value = randn(4, 4)
    value[2, 1] = bad
    with pytest.raises(ValueError, match=r"'layer\.w'"):
        check_finite(value, "layer.w")
    with pytest.raises(ValueError, match=r"'layer\.w'"):
        round_in_parts(value, Format.parse("i8/ch"), "rtn", name="layer.w", elements=4)


def test_good_values_are_taken() -> None:
    for value in (randn(4, 4), randn(0, 4), torch.tensor(3.0e38), randn(4).to(torch.bfloat16)):
        check_finite(value, "w")


@pytest.mark.parametrize("fmt", ["i8/ch", "i4/g32", "u4/g32"])
def test_parts_need_little_memory(fmt: str) -> None:
    """The largest tensor that rounding in parts makes is that of the codes."""
    value = randn(2048, 512)
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = func(*args, **(kwargs or {}))
            storage = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
            most = max([most, *(s.nbytes() for s in storage if s.data_ptr() != value.data_ptr())])
            return result

    with Watch():  # type: ignore[no-untyped-call]
        found = round_in_parts(value, Format.parse(fmt), "rtn", name="w", elements=1 << 14)
    assert most == found.data.nbytes < value.nbytes / 3


@pytest.mark.parametrize("fmt", ["i8/ch", "u4/g4", "u3/g8", "nf4/g4", "f4e2m1/g32/e8m0", "f8e4m3/ch", "f16", "i8"])
@pytest.mark.parametrize("shape", [(9, 6), (3, 5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_in_parts_is_the_whole(
    fmt: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfx.rounding.parts.ELEMENTS", 13)
    packed = round_weight(randn(*shape), Format.parse(fmt), "rtn", name="w")
    found = dequantize_in_parts(packed, dtype)
    assert found.dtype == dtype and torch.equal(found, packed.dequantize(dtype))


@pytest.mark.parametrize("fmt", ["u4/g8", "i8/ch", "i4/b4x8", "f16"])
def test_what_comes_back_goes_to_the_file_of_another(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part where it is large; small ones, and those beside what is in memory, stay in memory."""
    monkeypatch.setattr("qfx.rounding.parts.ELEMENTS", 5000)
    monkeypatch.setattr("qfx.storage.spill.LEAST", 5000)
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 4096)
    near = torch.frombuffer(map_file(file, Spill(tmp_path)), dtype=torch.uint8)
    for shape, there in (((90, 64), True), (((30, 64)), False)):
        packed = round_weight(randn(*shape), Format.parse(fmt), "rtn", name="w")
        found = dequantize_in_parts(packed, torch.bfloat16, near)
        assert is_mapped(found) == there and torch.equal(found, packed.dequantize(torch.bfloat16))
        assert not is_mapped(dequantize_in_parts(packed, torch.bfloat16, torch.ones(3)))


def test_a_value_in_any_part_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfx.rounding.parts.ELEMENTS", 4)
    value = randn(9, 5)
    check_finite(value, "w")
    check_finite(torch.empty(0, 4), "w")
    for row in range(9):
        bad = value.clone()
        bad[row, 3] = torch.inf
        with pytest.raises(ValueError, match="'w'"):
            check_finite(bad, "w")
    with pytest.raises(ValueError, match="'w'"):
        check_finite(torch.tensor(torch.nan), "w")
