"""Large tensors in files, in memory only while they are used.

A tensor is a view of a mapped file: of the temporary one of a `Spill`, or of a checkpoint (`map_file`). `rest` lets go
of the memory of such tensors until they are read again; `beside` puts what is made of one into a temporary file, too.
Both leave all other tensors alone, so that code which handles weights need not know where they lie.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, fx

LEAST = 1 << 16  # bytes of a tensor that is worth a place in the file
MOST = 4 << 20  # bytes that are written or read before memory is let go
_USED = 64 << 20  # bytes that calls read before free memory is given back
_LARGE, _PART = 1 << 24, 1 << 22  # elements of a weight that is multiplied part by part, and of a part


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, u8 [nbytes]: where they lie, where they lie so."""
    whole = tensor.detach().contiguous()
    # One element may have any stride and is contiguous all the same: only a stride of 1 can be seen as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


class Spill:
    """A context in which `keep` gives tensors a place in a file of `folder` that goes when nothing uses it any more.

    The tensors stay valid after the context. They are not to be written to: what is written may be lost.
    Without a context the file is open until the last tensor in it goes, or what is `beside` one.
    """

    def __init__(self, folder: Path) -> None:
        """folder: where the file shall be; where it is not there yet, its nearest parent. Raises OSError."""
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
        self._file = tempfile.TemporaryFile(dir=there)  # noqa: SIM115  (closed by __exit__)
        weakref.finalize(self, self._file.close)
        self._where = str(there)
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._size = self._read = self._kept = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, tensor: Tensor) -> Tensor:
        """The same tensor, contiguous, read from the file. Small ones, and those of other devices, stay as they are.

        Raises OSError where the disk does not take it.
        """
        if tensor.nbytes < LEAST or tensor.device.type != "cpu":
            return tensor
        return self.write([tensor.detach()], tuple(tensor.shape))

    def write(self, parts: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
        """A tensor [N, ..] of this shape, read from the file, of parts that follow each other along N.

        parts: on the CPU, all of one dtype; each is let go of as it is written. Raises OSError as `keep` does.
        """
        size, dtype = 0, torch.float32
        try:
            self._file.seek(self._size)
            for part in parts:
                data: Any = flat_bytes(part).numpy()
                self._file.write(data)
                size, dtype = size + part.nbytes, part.dtype
            self._file.flush()
        except OSError as error:
            what = f"a temporary file for packed weights cannot be written, nothing was changed: {error.strerror}"
            raise OSError(error.errno, what, self._where) from error
        assert size == math.prod(shape) * dtype.itemsize, (size, shape, dtype)
        held = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=self._size)
        weakref.finalize(held, _punch, self._file, self._size, size)
        self._maps.add(held)
        _REGIONS.add(held, self)
        self._kept += size
        if self._kept >= MOST:
            self._kept = 0
            give_back()
        self._size += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return torch.frombuffer(held, dtype=torch.uint8).view(dtype).reshape(shape)

    def rest(self, read: int) -> None:
        """Count bytes that were read; where they are many, let go of the memory of all tensors: the file has them."""
        self._read += read
        if self._read < MOST:
            return
        self._read = 0
        give_back()
        if hasattr(mmap, "MADV_DONTNEED"):  # elsewhere the system decides by itself
            for held in self._maps:
                held.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path, scratch: Spill) -> mmap.mmap:
    """A file, mapped for tensors that `rest` knows; what is put `beside` them goes to `scratch`. Raises OSError."""
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _REGIONS.add(held, scratch)
    return held


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor's memory is that of a file."""
    return _REGIONS.find(tensor) is not None


def rest(*tensors: Tensor) -> None:
    """Let go of the memory of tensors that lie in files, views included: they are read again when they are used."""
    for tensor in tensors:
        found = _REGIONS.find(tensor)
        if found is None or not hasattr(mmap, "MADV_DONTNEED"):
            continue
        held, _, at = found
        start = at // mmap.PAGESIZE * mmap.PAGESIZE
        held.madvise(mmap.MADV_DONTNEED, start, min(at + _extent(tensor), len(held)) - start)


