"""qfx.capture: Dynamo's graphs and torch.export's graphs in one normal form, with the user's own tensors by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx
from qfx import graph, run
from qfx.capture import Captured, capture_dynamo, capture_export
from qfx.errors import UnsupportedError
from qfx.passes.normalize import NORMALIZE, normalize
from tests.graphs import counts, error, text
from tests.zoo import ZOO, Inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Door:
    """A torch.compile backend that keeps what it captured and runs the captured graphs."""

    def __init__(self) -> None:
        self.captured: list[Captured] = []

    def __call__(self, gm: fx.GraphModule, examples: list[Any]) -> Any:
        captured = capture_dynamo(gm, examples)
        self.captured.append(captured)

        def call(*flat: Any) -> Any:
            for i, value in captured.scalars.items():
                assert float(flat[i]) == value
            out = captured.gm(*[flat[i] for i in captured.inputs])
            for at, i in captured.mutations.items():
                flat[i].copy_(out[at])
            return out[len(captured.mutations) :]

        return call

    @property
    def only(self) -> Captured:
        assert len(self.captured) == 1
        return self.captured[0]


@torch.no_grad()
def through_dynamo(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Door, Any]:
    door = Door()
    return door, torch.compile(model, backend=door, dynamic=dynamic)(*args, **kwargs)


def normal_text(captured: Captured) -> str:
    run.run(captured.gm, NORMALIZE)
    return text(captured.gm)


class Scaled(nn.Module):
    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return x * by


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_both_doors_give_the_same_text(name: str) -> None:
    model, inputs = ZOO[name]()
    door, _ = through_dynamo(model, **inputs)
    assert normal_text(door.only) == normal_text(capture_export(model, (), inputs, dynamic=False))


def test_both_doors_give_the_same_text_for_any_size() -> None:
    model, inputs = ZOO["gpt2"]()
    door, _ = through_dynamo(model, dynamic=True, **inputs)
    assert normal_text(door.only) == normal_text(capture_export(model, (), inputs))


@pytest.mark.parametrize("name", ["gpt2"])
def test_parameters_are_the_users_own_tensors_under_their_names(name: str) -> None:
    model, inputs = ZOO[name]()
    door, _ = through_dynamo(model, **inputs)
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for captured in (door.only, capture_export(model, (), inputs)):
        seen = [n.target for n in captured.gm.graph.nodes if n.op == "get_attr"]
        assert len(seen) == len(set(seen))
        for fqn in seen:
            assert graph.get_tensor(captured.gm, fqn) is own[fqn]
        normalize(captured.gm)
        linears = {graph.fqn_of(n) for n in captured.gm.graph.nodes if graph.op_name(n) == "linear"}
        assert len(linears) == 9
        assert linears <= {module for module, _ in model.named_modules()} | {"transformer.wte"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = x + scale * block(F.relu(self.first(x)))
        return x


def test_names_in_lists_and_module_paths() -> None:
    model = Small().eval()
    door, _ = through_dynamo(model, torch.randn(2, 4))
    for captured in (door.only, capture_export(model, (torch.randn(2, 4),))):
        linears = [n for n in captured.gm.graph.nodes if graph.op_name(n) == "linear"]
        assert [graph.fqn_of(n) for n in linears] == ["first", "blocks.0", "first", "blocks.1"]
        assert [n.meta["qfx_module"] for n in linears] == ["first", "blocks.0", "first", "blocks.1"]
        assert all("stack_trace" in n.meta for n in linears)


class Parts(nn.Module):
    """Layers in two loops, two of them one and the same: torch.export then names modules by the loops' lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(4))
        self.layers[2] = self.layers[0]
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.tail[2] = self.tail[1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers[:2], *self.layers[2:]]:
            x = layer(x)
        out: Tensor = self.tail[1:](self.tail[:1](x))
        return out


def test_modules_in_parts_of_lists_have_their_own_names() -> None:
    model, x = Parts().eval(), torch.randn(3, 4)
    wanted = [*(f"layers.{i}.{j}" for i in range(4) for j in (0, 2)), *(f"tail.{i}" for i in range(3))]
    captured = capture_export(model, (x,))
    linears = [n for n in captured.gm.graph.nodes if graph.op_name(n) == "linear"]
    assert [n.meta["qfx_module"] for n in linears] == [graph.fqn_of(n) for n in linears] == wanted
    rows = qfx.report(qfx.quantize(model, "w8a16", [x])).rows
    assert all(row.quantized for row in rows) and len(rows) == len(set(wanted) - {"layers.2.0", "layers.2.2", "tail.2"})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(ids).sin())
        return out


