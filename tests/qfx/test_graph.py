"""qfx.graph: tensors by name, names of nodes, clean-up, copies that share tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qfx.ops.packed  # noqa: F401  (registers torch.ops.qfx)
from qfx import annotation, graph
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.packing import pack_weight
from qfx.text import dump
from tests.graphs import Function, calls, capture, counts, node_of

aten = torch.ops.aten


class Tied(nn.Module):
    """An embedding whose table is the weight of lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.embed(ids))
        return out


def mlp() -> fx.GraphModule:
    model = Function(lambda own, x: own.down(torch.relu(own.up(x))), up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    return capture(model, torch.randn(2, 4))


# Tensors by name


@pytest.mark.parametrize("kind", ["parameter", "buffer", "plain"])
@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("fqn", ["w", "a.w", "a.b.w"])
def test_set_and_get(kind: str, parameter: bool, fqn: str) -> None:
    root, old = nn.Module(), torch.ones(2)
    *path, leaf = fqn.split(".")
    owner = root
    for name in path:
        setattr(owner, name, nn.Module())
        owner = getattr(owner, name)
    {"parameter": lambda: owner.register_parameter(leaf, nn.Parameter(old)),
     "buffer": lambda: owner.register_buffer(leaf, old),
     "plain": lambda: object.__setattr__(owner, leaf, old)}[kind]()  # fmt: skip
    new = nn.Parameter(torch.zeros(3)) if parameter else torch.zeros(3)
    graph.set_tensor(root, fqn, new)
    assert graph.get_tensor(root, fqn) is new and torch.equal(old, torch.ones(2))
    assert [name for name, _ in root.named_parameters()] == ([fqn] if parameter else [])
    assert [name for name, _ in root.named_buffers()] == ([] if parameter else [fqn])


def test_missing_modules_are_made() -> None:
    root, tensor = nn.Module(), torch.zeros(2)
    graph.set_tensor(root, "layers.0.fc.weight", tensor)
    assert root.get_submodule("layers.0.fc").weight is tensor
    with pytest.raises(AttributeError, match="bias"):
        graph.get_tensor(root, "layers.0.fc.bias")
    with pytest.raises(AssertionError, match="layers.0 is Module, not a tensor"):
        graph.get_tensor(root, "layers.0")


@pytest.mark.parametrize("fqn", ["graph.weight", "meta.weight", "code", "forward", "layers.weight.inner", "layers"])
def test_names_that_are_taken_are_refused(fqn: str) -> None:
    gm = mlp()
    graph.set_tensor(gm, "layers.weight", torch.zeros(1))
    with pytest.raises(UnsupportedError, match=r"(?s)no tensor can be held under .*next step: give the model's"):
        graph.set_tensor(gm, fqn, torch.zeros(2))


def test_a_model_with_such_a_name_is_refused_by_name() -> None:
    model = Function(lambda own, x: own.graph(x), graph=nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="'graph' another name"):
        capture(model, torch.randn(2, 4))


def test_tied_names() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    named = {
        0: ("embed.weight", table),
        1: ("lm_head.weight", nn.Parameter(table)),
        2: ("transposed", table.t()),
        3: ("part", table[:2]),
        4: ("codes", table.view(torch.int32)),
        5: ("equal", table.clone()),
        6: ("empty", torch.empty(0)),
        7: ("empty too", torch.empty(0)),
        8: ("meta", torch.empty(3, 4, device="meta")),
        9: ("meta too", torch.empty(3, 4, device="meta")),
    }
    names = graph.tied_names(named)
    assert names == {i: name for i, (name, _) in named.items()} | {1: "embed.weight"}


# Names of nodes


def test_fqn_of_float_nodes() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.wv = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            v = nn.functional.linear(x, self.wv.t())
            out: Tensor = nn.functional.scaled_dot_product_attention(self.q(x), x, v)
            return out

    model = Function(
        lambda own, x: torch.relu(own.conv(own.attention(x))), attention=Attention(), conv=nn.Conv1d(2, 3, 1)
    )
    gm = capture(model, torch.randn(1, 2, 4))
    found = {graph.op_name(n): graph.fqn_of(n) for n in calls(gm) if graph.op_name(n) != "linear"}
    assert found == {
        "t": "attention.t",
        "scaled_dot_product_attention": "attention.scaled_dot_product_attention",
        "conv1d": "conv",
        "relu": "relu",
    }
    assert {graph.fqn_of(n) for n in calls(gm) if graph.op_name(n) == "linear"} == {"attention.q", "attention.wv"}


def test_a_tied_weight_is_called_by_the_module_that_uses_it() -> None:
    gm = capture(Tied(), torch.ones(2, dtype=torch.int64))
    assert [(n.name, graph.fqn_of(n), str(graph.weight_of(n))) for n in calls(gm)] == [
        ("embedding", "embed", "p_embed_weight"),
        ("linear", "lm_head", "p_embed_weight"),
    ]


@pytest.mark.parametrize(
    ("target", "module", "name"),
    [
        ("fc.weight", "fc", "fc"),
        ("fc.w_codes", "fc", "fc"),
        ("fc.w_codes_1", "", "fc"),
        ("table.weight_w_codes", "table", "table"),
        ("experts.gate_up", "", "experts.gate_up"),
        ("experts.gate_up_w_codes", "experts", "experts.gate_up"),
        ("experts.gate_up_w_codes_12", "", "experts.gate_up"),
        ("weight", "", "weight"),
        ("w_codes", "", "weight"),
        ("w_w_codes", "", "w"),
        ("fc.parametrizations.weight.original", "fc", "fc"),
        ("fc.parametrizations.weight.original0", "", "fc"),
        ("cell.parametrizations.weight_hh.original", "", "cell.weight_hh"),
        ("weight.proj.weight", "", "weight.proj"),
        ("fc.my_weight", "", "fc.my_weight"),
        ("fc.show_codes", "", "fc.show_codes"),
        ("embed.weight", "lm_head", "lm_head"),
        ("embed.w_codes", "lm_head", "lm_head"),
        ("model.embed.weight", "model", "model.embed"),
        ("modelling.embed.weight", "model", "model"),
    ],
)
def test_names_stay_when_a_weight_is_packed(target: str, module: str, name: str) -> None:
    gm = fx.Graph()
    node = gm.call_function(aten.linear.default, (gm.placeholder("x"), gm.get_attr(target)))
    node.meta["qfx_module"] = module
    assert graph.fqn_of(node) == name


def test_weights_are_found_through_views_only() -> None:
    functions: dict[str, Any] = {
        "w.t()": lambda own, x: nn.functional.linear(x, own.w.t()),
        "w.transpose.reshape": lambda own, x: nn.functional.linear(x, own.w.transpose(0, 1).reshape(4, 4)),
        "2 w": lambda own, x: nn.functional.linear(x, own.w * 2),
        "x": lambda own, x: nn.functional.linear(own.w, x),
    }
    found = {}
    for name, function in functions.items():
        gm = capture(Function(function, w=torch.randn(4, 4)), torch.randn(4, 4))
        (linear,) = [n for n in calls(gm) if graph.op_name(n) == "linear"]
        found[name] = graph.weight_of(linear) is not None
    assert found == {"w.t()": True, "w.transpose.reshape": True, "2 w": False, "x": False}
    gm = mlp()
    assert graph.weight_of(node_of(gm, "relu")) is None and graph.weight_of(node_of(gm, "p_up_weight")) is None


# Names and order


def test_renaming_is_stable() -> None:
    gm = mlp()
    before = dump(gm)
    assert [n.name for n in calls(gm)] == ["linear", "relu", "linear_1"]
    for _ in range(2):
        graph.rename(gm)
        assert dump(gm) == before
    gm.recompile()
    assert gm(torch.zeros(2, 4))[0].shape == (2, 4)


@given(st.lists(st.sampled_from(["x", "x_1", "input", "relu", "a-b", "3", "for", ""]), max_size=6))
def test_all_names_are_different_and_valid(names: list[str]) -> None:
    nodes = fx.Graph()
    values = []
    for i, name in enumerate(names):
        values.append(nodes.placeholder(f"x_{i}"))
        values[-1].meta["qfx_name"] = name
    nodes.output(tuple(nodes.call_function(aten.relu.default, (value,)) for value in values))
    gm = fx.GraphModule(nn.Module(), nodes)
    graph.rename(gm)
    given_names = [n.name for n in gm.graph.nodes]
    assert len(set(given_names)) == len(given_names) and all(name.isidentifier() for name in given_names)
    gm.graph.lint()
    gm.recompile()
    inputs = [torch.full((1,), float(i)) for i in range(len(names))]
    assert [float(y) for y in gm(*inputs)] == [float(i) for i in range(len(names))]


def test_inputs_named_like_others_are_not_mixed_up() -> None:
    class Crossed(nn.Module):
        def forward(self, arg1_1: Tensor, arg0_1: Tensor) -> Tensor:
            return arg1_1 - arg0_1

    x, y = torch.randn(3), torch.randn(3)
    assert torch.equal(capture(Crossed(), x, y)(x, y)[0], x - y)


def test_parameters_stand_before_their_first_use() -> None:
    gm = mlp()
    names = [n.name for n in gm.graph.nodes if n.op != "output"]
    assert names == [
        "inputs_0",
        "p_up_weight",
        "p_up_bias",
        "linear",
        "relu",
        "p_down_weight",
        "p_down_bias",
        "linear_1",
    ]


# Clean-up


def test_clean() -> None:
    def forward(own: Any, x: Tensor, unused: Tensor) -> Any:
        torch._check(x.shape[0] > 1)
        return own.fc(x)

    gm = capture(Function(forward, fc=nn.Linear(4, 4)), torch.randn(3, 4), torch.randn(2), dynamic=True)
    assert counts(gm) == {"linear": 1} and graph.clean(gm) is False
    linear = node_of(gm, "linear")
    with gm.graph.inserting_before(linear):
        first = gm.graph.call_function(aten.neg.default, (linear.args[0],))
        gm.graph.call_function(aten.neg.default, (first,))
        gm.graph.get_attr("fc.weight")
        gm.graph.call_function(aten._assert_tensor_metadata.default, (linear.args[0],))
    assert graph.clean(gm) is True and counts(gm) == {"linear": 1}
    assert len([n for n in gm.graph.nodes if n.op == "get_attr"]) == 2


def test_inputs_stay() -> None:
    gm = mlp()
    node = node_of(gm, "inputs_0")
    node.replace_all_uses_with(node_of(gm, "p_up_bias"), delete_user_cb=lambda user: user.op == "call_function")
    graph.clean(gm)
    assert node in gm.graph.nodes


# Tensors added


def test_add_tensor() -> None:
    gm, tensor = mlp(), torch.randn(3)
    last, first = node_of(gm, "linear_1"), node_of(gm, "linear")
    added = graph.add_tensor(gm, "up.extra", tensor, last)
    assert graph.get_tensor(gm, "up.extra") is tensor and added.meta["val"].shape == (3,)
    assert added.meta["val"].fake_mode is node_of(gm, "inputs_0").meta["val"].fake_mode
    assert added.next is last
    assert graph.add_tensor(gm, "up.extra", tensor, last) is added and added.next is last
    assert graph.add_tensor(gm, "up.extra", tensor, first) is added and added.next is first
    with pytest.raises(AssertionError, match="up.extra already holds another tensor"):
        graph.add_tensor(gm, "up.extra", tensor.clone(), last)


# Copies


def test_a_copy_shares_tensors_and_nothing_else() -> None:
    gm = capture(Tied(), torch.ones(2, dtype=torch.int64))
    gm.meta["qfx_matches"] = {"linear": 1}
    annotation.set(node_of(gm, "linear"), "w", Format.parse("i8/ch"))
    gm.graph.output_node().meta["kept"] = 1
    before = dump(gm)
    new = graph.copy(gm)
    assert dump(new) == before and new.meta == gm.meta and new.graph.output_node().meta["kept"] == 1
    assert graph.get_tensor(new, "embed.weight") is graph.get_tensor(gm, "embed.weight")
    annotation.set(node_of(new, "linear"), "x", Format.parse("i8/tok"))
    annotation.clear(node_of(new, "linear"), "w")
    graph.set_tensor(new, "embed.weight", torch.zeros(9, 4))
    graph.set_tensor(new, "embed.more", torch.zeros(1))
    new.meta["qfx_matches"]["linear"] += 1
    new.graph.erase_node(new.graph.output_node())
    assert dump(gm) == before and gm.meta["qfx_matches"] == {"linear": 1}
    assert bool((graph.get_tensor(gm, "embed.weight") != 0).any()) and not hasattr(gm.embed, "more")


def test_a_copy_computes_the_same() -> None:
    gm, x = mlp(), torch.randn(2, 4)
    new = graph.copy(gm)
    assert torch.equal(gm(x)[0], new(x)[0])
    with torch.no_grad():
        graph.get_tensor(gm, "up.weight").mul_(2)
    assert torch.equal(gm(x)[0], new(x)[0])


# Small questions


def test_questions() -> None:
    gm = mlp()
    linear, relu, x = node_of(gm, "linear"), node_of(gm, "relu"), node_of(gm, "inputs_0")
    assert graph.is_call(linear, aten.relu.default, aten.linear.default) and not graph.is_call(
        linear, aten.relu.default
    )
    assert not graph.is_call(x, "inputs_0") and not graph.is_call(3, aten.linear.default)
    assert graph.schema_name(linear) == "aten::linear" and graph.schema_name(x) == ""
    assert graph.val(relu).shape == (2, 8) and graph.val(3) == 3 and graph.val(None) is None
    names = [graph.op_name(n) for n in gm.graph.nodes if n.op != "output"]
    assert names == ["inputs_0", "up.weight", "up.bias", "linear", "relu", "down.weight", "down.bias", "linear"]


def test_weights_of_packed_operators() -> None:
    packed = pack_weight(torch.randn(4, 8), Format.parse("i8/ch"))

    def forward(own: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        args = (own.codes, own.w_scale, None)
        return (
            torch.ops.qfx.linear(x, *args, None, None, None, None, "", "i8/ch"),
            torch.ops.qfx.embedding(ids, *args, "i8/ch", 8, torch.float32),
            torch.ops.qfx.dequantize(*args, "i8/ch", 8, torch.float32),
        )

    model = Function(forward, w_scale=packed.scale)
    model.register_buffer("codes", packed.data)
    gm = capture(model, torch.randn(2, 8), torch.zeros(3, dtype=torch.int64))
    assert [str(graph.weight_of(n)) for n in calls(gm)] == ["p_codes"] * 3


def test_what_a_node_is_computed_from() -> None:
    def forked(own: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shared = x.exp()
        return shared * shared + 1, y.sin() - shared

    gm = capture(Function(forked), torch.ones(2), torch.ones(2))
    named = {node.name: node for node in gm.graph.nodes}
    assert {node.name for node in graph.above(named["add"])} == {"inputs_0", "exp", "mul", "add"}
    assert graph.above(gm.graph.output_node()) == set(gm.graph.nodes)
