"""Memory: that of the launch's tensors, and what programs share among their threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor, UntypedStorage

from tests.ptx.faults import FaultError
from tests.ptx.global_races import GlobalRaces
from tests.ptx.values import WORDS, Array

_GUARD = 4096  # bytes between tensors
_FIRST = 1 << 32  # address
POISON = 0xFF  # NaN, or -1


class Memory:
    """Bytes at addresses from `first` on, of which those in `spans` may be touched."""

    def __init__(self, size: int, first: int, space: str) -> None:
        size = -(-size // 512) * 512
        self.bytes = np.full(size, POISON, np.uint8)
        self.allowed = np.zeros(size, bool)
        self.first, self.space = first, space

    def places(self, addresses: Array, size: int) -> Array:
        """Offsets of accesses of `size` bytes. Raises FaultError for one that is not aligned, or outside of tensors."""
        at = addresses.astype(np.int64) - self.first
        if (at % size).any():
            raise FaultError(
                f"{self.space} address {int(addresses[(at % size).argmax()]):#x} for {size} bytes: not aligned"
            )
        inside = (at >= 0) & (at + size <= len(self.bytes))
        if not inside.all() or not (self.allowed[at].all() and self.allowed[at + size - 1].all()):
            bad = ~inside
            bad[inside] = ~(self.allowed[at[inside]] & self.allowed[at[inside] + size - 1])
            first = int(addresses[bad.argmax()])
            raise FaultError(f"{self.space} address {first:#x} is outside ({int(bad.sum())} of {len(bad)} threads)")
        return at

    def load(self, addresses: Array, bits: int, count: int) -> Array:
        """[threads, count] words of `bits` bits, side by side."""
        at = self.places(addresses, bits // 8 * count)
        whole = self.bytes.view(WORDS[bits]).reshape(-1, count)
        found: Array = whole[at // (bits // 8 * count)]
        return found

    def store(self, addresses: Array, words: Array) -> None:
        """Store [threads, count] words. Raises FaultError where two threads store different ones at one address."""
        size = words.dtype.itemsize
        at = self.places(addresses, size * words.shape[1]) // (size * words.shape[1])
        whole = self.bytes.view(words.dtype).reshape(-1, words.shape[1])
        whole[at] = words
        if (lost := whole[at] != words).any() and self.differ(whole[at][lost], words[lost]):
            first = int(addresses[lost.any(1).argmax()])
            raise FaultError(f"two threads store different words at {self.space} address {first:#x} at once")

    def differ(self, some: Array, others: Array) -> bool:
        """Whether words of two threads at one address are a fault."""
        return True


class Global(Memory):
    """The memory behind tensors, copied here, and back by `give_back`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self.at: dict[int, int] = {}
        end = _FIRST
        for host, storage in found.items():
            end += host % 512  # aligned as it is on the host
            self.at[host] = end
            end = -(-(end + storage.nbytes() + _GUARD) // 512) * 512
        super().__init__(end - _FIRST, _FIRST, "global")
        self.hosts = {host: _view(storage) for host, storage in found.items()}
        for host, content in self.hosts.items():
            span = self._span(host)
            self.bytes[span], self.allowed[span] = content, True
        self.races = GlobalRaces([(s.start, s.stop) for s in map(self._span, self.hosts)], self.bytes)

    def address(self, tensor: Tensor) -> int:
        """Of a tensor's first element."""
        storage = tensor.untyped_storage().data_ptr()
        return self.at[storage] + tensor.data_ptr() - storage if tensor.numel() else 0

    def offsets(self, addresses: Array) -> Array:
        """Of addresses in these bytes."""
        found: Array = addresses.astype(np.int64) - self.first
        return found

    def give_back(self) -> None:
        """What was stored, to the tensors."""
        for host, content in self.hosts.items():
            content[:] = self.bytes[self._span(host)]

    def _span(self, host: int) -> slice:
        start = self.at[host] - _FIRST
        return slice(start, start + len(self.hosts[host]))


def _view(storage: UntypedStorage) -> Array:
    size, host = storage.nbytes(), storage.data_ptr()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))


class Shared(Memory):
    """Shared memory of several programs, one behind the other."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = -(-max(size, 16) // 1024) * 1024
        super().__init__(programs * self.size, 0, "shared")
        self.allowed.reshape(programs, self.size)[:, :size] = True

    def differ(self, some: Array, others: Array) -> bool:
        """Not where they are one number, rounded in two ways.

        After a reduction in a warp several threads hold the same sum and may all store it. The compiler fuses products
        into such sums, `x * y + that of another thread`, where each thread rounds that of the others but not its own.
        """
        if some.dtype != np.uint32:
            return True
        a, b = (x.view(np.float32).astype(np.float64) for x in (some, others))
        size = np.maximum(np.abs(a), np.abs(b))
        return not ((np.abs(a - b) <= 2.0**-16 * size.max()) & (size > 2.0**-100)).all()

    def absolute(self, addresses: Array, program: Array) -> Array:
        """Addresses of threads as those of the whole."""
        inside = addresses.astype(np.int64)
        if (inside >= self.size).any():
            raise FaultError(f"shared address {int(inside.max()):#x} is outside of the program's {self.size} bytes")
        found: Array = inside + program * self.size
        return found