def test_tied_weights_are_one_parameter() -> None:
    model = Tied().eval()
    ids = torch.tensor([[1, 2]])
    door, found = through_dynamo(model, ids)
    assert error(model(ids), found) == 0
    for captured in (door.only, capture_export(model, (ids,))):
        parameters = [n for n in captured.gm.graph.nodes if n.op == "get_attr"]
        assert [n.target for n in parameters] == ["embed.weight"]
        assert graph.get_tensor(captured.gm, "embed.weight") is model.embed.weight


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache[:, 0] = x.sum(-1)
        self.get_buffer("steps").add_(1.0)
        return x * self.get_buffer("steps").sum() + cache.sum()


@torch.no_grad()
def test_changed_inputs_come_out_first_and_are_copied_back() -> None:
    model, x = Counter().eval(), torch.randn(2, 3)
    expected_cache, found_cache = torch.zeros(2, 2), torch.zeros(2, 2)
    expected = model(x, expected_cache)
    model.get_buffer("steps").zero_()
    door, found = through_dynamo(model, x, found_cache)
    assert error([expected, expected_cache], [found, found_cache]) <= 1e-6
    assert model.get_buffer("steps").tolist() == [1.0, 1.0]
    names = set(door.only.gm.meta["qfx_mutations"].values())
    assert len(names) == 2 and "steps" in names
    exported = capture_export(model, (x, found_cache), dynamic=False)
    assert set(exported.gm.meta["qfx_mutations"].values()) == {"steps", "cache"}
    assert not any(n.target._schema.is_mutable for n in exported.gm.graph.nodes if n.op == "call_function")


@torch.no_grad()
def test_python_numbers_under_dynamic_shapes_are_constants_to_be_checked() -> None:
    model, x = Small().eval(), torch.randn(2, 4)
    door, found = through_dynamo(model, x, 0.5, dynamic=True)
    assert error(model(x, 0.5), found) <= 1e-6
    assert list(door.only.scalars.values()) in ([], [0.5])
    assert "item" not in text(door.only.gm)


@torch.no_grad()
def test_a_graph_break_gives_several_graphs_with_the_same_names() -> None:
    class Broken(Small):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            out: Tensor = self.blocks[1](x)
            return out

    model, x = Broken().eval(), torch.randn(2, 4)
    door, found = through_dynamo(model, x)
    assert error(model(x), found) <= 1e-6
    names = [[graph.fqn_of(n) for n in c.gm.graph.nodes if graph.op_name(n) == "linear"] for c in door.captured]
    assert names == [["first"], ["blocks.1"]]


@torch.no_grad()
def test_any_size_of_batch_and_length() -> None:
    model, inputs = ZOO["bert"]()
    captured = capture_export(model, (), inputs)
    normalize(captured.gm)
    longer: Inputs = {k: torch.cat([v, v[:, :3]], 1).repeat(2, 1)[:3] for k, v in inputs.items()}
    assert error(model(**longer), captured.gm(*captured.flatten((), longer))) <= 1e-5


def test_sizes_of_one_are_fixed_without_a_word_of_torch(caplog: pytest.LogCaptureFixture) -> None:
    batch, one = torch.randn(1, 7, 4), torch.randn(1)
    captured = capture_export(Scaled(), (batch, one))
    assert [tuple(n.meta["val"].shape) for n in captured.gm.graph.find_nodes(op="placeholder")][1] == (1,)
    assert captured.flatten((torch.randn(1, 9, 4), one), {})
    with pytest.raises(ValueError, match="does not fit the traced graph"):
        captured.flatten((torch.randn(2, 7, 4), one), {})
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_sizes_are_read_from_the_tensors() -> None:
    captured = capture_export(Small().eval(), (torch.randn(2, 4),))
    assert [n.op for n in captured.gm.graph.nodes if n.op == "placeholder"] == ["placeholder"]
    assert "sym_size" not in counts(captured.gm)


