"""qfx.passes.observe and qfx.passes.calibrate: observers in, data through, the same text back."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.calibration.observers import AbsMax, MinMax, Observer
from qfx.calibration.padding import Attended
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.passes.calibrate import calibrate, observed, progress_bar
from qfx.passes.observe import Observers, insert_observers, remove_observers
from qfx.text import dump
from tests.graphs import Function, capture

GOLDEN = """\
%x: f32[2,4] = input
%observe: NoneType = qfx_observers.0(%x)
%linear: f32[2,4] = aten.linear(%x, @q.weight, @q.bias)  # x=u8
%linear_1: f32[2,4] = aten.linear(%x, @k.weight, @k.bias)  # x=u8
%mul: f32[2,4] = aten.mul.Tensor(%linear, %linear_1)
%observe_1: NoneType = qfx_observers.1(%mul)
%linear_2: f32[2,3] = aten.linear(%mul, @o.weight, @o.bias)  # x=u8
return [%linear_2]
"""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.q(x) * self.k(x))
        return out


def annotated(gm: fx.GraphModule, fmt: str = "u8") -> fx.GraphModule:
    for node in gm.graph.nodes:
        if graph.op_name(node) == "linear":
            annotation.set(node, "x", Format.parse(fmt))
    return gm


def tiny() -> fx.GraphModule:
    return annotated(capture(Tiny(), torch.randn(2, 4)))


def make(node: fx.Node, role: str) -> Observer | None:
    return MinMax() if role == "x" else None


def test_observed_gives_the_graph_back() -> None:
    gm, x = tiny(), torch.randn(2, 4)
    before = dump(gm)
    observers, notes = observed(gm, [[x], [2 * x]], make)
    seen = observers["q", "x"]
    assert isinstance(seen, MinMax) and notes == [] and dump(gm) == before
    assert float(seen.qparams(Format("u8")).scale) > 0
    with pytest.raises(ValueError, match="batch 2"):
        observed(gm, [[x], [torch.full((2, 4), float("nan"))]], make)
    assert dump(gm) == before and not hasattr(gm, "qfx_observers")
    nothing, notes = observed(gm, [[x]], lambda node, role: None)
    assert not list(nothing) and notes == []


def test_golden_text_and_back() -> None:
    gm = tiny()
    before = dump(gm)
    observers = insert_observers(gm, make)
    assert dump(gm) == GOLDEN
    assert list(observers) == [("q", "x"), ("k", "x"), ("o", "x")]
    assert observers["q", "x"] is observers["k", "x"]
    assert observers["q", "x"].name == "q x" and observers["o", "x"].name == "o x"
    gm.graph.lint()
    assert graph.clean(gm) is False
    assert remove_observers(gm) and dump(gm) == before and not hasattr(gm, "qfx_observers")
    assert not remove_observers(gm)


def test_ranges_are_those_of_the_values() -> None:
    gm, model = tiny(), Tiny()
    batches = [torch.randn(2, 4) for _ in range(3)]
    observers = insert_observers(gm, make)
    assert calibrate(gm, [[b] for b in batches], observers, total=3) == []
    x = torch.cat(batches)
    with torch.no_grad():
        hidden = model.q(x) * model.k(x)
    for key, values in ((("q", "x"), x), (("o", "x"), hidden)):
        low, high = observers[key].range()
        torch.testing.assert_close((low, high), (values.min(), values.max()))
        assert observers[key].seen == values.numel() and observers[key].batches == 3


def test_observers_of_another_kind_are_not_shared() -> None:
    gm = tiny()
    kinds: dict[str, Callable[[], Observer]] = {"q": MinMax, "k": AbsMax, "o": MinMax}
    observers = insert_observers(gm, lambda node, role: kinds[graph.fqn_of(node)]())
    assert observers["q", "x"] is not observers["k", "x"] and len(set(observers.values())) == 3
    gm = tiny()
    observers = insert_observers(gm, lambda node, role: MinMax() if graph.fqn_of(node) == "k" else None)
    assert list(observers) == [("k", "x")]


def test_all_calls_of_a_shared_layer_have_one_observer() -> None:
    model = Function(lambda own, x: own.fc(own.fc(x).tanh() * 5), fc=nn.Linear(4, 4))
    gm = annotated(capture(model, torch.randn(2, 4)))
    observers = insert_observers(gm, make)
    calibrate(gm, [[torch.zeros(2, 4)]], observers)
    assert list(observers) == [("fc", "x")] and observers["fc", "x"].batches == 2
    assert float(observers["fc", "x"].range()[1]) > 0


def test_results_and_attention_operands() -> None:
    gm = capture(
        Function(lambda own, x: nn.functional.scaled_dot_product_attention(x, x * 2, x * 3)), torch.randn(1, 2, 3, 4)
    )
    node = next(n for n in gm.graph.nodes if "attention" in n.name)
    for role in ("q", "k", "v", "p"):
        annotation.set(node, role, Format.parse("i8/head" if role != "p" else "u8"))
    annotation.set(node, "y", Format.parse("u8"))
    observers = insert_observers(gm, lambda n, role: MinMax("" if role == "y" else "head"))
    fqn = graph.fqn_of(node)
    assert list(observers) == [(fqn, role) for role in ("y", "q", "k", "v")]
    x = torch.randn(1, 2, 3, 4)
    calibrate(gm, [[x]], observers)
    torch.testing.assert_close(observers[fqn, "v"].range()[1], 3 * x.amax((0, 2, 3), keepdim=True)[0])
    assert observers[fqn, "y"].range()[0].shape == ()


def test_bad_values_name_the_node_and_the_batch() -> None:
    gm = tiny()
    observers = insert_observers(gm, make)
    bad = torch.full((2, 4), float("nan"))
    with pytest.raises(ValueError, match=r"(?s)batch 2.*node: q x"):
        calibrate(gm, [[torch.ones(2, 4)], [bad]], observers)


def test_no_data_and_wrong_data() -> None:
    gm = tiny()
    observers = insert_observers(gm, make)
    with pytest.raises(ValueError, match="cannot calibrate without data"):
        calibrate(gm, iter([]), observers)
    with pytest.raises(ValueError, match=r"(?s)batch 1.*expected: 1 inputs \(x\).*found: 2"):
        calibrate(gm, [[torch.ones(2, 4), torch.ones(2, 4)]], observers)


def test_nodes_that_saw_nothing_are_told() -> None:
    gm = annotated(capture(Tiny(), torch.randn(2, 4), dynamic=True))
    observers = insert_observers(gm, make)
    with pytest.warns(QfxWarning, match="no calibration data reached its 'x'"):
        notes = calibrate(gm, [[torch.ones(0, 4)]], observers)
    assert [note.node for note in notes] == ["q", "k", "o"]


def test_no_gradients_and_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    gm = tiny()
    seen: list[bool] = []

    class Watch(MinMax):
        def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
            seen.append(torch.is_grad_enabled() or x.grad_fn is not None)
            super().update(x, batch, kept)

    observers = insert_observers(gm, lambda node, role: Watch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(gm, [[torch.randn(2, 4, requires_grad=True)]] * 2, observers)
    assert len(seen) == 4 and not any(seen)
    assert capfd.readouterr() == ("", "")


def test_a_bar_away_from_a_terminal_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(True) as shown:
        shown.advance(shown.add_task("calibrating", total=1))
    shown.console.print()  # as rich 13 to 14.1 does behind every bar
    assert capfd.readouterr() == ("", "")


def test_values_are_let_go_of() -> None:
    """A chain of n layers keeps no more than a few values alive at once."""
    model = Function(lambda own, x: own.layers(x), layers=nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)]))
    gm = annotated(capture(model, torch.randn(2, 4)))
    alive: list[int] = []
    held: set[int] = set()

    class Watch(MinMax):
        def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
            import weakref

            key = len(held) + 1000 * len(alive)
            held.add(key)
            weakref.finalize(x, held.discard, key)
            alive.append(len(held))
            super().update(x, batch, kept)

    observers = insert_observers(gm, lambda node, role: Watch())
    calibrate(gm, [[torch.randn(2, 4)]], observers)
    assert len(alive) == 20 and max(alive) <= 3


def test_observers_twice_are_a_fault() -> None:
    gm = tiny()
    insert_observers(gm, make)
    with pytest.raises(AssertionError, match="remove them first"):
        insert_observers(gm, make)


def test_an_empty_collection() -> None:
    gm = tiny()
    observers = insert_observers(gm, lambda node, role: None)
    assert len(observers) == 0 and not remove_observers(gm)
    assert Observers().notes() == []
