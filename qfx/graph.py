"""Small edits and questions on a graph in normal form that every stage uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _Namespace

from qfx.errors import UnsupportedError, explain
from qfx.names import is_within

aten = torch.ops.aten

# Operators that only assert or mark, and whose removal changes no value.
_ASSERTS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


def get_tensor(root: nn.Module, fqn: str) -> torch.Tensor:
    """The parameter, buffer or plain tensor that `fqn` names under `root`."""
    *path, leaf = fqn.split(".")
    module = root.get_submodule(".".join(path)) if path else root
    value = getattr(module, leaf)
    assert isinstance(value, torch.Tensor), f"{fqn} is {type(value).__name__}, not a tensor"
    return value


def set_tensor(root: nn.Module, fqn: str, tensor: torch.Tensor) -> None:
    """Let `fqn` under `root` hold `tensor`; missing sub-modules are made. The former tensor object is not changed.

    Raises UnsupportedError where a part of the name is taken by something else: a graph module's own `graph`, ...
    """
    *path, leaf = fqn.split(".")
    module = root
    for name in path:
        child = getattr(module, name, None)
        if child is None:
            child = nn.Module()
            setattr(module, name, child)
        if not isinstance(child, nn.Module):
            raise _taken(fqn, name, child)
        module = child
    held = getattr(module, leaf, None)
    if held is not None and not isinstance(held, torch.Tensor):
        raise _taken(fqn, leaf, held)
    for store in (module._parameters, module._buffers, module.__dict__):
        store.pop(leaf, None)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def _taken(fqn: str, name: str, value: object) -> UnsupportedError:
    return UnsupportedError(
        explain(
            f"no tensor can be held under the name {fqn!r}",
            expected=f"{name!r} to be free, or a module or tensor",
            found=type(value).__name__,
            next_step=f"give the model's {name!r} another name",
        )
    )


def tied_names(tensors: dict[int, tuple[str, torch.Tensor]]) -> dict[int, str]:
    """One canonical FQN for tensors that share memory, dtype, shape and stride: the first name in order."""
    names: dict[Any, str] = {}
    result = {}
    for i, (name, tensor) in tensors.items():
        at = tensor.data_ptr()  # 0 for what holds nothing: empty tensors and those on the meta device
        key = (at, tensor.dtype, tensor.shape, tensor.stride()) if at else (id(tensor),)
        result[i] = names.setdefault(key, name)
    return result


def bind(gm: fx.GraphModule, node: fx.Node, fqn: str, tensor: torch.Tensor) -> None:
    """Replace a placeholder by a get_attr of `fqn`, which then holds `tensor` itself (no copy)."""
    existing = _attribute(gm, fqn)
    if existing is None:
        set_tensor(gm, fqn, tensor)
        with gm.graph.inserting_before(node):
            existing = gm.graph.create_node("get_attr", fqn)
        existing.meta = dict(node.meta)
    node.replace_all_uses_with(existing)
    gm.graph.erase_node(node)


def sizes_from_tensors(gm: fx.GraphModule, tensors: Iterable[fx.Node]) -> None:
    """Read sizes from the tensors that carry them: SymInt placeholders are replaced by aten.sym_size.int nodes."""
    carriers: dict[str, tuple[fx.Node, int]] = {}
    for node in tensors:
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                carriers.setdefault(str(size.node.expr), (node, dim))
    symbols = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.SymInt)]
    last = next((n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    for node in symbols:
        carrier = carriers.get(str(node.meta["val"].node.expr))
        if carrier is None or last is None or not node.users:
            continue
        with gm.graph.inserting_before(last):
            size = gm.graph.call_function(aten.sym_size.int, carrier)
        size.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(size)


def clean(gm: fx.GraphModule) -> bool:
    """Drop assertions and what nobody uses, get_attr nodes included. Placeholders stay. Says whether it changed."""
    changed = False
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        if not node.users and (name in _ASSERTS or not node.is_impure() or node.op == "get_attr"):
            gm.graph.erase_node(node)
            changed = True
    return changed


def op_name(node: fx.Node) -> str:
    """A short name of what a node does: `linear`, `add`, `getitem`, the FQN of a parameter, the name of an input."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return target._opname
        return getattr(target, "__name__", str(target))
    if node.op == "placeholder":
        return str(node.meta.get("qfx_name", node.name))
    return str(node.target)