class Both(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(2, 4))

    def forward(self, x: Tensor, y: Tensor, more: dict[str, Tensor] | None = None) -> Tensor:
        return x - 2 * y + (3 * more["z"] if more else 0) + 5 * self.offset


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_one_tensor_given_for_several_arguments(dynamic: bool) -> None:
    """A graph that reads it once would be wrong for every call whose arguments differ."""
    model, x = Both(), torch.randn(2, 4)
    captured = capture_export(model, (x, x), {"more": {"z": x}}, dynamic=dynamic)
    args, kwargs = (torch.randn(2, 4), torch.randn(2, 4)), {"more": {"z": torch.randn(2, 4)}}
    assert len(captured.inputs) == 3
    assert torch.equal(captured.gm(*captured.flatten(args, kwargs))[0], model(*args, **kwargs))


@torch.no_grad()
def test_a_tensor_of_the_models_own_given_as_an_argument() -> None:
    model = Both()
    captured = capture_export(model, (model.offset, torch.randn(2, 4)))
    args = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(captured.gm(*captured.flatten(args, {}))[0], model(*args))


def test_inputs_in_another_order_and_missing_inputs() -> None:
    model, inputs = ZOO["bert"]()
    captured = capture_export(model, (), inputs)
    turned = dict(reversed(inputs.items()))
    assert all(a is b for a, b in zip(captured.flatten((), inputs), captured.flatten((), turned), strict=True))
    with pytest.raises(ValueError, match=r"expected a batch with the inputs \['attention_mask', 'input_ids'\]"):
        captured.flatten((), {"input_ids": inputs["input_ids"]})


def test_grad_mode_switches_are_inlined() -> None:
    class Switches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x.sin()
            with torch.autocast("cpu", enabled=False):
                return y.cos()

    model, x = Switches().eval(), torch.randn(3)
    door, found = through_dynamo(model, x)
    assert error(model(x), found) == 0
    assert counts(door.only.gm) == {"sin": 1, "cos": 1}
    assert counts(capture_export(model, (x,)).gm) == {"sin": 1, "cos": 1}


def test_autocast_is_refused_with_a_way_out() -> None:
    class Autocast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    with pytest.raises(UnsupportedError, match=r"enables autocast; next step: cast the model"):
        capture_export(Autocast().eval(), (torch.randn(3, 3),))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"enables autocast"):
        through_dynamo(Autocast().eval(), torch.randn(3, 3))


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if x.sum() > 0 else x.cos()

    with pytest.raises(UnsupportedError, match="expected a model that torch.export captures as one graph"):
        capture_export(Branches().eval(), (torch.randn(3),))


def test_a_forward_with_variable_arguments() -> None:
    class Variable(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return torch.stack(inputs).sum(0)

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    captured = capture_export(Variable().eval(), (x, y))
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    assert error(x + y, captured.gm(*captured.flatten((x, y), {}))) <= 1e-6


def test_a_module_that_keeps_state_has_its_names() -> None:
    """Dynamo finds tensors by way of __dict__ in a module whose forward sets an attribute."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state, self.inner, self.scale = torch.zeros(1), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Any:
            self.state = x.mean()
            return self.inner(x * self.scale)

    door, _ = through_dynamo(nn.Sequential(nn.Linear(4, 4), Keeping()), torch.randn(2, 4))
    assert set(dict(door.only.gm.named_parameters())) == {
        "0.weight",
        "0.bias",
        "1.inner.weight",
        "1.inner.bias",
        "1.scale",
    }


@pytest.mark.parametrize("instance", [False, True])
def test_sizes_vary_beside_arguments_that_kwargs_take(instance: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            return self.inner(x) * kwargs["scale"] if kwargs["turn"] else None

    model = Outer()
    if instance:
        model.forward = model.forward  # type: ignore[method-assign]  # as accelerate's hooks put it there
    held = dict(model.__dict__)
    x, given = torch.randn(2, 3, 4), {"turn": True, "scale": torch.ones(4)}
    captured = capture_export(model, (x,), given)
    assert model.__dict__ == held
    more = torch.randn(5, 7, 4)
    assert torch.equal(captured.gm(*captured.flatten((more,), given))[0], model(more, **given))
    linear = next(n for n in captured.gm.graph.nodes if graph.op_name(n) == "linear")
    assert "test_capture.py" in linear.meta["stack_trace"].splitlines()[-2] or "linear.py" in linear.meta["stack_trace"]
