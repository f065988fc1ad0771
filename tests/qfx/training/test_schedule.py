"""qfx.QATSchedule: delayed start, fewer bits by steps, freezing; resumed, compiled, and what is refused."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.qat import quantizers
from tests.qat_nets import DATA, adam, both, ids, net, out, prepared, step

RECIPE = both("u4/g16", "u4", table="i8/ch")  # inputs of 4 bits with fixed scales


@functools.cache
def planned() -> qfx.Plan:
    return qfx.plan(net(), RECIPE, DATA)


def formats(model: nn.Module) -> dict[str, str]:
    return {name: str(q.format) for name, q in quantizers(model).items()}


def up(model: nn.Module) -> tuple[str, str]:
    """Formats of one linear's weight and input."""
    found = formats(model)
    return found["up.fake_quant.weight.parts.0"], found["up.fake_quant.inputs"]


def test_it_trains_in_float_until_it_begins() -> None:
    model, plain = prepared(net(), planned()), out(net())
    quantized = out(model)
    schedule = qfx.QATSchedule(model, start_after=2)
    assert torch.allclose(out(model), plain, atol=1e-6) and not torch.allclose(quantized, plain, atol=1e-3)
    optimizer = adam(model)
    step(model, optimizer)
    schedule.step()
    assert quantizers(model)["up.fake_quant.inputs"].log_scale.grad is None, "scales have no part in it"
    with pytest.raises(ValueError, match="has not begun.*\n?.*train on"):
        qfx.convert(model)
    with torch.no_grad():
        model.up.weight.mul_(3)
    schedule.step()
    scale = quantizers(model)["up.fake_quant.weight.parts.0"].qparams().scale
    extent = model.up.weight.detach().unflatten(-1, (-1, 16))
    spans = (extent.amax(-1).clamp(min=0) - extent.amin(-1).clamp(max=0)) / 15
    assert bool((scale < spans * 1.2).all() and (scale > spans * 0.4).all()), "scales of the weights as they are now"
    step(model, optimizer)
    trained = out(model)
    assert torch.allclose(out(qfx.convert(model)), trained, rtol=0, atol=0.05)


def test_bits_fall_by_steps_to_those_of_the_plan() -> None:
    model = prepared(net(), planned())
    last, table = up(model), formats(model)["table.fake_quant.weight.parts.0"]
    assert last == ("u4/g16", "u4")
    errors, seen = [], []
    schedule = qfx.QATSchedule(model, bits={0: 8, 1: 6, 3: 4})
    for number in range(4):
        seen.append(up(model))
        errors.append(float((out(model) - out(net())).norm()))
        if number < 3:
            with pytest.raises(ValueError, match=r"(?s)trains in u[86].*the plan says u4.*come to its end"):
                qfx.convert(model)
        schedule.step()
    assert seen == [("u8/g16", "u8"), ("u6/g16", "u6"), ("u6/g16", "u6"), last]
    assert formats(model)["table.fake_quant.weight.parts.0"] == table == "i8/ch"
    assert errors[0] < errors[1] == errors[2] < errors[3], "nothing learned meanwhile: fewer bits, more error"
    assert errors[0] < 0.2 * errors[3]
    step(model, adam(model))
    trained = out(model)
    assert float((out(qfx.convert(model)) - trained).norm() / trained.norm()) < 0.05
    assert model.up.w_format == "u4/g16" and model.up.x_format == "u4"


@pytest.mark.slow
def test_inputs_found_at_run_time_and_attention_have_more_bits_too() -> None:
    from tests.qfx.live.test_attending import Net, X, recipe

    rule = {"target": "attention", "q": "i4/tok", "k": "u4/head", "v": "i4/tok", "p": "u4"}
    model = qfx.prepare_qat(Net(), recipe(rule), data=[X])
    plain = Net()(X)
    few = float((model.train()(X) - plain).detach().norm())
    schedule = qfx.QATSchedule(model, bits={0: 8, 1: 4})
    many = float((model(X) - plain).detach().norm())
    schedule.step()
    assert many < 0.15 * few
    assert float((model(X) - plain).detach().norm()) == pytest.approx(few, rel=0.2)


def test_what_is_frozen_stands_still() -> None:
    model = prepared(net(), planned())
    schedule = qfx.QATSchedule(model, freeze={1: "up", 2: ["*.log_scale", "norm"]})
    optimizer, moved = adam(model), []
    for seed in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step(model, optimizer, seed)
        schedule.step()
        moved.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
    ups = {n for n, _ in model.named_parameters() if n.startswith("up.")}
    scales = {n for n, _ in model.named_parameters() if n.endswith("log_scale")}
    assert len(ups) == 6 and ups & moved[0] and not ups & moved[1]
    assert moved[1] > scales - ups and not (scales | {"norm.weight"}) & moved[2] and "down.weight" in moved[2]
    schedule.load_state_dict({"steps": 1})
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == ups


