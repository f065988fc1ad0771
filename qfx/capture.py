"""Capture: Dynamo's graph and torch.export's graph come to one normal ATen form, parameters known by FQN.

Normal form: functional pre-dispatch ATen; parameters and buffers are `get_attr` nodes named by their fully qualified
name (FQN) that hold the user's own tensors; placeholders are run-time tensors (and SymInts that no tensor carries).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from qfx import graph, traced_call
from qfx.common_sizes import Calls, CommonSizes, HoldsForAll, OtherSize
from qfx.conditions import is_number
from qfx.errors import UnsupportedError, explain, first_line, raised_at
from qfx.finite import TakenFinite
from qfx.long_sizes import LongSize, ShortSizes
from qfx.sources import input_name, module_path, source_of, statics, unsliced
from qfx.trace import retrace


@dataclass(frozen=True)
class Captured:
    """A graph in normal form and how the caller's flat arguments feed it.

    gm: the normal form.
    inputs: for each placeholder its index among the caller's flat arguments.
    params: FQN -> index among the caller's flat arguments (Dynamo's door; empty for torch.export's).
    tied: index of an argument that shares the storage of one in `params` -> the FQN of that one.
    scalars: flat index -> value that the graph was specialised on; a caller must retrace when it changes.
    mutations: output index -> flat index of the argument to copy it into. These outputs come first.
    spec: how (args, kwargs) flatten, for torch.export's door.
    outputs: the outputs' names, for torch.export's door: fields, keys and positions joined by dots.
    fixed: which axes of the inputs do not vary, and why; "" where all may.
    constants: flat index -> the argument that is no tensor, with which torch.export's graph was traced.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    params: dict[str, int] = field(default_factory=dict)
    tied: dict[int, str] = field(default_factory=dict)
    scalars: dict[int, float] = field(default_factory=dict)
    mutations: dict[int, int] = field(default_factory=dict)
    spec: pytree.TreeSpec | None = None
    outputs: tuple[str, ...] = ()
    fixed: str = ""
    constants: dict[int, Any] = field(default_factory=dict)

    @property
    def environment(self) -> Any:
        """torch's ShapeEnv of the graph's sizes; None where all are fixed."""
        values = (n.meta.get("val") for n in self.gm.graph.find_nodes(op="placeholder"))
        modes = (getattr(value, "fake_mode", None) for value in values)
        return next((mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None), None)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs, in placeholder order, from a call `model(*args, **kwargs)` (torch.export's door).

        Raises ValueError where the call has other arguments than the traced one, or one that is no tensor has another
        value, or a size that the graph holds fixed differs.
        """
        flat = traced_call.leaves(args, kwargs, self.spec)
        traced_call.check_constants(flat, self.constants, self.spec)
        inputs = [flat[i] for i in self.inputs]
        self._check_shapes(inputs)
        return inputs

    def _check_shapes(self, inputs: Sequence[Any]) -> None:
        """A traced graph is wrong, not only slow, for sizes it was specialised on: refuse other ones."""
        nodes = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for node, value in zip(nodes, inputs, strict=True):
            want = node.meta["val"]
            if not isinstance(want, torch.Tensor):
                continue
            if not isinstance(value, torch.Tensor):
                raise traced_call.differs(repr(node.name), "a tensor", value)
            fits = len(want.shape) == len(value.shape) and all(
                not is_number(w) or w == v for w, v in zip(want.shape, value.shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    explain(
                        f"the shape of {node.name!r} does not fit the traced graph",
                        expected=f"{[str(s) for s in want.shape]} (numbers are fixed)",
                        found=f"{list(value.shape)}",
                        next_step="cut or pad the batches to one shape, or drop the last incomplete batch",
                    )
                )


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any], live: Collection[int] = ()) -> Captured:
    """Bring the graph that Dynamo hands to a backend to normal form.

    `example_inputs` are the backend's example inputs; parameters among them are recognised by their source and keep
    their identity. Those that the graph itself changes, and the indices in `live`, stay inputs, since their values are
    of one call. Raises UnsupportedError where a placeholder carries no example value.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fakes = [example_of(n) for n in placeholders]
    static, base = statics(gm, example_inputs)
    scalars = {i: float(v) for i, v in enumerate(example_inputs) if _is_wrapped_scalar(placeholders[i], v)}
    traced, mutated = retrace(gm, fakes, {placeholders[i].name: v for i, v in scalars.items()})
    names = {i: name for i, name in static.items() if i not in mutated and i not in live}
    inputs = {
        i: re.sub(r"\W", "_", static[i]) if i in static else input_name(source_of(n), n.name)
        for i, n in enumerate(placeholders)
        if i not in names
    }
    tensors = {i: (name, example_inputs[i]) for i, name in names.items()}
    return _normal(traced, inputs, tensors, mutated, scalars, base)


def capture_export(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic: bool = True,
    shared: bool = False, calls: Calls | None = None,
) -> Captured:  # fmt: skip
    """Export `model` on example inputs and bring it to normal form.

    shared: arguments that are one tensor in the example are one in every call. Otherwise each is an input of its own.
    calls: all calls that the graph is to run, the example among them.

    Every dimension of every tensor input may vary where the model allows it (`dynamic=True`), or the first of each, or
    none, where torch does not trace the others (`Captured.fixed`); with `calls` those may that do so in them, which
    takes a fraction of the time. Raises UnsupportedError with torch.export's reason where the model cannot be exported
    as one graph, ValueError where calls differ in more than sizes, OtherSize where the graph would not hold for the
    sizes of one.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if not shared:
        args, kwargs = traced_call.apart(model, args, kwargs)
    common = None if calls is None else CommonSizes.of(args, kwargs, calls)
    if common is not None:
        ep, fixed = _common(model, args, kwargs, common), ""
    else:
        ep, fixed = _most_varying(model, args, kwargs) if dynamic else (_traced(model, args, kwargs, axes=0), "")
    placeholders = [n for n in ep.graph.nodes if n.op == "placeholder"]
    signature = ep.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    own = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    for i, node in enumerate(placeholders):
        if node.name in named:
            tensors[i] = (named[node.name], own[named[node.name]])
        elif node.name in constants:
            tensors[i] = (constants[node.name], ep.constants[constants[node.name]])
    first = len(placeholders) - len(signature.user_inputs)
    traced, mutated = retrace(ep.graph_module, [n.meta["val"] for n in placeholders])
    inputs = {i: n.name for i, n in enumerate(placeholders) if i not in tensors}
    captured = _without_overwritten(_normal(traced, inputs, tensors, mutated, {}))
    for node in captured.gm.graph.nodes:
        node.meta["qfx_module"] = unsliced(model, node.meta["qfx_module"])
    assert all(i >= first for i in captured.inputs), "an unnamed tensor among the lifted inputs"
    return Captured(
        gm=captured.gm,
        inputs=tuple(i - first for i in captured.inputs),
        mutations={o: i - first for o, i in captured.mutations.items()},
        spec=ep.call_spec.in_spec,
        outputs=_output_names(ep.call_spec.out_spec),
        fixed=fixed,
        constants=traced_call.constants(args, kwargs),
    )


def _most_varying(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
    """torch.export's program in which all axes vary, or else the first of each, or none; and why not all.

    Raises UnsupportedError as it came first.
    """
    refused, why = None, ""
    for axes, what in ((None, ""), (1, "only the first axis of each input varies"), (0, "no axis of an input varies")):
        try:
            return _traced(model, args, kwargs, axes=axes), what and f"{what}: {why}"
        except LongSize:
            why = "sizes of the others become too long to trace"
        except UnsupportedError as error:
            refused = refused or error
            if isinstance(error.__cause__, GuardOnDataDependentSymNode):
                break  # a condition on values, with the example's sizes put in: it stays where fewer vary
            why = f"torch.export does not trace the others ({first_line(error.__cause__ or error)})"
    assert refused is not None
    raise refused


def _common(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], common: CommonSizes) -> Any:
    """torch.export's program in which those axes vary that do so in the data."""
    try:
        return _traced(model, args, kwargs, axes=None, common=common)
    except (LongSize, UnsupportedError) as error:
        if not common.any_varies or isinstance(error.__cause__, GuardOnDataDependentSymNode):
            raise
        raise OtherSize(first_line(error)) from error


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, axes: int | None,
    common: CommonSizes | None = None,
) -> Any:  # fmt: skip
    """`_exported`, or UnsupportedError that says where the model cannot be traced."""
    try:
        return _exported(model, args, kwargs, axes=axes, common=common)
    except (LongSize, OtherSize):
        raise
    except Exception as error:
        place = raised_at(error)
        raise UnsupportedError(
            f"expected a model that torch.export captures as one graph, found {type(error).__name__}: "
            f"{first_line(error)}{f' (at {place})' if place else ''}; next step: pass data that the forward accepts, "
            "or compile it with torch.compile(model, backend='qfx'), which may break the graph"
        ) from error


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, axes: int | None,
    common: CommonSizes | None = None,
) -> Any:  # fmt: skip
    """torch.export's program, in which the first `axes` axes of every tensor input may vary (None: all), but for sizes
    of 0 and 1, which torch fixes (and, asked to let them vary, warns of each), and for axes that `common` fixes.

    Raises LongSize where all axes of images or videos vary, and torch would work on their sizes for hours, OtherSize
    where the trace fixes what varies in `common`.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    kinds = torch.export.Dim.AUTO, torch.export.Dim.STATIC  # said of each: an earlier trace left marks on the tensors

    def kinds_of(leaf: int, shape: Sequence[int]) -> dict[int, Any]:
        varying = range(len(shape))[:axes] if common is None else common.varying[leaf]
        return {axis: kinds[size < 2 or axis not in varying] for axis, size in enumerate(shape)}

    shapes = [kinds_of(i, v.shape) if isinstance(v, torch.Tensor) and v.dim() else None for i, v in enumerate(flat)]
    free = any(kinds[0] in shape.values() for shape in shapes if shape and len(shape) >= 4)
    with ExitStack() as modes:
        modes.enter_context(_naming(model, kwargs))
        if axes is None and free:
            modes.enter_context(ShortSizes())
        watch = modes.enter_context(HoldsForAll(common)) if common is not None and common.others else None
        modes.enter_context(TakenFinite())
        given = _by_parameter(model, pytree.tree_unflatten(shapes, spec))
        program = torch.export.export(model, args, kwargs, dynamic_shapes=given, strict=False)
    if watch is not None:
        for node in program.graph.find_nodes(op="placeholder"):
            watch.look(node.meta["val"])  # what came after the last function
    return program


def _output_names(spec: pytree.TreeSpec | None) -> tuple[str, ...]:
    """A name for each flat output: `logits`, `hidden_states.0`, `output` where there is only one."""
    if spec is None:
        return ()
    found: dict[int, str] = {}

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, int):
            found[value] = ".".join(path) or "output"
        elif isinstance(value, Mapping):
            for key, one in value.items():
                visit(one, (*path, str(key)))
        else:
            for i, one in enumerate(value if isinstance(value, list | tuple) else pytree.tree_leaves(value)):
                visit(one, (*path, str(i)) if path else (f"output_{i}",))

    visit(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), ())
    return tuple(found[i] for i in range(spec.num_leaves))


def _normal(
    traced: fx.GraphModule,
    inputs: dict[int, str],
    tensors: dict[int, tuple[str, torch.Tensor]],
    mutated: list[int],
    scalars: dict[int, float],
    base: str = "",
) -> Captured:
    """Turn placeholders of static tensors into get_attr nodes and sizes into aten.sym_size nodes; give stable names."""
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    canonical = graph.tied_names(tensors)
    for i, (_, tensor) in tensors.items():
        graph.bind(traced, placeholders[i], canonical[i], tensor)
    kept = {i: placeholders[i] for i in inputs}
    graph.sizes_from_tensors(traced, [n for n in kept.values() if isinstance(n.meta.get("val"), torch.Tensor)])
    graph.clean(traced)
    for i, node in list(kept.items()):
        if not node.users:
            traced.graph.erase_node(node)
            del kept[i]
    for i, node in kept.items():
        node.meta["qfx_name"] = inputs[i]
    graph.parameters_at_first_use(traced)
    graph.rename(traced)
    names = {name for name, _ in tensors.values()}
    for node in traced.graph.nodes:
        node.meta["qfx_module"] = module_path(node, names, base)
    mutations = dict(enumerate(mutated))
    traced.meta["qfx_mutations"] = {
        o: kept[i].name if i in kept else canonical.get(i, inputs.get(i, "")) for o, i in mutations.items()
    }
    traced.recompile()
    return Captured(
        gm=traced,
        inputs=tuple(sorted(kept)),
        params={tensors[i][0]: i for i in tensors if canonical[i] == tensors[i][0]},
        tied={i: canonical[i] for i in tensors if canonical[i] != tensors[i][0]},
        scalars=scalars,
        mutations=mutations,
    )


def _without_overwritten(captured: Captured) -> Captured:
    """Without new values of buffers that each call overwrites before it reads them, such as RoPE's frequencies that a
    model chooses by the length: no later call sees them. What shares memory with another stays."""
    gm, output, names = captured.gm, captured.gm.graph.output_node(), captured.gm.meta["qfx_mutations"]
    read = {
        str(n.target)
        for n in gm.graph.find_nodes(op="get_attr")
        if any(u.target != torch.ops.aten.copy.default or n in u.args[1:] for u in n.users)
    }
    held = dict((*gm.named_parameters(), *gm.named_buffers()))
    memory = Counter(tensor.untyped_storage()._cdata for tensor in held.values())
    buffers = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} - read
    buffers = {name for name in buffers if memory[held[name].untyped_storage()._cdata] == 1}
    gone = {o for o in captured.mutations if names[o] in buffers}
    left = [o for o in captured.mutations if o not in gone]
    output.args = (tuple(x for o, x in enumerate(output.args[0]) if o not in gone),)  # type: ignore[arg-type]
    gm.meta["qfx_mutations"] = {at: names[o] for at, o in enumerate(left)}
    gm.recompile()
    return replace(captured, mutations={at: captured.mutations[o] for at, o in enumerate(left)})


def example_of(node: fx.Node) -> Any:
    """The example value of a graph input. Raises UnsupportedError where there is none."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if value is None:
        raise UnsupportedError(f"expected an example value on graph input {node.name!r}, found none")
    return value


def _is_wrapped_scalar(node: fx.Node, value: Any) -> bool:
    """Under dynamic=True Dynamo passes Python floats as 0-dimensional f64 tensors and takes them out with item()."""
    if not (isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64):
        return False
    return bool(node.users) and all(u.op == "call_method" and u.target == "item" for u in node.users)


@contextmanager
def _naming(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let forward's signature name the arguments that its **kwargs take: torch.export knows no dynamic shapes of those
    (LLaVA hands use_cache on so)."""
    signature = inspect.signature(model.forward)
    known = signature.parameters.values()
    rest = [p for p in known if p.kind is p.VAR_KEYWORD]
    unnamed = [name for name in kwargs if name not in signature.parameters]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]
    if not (rest and more):
        yield
        return
    before = model.__dict__.get("forward")
    named: Any = functools.partial(model.forward)  # no frame of Python's: nodes keep the model's own source lines
    named.__signature__ = signature.replace(parameters=[*(p for p in known if p not in rest), *more])
    model.__dict__["forward"] = named
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before


def _by_parameter(model: nn.Module, shapes: tuple[Any, Any]) -> Any:
    """torch.export wants dynamic shapes by the names of forward's parameters (*args and **kwargs are one each)."""
    args, kwargs = shapes
    return dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
