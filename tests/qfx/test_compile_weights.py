"""torch.compile(backend="qfx"): results follow the weights, whatever happens to them; nothing is packed for nothing."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.measuring.measure import sqnr_db
from tests.qfx.conftest import Counts
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # said of every weight-only linear, and tested in tests/qfx/test_compile.py
    pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them"),
]


class Net(nn.Module):
    """Two linears of one shape and a norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.b(torch.relu(self.a(x))))
        return out


class Layers(nn.Module):
    """Layers whose forward is a frame of its own, since the graph breaks between them."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Net(seed) for seed in range(count))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="qfx", options=options or None)


def anew(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What the model gives when compiled from nothing. A copy, for Dynamo keeps compiled code by the function."""
    torch._dynamo.reset()
    found: Tensor = compiled(copy.deepcopy(model))(*inputs)
    return found


def in_place(model: Net) -> None:
    model.a.weight.mul_(-1.5)


def bias_in_place(model: Net) -> None:
    model.b.bias.add_(1.0)


def norm_in_place(model: Net) -> None:
    model.norm.weight.fill_(0.25)


def swapped(model: Net) -> None:
    model.a.weight = nn.Parameter(torch.randn(16, 16))


def data_swapped(model: Net) -> None:
    model.a.weight.data = torch.randn(16, 16)


def within_data(model: Net) -> None:
    """As peft merges adapters: no version is counted, and the place stays."""
    model.a.weight.data += torch.randn(16, 16)


def averaged(model: Net) -> None:
    """As moving averages are put in place."""
    for own, other in zip(model.parameters(), Net(seed=9).parameters(), strict=True):
        own.data.copy_(other.data)


def loaded(model: Net) -> None:
    model.load_state_dict(Net(seed=7).state_dict())


def assigned(model: Net) -> None:
    model.load_state_dict(Net(seed=8).state_dict(), assign=True)


def module_swapped(model: Net) -> None:
    model.b = nn.Linear(16, 16)


