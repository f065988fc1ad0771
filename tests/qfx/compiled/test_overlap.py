"""Inputs that are views of one tensor, of which a graph changes one in place."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.compiled.overlap import overlapping
from qfx.errors import QfxWarning, UnsupportedError
from qfx.measuring.measure import sqnr_db

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(own)
        own.add_(1)
        return y, other * 2


def test_only_common_elements_count() -> None:
    x, cache = torch.zeros(8, 8), torch.zeros(6, 2, 2, 4)
    rows = [x[:4], x[2:6], x[6:], torch.zeros(2), 3, x[:0]]
    everything = range(len(rows))
    assert overlapping(rows, everything, [0]) == (0, 1)
    assert overlapping(rows, everything, [1]) == (1, 0)
    assert overlapping(rows, everything, [2]) is None, "the two others overlap, and nobody writes into them"
    assert overlapping(rows, [0, 2], [0]) is None
    assert overlapping([x[:, :4], x[:, 4:]], [0, 1], [0]) is None, "columns beside each other"
    layers = [cache[:, layer, kind] for layer in range(2) for kind in range(2)]
    assert overlapping(layers, range(4), range(4)) is None, "keys and values of layers in one tensor"


@torch.no_grad()
def test_views_of_one_tensor_give_what_torch_gives_and_are_told_once() -> None:
    model = Writes().eval()
    compiled = torch.compile(model, backend="qfx")
    theirs = torch.randn(8, 16)
    ours = theirs.clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            expected, found = model(theirs[:4], theirs[2:6]), compiled(ours[:4], ours[2:6])
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert torch.equal(theirs, ours)
        assert [issubclass(w.category, QfxWarning) for w in said] == [True]
        assert "'own' is changed in place and shares memory with the input 'other'" in str(said[0].message)
        beside = compiled(ours[:4], ours[4:])
        assert len(said) == 1
    assert sqnr_db(model(theirs[:4], theirs[4:])[0], beside[0]) < 60, "memory beside each other is quantized"
    assert any("shares memory" in note.reason for note in qfx.report(compiled).notes)


@torch.no_grad()
def test_under_strict_they_are_an_error() -> None:
    compiled = torch.compile(Writes().eval(), backend="qfx", options={"strict": True})
    x = torch.randn(8, 16)
    assert compiled(x[:4], x[4:])[0].shape == (4, 16)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"other\.clone\(\)"):
            compiled(x[:4], x[2:6])
