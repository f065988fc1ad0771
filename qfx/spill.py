"""Large tensors in a temporary file, in memory only while they are used."""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

LEAST = 1 << 16  # bytes of a tensor that is worth a place in the file
MOST = 4 << 20  # bytes that are written or read before memory is let go


class Spill:
    """A context in which `keep` gives tensors a place in a file of `folder` that goes when nothing uses it any more.

    The tensors stay valid after the context. They are not to be written to: what is written may be lost.
    """

    def __init__(self, folder: Path) -> None:
        """folder: where the file shall be; where it is not there yet, its nearest parent. Raises OSError."""
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
        self._file = tempfile.TemporaryFile(dir=there)  # noqa: SIM115  (closed by __exit__)
        self._where = str(there)
        self._maps: list[mmap.mmap] = []
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
        data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(self._size)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            what = f"a temporary file for packed weights cannot be written, nothing was changed: {error.strerror}"
            raise OSError(error.errno, what, self._where) from error
        held = mmap.mmap(self._file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY, offset=self._size)
        self._maps.append(held)
        self._kept += tensor.nbytes
        if self._kept >= MOST:
            self._kept = 0
            give_back()
        self._size += -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return torch.frombuffer(held, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)

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


def give_back() -> None:
    """Let the C library return free memory to the system: weights were packed, and the copies that are left are many.

    Only glibc keeps it; elsewhere there is nothing to do.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
