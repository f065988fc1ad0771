"""Quantizers with scales of their own: where they begin, how they move, what they pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import embedding

from qfx.backends.qat import InputQuantizer, RunTimeInput, WeightQuantizer, fake_quantize
from qfx.backends.qat.quantizers import RATE
from qfx.format import Format
from qfx.numerics import QParams, choose_qparams, effective_scale, split, spread
from qfx.numerics import fake_quantize as numerics_fake
from qfx.packing import pack_weight
from qfx.rounding.nearest import round_weight
from tests.seeded import randn

WEIGHTS = (
    "i2/ch", "i4/g16", "i8", "u3/g16", "u4/g8/f16", "u8/b4x8", "nf4/g16", "f8e4m3/ch", "f4e2m1/g32/e8m0",
    "f4e2m1/g16/e4m3", "nf4/g64/dq", "i4/g24/bf16",
)  # fmt: skip


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("text", WEIGHTS)
def test_it_begins_as_the_packed_weight_and_packs_what_it_gives(text: str, method: str) -> None:
    """Bit for bit, before and after its scales moved, also where the search chose negative scales."""
    fmt, weight = Format.parse(text), randn(8, 64)
    packed = round_weight(weight, fmt, method, name="w")
    quantizer = WeightQuantizer(weight, packed, "learned")
    assert torch.equal(quantizer(weight), packed.dequantize())
    assert quantizer.pack(weight).params().scale.dtype == packed.scale.dtype
    signs = quantizer.qparams().scale.float().sign()
    with torch.no_grad():
        for parameter, seed in zip(quantizer.parameters(), (1, 2), strict=False):
            parameter.add_(0.2 * randn(*parameter.shape, seed=seed))
    moved = quantizer(weight.clone())
    assert not torch.equal(moved, packed.dequantize())
    again = quantizer.pack(weight)
    assert torch.equal(moved, again.dequantize())
    if not fmt.has_global_scale:
        assert torch.equal(again.scale.float().sign(), signs)


@pytest.mark.parametrize("text", ["i4/g16", "u3/g16"])
def test_gradients_of_the_parameters_follow_from_those_of_scale_and_zero_point(text: str) -> None:
    fmt, weight = Format.parse(text), randn(4, 32)
    quantizer = WeightQuantizer(weight, pack_weight(weight * 0.6, fmt), "learned")
    g = randn(4, 32, seed=1)
    scale, zero = (None if t is None else t.detach().requires_grad_() for t in quantizer.current())
    assert scale is not None
    fake_quantize(weight, fmt, scale, zero, factor=quantizer.factor).backward(g)
    quantizer(weight).backward(g)
    assert scale.grad is not None and quantizer.log_scale.grad is not None
    assert torch.allclose(quantizer.log_scale.grad, RATE * scale.detach() * scale.grad, atol=1e-6)
    if zero is not None:
        assert zero.grad is not None and quantizer.zero_shift is not None and quantizer.zero_shift.grad is not None
        assert torch.allclose(quantizer.zero_shift.grad, RATE * fmt.qmax * zero.grad, atol=1e-6)


@pytest.mark.parametrize("text", [text for text in WEIGHTS if "e8m0" not in text])
def test_scales_learn_below_codes_that_stay(text: str) -> None:
    """The gradient is that of scale * (code - zero), which has no rounding in it (EfficientQAT, "E2E-QP")."""
    fmt, weight, g = Format.parse(text), randn(8, 64), randn(8, 64, seed=1)
    packed = round_weight(weight, fmt, "mse", name="w")
    quantizer = WeightQuantizer(weight, packed, "learned", keep_codes=True)
    assert torch.equal(quantizer(weight), packed.dequantize())
    quantizer(weight).backward(g)
    shift = quantizer.zero_shift
    assert quantizer.log_scale.grad is not None and (shift is None or shift.grad is None)
    each = split(g * packed.dequantize(), fmt)
    wanted = quantizer.factor * RATE * each.sum_to_size(spread(quantizer.current()[0], fmt).shape)
    assert torch.allclose(quantizer.log_scale.grad, wanted.reshape(quantizer.log_scale.shape), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        quantizer.log_scale.add_(0.1 * randn(*quantizer.log_scale.shape, seed=2))
    again = quantizer.pack(weight)
    assert torch.equal(again.codes(), packed.codes()) and torch.equal(quantizer(weight), again.dequantize())
    assert not torch.equal(again.dequantize(), packed.dequantize())
    if fmt.by_row:
        ids = torch.tensor([3, 0, 3])
        assert torch.equal(quantizer.rows(weight, ids, None), quantizer(weight)[ids])


@pytest.mark.parametrize("text", ["i4/ch", "u4/ch", "f8e4m3/ch"])
def test_codes_of_values_between_two_codes_stay_below_moving_scales(text: str) -> None:
    """As a twentieth of a percent of the weights of models in bfloat16 are."""
    fmt, weight = Format.parse(text), torch.arange(-14, 15).reshape(1, -1) / 2
    if fmt.is_float:
        weight = torch.cat([448 * torch.ones(1, 1), torch.arange(17, 32, 2).reshape(1, -1)], 1)
    packed = pack_weight(weight, fmt)
    quantizer = WeightQuantizer(weight, packed, "learned", keep_codes=True)
    for seed in range(20):
        with torch.no_grad():
            quantizer.log_scale.copy_(0.1 * randn(1, 1, seed=seed))
        again = quantizer.pack(weight)
        assert torch.equal(again.codes().float(), packed.codes().float())
        assert torch.equal(again.dequantize(), quantizer(weight))


def test_scales_that_are_powers_of_two_move_codes() -> None:
    fmt, weight = Format.parse("f4e2m1/g32/e8m0"), randn(2, 64)
    quantizer = WeightQuantizer(weight, pack_weight(weight, fmt), "learned", keep_codes=True)
    quantizer.log_scale.data.fill_(0.7 / RATE)
    assert float((quantizer(weight).detach() - weight).norm() / weight.norm()) < 0.3, "and not twice the weight"


def test_rows_of_a_table_are_those_of_the_whole() -> None:
    for text in ("i4/ch", "u4/g8", "nf4/g16"):
        weight, ids = randn(10, 32).requires_grad_(), torch.tensor([[1, 7], [7, 0]])
        quantizer = WeightQuantizer(weight.detach(), pack_weight(weight, Format.parse(text)), "learned")
        quantizer.log_scale.data.add_(0.03)
        rows, whole = quantizer.rows(weight, ids, 0), quantizer(weight)
        assert torch.equal(rows, whole[ids])
        (by_rows,) = torch.autograd.grad(rows.square().sum(), quantizer.log_scale)
        (by_whole,) = torch.autograd.grad(embedding(ids, whole, 0).square().sum(), quantizer.log_scale)
        assert torch.allclose(by_rows, by_whole, atol=1e-5) and by_rows[1].any()
        assert not by_rows[0].any(), "nothing reaches the row of the padding"


def test_the_zero_point_stays_a_code() -> None:
    weight = randn(4, 16)
    quantizer = WeightQuantizer(weight, pack_weight(weight, Format.parse("u3/ch")), "learned")
    assert quantizer.zero_shift is not None
    for value, wanted in ((5.0, 7), (-5.0, 0)):
        quantizer.zero_shift.data.fill_(value)
        zero = quantizer.qparams().zero
        assert zero is not None and zero.dtype == torch.uint8 and bool((zero == wanted).all())
        assert torch.equal(quantizer(weight), quantizer.pack(weight).dequantize())


def test_powers_of_two_move_only_when_the_nearest_changes() -> None:
    weight = randn(2, 32)
    quantizer = WeightQuantizer(weight, pack_weight(weight, Format.parse("f4e2m1/g32/e8m0")), "learned")
    first = quantizer.qparams().scale.float()
    for shift, factor in ((0.3, 1.0), (-0.3, 1.0), (0.4, 2.0), (-0.4, 0.5)):
        quantizer.log_scale.data.fill_(shift / RATE)
        assert torch.equal(quantizer.qparams().scale.float(), first * factor), shift


@pytest.mark.parametrize("text", ["u8", "i8", "u4", "u8/ch", "f8e4m3"])
def test_inputs_begin_as_they_were_calibrated(text: str) -> None:
    fmt, x = Format.parse(text), randn(3, 5, 16)
    found = choose_qparams(x, fmt, activation=True)
    for scales in ("learned", "observed"):
        quantizer = InputQuantizer(fmt, found, scales).eval()
        assert torch.equal(quantizer(x), numerics_fake(x, fmt, *found))
        scale, zero = quantizer.qparams()
        assert torch.equal(scale, found.scale)
        assert zero is None if found.zero is None else zero is not None and torch.equal(zero, found.zero)


def test_inputs_of_some_channels_take_their_scales() -> None:
    fmt, x = Format.parse("u8/ch"), randn(3, 16)
    quantizer = InputQuantizer(fmt, choose_qparams(x, fmt, activation=True), "learned")
    columns = torch.tensor([3, 9, 1])
    assert torch.equal(quantizer(x[:, columns], columns), quantizer(x)[:, columns])


def test_an_observed_range_moves_by_its_decay() -> None:
    fmt = Format.parse("u8")
    quantizer = InputQuantizer(fmt, QParams(torch.tensor(1 / 255), torch.tensor(0, dtype=torch.uint8)), "observed")
    quantizer.train()(torch.tensor([[-1.0, 3.0]]))
    assert float(quantizer.low) == pytest.approx(-0.01) and float(quantizer.high) == pytest.approx(1.02)
    assert float(quantizer.qparams().scale) == pytest.approx(1.03 / 255)
    quantizer(torch.empty(0, 2))
    assert int(quantizer.steps) == 1, "an empty batch says nothing"


def test_an_all_zero_weight() -> None:
    weight = torch.zeros(2, 16)
    for scales in ("learned", "observed"):
        quantizer = WeightQuantizer(weight, pack_weight(weight, Format.parse("i4/g8")), scales)
        assert not bool(quantizer.train()(weight).any())
        assert bool(torch.isfinite(quantizer.qparams().scale).all())


@pytest.mark.parametrize("scales", ["learned", "observed"])
@pytest.mark.parametrize("text", [*WEIGHTS, "u4/g8"])
def test_weights_that_leave_zero_are_seen(text: str, scales: Any) -> None:
    """Layers that begin at zero train: a scale of 1 would round what they learn to zero."""
    fmt, weight = Format.parse(text), torch.cat((torch.zeros(4, 64), randn(4, 64)))
    packed = pack_weight(weight, fmt)
    quantizer = WeightQuantizer(weight, packed, scales).eval()
    assert torch.equal(quantizer(weight), packed.dequantize()), "it begins as it is packed"
    moved = weight + 0.05 * randn(8, 64, seed=1).sign()
    back = quantizer(moved)[:4].detach()
    if fmt.bits > 3 and fmt.granularity:
        assert float((back - moved[:4]).abs().max()) < 0.05, "each half of the codes of both signs"
    held = WeightQuantizer(weight, packed, "learned", keep_codes=True)
    assert fmt.scale_type == "e8m0" or torch.equal(held.qparams().scale.float(), packed.scale.float())


def test_an_observed_range_that_began_at_zero_moves() -> None:
    weight = torch.zeros(2, 16)
    quantizer = WeightQuantizer(weight, pack_weight(weight, Format.parse("i8/ch")), "observed").train()
    for _ in range(100):
        quantizer(torch.full((2, 16), 1e-3))
    assert torch.allclose(quantizer.qparams().scale, torch.tensor(1e-3 / 127), rtol=1e-2)


def test_a_moved_quantizer_keeps_its_types() -> None:
    weight = randn(2, 16)
    quantizer = WeightQuantizer(weight, pack_weight(weight, Format.parse("u4/g8")), "observed").half()
    assert {t.dtype for t in quantizer.state_dict().values()} == {torch.float32, torch.int64}
    scale = effective_scale(*quantizer.qparams(), quantizer.format)
    assert torch.equal(scale, effective_scale(*choose_qparams(weight, quantizer.format), quantizer.format))


def test_a_run_time_input_has_no_state() -> None:
    module, x = RunTimeInput(Format.parse("bf16")), randn(4)
    assert not module.state_dict() and torch.equal(module(x), x.bfloat16().float())
    assert repr(module) == "RunTimeInput(bf16)"
