"""Mean squares of the inputs of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfx.interop.gguf_energy import input_energy


class Two(nn.Module):
    """The second layer is reached by large inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.dropout(self.first(x)))
        return y


def test_mean_squares_over_all_tokens() -> None:
    model, x, y = Two().train(), torch.randn(2, 5, 3), torch.randn(1, 5, 3)
    found = input_energy(model, ["first", "second", "third"], [x, y])
    rows = torch.cat([x.flatten(0, 1), y.flatten(0, 1)])
    assert set(found) == {"first", "second"}, "no token reaches the third"
    torch.testing.assert_close(found["first"], rows.square().mean(0))
    torch.testing.assert_close(found["second"], model.first(rows).square().mean(0).detach())
    assert model.training and not model.first._forward_pre_hooks


def test_hooks_go_when_the_model_fails() -> None:
    model = Two()
    with pytest.raises(ValueError, match="does not take batch 2 of the data: RuntimeError: "):
        input_energy(model, ["first"], [torch.ones(2, 3), torch.ones(2, 7)])
    assert not model.first._forward_pre_hooks


def test_inputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="the inputs of 'first' are not finite on the calibration data"):
        input_energy(Two(), ["first"], [torch.full((1, 3), torch.inf)])


def test_no_data() -> None:
    with pytest.raises(ValueError, match="the data holds no batch"):
        input_energy(Two(), ["first"], [])


class Masked(Two):
    """With the names of transformers."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("named", [True, False])
def test_padding_does_not_count(named: bool) -> None:
    model, x, mask = Masked(), torch.randn(2, 5, 3), torch.ones(2, 5)
    mask[0, 3:] = 0
    rows = x[mask.bool()]
    x[mask == 0] = torch.nan
    batches = [{"x": x, "attention_mask": mask}] if named else [(x, mask)]
    found = input_energy(model, ["first"], batches)
    torch.testing.assert_close(found["first"], rows.square().mean(0))
    with pytest.raises(ValueError, match="'first' are not finite"):
        input_energy(model, ["first"], [x])


class Flat(Masked):
    """Layers that read the positions in one row, as the router of experts does."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x.view(-1, x.shape[-1]))


def test_padding_of_flattened_inputs_does_not_count() -> None:
    model, x, mask = Flat(), torch.randn(2, 5, 3), torch.ones(2, 5)
    mask[0, 3:] = 0
    rows = x[mask.bool()]
    x[mask == 0] = torch.nan
    found = input_energy(model, ["first"], [{"x": x, "attention_mask": mask}])
    torch.testing.assert_close(found["first"], rows.square().mean(0))
