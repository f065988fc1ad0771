"""Predictions: against sums by hand, and what they must say about batch, context and bits."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.allocation.costs import Asked, Costs
from qfx.allocation.devices import DEVICES, Device
from qfx.allocation.model_costs import costs_of
from qfx.allocation.roofline import Point, Roofline, crossover, predict, sentences
from qfx.format import Format
from tests.zoo import ZOO

F = Format.parse
FLAT = Device(
    "flat", 10**9, ((1, 10e9),), {"f32": ((1, 100e9),), "w4": ((1, 100e9),), "w8a8": ((1, 400e9),)}, dtype="f32",
    widths=(2, 4, 8),
)  # fmt: skip


@functools.cache
def _costs(name: str = "llama") -> Costs:
    return costs_of(ZOO[name]()[0])


def _linears(asked: object) -> Asked:
    return {n.name: asked for n in _costs().nodes if n.kind == "linear"}


def test_a_token_takes_as_long_as_its_bytes() -> None:
    slow = replace(FLAT, rates={"f32": ((1, 1e18),)})  # products take no time
    found = predict(_costs(), None, slow, sequence=8, context=64).decode
    assert found is not None and found.bound == "memory" and found.parts["compute"] == 0
    assert found.seconds == pytest.approx(_costs().at(context=64).traffic / 10e9)
    assert found.moved == _costs().at(context=64).traffic


def test_a_prompt_takes_as_long_as_its_products() -> None:
    fast = replace(FLAT, bandwidth=((1, 1e18),))
    found = predict(_costs(), None, fast, batch=4, sequence=64).prefill
    assert found.bound == "compute"
    assert found.seconds == pytest.approx(2 * _costs().at(batch=4, sequence=64).macs / 100e9, rel=1e-3)


def test_each_call_costs_its_overhead() -> None:
    late = replace(FLAT, overhead=1.0)
    phase = Roofline(_costs(), None, late).phase()
    calls = sum(n.kind != "view" for n in _costs().nodes)
    assert phase.bound == "overhead" and phase.parts["overhead"] == calls
    halves = (F("u4/g32"), F("i8/ch"))
    cut = Roofline(_costs(), {"model.layers.0.mlp.up_proj": halves}, late).phase()
    assert cut.parts["overhead"] == calls + 1, "two products in the place of one"


def test_kernels_of_parts_share_the_products() -> None:
    fast = replace(FLAT, bandwidth=((1, 1e18),), rates={"f32": ((1, 1e18),), "w4": ((1, 1e9),), "w8": ((1, 3e9),)})
    name = "model.layers.0.mlp.up_proj"
    macs = 2 * 64 * 96
    for asked, rate in (("u4/g32", 1e9), ("i8/ch", 3e9)):
        assert Roofline(_costs(), {name: asked}, fast).phase().parts["compute"] == pytest.approx(macs / rate, rel=1e-3)
    mixed = Roofline(_costs(), {name: (F("u4/g32"), F("u4/g32"), F("u4/g32"), F("i8/ch"))}, fast).phase()
    assert mixed.parts["compute"] == pytest.approx(macs * (0.75 / 1e9 + 0.25 / 3e9), rel=1e-3)


def test_a_tied_weight_runs_by_the_format_of_its_table() -> None:
    costs = _costs("gpt2")
    fast = replace(FLAT, bandwidth=((1, 1e18),), rates={"f32": ((1, 1e18),), "w8": ((1, 1e9),)})
    assert Roofline(costs, {"transformer.wte": "i8/ch"}, fast).phase().parts["compute"] > 1e-6


def test_bits_that_no_kernel_reads_move_as_more() -> None:
    three, four = (Roofline(_costs(), _linears(f), FLAT).phase().moved for f in ("u3/g32", "u4/g32"))
    assert three == four
    stored = [_costs().weights(_linears(f)) for f in ("u3/g32", "u4/g32")]
    assert stored[0] < stored[1]


def test_fewer_bits_decode_faster_and_only_integers_prefill_faster() -> None:
    points = crossover(_costs(), _linears("u4/g32"), FLAT, batches=(1, 256), contexts=(8,))
    found = {(p.phase, p.batch): p.verdict for p in points}
    assert found["decode", 1] == "faster"
    assert found["prefill", 256] == "only smaller"
    integer = crossover(_costs(), _linears({"w": "i8/ch", "x": "i8/tok"}), FLAT, batches=(256,), contexts=(8,))
    assert {p.verdict for p in integer if p.phase == "prefill"} == {"faster"}


def test_a_small_cache_pays_at_long_context() -> None:
    near, far = (
        next(
            p
            for p in crossover(_costs(), None, FLAT, cache=F("i8"), batches=(1,), contexts=(n,))
            if p.phase == "decode"
        )
        for n in (1, 100_000)
    )
    assert near.verdict == "only smaller" and far.ratio > 2


def test_predictions_of_an_encoder_have_no_decode() -> None:
    found = predict(_costs("bert"), None, FLAT, batch=2, sequence=16)
    assert found.decode is None and found.cache == 0
    assert {p.phase for p in crossover(_costs("bert"), None, FLAT, batches=(1,), contexts=(8,))} == {"prefill"}


def test_memory_and_whether_it_fits() -> None:
    roomy = predict(_costs(), None, FLAT, batch=2, sequence=4, context=100)
    assert roomy.fits and roomy.memory > roomy.weights + roomy.cache
    assert roomy.cache == _costs().at(batch=2, context=100).cache
    assert not predict(_costs(), None, replace(FLAT, memory=roomy.memory - 1), batch=2, sequence=4, context=100).fits


def test_a_rate_that_is_not_known_is_told() -> None:
    asked = {"model.layers.0.mlp.up_proj": {"w": "f8e4m3/ch", "x": "f8e4m3/tok"}}
    assert predict(_costs(), asked, DEVICES["a100"]).notes == (
        "w=f8e4m3/ch x=f8e4m3/tok: a100 tells no rate for it, products count at that of f16",
    )
    assert predict(_costs(), asked, DEVICES["h100"]).notes == ()


def test_floats_run_in_the_dtype_of_the_device() -> None:
    found = predict(_costs(), None, DEVICES["h100"])
    assert found.weights == _costs().weights(rest=F("f16"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(0, 4096), st.sampled_from(["u2/g32", "u4/g32", "i8/ch"]))
def test_times_only_grow(batch: int, context: int, fmt: str) -> None:
    roof = Roofline(_costs(), _linears(fmt), DEVICES["h100"])
    here = roof.phase(batch=batch, context=context).seconds
    assert roof.phase(batch=batch + 1, context=context).seconds > here
    assert roof.phase(batch=batch, context=context + 64).seconds > here


def test_sentences() -> None:
    points = [Point("decode", b, 128, r, "memory") for b, r in ((1, 3.5), (2, 2.0), (4, 1.01), (8, 0.5))]
    (line,) = sentences(points)
    assert line == (
        "decode, context 128: faster at batch 1 to 2 (2.00x to 3.50x); only smaller at batch 4 (1.01x); "
        "slower at batch 8 (0.50x) (predicted)"
    )
