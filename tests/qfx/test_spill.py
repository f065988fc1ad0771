"""Tensors in a temporary file: the same values, no memory while they rest, nothing left behind."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx import spill
from qfx.spill import LEAST, Spill, give_back

DTYPES = [torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]


def tensor(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 100, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).reshape(shape)


def same(found: Tensor, wanted: Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)]
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(*as_bytes)


@settings(deadline=None, max_examples=30)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    rows=st.integers(1, 200),
    columns=st.integers(300, 700),
)
def test_what_is_kept_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], rows: int, columns: int
) -> None:
    given = [tensor(rows, columns, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    with Spill(tmp_path_factory.mktemp("spill")) as place:
        kept = [place.keep(t) for t in given]
        assert all(map(same, kept, given))
        place.rest(1 << 40)
        assert all(map(same, kept, given)), "read again from the file"
    assert all(map(same, kept, given)), "they stay valid"


def test_small_tensors_and_those_of_other_devices_stay(tmp_path: Path) -> None:
    with Spill(tmp_path) as place:
        small, away = tensor(LEAST - 1), torch.empty(LEAST, device="meta")
        assert place.keep(small) is small and place.keep(away) is away
        assert place.keep(tensor(LEAST)) is not None and place._size >= LEAST


def test_views_are_kept_as_they_are_read(tmp_path: Path) -> None:
    whole = tensor(400, 300, dtype=torch.float32)
    with Spill(tmp_path) as place:
        assert same(place.keep(whole.t()), whole.t()) and same(place.keep(whole[10:, ::2]), whole[10:, ::2])


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with Spill(tmp_path / "not" / "there") as place:
        kept = place.keep(tensor(LEAST))
        assert not (tmp_path / "not").exists(), "no folder is made"
    del kept, place
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with Spill(tmp_path) as place, pytest.raises(OSError, match="nothing was changed: No space left"):
        place.keep(tensor(LEAST))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_tensors_at_rest_need_no_memory(tmp_path: Path) -> None:
    size = 32 << 20
    with Spill(tmp_path) as place:
        value = tensor(size)
        kept = place.keep(value)
        del value
        give_back()
        before = _resident()
        assert int(kept.sum()) > 0
        assert _resident() - before > 0.9 * size, "it is in memory while it is read"
        place.rest(1 << 40)
        assert _resident() - before < 0.1 * size


def _resident() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def test_memory_is_given_back_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(spill, "give_back", lambda: calls.append(1))
    monkeypatch.setattr(spill, "MOST", 2 * LEAST)
    with Spill(tmp_path) as place:
        for _ in range(5):
            place.keep(tensor(LEAST))
        assert len(calls) == 2, "after each two"
        for _ in range(4):
            place.rest(LEAST)
        assert len(calls) == 4