def used(*tensors: Tensor) -> None:
    """`rest` for what a call has read; where that was much, the memory that it freed is given back, too."""
    if not _REGIONS:
        return
    rest(*tensors)
    _REGIONS.used += sum(tensor.nbytes for tensor in tensors if is_mapped(tensor))
    if _REGIONS.used >= _USED:
        _REGIONS.used = 0
        give_back()


def call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`target(*args, **kwargs)`; a linear with a very large weight on the CPU in parts, since libraries copy the weight
    that they are given into an order of their own. For interpreters without gradients."""
    large = target is torch.ops.aten.linear.default and not kwargs and args[1].numel() > _LARGE
    if not large or torch.is_grad_enabled() or args[1].device.type != "cpu":
        return target(*args, **kwargs)
    x, weight, bias = (*args, None)[:3]
    found = x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, _PART // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        found[..., rows] = target(x, weight[rows], None if bias is None else bias[rows])
        rest(weight[rows])
    return found


def beside(new: Tensor, old: Tensor) -> Tensor:
    """`new`, in a temporary file where `old` lies in a file; else `new` itself. Raises OSError as `Spill.keep`."""
    found = _REGIONS.find(old)
    return new if found is None or is_mapped(new) else found[1].keep(new)


def write_beside(parts: Iterable[Tensor], shape: tuple[int, ...], old: Tensor) -> Tensor:
    """Parts of a tensor of this shape (see `Spill.write`) in a temporary file; `old` lies in a file."""
    found = _REGIONS.find(old)
    assert found is not None, "the tensor lies in no file"
    return found[1].write(parts, shape)


class Resting(fx.Interpreter):
    """An interpreter after whose every node the weights that it has read go to rest."""

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if _REGIONS:
            used(*(self.env[a] for a in n.all_input_nodes if isinstance(self.env.get(a), Tensor)))
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of a call."""
        return call(target, args, kwargs)


def give_back() -> None:
    """Let the C library return free memory to the system: weights were packed, and the copies that are left are many.

    Only glibc keeps it; elsewhere there is nothing to do.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _punch(file: Any, start: int, size: int) -> None:
    """Give the place of a tensor that is gone back to the disk. Where the system cannot, it waits for the file."""
    if sys.platform == "linux" and not file.closed:
        keep_size, punch_hole = 1, 2
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).fallocate(
                file.fileno(), keep_size | punch_hole, ctypes.c_int64(start), ctypes.c_int64(size)
            )


class _Regions:
    """The mapped files of this process by address. A region goes with its map."""

    def __init__(self) -> None:
        self.used = 0  # bytes that calls read since memory was given back
        self._starts: list[int] = []
        self._held: dict[int, tuple[weakref.ref[mmap.mmap], Spill]] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, held: mmap.mmap, scratch: Spill) -> None:
        """Know a map, and where goes what is made of the tensors in it."""
        start = torch.frombuffer(held, dtype=torch.uint8).data_ptr()
        bisect.insort(self._starts, start)
        self._held[start] = (weakref.ref(held, lambda _: self._forget(start)), scratch)

    def find(self, tensor: Tensor) -> tuple[mmap.mmap, Spill, int] | None:
        """The map that holds a tensor, where its results go, the tensor's place in the map."""
        if not self._starts or not _is_plain(tensor):
            return None
        address = tensor.data_ptr()
        number = bisect.bisect_right(self._starts, address) - 1
        if number < 0:
            return None
        reference, scratch = self._held[self._starts[number]]
        held, at = reference(), address - self._starts[number]
        return None if held is None or at >= len(held) else (held, scratch, at)

    def _forget(self, start: int) -> None:
        self._starts.remove(start)
        del self._held[start]


_REGIONS = _Regions()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has an address: it is no fake one, has elements and lies in the memory of the CPU."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel():
        return False
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
