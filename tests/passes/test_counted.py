"""What is known of positions without the inputs: held against the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.passes._counted import Counted, counted, is_causal
from tests.graphs import Function, capture

Make = Callable[[Tensor], Tensor]


def told(make: Make, x: Tensor, ask: Callable[[Any], Any], *, dynamic: bool = False) -> tuple[Any, Tensor]:
    """What is said of the node that gives a tensor, and the tensor."""
    gm = capture(Function(lambda _, x: (make(x), x + 1)), x, dynamic=dynamic)
    return ask(gm.graph.output_node().args[0][0]), gm(x)[0]  # type: ignore[index]


def numbers(found: Counted, shape: torch.Size) -> Tensor:
    """The tensor that a `Counted` says."""
    if found.axis is None:
        return torch.full(shape, found.start)
    sizes = [1] * len(shape)
    sizes[found.axis] = -1
    return (torch.arange(shape[found.axis]) + found.start).reshape(sizes).expand(shape)


KNOWN: dict[str, Make] = {
    "arange": lambda x: torch.arange(x.shape[0]),
    "from a number": lambda x: torch.arange(3, 3 + x.shape[0]),
    "new axes": lambda x: torch.arange(x.shape[1])[None, :, None],
    "expand": lambda x: torch.arange(x.shape[1])[None].expand(x.shape[0], -1),
    "expand of one": lambda x: torch.arange(1)[:, None].expand(x.shape[0], x.shape[1]),
    "slice": lambda x: torch.arange(x.shape[1])[None, 2:],
    "slice to one": lambda x: torch.arange(x.shape[1])[None, 2:3],
    "slice of another axis": lambda x: torch.arange(x.shape[1])[None].expand(x.shape[0], -1)[1:],
    "plus": lambda x: torch.arange(x.shape[1]) + 5,
    "minus": lambda x: torch.arange(x.shape[1]) - 5,
    "plus one number in a row": lambda x: torch.arange(1)[:, None] + torch.arange(x.shape[1]),
    "difference": lambda x: torch.arange(2, 2 + x.shape[1]) - torch.arange(x.shape[1]),
    "diff": lambda x: torch.diff(torch.arange(x.shape[1])),
    "diff of a constant": lambda x: torch.diff(torch.arange(1)[:, None].expand(*x.shape), dim=0),
    "diff behind what comes before": lambda x: torch.diff(
        torch.arange(x.shape[1])[None], prepend=torch.arange(x.shape[1])[None, :1] - 1
    ),
    "no break": lambda x: (torch.diff(torch.arange(x.shape[1])) != 1).cumsum(-1),
    "index": lambda x: torch.arange(4, 4 + x.shape[1])[torch.arange(x.shape[1])[:, None]],
    "index of two": lambda x: torch.arange(x.shape[1])[None].expand(x.shape[0], -1)[
        torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[None, None]
    ],
    "equal": lambda x: torch.arange(3)[:, None] + 1 == torch.arange(1, 4)[:, None],
    "unequal": lambda x: torch.arange(3) > torch.arange(1, 4),
    "to int32": lambda x: torch.arange(x.shape[1]).to(torch.int32),
}  # fmt: skip
UNKNOWN: dict[str, Make] = {
    "inputs": lambda x: x.long(),
    "floats": lambda x: torch.arange(x.shape[1]).float(),
    "steps of two": lambda x: torch.arange(0, 8, 2),
    "every other": lambda x: torch.arange(8)[::2],
    "two axes": lambda x: torch.arange(x.shape[0])[:, None] + torch.arange(x.shape[1]),
    "twice": lambda x: torch.arange(4) + torch.arange(4),
    "with a factor": lambda x: torch.add(torch.arange(4), torch.arange(1), alpha=3),
    "backwards": lambda x: 3 - torch.arange(4),
    "a jump before": lambda x: torch.diff(torch.arange(x.shape[1])[None], prepend=torch.zeros(1, 1, dtype=torch.long)),
    "cumsum of ones": lambda x: (torch.diff(torch.arange(x.shape[1])) == 1).cumsum(-1),
    "compared": lambda x: torch.arange(4) > 2,
    "to bool": lambda x: torch.arange(4).bool(),
    "to int8": lambda x: torch.arange(300).to(torch.int8),
    "from behind": lambda x: torch.arange(8)[torch.arange(4) - 2],
    "by a mask": lambda x: torch.arange(4)[torch.ones(4, dtype=torch.bool)],
    "below the least of its dtype": lambda x: torch.arange(1, dtype=torch.uint8) - 1 > 0,
    "a sum of booleans": lambda x: (torch.arange(3) == torch.arange(3)) + (torch.arange(3) >= torch.arange(3)) == 1,
    "a number that int32 has not": lambda x: torch.arange(2**40, 2**40 + 4).to(torch.int32),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_said_is_so(name: str) -> None:
    found, tensor = told(KNOWN[name], torch.zeros(3, 7), counted)
    assert found is not None
    assert torch.equal(numbers(found, tensor.shape), tensor.long())


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_others_nothing_is_said(name: str) -> None:
    found, tensor = told(UNKNOWN[name], torch.zeros(3, 7), counted)
    assert found is None or torch.equal(numbers(found, tensor.shape), tensor.long())
    assert found is None


OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda x, y: torch.arange(x.numel()) - torch.arange(y.numel()),
    "expand": lambda x, y: torch.arange(x.numel()).expand(y.shape[0] * y.shape[1]),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_of_sizes_that_only_happen_to_be_equal_nothing_is_said(name: str) -> None:
    x, y = torch.zeros(2, 6), torch.zeros(3, 4)
    gm = capture(Function(lambda _, x, y: (OF_TWO[name](x, y), x + 1)), x, y, dynamic=True)
    assert counted(gm.graph.output_node().args[0][0]) is None  # type: ignore[index]


def test_of_sizes_that_data_gives_nothing_is_asked() -> None:
    def make(_: Any, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        size: Any = n.item()
        return torch.arange(size) + 2, x + 1

    gm = capture(Function(make), torch.zeros(3), torch.tensor(4))
    assert counted(gm.graph.output_node().args[0][0]) == Counted(2, 0)  # type: ignore[index]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(("unsqueeze", "expand", "slice", "plus", "minus", "index")), max_size=5),
       st.integers(0, 3), st.randoms(use_true_random=False))  # fmt: skip
def test_any_chain(names: list[str], start: int, random: Any) -> None:
    choices = [random.randrange(100) for _ in names]

    def make(_: Tensor) -> Tensor:
        x = torch.arange(start, start + 6)
        for name, choice in zip(names, choices, strict=True):
            dim = choice % x.dim()
            if name == "unsqueeze":
                x = x.unsqueeze(dim)
            elif name == "expand":
                x = x.expand(2, *[3 if n == 1 else n for n in x.shape])
            elif name == "slice":
                x = x.narrow(dim, choice % x.shape[dim], 1) if choice % 2 else x[choice % x.shape[0] :]
            elif name == "index":
                x = x[tuple(torch.arange(n).reshape(-1, *[1] * (x.dim() - 1 - i)) for i, n in enumerate(x.shape))]
            else:
                x = x + choice if name == "plus" else x - choice
        return x

    found, tensor = told(make, torch.zeros(1), counted)
    assert found is None or torch.equal(numbers(found, tensor.shape), tensor)


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


CAUSAL: dict[str, Make] = {
    "le": lambda x: torch.arange(x.shape[0]) <= torch.arange(x.shape[0])[:, None],
    "ge": lambda x: torch.arange(x.shape[0])[:, None] >= torch.arange(x.shape[0]),
    "lt": lambda x: (torch.arange(x.shape[0]) < torch.arange(1, 1 + x.shape[0])[:, None])[None, None],
    "gt": lambda x: (torch.arange(x.shape[0])[:, None] + 1 > torch.arange(x.shape[0])).expand(2, 3, -1, -1),
    "new axes": lambda x: (torch.arange(x.shape[0]) <= torch.arange(x.shape[0])[:, None])[None].expand(2, -1, -1)[
        :, None
    ],
    "both later": lambda x: torch.arange(x.shape[0]) + 4 <= 4 + torch.arange(x.shape[0])[:, None],
}
OTHER: dict[str, Make] = {
    "anti": lambda x: torch.arange(x.shape[0])[:, None] <= torch.arange(x.shape[0]),
    "without its own": lambda x: torch.arange(x.shape[0]) < torch.arange(x.shape[0])[:, None],
    "one more": lambda x: torch.arange(x.shape[0]) <= 1 + torch.arange(x.shape[0])[:, None],
    "not square": lambda x: torch.arange(x.shape[0] + 1) <= torch.arange(x.shape[0])[:, None],
    "by input": lambda x: torch.arange(x.shape[0]) <= x[:, :1],
    "the first alone": lambda x: (torch.arange(1)[:, None] >= torch.arange(x.shape[0])).expand(x.shape[0], -1),
    "turned by an axis": lambda x: (torch.arange(x.shape[0]) <= torch.arange(x.shape[0])[:, None])[..., None].expand(
        -1, -1, x.shape[0]
    ),
    "equal": lambda x: torch.arange(x.shape[0]) == torch.arange(x.shape[0])[:, None],
    "one axis": lambda x: torch.arange(x.shape[0]) <= 3,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks(name: str, dynamic: bool) -> None:
    found, mask = told(CAUSAL[name], torch.zeros(5, 3), is_causal, dynamic=dynamic)
    assert found and torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().expand_as(mask))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OTHER)
def test_masks_that_are_not_causal(name: str, dynamic: bool) -> None:
    assert not told(OTHER[name], torch.zeros(5, 3), is_causal, dynamic=dynamic)[0]
