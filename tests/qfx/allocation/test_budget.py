from __future__ import annotations

import math

import pytest

from qfx.allocation.budget import Stored, least_bytes
from qfx.rounding.method_options import AllocationOptions

STORED = Stored(
    least=2500, elements=8000, rest=700, beside=3000, fixed={"head": (1000, 1100)},
    rules={"head": "the rule for '*head'"},
)  # fmt: skip


def asked(**fields: float) -> AllocationOptions:
    return AllocationOptions(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ({"avg_bits": 4}, 9000 * 4 // 8 - 1100),
        ({"avg_bits": 3.3333}, math.floor(9000 * 3.3333 / 8) - 1100),
        ({"ratio": 0.25}, 18000 // 4 - 1100),
        ({"max_bytes": 6000}, 6000 - 700 - 1100),
        ({"max_memory": 9000}, 9000 - 700 - 1100 - 3000),
    ],
)
def test_budgets_are_bytes_of_the_units(budget: dict[str, float], found: int) -> None:
    assert STORED.budget(asked(**budget)) == found


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        ({"avg_bits": 2.0}, "3.2"), ({"ratio": 0.1}, "0.2"), ({"max_bytes": 4299}, "4300"),
        ({"max_memory": 7299}, "7300"),
    ],
)  # fmt: skip
def test_what_is_too_small_names_the_least_and_the_rules(budget: dict[str, float], least: str) -> None:
    ((name, value),) = budget.items()
    with pytest.raises(ValueError, match=f"the budget {name}={value:g} is too small\n  expected: at least") as error:
        STORED.budget(asked(**budget))
    assert f"at least {name}={least}:" in str(error.value)
    assert "the rule for '*head' holds 1,100 bytes" in str(error.value)
    assert ("caches and activations take 3,000 bytes" in str(error.value)) == (name == "max_memory")
    assert STORED.budget(asked(**{name: type(value)(least)})) >= STORED.least


def test_what_is_above_16_bits_is_refused() -> None:
    assert STORED.budget(asked(max_bytes=16000 + 1800)) == 16000
    with pytest.raises(ValueError, match=r"max_bytes=17801 is above what 16 bits for every weight take \(17800\)"):
        STORED.budget(asked(max_bytes=17801))
    with pytest.raises(ValueError, match=r"avg_bits=17 is above what 16 bits"):
        STORED.budget(asked(avg_bits=17))


def test_one_budget_is_needed() -> None:
    with pytest.raises(ValueError, match="one of avg_bits, max_bytes, ratio, max_memory, found {}"):
        STORED.budget(asked())
    with pytest.raises(ValueError, match="one budget is needed, found avg_bits=3.0 and ratio=0.5"):
        asked(avg_bits=3, ratio=0.5)


@pytest.mark.parametrize("most", [0.5, 3.0, 9.9])
def test_least_bytes_are_found_by_bisection(most: float) -> None:
    calls = []

    def loss(size: int) -> float:
        calls.append(size)
        return 10_000 / size

    found = least_bytes(1000, 100_000, loss, most)
    assert loss(found) <= most
    assert loss(found - 100) > most
    assert len(calls) < 20


def test_least_bytes_at_the_ends() -> None:
    assert least_bytes(10, 20, lambda _: 0.0, 1.0) == 10
    with pytest.raises(ValueError, match="the largest candidate of every unit loses 2 %, more than max_loss=1"):
        least_bytes(10, 20, lambda _: 2.0, 1.0)
