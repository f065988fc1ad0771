"""Tensors in a temporary file: the same values, no memory while they rest, nothing left behind."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qfx.format import Format
from qfx.packing import pack_weight
from qfx.storage import spill
from qfx.storage.spill import (
    LEAST,
    Resting,
    Spill,
    beside,
    call,
    give_back,
    is_mapped,
    map_file,
    rest,
    used,
    write_beside,
)

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


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]),
)
def test_bytes_lie_in_row_major_order_whatever_the_strides(shape: list[int], step: int, dtype: torch.dtype) -> None:
    wide = torch.arange(5000).remainder(7).to(dtype)
    tensor = wide[3:].as_strided(shape, [step * 9 ** (place + 1) for place in range(len(shape))])
    found = spill.flat_bytes(tensor)
    assert found.dtype == torch.uint8 and found.shape == (tensor.nbytes,)
    assert torch.equal(found.view(dtype).reshape(shape), tensor)


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


def on_disk(folder: Path, value: Tensor, name: str = "weights") -> Tensor:
    """The same tensor as a view of a file of its own, 64 bytes from its start."""
    path = folder / name
    path.write_bytes(b"x" * 64 + value.numpy().tobytes())
    held = map_file(path, Spill(folder))
    return torch.frombuffer(held, dtype=value.dtype, offset=64).reshape(value.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_rest_lets_go_of_what_was_read_and_of_views(tmp_path: Path) -> None:
    size = 32 << 20
    value = on_disk(tmp_path, tensor(size // 4096, 4096))
    whole = value.clone()
    rest(value)
    give_back()
    before = _resident()
    assert torch.equal(value, whole) and _resident() - before > 0.9 * size
    rest(value[:: size // 4096 - 1, 1:].t())
    assert _resident() - before < 0.1 * size, "from the first element of the view to its last"
    assert torch.equal(value, whole), "it is read again"
    rest(value[:4])
    assert _resident() - before > 0.9 * size, "only the view rests"


def test_what_lies_nowhere_is_left_alone(tmp_path: Path) -> None:
    there = on_disk(tmp_path, tensor(10, 10))
    plain = torch.ones(100_000)
    others = [plain, torch.empty(3, device="meta"), torch.empty(0), torch.eye(3).to_sparse(), torch.tensor(1.0)]
    rest(*others)
    assert torch.equal(plain, torch.ones(100_000)) and not any(map(is_mapped, others)) and is_mapped(there[2:, 3:])
    assert all(beside(other, other) is other for other in others)


def test_a_map_is_forgotten_with_its_last_view(tmp_path: Path) -> None:
    gc.collect()
    count = len(spill._REGIONS)
    view = on_disk(tmp_path, tensor(10, 10))[3:]
    assert len(spill._REGIONS) == count + 1
    rest(view)
    del view
    gc.collect()
    assert len(spill._REGIONS) == count


def test_what_is_made_of_a_tensor_in_a_file_goes_beside_it(tmp_path: Path) -> None:
    old, new = on_disk(tmp_path, tensor(400, 400)), tensor(400, 401, seed=1)
    kept = beside(new, old)
    assert is_mapped(kept) and same(kept, new) and beside(kept, old) is kept
    assert is_mapped(beside(tensor(400, 402), kept)), "and what is made of that one"
    small = tensor(2, 3)
    assert beside(small, old) is small
    packed = pack_weight(torch.randn(512, 1024), Format.parse("i8/ch"))
    assert is_mapped(packed.beside(old).data) and packed.beside(new).data is packed.data
    assert same(packed.beside(old).dequantize(), packed.dequantize())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_parts_are_written_one_after_the_other(tmp_path: Path, dtype: torch.dtype) -> None:
    whole, old = tensor(500, 300, dtype=dtype), on_disk(tmp_path, tensor(10, 10))
    made: list[int] = []

    def parts() -> Iterator[Tensor]:
        for start in range(0, 500, 70):
            made.append(start)
            yield whole[start : start + 70]

    found = write_beside(parts(), (500, 300), old)
    assert is_mapped(found) and same(found, whole) and len(made) == 8
    after = beside(tensor(400, 400, seed=1), old)
    rest(found, after)
    assert same(found, whole) and same(after, tensor(400, 400, seed=1)), "each has its place"


def test_parts_must_be_the_whole_and_have_a_file(tmp_path: Path) -> None:
    whole, old = tensor(500, 300), on_disk(tmp_path, tensor(10, 10))
    with pytest.raises(AssertionError, match=r"\(499, 300\)"):
        write_beside([whole], (499, 300), old)
    with pytest.raises(AssertionError, match="lies in no file"):
        write_beside([whole], (500, 300), whole)


def test_what_calls_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, plain = on_disk(tmp_path, tensor(1000, 1000)), tensor(1000, 1000)
    given: list[int] = []
    monkeypatch.setattr(spill, "give_back", lambda: given.append(1))
    monkeypatch.setattr(spill, "_USED", 3_000_000)
    monkeypatch.setattr(spill._REGIONS, "used", 0)
    for _ in range(7):
        used(there, plain)
    assert len(given) == 2, "after each third million; what is in memory does not count"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_linear_is_multiplied_in_parts(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=random).to(dtype) for shape in ((2, 3, 40), (50, 40), (50,)))
    args = (x, w, b) if bias else (x, w)
    seen: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.extend(t for t in tree_leaves(result) if isinstance(t, Tensor))
            return result

    linear = torch.ops.aten.linear.default
    monkeypatch.setattr(spill, "_PART", 280)
    for large, grad, parts in ((2000, False, False), (1999, False, True), (1999, True, False)):
        monkeypatch.setattr(spill, "_LARGE", large)
        seen.clear()
        with torch.set_grad_enabled(grad), Watch():  # type: ignore[no-untyped-call]
            found = call(linear, args, {})
        assert found.dtype == dtype and torch.allclose(found, linear(*args), rtol=1e-2, atol=1e-2)
        assert any(tuple(t.shape) == (7, 40) for t in seen) == parts
    assert call(torch.ops.aten.add.Tensor, (torch.ones(2), torch.ones(2)), {"alpha": 2}).tolist() == [3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="holes in files")
def test_the_place_of_a_tensor_that_is_gone_is_given_back(tmp_path: Path) -> None:
    place = Spill(tmp_path)
    first, second = place.keep(tensor(8 << 20)), place.keep(tensor(4 << 20, seed=1))
    os.fsync(place._file.fileno())
    before = os.fstat(place._file.fileno()).st_blocks * 512
    wanted = second.clone()
    del first
    gc.collect()
    assert before - os.fstat(place._file.fileno()).st_blocks * 512 >= 8 << 20
    rest(second)
    assert torch.equal(second, wanted), "others stay"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_graph_runs_with_its_weights_at_rest(tmp_path: Path) -> None:
    class Sums(nn.Module):
        w0: Tensor
        w1: Tensor
        w2: Tensor
        w3: Tensor

        def __init__(self) -> None:
            super().__init__()
            for i in range(4):
                held = on_disk(tmp_path, tensor(8 << 20, seed=i), f"w{i}")
                self.register_parameter(f"w{i}", nn.Parameter(held, requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w0.sum() + self.w1.view(-1).sum() + self.w2.sum() + self.w3.sum()

    graph = fx.symbolic_trace(Sums())
    give_back()
    before = _resident()
    found = Resting(graph).run(torch.zeros(()))
    assert _resident() - before < 8 << 20, "less than one of the four"
    assert fx.Interpreter(graph).run(torch.zeros(())) == found
    assert _resident() - before > 30 << 20, "the control: all four"
