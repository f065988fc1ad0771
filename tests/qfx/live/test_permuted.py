"""QuantPermuted: a linear whose columns are stored in another order, in every place where a quantized linear may be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.format import Format
from qfx.live.modules import QuantLinear
from qfx.live.permuted import QuantPermuted
from qfx.packing import pack_weight

ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(0))


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permuted(fmt: str = "i4/g32", **formats: Any) -> QuantPermuted:
    return QuantPermuted(pack_weight(rows(24, 64), Format.parse(fmt)), rows(24, seed=2), ORDER, **formats)


def test_it_multiplies_by_columns_in_the_inputs_order() -> None:
    module, x = permuted(), rows(3, 5, 64)
    stored = QuantLinear(pack_weight(rows(24, 64), Format.parse("i4/g32")), module.bias)
    assert torch.equal(module(x), stored(x[..., ORDER]))
    assert torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), atol=1e-5)
    assert torch.equal(module.weight[:, ORDER], stored.weight)
    assert not torch.allclose(module(x), stored(x), atol=1e-2)
    assert module(x[:0]).shape == (0, 5, 24)


@pytest.mark.parametrize("x_format", ["i8/tok", "f8e4m3/tok"])
def test_formats_of_a_token_see_the_same_values(x_format: str) -> None:
    module, x = permuted("i8/ch", x_format=x_format), rows(5, 64)
    plain = QuantLinear(pack_weight(rows(24, 64), Format.parse("i8/ch")), module.bias, x_format=x_format)
    assert torch.equal(module(x), plain(x[:, ORDER]))


def test_gradients_go_back_in_the_inputs_order() -> None:
    module, x = permuted(), rows(5, 64).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, module.weight.sum(0).expand(5, 64), atol=1e-5)


def test_it_is_copied_and_cast_like_others() -> None:
    module = copy.deepcopy(permuted()).to(torch.bfloat16)
    assert module.columns.dtype == torch.int64 and module(rows(2, 64).bfloat16()).dtype == torch.bfloat16
    assert "permuted input" in repr(module) and module.qfx_row("a").asked == "w=i4/g32"


@pytest.mark.parametrize("low", [None, (rows(2, 64), rows(24, 2))], ids=["", "low rank"])
def test_it_is_saved_and_loaded(low: Any, tmp_path: Path) -> None:
    model = nn.Sequential(permuted(low=low), nn.ReLU()).eval()
    qfx.save(model, tmp_path)
    loaded = qfx.load(tmp_path, nn.Sequential(nn.Linear(64, 24), nn.ReLU()))
    assert isinstance(loaded.get_submodule("0"), QuantPermuted)
    assert torch.equal(loaded(rows(3, 64)), model(rows(3, 64)))


@pytest.mark.usefixtures("fresh_dynamo")
def test_it_compiles() -> None:
    model = nn.Sequential(permuted("i8/ch", x_format="i8/tok")).eval()
    compiled = torch.compile(model, backend="qfx")
    with torch.no_grad():
        assert torch.allclose(compiled(rows(3, 64)), model(rows(3, 64)), atol=1e-4)
    (row,) = qfx.report(compiled)
    assert row.asked == "x=i8/tok w=i8/ch" and row.kernel and not row.reason