CHANGES = [
    in_place, bias_in_place, norm_in_place, swapped, data_swapped, within_data, averaged, loaded, assigned,
    module_swapped,
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_follow_changed_weights(mode: Callable[[], Any], counts: Counts) -> None:
    x = torch.randn(3, 16)
    model = Net()
    fast = compiled(model)
    with mode():
        before = after = fast(x)
        for number, change in enumerate(CHANGES, 2):
            change(model)
            after = fast(x)
            assert torch.equal(fast(x), after) and counts.lowered == number, change.__name__
            assert not torch.equal(before, after), change.__name__
            assert sqnr_db(model(x), after) > 30, change.__name__
            before = after
    with torch.no_grad():
        assert torch.equal(anew(model, x), after)


@torch.no_grad()
def test_weights_that_stay_are_packed_once(counts: Counts) -> None:
    model = Net()
    fast = compiled(model)
    for _ in range(5):
        fast(torch.randn(3, 16))
    model.load_state_dict(model.state_dict(), assign=True)  # the same tensors again, as new parameters
    fast(torch.randn(3, 16))
    assert counts.lowered <= 2
    lowered = counts.lowered
    for _ in range(3):
        fast(torch.randn(3, 16))
    assert counts.lowered == lowered


@torch.no_grad()
def test_going_back_and_forth_between_two_sets_of_weights(counts: Counts) -> None:
    model, x = Net(), torch.randn(3, 16)
    fast = compiled(model)
    first, second = model.a.weight, nn.Parameter(torch.randn(16, 16))
    found = []
    for weight in (first, second, first, second):
        model.a.weight = weight
        found.append(fast(x))
        assert sqnr_db(model(x), found[-1]) > 30
    assert counts.lowered == 2 and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_inference_tensors_as_weights() -> None:
    with torch.inference_mode():
        model = Net()
        fast, x = compiled(model), torch.randn(3, 16)
        assert sqnr_db(model(x), fast(x)) > 30
        model.a.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        assert model.a.weight.is_inference()
        assert sqnr_db(model(x), fast(x)) > 30


@torch.no_grad()
def test_layers_that_share_their_code_are_each_packed_once(counts: Counts) -> None:
    model = Layers()
    fast = compiled(model)
    x = torch.randn(3, 16)
    for _ in range(3):
        assert sqnr_db(model(x), fast(x)) > 25
    assert (counts.graphs, counts.lowered) == (1, 4)
    rows = {row.node: row for row in qfx.report(fast).rows}
    assert sorted(rows) == sorted(f"layers.{i}.{name}" for i in range(4) for name in "ab")
    assert all(row.quantized for row in rows.values())
    model.get_parameter("layers.2.a.weight").mul_(2)
    assert sqnr_db(model(x), fast(x)) > 25
    assert counts.lowered == 5


@torch.no_grad()
def test_layers_compiled_one_by_one(counts: Counts) -> None:
    model = Layers()
    for layer in model.layers:
        layer.compile(backend="qfx")
    x = torch.randn(3, 16)
    plain = Layers()(x)
    for _ in range(2):
        assert sqnr_db(plain, model(x)) > 25
    assert counts.lowered == 4
    assert len(qfx.report(model).rows) == 8 and all(row.quantized for row in qfx.report(model).rows)


@torch.no_grad()
def test_a_deep_copy_has_its_own_weights(counts: Counts) -> None:
    model, x = Net(), torch.randn(3, 16)
    fast = compiled(model)
    before = fast(x)
    other = copy.deepcopy(fast)
    other.a.weight.mul_(3)
    assert sqnr_db(other._orig_mod(x), other(x)) > 30
    for _ in range(3):
        assert torch.equal(fast(x), before) and not torch.equal(other(x), before)
    assert counts.lowered == 2
    assert qfx.report(other).totals["linear_quantized"] == 2


@torch.no_grad()
def test_tied_weights_are_packed_once_and_followed() -> None:
    model, inputs = ZOO["gpt2"]()
    table = model.get_parameter("transformer.wte.weight")
    assert model.get_parameter("lm_head.weight") is table
    fast = compiled(model)
    assert sqnr_db(model(**inputs).logits, fast(**inputs).logits) > 20
    rows = {row.node: row for row in qfx.report(fast).rows}
    assert rows["transformer.wte"].quantized and rows["lm_head"].quantized
    assert [rows["transformer.wte"].shared, rows["lm_head"].shared] == [False, True]
    table.mul_(1.5)
    assert sqnr_db(model(**inputs).logits, fast(**inputs).logits) > 20


@torch.no_grad()
def test_weights_that_share_memory_and_then_do_not() -> None:
    model, x = Net(), torch.randn(3, 16)
    model.b.weight = nn.Parameter(model.a.weight.data)  # another parameter on the same memory
    fast = compiled(model)
    assert sqnr_db(model(x), fast(x)) > 30
    model.b.weight = nn.Parameter(torch.randn(16, 16))
    assert sqnr_db(model(x), fast(x)) > 30
    model.a.weight = nn.Parameter(torch.randn(16, 16))
    assert sqnr_db(model(x), fast(x)) > 30


@torch.no_grad()
def test_two_models_with_different_options_at_once() -> None:
    four, eight, x = Net(0), Net(1), torch.randn(64, 16)
    plans = qfx.plan(four, "w4a16", [x], progress=False)
    fast_four, fast_eight = compiled(four, plan=plans), compiled(eight, recipe="w8a8", strict=True)
    for _ in range(2):
        assert 8 < sqnr_db(four(x), fast_four(x)) < 25 < sqnr_db(eight(x), fast_eight(x))
    assert {row.asked for row in qfx.report(fast_four).rows} == {"w=u4/g32/f16"}
    assert {row.asked for row in qfx.report(fast_eight).rows} == {"x=i8/tok w=i8/ch"}


@torch.no_grad()
def test_one_model_compiled_twice_with_other_options() -> None:
    model, x = Net(), torch.randn(64, 16)
    four, eight = compiled(model, recipe="w4a16"), compiled(model)
    for _ in range(2):
        assert 8 < sqnr_db(model(x), four(x)) < 25 < sqnr_db(model(x), eight(x))
    assert {row.asked for row in qfx.report(four).rows} == {"w=u4/g32/f16"}
    assert {row.asked for row in qfx.report(eight).rows} == {"x=i8/tok w=i8/ch"}
    assert "compiled with several options" in "".join(note.reason for note in qfx.report(model).notes)


def beside_others(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a compiled model, which older torch (2.13) refuses as long as another thread traces."""
    while True:
        try:
            y: Tensor = model(x)
        except RuntimeError as error:
            if "symbolically trace a dynamo-optimized function" not in str(error):
                raise
        else:
            return y


def test_several_threads_get_right_results() -> None:
    models = [Net(seed) for seed in range(3)]
    fast = [compiled(model) for model in models]
    inputs = [torch.randn(batch, 16) for batch in (2, 3, 5)]
    with torch.no_grad():
        expected = [[model(x) for x in inputs] for model in models]
    wrong: list[str] = []

    def call(start: int) -> None:
        with torch.no_grad():
            for step in range(30):
                m, i = (start + step) % 3, (start + step // 3) % 3
                if not sqnr_db(expected[m][i], beside_others(fast[m], inputs[i])) > 30:
                    wrong.append(f"model {m}, input {i}")

    threads = [threading.Thread(target=call, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_nothing_is_kept_alive() -> None:
    model = Net()
    fast = compiled(model)
    fast(torch.randn(3, 16))
    old = weakref.ref(model.a.weight)
    model.a.weight = nn.Parameter(torch.randn(16, 16))
    fast(torch.randn(3, 16))
    gc.collect()
    assert old() is None, "a weight that was swapped out is held"
    held: list[Any] = [weakref.ref(model), weakref.ref(model.b.weight)]
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
