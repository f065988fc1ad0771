"""Views, joins, cuts and fills against torch, with sizes known and unknown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.backends.onnx import lower
from tests.backends.onnx.checks import Case, check, floats, integers, same, traced


def x2(n: int) -> list[Tensor]:
    return [floats(n, 6)]


def x3(n: int) -> list[Tensor]:
    return [floats(n, 2 * n, 6)]


def two(n: int) -> list[Tensor]:
    return [floats(n, 6), floats(n, 6, seed=2)]


CASES: list[Case] = [
    ("view", lambda x: x.view(x.shape[0], -1, 2, 3), x3),
    ("view to rows", lambda x: x.reshape(-1, 6), x3),
    ("flatten", lambda x: (x.flatten(), x.flatten(1)), x3),
    ("unflatten", lambda x: x.unflatten(-1, (2, 3)), x3),
    ("split a size", lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, 6), x3),
    ("expand", lambda x: (x[:, None].expand(-1, 4, -1), x.expand(2, *x.shape)), x2),
    ("expand 0-dim", lambda x: x.sum().expand(x.shape[0], 2), x2),
    ("broadcast_to", lambda x: torch.broadcast_to(x[:1], x.shape), x2),
    ("broadcast_tensors", lambda x: torch.broadcast_tensors(x[:, :1], x[:1]), x2),
    ("transpose", lambda x: (x.transpose(0, 2), x.transpose(-1, -2), x.mT), x3),
    ("t", lambda x: x.t(), x2),
    ("permute", lambda x: (x.permute(2, 0, 1), x.permute(-1, 1, 0)), x3),
    ("movedim", lambda x: (torch.movedim(x, 0, -1), torch.movedim(x, (0, 1), (2, 0))), x3),
    ("unsqueeze", lambda x: (x.unsqueeze(0), x.unsqueeze(-1), x[None, :, None]), x2),
    (
        "squeeze",
        lambda x: (x[None].squeeze(), x[None].squeeze(0), x.squeeze(0), x[:, None, :, None].squeeze((1, 3))),
        x2,
    ),
    ("slice", lambda x: (x[:, 1:3], x[1:], x[..., ::2], x[:-1], x[-2:], x[:, 0:100], x[5:2]), x2),
    ("slice by a size", lambda x: (x[:, : x.shape[0]], x[:, : x.shape[0] - 1], x[:, x.shape[0] // 2 :]), x3),
    ("select", lambda x: (x[0], x[:, -1], x[..., 2], x.select(1, 1)), x2),
    ("narrow", lambda x: x.narrow(1, 2, 3), x2),
    ("split", lambda x: (x.split(4, -1), x.split([1, 2, 3], 1), x.chunk(3, 1), x.chunk(4, 1)), x2),
    ("unbind", lambda x: (x.unbind(1)[2], torch.unbind(x, -1)[0]), x2),
    ("cat", lambda x, y: (torch.cat([x, y]), torch.cat([x, y, x], -1), torch.cat([x, y.int()], 1)), two),
    ("cat with empty", lambda x, y: (torch.cat([torch.zeros(0), x]), torch.cat([x[:, :0], y], 1)), two),
    ("stack", lambda x, y: (torch.stack([x, y]), torch.stack([x, y], -1)), two),
    ("repeat", lambda x: (x.repeat(2, 3), x.repeat(2, 1, 1), torch.tile(x, (2,)), x.repeat(1, x.shape[0])), x2),
    ("repeat_interleave", lambda x: (x.repeat_interleave(3, 1), x.repeat_interleave(2, 0), x.repeat_interleave(2)), x2),
    ("flip", lambda x: (x.flip(0), x.flip(0, 1), x.flip(-1)), x2),
    ("roll", lambda x: (x.roll(2, 1), x.roll((1, -1), (0, 1)), x.roll(8, 1)), x2),
    ("tril", lambda x: (x.tril(), x.triu(1), x.tril(-1), (x > 0).triu(), x.int().tril()), x2),
    ("tril of ones", lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(), x2),
    (
        "pad",
        lambda x: (F.pad(x, (1, 2)), F.pad(x, (0, 0, 1, 1), value=3.0), F.pad(x, (-1, -2)), F.pad(x > 0, (1, 1))),
        x2,
    ),
    ("pad modes", lambda x: (F.pad(x, (1, 2), mode="reflect"), F.pad(x, (1, 2), mode="replicate")), x3),
    ("pad circular", lambda x: F.pad(x, (1, 2), mode="circular"), x3),
    ("diff", lambda x: (x.diff(dim=1), x.diff(dim=-1, prepend=x[:, :1]), x.diff(dim=1, n=2)), x2),
    ("casts", lambda x: (x.to(torch.int64), x.double(), x.bool(), x.int().float(), (x * 20).to(torch.int8)), x2),
    ("type_as", lambda x: x.int().type_as(x), x2),
    ("clone", lambda x: (x.clone(), x.contiguous(), x.detach(), x), x2),
    ("sizes as outputs", lambda x: (x.shape[0], x.shape[1] * 2 + 1, x.numel(), x), x3),
    ("sizes in arithmetic", lambda x: (x * x.shape[0], x + x.shape[1], x / (x.shape[0] * 2 - 1)), x3),
    ("size arithmetic", lambda x: x[:, : max(x.shape[0] % 2, -(-x.shape[0] // 2))], x3),
    ("sizes as fractions", lambda x: (x * (x.shape[0] / 2), x + x.shape[0] ** 0.5, x.shape[0] / 4), x2),
    ("a count from fractions", lambda x: torch.arange(0.5, x.shape[0], 0.5), x2),
    ("meshgrid xy", lambda x: torch.meshgrid(x[0], x[:, 0], torch.arange(2.0), indexing="xy"), x2),
    ("arange", lambda x: (torch.arange(x.shape[0]), torch.arange(2, 9, 3), torch.arange(x.shape[0], 0, -1)), x2),
    ("arange floats", lambda x: (torch.arange(0, 1, 0.3), torch.arange(x.shape[0], dtype=torch.float32)), x2),
    ("arange from a size", lambda x: torch.arange(x.shape[0], x.shape[0] + 4) + torch.arange(1.0, 5.0), x2),
    (
        "fills",
        lambda x: (torch.zeros(x.shape[0], 2), torch.ones_like(x), x.new_ones(3), torch.full((2, 2), -torch.inf)),
        x2,
    ),
    ("fills of other types", lambda x: (x.new_full((2,), 3), torch.full_like(x, 2, dtype=torch.int64)), x2),
    ("bool fills", lambda x: (torch.ones(x.shape[0], dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)), x2),
    ("size as a tensor", lambda x: torch.scalar_tensor(x.shape[0]) + x, x2),
    ("linspace", lambda x: x + torch.linspace(0, 1, 6), x2),
    ("linspace to a size", lambda x: x + torch.linspace(0.5, x.shape[0] - 0.5, 6), x2),
    ("linspace from a size", lambda x: x + torch.linspace(x.shape[0], -2, 6), x2),
    ("linspace of one", lambda x: x * torch.linspace(x.shape[0] * 0.5, 9, 1), x2),
    ("eye", lambda x: (torch.eye(4), torch.eye(3, 2)), x2),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x.view(1, x.shape[0] * 2, 6, x.shape[0])[:, :4], 2), x3),
    ("meshgrid", lambda x: torch.meshgrid(x[0], x[:, 0], indexing="ij"), x2),
    ("unfold", lambda x: x.unfold(1, 3, 1), x2),
    ("diagonal", lambda x: x.diagonal(0, 0, 1), x2),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)


def test_empty_tensors_pass_through_views_and_joins() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(x.shape[0], 2, 3), torch.cat([x, x]), x.transpose(0, 1), x.reshape(-1, 3), x @ x.t(), x.sum(-1)

    lowered = lower(traced(function, [floats(4, 6)], [floats(5, 6)]), strict=True)
    for size in (0, 1, 2):
        inputs = floats(size, 6)
        for found, expected in zip(lowered(inputs), function(inputs), strict=True):
            same(found, expected)


def test_static_empty_tensors() -> None:
    check(lambda x: (x[:, :0].reshape(0, 3), x[:0], torch.zeros(0, 4)), lambda n: [floats(n, 6)])


def test_mask_of_a_decoder() -> None:
    """The way in which transformers builds a causal mask with padding."""

    def function(mask: Tensor) -> Tensor:
        batch, length = mask.shape
        rows, columns = torch.arange(length), torch.arange(length)
        causal = columns[None, None, None, :] <= rows[None, None, :, None]
        index = torch.arange(batch)[:, None, None, None]
        return causal & mask.bool()[index, columns[None, None, None, :]]

    check(function, lambda n: [integers(n, n + 2, low=0, high=2)], dynamic=True)
