"""What a kernel asks of the chip: instructions of warps, sectors of global memory, passes over the banks of shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.values import Array

_SECTOR, _BANKS, _WORD = 32, 32, 4  # bytes, banks, bytes of a bank
_PASS = 128  # bytes that shared memory gives at once


@dataclass
class Counts:
    """Of the programs that ran. issued: instructions of warps by name. sectors and passes: by instruction text.

    sectors: [32 bytes each that were touched, the least that could hold what was asked for]. passes: [over the banks,
    the least].
    """

    issued: Counter[str] = field(default_factory=Counter)
    sectors: dict[str, Array] = field(default_factory=dict)
    passes: dict[str, Array] = field(default_factory=dict)
    bytes: Counter[str] = field(default_factory=Counter)

    def asked(self, text: str, how: str, addresses: Array, lanes: Array, size: int) -> None:
        """An instruction's accesses of global memory, `size` bytes a lane."""
        warps = lanes // 32
        first, last = addresses // _SECTOR, (addresses + size - 1) // _SECTOR
        touched = (
            sum(
                len(np.unique(np.stack([warps, part.astype(np.int64)]), axis=1).T)
                for part in {0: first, 1: last}.values()
            )
            if size > _SECTOR
            else len(np.unique(np.stack([warps, first.astype(np.int64)]), axis=1).T)
        )
        distinct = np.unique(np.stack([warps, addresses.astype(np.int64)]), axis=1)
        per_warp = np.unique(distinct[0], return_counts=True)[1] * size
        least = int(np.ceil(per_warp / _SECTOR).sum())
        self.sectors[text] = self.sectors.get(text, np.zeros(2, np.int64)) + np.asarray([touched, least])
        self.bytes[how] += int(per_warp.sum())

    def banked(self, text: str, addresses: Array, lanes: Array, size: int) -> None:
        """The same of shared memory: lanes go in groups of `_PASS` bytes."""
        group = lanes // max(1, _PASS // max(size, _WORD))
        words = np.concatenate([addresses // _WORD + i for i in range(max(1, size // _WORD))])
        groups = np.tile(group, max(1, size // _WORD))
        distinct = np.unique(np.stack([groups, words]), axis=1)
        keys, counts = np.unique(distinct[0] * _BANKS + distinct[1] % _BANKS, return_counts=True)
        worst: dict[int, int] = {}
        which = keys // _BANKS
        order = np.unique(which, return_inverse=True)
        most = np.zeros(len(order[0]), np.int64)
        np.maximum.at(most, order[1], counts)
        per_group = np.unique(distinct[0], return_counts=True)[1]
        least = np.ceil(per_group / _BANKS).sum()
        del worst
        self.passes[text] = self.passes.get(text, np.zeros(2, np.int64)) + np.asarray([most.sum(), int(least)])