def test_observed_ranges_of_what_is_frozen_stand_still() -> None:
    model = prepared(net(), planned(), scales="observed")
    schedule = qfx.QATSchedule(model, freeze={0: "up", 1: "down.*.inputs"})
    optimizer = adam(model)

    def moved(seed: int) -> set[str]:
        before = {n: q.log_scale.clone() for n, q in quantizers(model).items()}
        step(model, optimizer, seed)
        schedule.step()
        return {n for n, q in quantizers(model).items() if not torch.equal(q.log_scale, before[n])}

    moved(0)
    found = moved(1)
    assert not {n for n in found if n.startswith("up.")} and "down.fake_quant.weight.parts.0" in found
    assert "head.fake_quant.inputs" in found and "down.fake_quant.inputs" not in found
    schedule.unfreeze()
    assert {"up.fake_quant.inputs", "down.fake_quant.inputs"} <= moved(2) and model.up.weight.requires_grad


@pytest.mark.parametrize("later", [False, True], ids=["schedule first", "schedule last"])
@pytest.mark.parametrize("at", [2, 5], ids=["in float", "at six bits"])
def test_resumed_training_goes_on_exactly(at: int, later: bool) -> None:
    fields: dict[str, Any] = {"start_after": 3, "bits": {0: 8, 4: 6, 7: 4}, "freeze": {6: "norm"}}

    def start() -> list[Any]:
        model = prepared(net(), planned())
        return [model, torch.optim.Adam(model.parameters(), lr=1e-2), qfx.QATSchedule(model, **fields)]

    def train(parts: Any, seeds: range) -> list[Tensor]:
        losses = []
        for seed in seeds:
            losses.append(step(parts[0], parts[1], seed))
            parts[2].step()
        return losses

    whole = start()
    losses = train(whole, range(9))
    first = start()
    train(first, range(at))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    again, states = start(), torch.load(file, weights_only=True)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    if later:
        again[:2] = start()[:2]
        for part, state in zip(again[:2], states[:2], strict=True):
            part.load_state_dict(state)
        again[2] = qfx.QATSchedule(again[0], **fields, steps=states[2]["steps"])
    assert torch.equal(torch.stack(train(again, range(at, 9))), torch.stack(losses[at:]))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), again[0].parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, on any such function
def test_each_switch_is_one_compilation(fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = prepared(net(), planned()).train()
    schedule = qfx.QATSchedule(model, start_after=2, bits={0: 8, 4: 4})
    counter = CompileCounterWithBackend("aot_eager")
    run, counts = torch.compile(model, fullgraph=True, backend=counter), []
    for _ in range(6):
        y = run(ids())  # type: ignore[no-untyped-call]
        assert torch.allclose(y, model(ids()), atol=1e-5)
        y.sum().backward()
        counts.append(counter.frame_count)
        schedule.step()
    assert counts == [1, 1, 2, 2, 3, 3]


@functools.cache
def _prepared() -> Any:
    return prepared(net(), planned())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_after": -1}, "step of start_after is a whole number, 0 or more, found -1"),
        ({"start_after": True}, "found True"),
        ({"steps": -2}, "step of steps.*-2"),
        ({"bits": {0.5: 8}}, "step of bits"),
        ({"freeze": {"a": "up"}}, "step of freeze.*'a'"),
        ({"bits": {0: 9, 1: 4}}, "2 to 8"),
        ({"bits": {1: 8, 2: 4}}, "begin at step 0"),
        ({"bits": {0: 6, 1: 8, 2: 4}}, "and fall"),
        ({"bits": {0: 4}}, "(?s)change nothing.*formats of 4, 8 bits"),
        ({"bits": {0: 8, 9: 6}}, "(?s)end at 6, and the plan has formats of 4.*add a step with 4"),
        ({"freeze": {3: "upp"}}, "(?s)no parameter and no module.*'upp'.*up"),
        ({"freeze": {3: ["up", "down.bias"]}}, "(?s)'down.bias' are frozen already"),
    ],
)
def test_bad_schedules(fields: dict[str, Any], message: str) -> None:
    model = _prepared()
    model.down.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        qfx.QATSchedule(model, **fields)


def test_scales_alone_learn_nothing_in_float() -> None:
    model = prepared(net(), planned(), train="scales")
    with pytest.raises(ValueError, match="(?s)nothing that learns in float.*start_after=3.*leave it out"):
        qfx.QATSchedule(model, start_after=3)
    schedule = qfx.QATSchedule(model, bits={0: 8, 1: 4}, freeze={1: "up.fake_quant"})
    step(model, adam(model))
    schedule.step()
    assert float((out(model) - out(net())).norm()) < 2 * float((out(prepared(net(), planned())) - out(net())).norm())
    trained = out(model)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)


def test_attributes_of_the_users_modules_say_nothing() -> None:
    model = prepared(net(), planned())
    model.norm.on, model.norm.planned = False, "soon"
    assert model is qfx.convert(model)


def test_other_models_and_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)Net is not prepared.*prepare_qat"):
        qfx.QATSchedule(net())
    model = prepared(net(), both("nf4/g16"), DATA)
    with pytest.raises(ValueError, match="change nothing"):
        qfx.QATSchedule(prepared(net(), both("nf4/g16", table="none"), DATA), bits={0: 8})
    schedule = qfx.QATSchedule(model, start_after=1)
    for state in ({}, {"steps": -1}, {"steps": 1.5}, {"steps": 1, "more": 2}):
        with pytest.raises(ValueError, match="state of a schedule"):
            schedule.load_state_dict(state)
