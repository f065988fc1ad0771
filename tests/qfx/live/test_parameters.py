"""qfx.live.parameters: parameters packed in modules that go on reading them, cast, copied and loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.format import Format
from qfx.live.modules import quantized_parts
from qfx.live.parameters import pack_parameter
from qfx.measuring.measure import sqnr_db
from qfx.packing import pack_weight
from tests.qfx.live.test_modules import CASTS
from tests.seeded import randn


class Expert(nn.Module):
    """Reads parameters of three orientations by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(randn(3, 6, 8))
        self.down = nn.Parameter(randn(3, 6, 8, seed=3))
        self.conv = nn.Parameter(randn(4, 3, 2, 2, seed=4))
        self.bias = nn.Parameter(randn(8))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, 8] -> [3, T, 8]."""
        hidden = torch.relu(x @ self.up.transpose(1, 2))
        return hidden @ self.down + self.bias


def packed_expert() -> tuple[Expert, Expert]:
    model = Expert().eval()
    before = copy.deepcopy(model)
    pack_parameter(model, "up", pack_weight(model.up, Format.parse("i8/ch")))
    down = pack_weight(model.down.transpose(1, 2), Format.parse("i8/ch"))
    pack_parameter(model, "down", down, transposed=True)
    pack_parameter(model, "conv", pack_weight(model.conv.flatten(1), Format.parse("i8/ch")))
    return model, before


def test_packed_parameters_read_like_the_float_ones() -> None:
    model, before = packed_expert()
    assert isinstance(model, Expert) and type(model).__name__ == "PackedExpert" and type(model) is not Expert
    assert [n for n, _ in model.named_parameters()] == ["bias"]
    for name in ("up", "down", "conv"):
        value = getattr(model, name)
        assert value.shape == getattr(before, name).shape and sqnr_db(getattr(before, name), value) > 35
    assert sqnr_db(before(randn(5, 8)), model(randn(5, 8))) > 30
    assert quantized_parts(model) == ["up", "down", "conv"]
    assert quantized_parts(nn.Sequential(nn.Linear(2, 2), model)) == ["1.up", "1.down", "1.conv"]


@pytest.mark.parametrize(("fn", "dtype"), CASTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_packed_parameters_are_cast_copied_and_loaded(fn: Any, dtype: torch.dtype) -> None:
    model, _ = packed_expert()
    wanted = model(randn(5, 8))
    cast = fn(copy.deepcopy(model))
    assert cast.up.dtype == cast.down.dtype == cast.bias.dtype == dtype
    assert sqnr_db(wanted, cast(randn(5, 8).to(dtype)).float()) > 30
    assert {b.dtype for n, b in cast.named_buffers() if n.endswith("scale")} == {torch.float32}
    assert model.up.dtype == torch.float32, "the copy has its own dtype"
    other, _ = packed_expert()
    with torch.no_grad():
        other.get_buffer("up_w_codes").zero_()
    assert not torch.equal(other(randn(5, 8)), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(randn(5, 8)), wanted)


def packed_by(up: str, *, transposed: bool = False) -> Expert:
    model = Expert().eval()
    weight = nn.Parameter(randn(3, 32, 32, seed=5))
    model.up = weight
    pack_parameter(model, "up", pack_weight(weight.detach(), Format.parse(up)), transposed=transposed)
    return model


@pytest.mark.parametrize(
    ("own", "other"),
    [(("i4/g32", False), ("nf4/g32", False)), (("i8/ch", False), ("i8/ch", True))],
    ids=["another format", "transposed"],
)
def test_a_state_dict_whose_codes_mean_something_else_is_refused(own: Any, other: Any) -> None:
    model = nn.ModuleDict({"experts": packed_by(own[0], transposed=own[1])})
    state = nn.ModuleDict({"experts": packed_by(other[0], transposed=other[1])}).state_dict()
    with torch.no_grad():
        model.experts.bias.zero_()  # type: ignore[union-attr, operator]
    before = model.experts.up.clone()  # type: ignore[union-attr, operator]
    message = rf"the weight of experts is stored in another way\n  expected: up {own[0]}\S*( transposed)?\n  found: up "
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, strict=strict)
    assert torch.equal(model.experts.up, before)  # type: ignore[union-attr, arg-type]
    assert not model.experts.bias.any(), "nothing of the module is loaded"  # type: ignore[union-attr, operator]
    alike = nn.ModuleDict({"experts": packed_by(own[0], transposed=own[1])}).state_dict()
    model.load_state_dict(alike)
    assert model.experts.bias.any()  # type: ignore[union-attr, operator]


def test_another_parameter_that_is_packed_is_refused() -> None:
    model, _ = packed_expert()
    with pytest.raises(RuntimeError, match=r"expected: conv i8/ch, down i8/ch transposed, up i8/ch\n  found: up i8/ch"):
        model.load_state_dict(packed_by("i8/ch").state_dict())


def test_tensors_alone_are_taken_as_they_are() -> None:
    model, state = packed_by("i4/g32"), dict(packed_by("nf4/g32").state_dict())
    model.load_state_dict(state)
    assert torch.equal(model.get_buffer("up_w_codes"), state["up_w_codes"])


def test_one_class_is_made_for_one_set_of_names() -> None:
    first, second = packed_expert()[0], packed_expert()[0]
    assert type(first) is type(second)
    assert type(first).qfx_float_class is Expert  # type: ignore[attr-defined]


@pytest.mark.parametrize("forward", [False, True], ids=["max_norm", "forward of its own"])
def test_a_plain_embedding_that_is_not_replaced_keeps_its_class(forward: bool) -> None:
    """nn.Embedding itself, not a subclass of it: its packed class has to have an order of bases too."""
    table = nn.Embedding(7, 8, max_norm=None if forward else 0.5)
    if forward:
        table.forward = lambda ids: F.embedding(ids, table.weight)  # type: ignore[method-assign, assignment]
    wanted = F.embedding(torch.arange(7), table.weight.detach().clone(), max_norm=table.max_norm).detach()
    pack_parameter(table, "weight", pack_weight(table.weight.detach(), Format.parse("i8/ch")))
    assert isinstance(table, nn.Embedding) and not list(table.parameters())
    assert sqnr_db(wanted, table(torch.arange(7))) > 35
    assert sqnr_db(wanted, copy.deepcopy(table)(torch.arange(7))) > 35
