"""Retrace a graph of fake tensors into functional, pre-dispatch ATen: the one normal form behind both doors.

Composite operators (linear, layer_norm, scaled_dot_product_attention, ...) are kept, in-place operators become
functional ones, switches of grad mode disappear, higher-order wrappers around sub-graphs are inlined, and the fused
layer of nn.TransformerEncoder is spelled out.

torch.export's graphs carry the value of each node, and most change nothing in place. Those are not functionalized, and
only what is to be decomposed runs again: sizes that vary make running a graph of fake tensors slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, PythonFunctionalizeAPI
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    maybe_enable_thunkify,
    py_sym_types,
    track_tensor,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import Max, Min

from qfx.encoder_layer import FUSED, encoder_layer
from qfx.errors import UnsupportedError, explain
from qfx.graph import val
from qfx.vmaps import has_vmaps, levels_kept, without_vmaps

_DROPPED = {"_set_grad_enabled", "_log_api_usage_once", "_functorch_set_grad"}
_DROPOUTS = {torch.ops.aten.dropout.default, torch.nn.functional.dropout, torch.dropout}
# changes in place what gradients alone see: of a constant that a forward makes (the empty cache of transformers)
_UNTRACKED = {torch.ops.aten.detach_.default: torch.ops.aten.detach.default}
_RUN = {*_DROPOUTS, *FUSED, *_UNTRACKED}  # what a graph's values do not stand for
_CONTROL = {"cond", "while_loop", "scan", "associative_scan", "map_impl"}
# name of the higher-order wrapper -> positions of its sub-graph, and of the first of its inputs, among the arguments
_WRAPPERS = {
    "wrap_with_set_grad_enabled": (1, 2), "wrap_with_autocast": (4, 5), "tag_activation_checkpoint": (0, 1),
    "wrap": (0, 1), "invoke_subgraph": (0, 2), "autograd_function_apply": (0, 2),
}  # fmt: skip


class _Inline(fx.Interpreter):
    """Runs a graph, inlining wrappers of sub-graphs and dropping grad-mode switches and known scalars."""

    def __init__(self, gm: fx.GraphModule, scalars: dict[str, float]) -> None:
        super().__init__(gm)
        self.scalars = scalars
        self._regions = ExitStack()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self._regions:  # whatever is raised, autocast is as it was
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_method" and n.target == "item" and getattr(n.args[0], "name", "") in self.scalars:
            return self.scalars[getattr(n.args[0], "name", "")]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if name in _DROPPED:
            return None
        if target in _DROPOUTS and not in_training(args, kwargs):
            # as eager gives it: the same tensor, which may change in place afterwards
            return args[0] if args else kwargs["input"]
        if target in FUSED:
            return encoder_layer(*args, **kwargs)
        if target is torch.ops.aten._assert_scalar.default:
            with disable_proxy_modes_tracing():  # sizes are told; torch 2.11 finds no node for a bool of item()
                return target(*args, **kwargs)
        if name == "_enter_autocast":
            _refuse_autocast(enabled=args[2] if len(args) > 2 else kwargs.get("enabled", True))
            region = self._regions.enter_context(ExitStack())
            region.enter_context(_without_autocast(args[0]))
            return region
        if name == "_exit_autocast":
            return args[0].close()
        if isinstance(target, torch._ops.HigherOrderOperator) and name in _WRAPPERS:
            at, first = _WRAPPERS[name]
            apart: AbstractContextManager[None] = nullcontext()
            if name == "wrap_with_autocast":
                _refuse_autocast(enabled=args[2])
                apart = _without_autocast(args[0])
            lacking = len(args[at].graph.find_nodes(op="placeholder")) - len(args[first:])  # older torch: the context
            with apart:
                found = type(self)(args[at], {}).run(*[None] * lacking, *args[first:])
            return found[0] if name == "autograd_function_apply" else found  # beside it is what backward wants
        if isinstance(target, torch._ops.HigherOrderOperator) and name in _CONTROL:
            raise UnsupportedError(
                f"expected a graph whose course does not depend on values, found torch's operator {name!r}; "
                "next step: compute both sides and choose with torch.where, or unroll the loop"
            )
        return super().call_function(target, args, kwargs)


class _Known(_Inline):
    """Runs a graph in which nothing changes in place, and takes its nodes with their values as they are."""

    def run_node(self, n: fx.Node) -> Any:
        tracer: Any = getattr(get_proxy_mode(), "tracer", None)
        value: Any = val(n)
        stays = n.op == "call_function" and isinstance(value, Tensor) and _stays(n.target) and not _is_early(value)
        if not stays or get_proxy_slot(value, tracer, None) is not None:  # a sub-graph may be called twice
            found = super().run_node(n)
            if n.target is torch.ops.aten.sym_size.int and isinstance(found, torch.SymInt):
                _proxy_of(found, tracer)  # a node where the size is read, and not where it is first used
            return found
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with self._set_current_node(n), disable_proxy_modes_tracing():
            proxies = pytree.tree_map_only((Tensor, *py_sym_types), lambda v: _proxy_of(v, tracer), (args, kwargs))
            proxy = tracer.create_proxy("call_function", n.target, *proxies)
            proxy.node.meta["val"] = value
            track_tensor(value, proxy, constant=None, tracer=tracer)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(_UNTRACKED.get(target, target), args, kwargs)


def _is_early(value: Tensor) -> bool:
    """Whether a size or stride is the greater or lesser of two: which of them it is a later node may have told."""
    sizes = (*value.shape, *(value.stride() if value.layout == torch.strided else ()))
    return any(isinstance(size, torch.SymInt) and size.node.expr.has(Max, Min) for size in sizes)


def _proxy_of(value: Any, tracer: Any) -> Any:
    """What stands for a tensor or size in the graph that is made; itself where nothing does, such as a constant."""
    found = get_proxy_slot(value, tracer, value)
    return found if found is value else found.proxy if isinstance(value, Tensor) else found.force()


def in_training(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of dropout is told of it: `training` of torch.nn.functional.dropout, `train` of torch.dropout."""
    return args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """A region without autocast inside one that the caller opened: RoPE leaves it, to turn by exact angles."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)


def _refuse_autocast(*, enabled: bool) -> None:
    if enabled:
        raise UnsupportedError(
            "expected a graph without autocast regions, found one that enables autocast; "
            "next step: cast the model with model.to(dtype) instead of torch.autocast"
        )


def retrace(
    gm: fx.GraphModule, fakes: Sequence[Any], scalars: dict[str, float] | None = None
) -> tuple[fx.GraphModule, list[int]]:
    """Trace `gm` over fake inputs (FakeTensor, SymInt or plain values) into functional pre-dispatch ATen.

    Returns the new GraphModule, whose output is `(new values of mutated inputs..., outputs...)`, flat, and the indices
    of the inputs that the graph mutates. Raises whatever torch raises where an operator cannot be traced.
    """
    mutated: list[int] = []
    if has_vmaps(gm):
        with _mode_of(fakes):
            gm = without_vmaps(gm, fakes)
    if not scalars and _is_known(gm):
        traced = _retraced(gm, fakes)
        if not _is_other(traced, gm):
            return traced, []
    interpreter = _Inline(gm, scalars or {})

    def functional(*args: Any) -> tuple[Any, ...]:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=False)
        api = PythonFunctionalizeAPI(mode, pre_dispatch=True)
        wrapped = api.wrap_tensors(args)
        with mode, torch.fx.traceback.preserve_node_meta(), maybe_enable_thunkify():
            out = interpreter.run(*wrapped)
        mutated[:] = [i for i, value in enumerate(wrapped) if _was_mutated(value)]
        news = tuple(wrapped[i] for i in mutated)
        flat, _ = torch.utils._pytree.tree_flatten(out)
        return tuple(api.unwrap_tensors(value) for value in (*news, *flat))

    traced = _traced(functional, fakes)
    return traced, mutated


def _retraced(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """`retrace` of a graph for which `_is_known` holds."""
    interpreter = _Known(gm, {})

    def plain(*args: Any) -> tuple[Any, ...]:
        with torch.fx.traceback.preserve_node_meta(), maybe_enable_thunkify():
            return tuple(pytree.tree_leaves(interpreter.run(*args)))

    targets: set[Any] = {n.target for n in _calls(gm)}
    return _traced(plain, fakes, {target: target.decompose for target in targets if _decomposes(target)})


def _is_other(traced: fx.GraphModule, gm: fx.GraphModule) -> bool:
    """Whether decomposing gave what is to be decomposed in turn or changes in place (dropout of whole channels), or
    computed sizes, which functionalizing spells in another way."""
    sizes, known = (Counter(n.target for n in _calls(g) if isinstance(val(n), py_sym_types)) for g in (traced, gm))
    return bool(sizes - known) or any(_decomposes(n.target) or _changes(n.target) for n in _calls(traced))


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of a graph and of those in it."""
    parts = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return [node for part in parts for node in part.graph.nodes if node.op.startswith("call_")]