def parameters_at_first_use(gm: fx.GraphModule) -> None:
    """Move each get_attr to just before its first user; placeholders come first."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and n.users]:
        min(node.users, key=order.__getitem__).prepend(node)


def rename(gm: fx.GraphModule) -> None:
    """Names by operator in graph order (`linear`, `linear_1`, ...), so that equal graphs print equally."""
    gm.graph._graph_namespace = _Namespace()
    taken: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        base = re.sub(r"\W", "_", op_name(node)) or "value"
        base = f"p_{base}" if node.op == "get_attr" else base
        number = taken.get(base, 0)
        taken[base] = number + 1
        node.name = gm.graph._graph_namespace.create_name(f"{base}_{number}" if number else base, node)
        if node.op == "placeholder":
            node.target = node.name  # the parameter's name in the code, which else could be another input's


def is_call(node: Any, *targets: Any) -> bool:
    """Is it a call of one of these functions?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def above(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        more = set(todo.pop().all_input_nodes) - found
        found |= more
        todo += more
    return found


def schema_name(node: fx.Node) -> str:
    """`aten::linear` for a call of an operator, '' for everything else."""
    target = node.target
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""


def val(node: Any) -> Any:
    """The fake value on a node, or the plain value itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


_WEIGHT_AT = {
    "aten::linear": 1,
    "aten::embedding": 0,
    "aten::conv1d": 1,
    "aten::conv2d": 1,
    "aten::conv3d": 1,
    "aten::convolution": 1,
    "aten::conv_transpose1d": 1,
    "aten::conv_transpose2d": 1,
    "aten::conv_transpose3d": 1,
    "qfx::grouped_linear": 1,
    "qfx::linear": 1,
    "qfx::embedding": 1,
    "qfx::dequantize": 0,
    "qfx::grouped_linear_quant": 1,
}
# What stands for `weight` or `<name>` where a weight is packed (numbered where the name was taken) or parametrized.
_HELD = re.compile(
    r"(?:^|(?<=\.))(?:(?:(?P<packed>\w+)_)?(?:w|rows\d+|columns\d+)_codes(?:_\d+)?"
    r"|parametrizations\.(?P<whole>\w+)\.original\d*)$"
)
_VIEWS = {"t", "transpose", "permute", "view", "reshape", "_unsafe_view", "alias", "detach", "contiguous", "clone"}


def weight_of(node: fx.Node) -> fx.Node | None:
    """The get_attr behind a linear-like node's weight, through transposes and reshapes; None where it is computed."""
    operand = weight_operand(node)
    return parameter_behind(operand) if operand is not None else None


def weight_operand(node: fx.Node) -> fx.Node | None:
    """What a linear-like node has for a weight; None for other nodes."""
    at = _WEIGHT_AT.get(schema_name(node)) if node.op == "call_function" else None
    operand = None if at is None else node.args[at]
    return operand if isinstance(operand, fx.Node) else None


def parameter_behind(operand: Any) -> fx.Node | None:
    """The get_attr that an operand is, through transposes and reshapes; None for everything else."""
    while isinstance(operand, fx.Node) and operand.op == "call_function" and op_name(operand) in _VIEWS:
        operand = operand.args[0]
    return operand if isinstance(operand, fx.Node) and operand.op == "get_attr" else None


def readers(parameter: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a parameter, through transposes and reshapes."""
    for user in parameter.users:
        if user.op == "call_function" and op_name(user) in _VIEWS:
            yield from readers(user)
        else:
            yield user


def is_turned(operand: fx.Node) -> bool:
    """Whether an operand is its `parameter_behind` transposed."""
    swaps = 0
    while operand.op == "call_function":
        name, axes = op_name(operand), operand.args[-1]
        swaps += name in ("t", "transpose") or (name == "permute" and list(axes) != sorted(axes))  # type: ignore[arg-type]
        operand = operand.all_input_nodes[0]
    return swaps % 2 == 1


CALLED = "qfx_called"  # in the meta of a node that took the place of another: what that one's operator is called
NAMED = "qfx_named"  # in the meta of a node that must not be called as its weight is
_CALLED = {"quantized_attention": "scaled_dot_product_attention"}  # where live modules call it


def fqn_of(node: fx.Node) -> str:
    """What a node is called in recipes, plans, reports: its weight's FQN without '.weight', else module and operator.

    A packed weight is called as before it was packed.
    A tied weight is called by the module that uses it: the `lm_head` that reads the embedding's table is `lm_head`.
    """
    if NAMED in node.meta:
        return str(node.meta[NAMED])
    module = str(node.meta.get("qfx_module", ""))
    weight = weight_of(node)
    if weight is None:
        return f"{module}.{node.meta.get(CALLED) or _CALLED.get(op_name(node), op_name(node))}" if module else node.name
    name = _HELD.sub(lambda m: m["packed"] or m["whole"] or "weight", str(weight.target)).removesuffix(".weight")
    if module and not is_within(name, module):
        return module
    return name


def add_tensor(gm: fx.GraphModule, fqn: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    """Hold `tensor` under `fqn` and return its get_attr node, which stands before `before`; an existing one serves."""
    existing = _attribute(gm, fqn)
    if existing is not None and get_tensor(gm, fqn) is tensor:
        if _after(existing, before):
            before.prepend(existing)
        return existing
    assert existing is None, f"{fqn} already holds another tensor"
    set_tensor(gm, fqn, tensor)
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("get_attr", fqn)
    node.meta["val"] = fake_mode_of(gm).from_tensor(tensor, static_shapes=True)
    node.meta["qfx_module"] = ""
    return node


def _attribute(gm: fx.GraphModule, fqn: str) -> fx.Node | None:
    """The get_attr node of a name. The graph is searched only where the module holds something of that name."""
    owner, _, leaf = fqn.rpartition(".")
    try:
        getattr(gm.get_submodule(owner), leaf)
    except AttributeError:
        return None
    return next((n for n in gm.graph.nodes if n.op == "get_attr" and n.target == fqn), None)


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode of the values in a graph; a new one where the graph has none."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _after(node: fx.Node, other: fx.Node) -> bool:
    return next(n for n in node.graph.nodes if n is node or n is other) is other


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its own nodes that holds the same tensors. Names and metadata are kept."""
    nodes = fx.Graph()
    result = nodes.graph_copy(gm.graph, {})
    output = nodes.output(result)
    output.meta = dict(next(n for n in gm.graph.nodes if n.op == "output").meta)
    new = fx.GraphModule(gm, nodes)
    new.meta = {key: dict(value) if isinstance(value, dict) else value for key, value in gm.meta.items()}
    return new


def let_go(gm: fx.GraphModule) -> None:
    """Take the tensors out of a graph that is done with: it is part of a cycle and would hold them for a while."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            set_tensor(gm, str(node.target), get_tensor(gm, str(node.target)).to("meta"))
