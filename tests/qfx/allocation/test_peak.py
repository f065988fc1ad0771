"""qfx.allocation.peak: the expression gives what adding up at each call gives."""

from __future__ import annotations

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.allocation.costs import Costs
from qfx.allocation.peak import peak
from qfx.allocation.sizes import BATCH, CONTEXT, SEQUENCE
from tests.qfx.analysis.models import prepared

SIZES = (
    sympy.Integer(7), 3 * BATCH, 2 * BATCH * SEQUENCE, BATCH * (CONTEXT + 5), sympy.Max(CONTEXT, 4), CONTEXT * SEQUENCE,
)  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 6), st.integers(0, 4)), max_size=8),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(0, 50)),
)
@settings(max_examples=40, deadline=None)
def test_the_expression_is_the_greatest_sum(spans: list[tuple[sympy.Expr, int, int]], at: tuple[int, int, int]) -> None:
    lives = [(size, start, start + length) for size, start, length in spans]
    put = dict(zip((BATCH, SEQUENCE, CONTEXT), at, strict=True))
    sums = [sum(int(s.subs(put)) for s, first, last in lives if first <= step <= last) for step in range(11)]
    assert int(peak(lives).subs(put)) == max(sums)


def test_it_agrees_with_the_numbers_of_a_graph() -> None:
    costs = Costs.of(prepared()[0])
    found = peak(costs.lives)
    assert found.free_symbols == {BATCH, SEQUENCE}
    for batch, sequence in ((1, 1), (2, 9), (8, 1), (1, 1000)):
        assert int(found.subs({BATCH: batch, SEQUENCE: sequence})) == costs.activations(batch=batch, sequence=sequence)


def test_nothing_alive_is_nothing() -> None:
    assert peak([]) == 0