def _is_known(gm: fx.GraphModule) -> bool:
    """Whether a graph calls nothing that changes its input, and carries the values of what it calls.

    Sizes that only the data tell (of nonzero) are made anew by each run, and those of the graph do not hold then.
    """
    return all(_is_pure(call) and "unbacked_bindings" not in call.meta for call in _calls(gm))


def _is_pure(call: fx.Node) -> bool:
    if isinstance(call.target, torch._ops.HigherOrderOperator):
        return getattr(call.target, "__name__", "") in _WRAPPERS
    return call.op == "call_function" and "val" in call.meta and not _changes(call.target)


def _changes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target not in _UNTRACKED


def _decomposes(target: Any) -> bool:
    """Whether functional pre-dispatch ATen has other operators in the place of this one, which may give its input."""
    if not isinstance(target, torch._ops.OpOverload) or target in _DROPOUTS or not target._can_decompose():
        return False
    aliases = any(argument.alias_info for argument in target._schema.arguments)
    return aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _stays(target: Any) -> bool:
    """Whether a node may be taken as it is. A constant is traced, so that its value is known to what is read of it."""
    known = isinstance(target, torch._ops.OpOverload) and target not in _RUN
    return known and not (_decomposes(target) or target._opname.startswith("lift_fresh"))


def _traced(
    function: Callable[..., Any], fakes: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    with _mode_of(fakes), torch.no_grad(), levels_kept():
        make = make_fx(function, decompositions, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
        traced = make(*fakes)
    _refuse_functions(traced)
    return traced


def _refuse_functions(traced: fx.GraphModule) -> None:
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target), None), fx.GraphModule):
            user = next(iter(node.users), node)
            what = f"torch's operator {getattr(user.target, '__name__', str(user.target))!r} takes a function"
            step = "call one that takes tensors alone (for attention F.scaled_dot_product_attention, in transformers "
            step += "attn_implementation='sdpa')"
            expected, found = "operators that take tensors and numbers", f"a graph, {node.name!r}, among its arguments"
            raise UnsupportedError(explain(what, expected=expected, found=found, node=user, next_step=step))


def _mode_of(fakes: Sequence[Any]) -> FakeTensorMode:
    found = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    return found or FakeTensorMode(allow_non_fake_inputs=True)


def _was_mutated(value: Any) -> bool:
    if not isinstance(value, FunctionalTensor):
        return False
    torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]
    return bool(torch._functionalize_has_data_mutation(value.elem))  # type: ignore[attr-defined]
