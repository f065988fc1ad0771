"""Reading and writing at places that tensors give, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.onnx.checks import Case, check, floats, integers


def table(n: int) -> list[Tensor]:
    return [floats(6, 4, 5), integers(n, 3, low=0, high=4)]


def rows(n: int) -> list[Tensor]:
    return [floats(6, 4), integers(n, low=-4, high=4), floats(n, 4, seed=2)]


def written(n: int) -> list[Tensor]:
    return [floats(2, 6, 4), torch.randperm(6, generator=torch.Generator().manual_seed(n))[:n], floats(2, n, 4, seed=2)]


def elements(n: int) -> list[Tensor]:
    return [floats(n, 6), integers(n, 3, low=0, high=6).sort(-1)[0] % 6, floats(n, 3, seed=2)]


def _distinct(n: int) -> list[Tensor]:
    places = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(n)])
    return [floats(n, 6), places, floats(n, 3, seed=2)]


def masked(n: int) -> list[Tensor]:
    return [floats(n, 6), floats(n, 6, seed=2) > 0]


CASES: list[Case] = [
    ("embedding", lambda w, i: torch.nn.functional.embedding(i, w[:, 0], padding_idx=0), table),
    ("gather", lambda x, i, v: (x.gather(1, i), x.gather(-1, i)), elements),
    ("index_select", lambda x, i: x.index_select(1, i.flatten()), table),
    ("index one", lambda x, i, v: (x[i], x[i.int()]), rows),
    ("index middle", lambda x, i: (x[:, i], x[:, :, i]), table),
    ("index several", lambda x, i: (x[i, i], x[i[:, :1], i[:1]], x[i, i, i]), table),
    ("index several after a whole dimension", lambda x, i: x[:, i, i], table),
    ("index with numbers and slices", lambda x, i: (x[0, i], x[1:3, i[0]], x[..., i]), table),
    ("index_put", lambda x, i, v: torch.index_put(x, (i.abs() % 6,), v[:1, :1]), rows),
    ("index_put several", lambda x, i: torch.index_put(x, (i, i), torch.zeros(())), table),
    ("index_put after a whole dimension", lambda x, i, v: torch.ops.aten.index_put(x, [None, i], v), written),
    ("index_put adds", lambda x, i, v: torch.index_put(x, (i,), v, accumulate=True), rows),
    ("index_put under a mask", lambda x, m: torch.index_put(x, (m,), torch.tensor(2.0)), masked),
    ("index_put of rows under a mask", lambda x, m: torch.index_put(x, (m[:, 0],), x[:1] + 2), masked),
    ("index_put of one number a place under a mask", lambda x, m: torch.index_put(x, (m[:, 0],), x[0, :1]), masked),
    (
        "masked_scatter",
        lambda x, m: (
            x.masked_scatter(m, x.flip(0)),
            x.masked_scatter(m[0], -x),
            x.half().masked_scatter(m[:, :1], x.half()),
        ),
        masked,
    ),
    ("masked_scatter of nothing", lambda x, m: x.masked_scatter(m & ~m, x[:0]), masked),
    ("index_copy", lambda x, i, v: x.index_copy(1, i, v), written),
    ("index_add", lambda x, i, v: (x.index_add(1, i, v), x.index_add(1, i, v, alpha=2)), written),
    ("index_fill", lambda x, i, v: x.index_fill(1, i, 3.0), written),
    ("scatter", lambda x, i, v: (x.scatter(1, i, v), x.scatter(1, i, 2.0)), _distinct),
    ("scatter_add", lambda x, i, v: (x.scatter_add(1, i, v), x.scatter_reduce(1, i, v, "amax")), elements),
    (
        "scatter_reduce without the former values",
        lambda x, i, v: tuple(
            value.scatter_reduce(1, i, new, how, include_self=False)
            for value, new in ((x, v), ((9 * x).long(), (9 * v).long()))
            for how in ("amin", "amax", "sum", "prod")
        ),
        elements,
    ),
    ("scatter of bools", lambda x, i, v: (x > 0).scatter(1, i, True), elements),
    ("scatter_reduce of fewer places", lambda x, i, v: x.scatter_reduce(1, i[:1, :2], v, "amin"), elements),
    (
        "slice_scatter",
        lambda x, m: (x.slice_scatter(x[:, :2] + 1, 1, 1, 3), x.slice_scatter(x[:, ::2], 1, 0, 6, 2)),
        masked,
    ),
    (
        "slice_scatter from the end",
        lambda x, m: (
            x.slice_scatter(x[:2] * 2, 0, -2),
            x.slice_scatter(x[1:] * 2, 0, 1 - x.shape[0]),
            x.slice_scatter(x[1:2] * 2, 0, 1 - x.shape[0], 2),
            x.slice_scatter(x[::2] * 2, 0, -x.shape[0], step=2),
        ),
        masked,
    ),
    (
        "slice_scatter from before the first place",
        lambda x, m: (x.slice_scatter(x[:1] * 2, 0, -20, 1), x.slice_scatter(x[:1] * 2, 0, -20, 1, 2)),
        masked,
    ),
    ("slice_scatter whole", lambda x, m: x.slice_scatter(x * 2, 0), masked),
    ("select_scatter", lambda x, m: (x.select_scatter(x[:, 0] * 2, 1, 2), x.select_scatter(x[0], 0, -1)), masked),
    ("copy", lambda x, m: torch.ops.aten.copy(x, m[:1]), masked),
    ("one_hot", lambda x, i: torch.nn.functional.one_hot(i, 5), table),
    ("isin", lambda x, i: torch.isin(i, torch.tensor([1, 2])), table),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)


DATA_DEPENDENT: list[Case] = [
    ("nonzero", lambda x, m: (m.nonzero(), m.nonzero().shape[0]), masked),
    ("mask as index", lambda x, m: (x[m], x[m].sum()), masked),
    ("rows under a mask", lambda x, m: x[m[:, 0]] * 2, masked),
    ("masked_select", torch.masked_select, masked),
    ("as many rows as a mask has places", lambda x, m: torch.index_put(x, (m[:, 0],), -x[m[:, 0]]), masked),
    ("as many elements as a mask has places", lambda x, m: x.masked_scatter(m, x[m] * 2), masked),
    ("item in arithmetic", lambda x, m: x + m.sum().item(), masked),
]


@pytest.mark.parametrize(("function", "make"), [c[1:] for c in DATA_DEPENDENT], ids=[c[0] for c in DATA_DEPENDENT])
def test_sizes_that_depend_on_data(function: Any, make: Any) -> None:
    check(function, make, dynamic=True)
