"""`QuantPermuted`: a linear whose input columns are stored in another order, so that scale groups lie side by side.

GPTQ with activation order writes such weights: column k belongs to group g_idx[k]. Sorted by their group the columns
form ordinary groups; the input is put in the same order first, which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.live.modules import QuantLinear
from qfx.packing import Packed


class QuantPermuted(QuantLinear):
    """y = x[..., columns] W^T + b with a packed W [out_features, in_features], its columns in the order `columns`.

    columns: int64 [in_features], a permutation. Static input scales are one for the tensor.
    """

    columns: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None, columns: Tensor, **formats: Any) -> None:
        super().__init__(packed, bias, **formats)
        self.register_buffer("columns", columns.to(torch.int64))

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, its columns in the input's own order."""
        return self._dequantized().index_select(1, torch.argsort(self.columns))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x.dtype."""
        return super().forward(x.index_select(-1, self.columns))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, permuted input"
