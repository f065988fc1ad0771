"""Reductions, scans, sorts and counts against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.onnx.checks import Case, check, floats, integers


def x3(n: int) -> list[Tensor]:
    return [floats(n, 4, 6)]


def whole(n: int) -> list[Tensor]:
    return [integers(n, 6)]


def bools(n: int) -> list[Tensor]:
    return [floats(n, 6) > 0]


def ties(n: int) -> list[Tensor]:
    return [integers(n, 12, low=0, high=4)]


CASES: list[Case] = [
    ("sum", lambda x: (x.sum(), x.sum(-1), x.sum((0, 2), keepdim=True), x.sum(1, dtype=torch.float64)), x3),
    ("sum of integers", lambda x: (x.sum(), x.sum(0), x.int().sum(1)), whole),
    ("sum of bools", lambda x: (x.sum(), x.sum(-1), x.sum(-1, dtype=torch.int32)), bools),
    ("mean", lambda x: (x.mean(), x.mean(-1), x.mean((0, 1), keepdim=True), x.int().float().mean(-1)), x3),
    ("prod", lambda x: (x.prod(), x.prod(1), x.prod(-1, keepdim=True)), x3),
    ("amax", lambda x: (x.amax(-1), x.amin((0, 1)), x.max(), x.min(), x.amax()), x3),
    ("max with places", lambda x: (*x.max(1), *x.min(-1, keepdim=True)), x3),
    ("max of integers", lambda x: (x.amax(1), x.max(), *x.min(0)), whole),
    ("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True), x.argmin()), x3),
    ("argmax with ties", lambda x: (x.argmax(-1), x.argmin(-1)), ties),
    ("any", lambda x: (x.any(), x.all(), x.any(-1), x.all(0, keepdim=True)), bools),
    ("any of numbers", lambda x: (x.any(-1), x.all(-1)), ties),
    (
        "var",
        lambda x: (x.var(-1), x.std(1, correction=0), x.var((0, 1), keepdim=True), x.var(), *torch.var_mean(x, -1)),
        x3,
    ),
    ("norm", lambda x: (x.norm(), x.norm(dim=-1), torch.linalg.vector_norm(x, 1, dim=1), x.norm(p=3, dim=0)), x3),
    ("norm inf", lambda x: torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True), x3),
    ("norm of order 0", lambda x: (x.relu().norm(p=0, dim=-1), torch.linalg.vector_norm(x.relu(), 0)), x3),
    ("normalize", lambda x: torch.nn.functional.normalize(x, dim=-1), x3),
    ("logsumexp", lambda x: (x * 100).logsumexp(-1), x3),
    ("cumsum", lambda x: (x.cumsum(1), x.cumsum(-1, dtype=torch.float64)), x3),
    ("cumsum of integers", lambda x: (x.cumsum(0), (x > 0).cumsum(-1), x.int().cumsum(1)), whole),
    ("topk", lambda x: (*x.topk(2), *x.topk(3, 1, largest=False)), x3),
    ("sort", lambda x: (*x.sort(), *x.sort(1, descending=True), x.argsort(0)), x3),
    ("sort with ties", lambda x: (*x.sort(stable=True), *torch.sort(x, stable=True, descending=True)), ties),
    ("sort bools", lambda x: x.sort(stable=True, dim=-1), bools),
    ("histc", lambda x: torch.histc(x.float(), bins=4, min=0, max=3), ties),
    ("histc of fractions", lambda x: torch.histc(x, bins=5, min=-1, max=1), x3),
    ("bucketize", lambda x: (torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),), x3),
    ("bucketize right", lambda x: torch.bucketize(x, torch.tensor([-1, 0, 2]), right=True), ties),
    (
        "bucketize integers by fractions",
        lambda x: [torch.bucketize(x, torch.tensor([-1.5, -0.5, 0.5]), right=right) for right in (False, True)],
        whole,
    ),
    ("count_nonzero", lambda x: (torch.count_nonzero(x), torch.count_nonzero(x, dim=1)), ties),
    ("softmax", lambda x: (x.softmax(-1), x.softmax(0), x.log_softmax(1), x.softmax(-1, dtype=torch.float64)), x3),
    ("softmax of integers", lambda x: x.softmax(-1, dtype=torch.float32), whole),
    ("0-dimensional", lambda x: (x[0, 0, 0].sum(), x[0, 0, 0].amax(), x[0, 0, 0].cumsum(0), x[0, 0, 0].softmax(0)), x3),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)
