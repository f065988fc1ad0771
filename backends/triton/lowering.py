"""`lower`: a quantized graph in normal form to a graph of this backend's ops, the rest compiled by Inductor.

    %linear: f16[1,64] = qfx.linear(%x, @q.w_codes, @q.w_scale, @q.w_zero, ..., , u4/g128)
    ->
    %linear: f16[1,64] = qfx_triton.linear_weight_only(%x, [@triton.0, @triton.1, ...], ...)

Weights are brought into the layout of their kernel once, here. Inputs that the graph changes are written where they lie
(Inductor then updates a static cache in place), so that no byte of the rest of a cache moves.
"""

from __future__ import annotations

import logging
import math
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import list_mode_options
from torch.utils import _pytree as pytree

from qfx import graph
from qfx.backends.triton import device, tuning
from qfx.backends.triton.device import Device
from qfx.backends.triton.passes._nodes import computed, gives_views, note_computed
from qfx.backends.triton.passes.few_queries import few_queries
from qfx.backends.triton.passes.fold_groups import fold_groups
from qfx.backends.triton.passes.fuse import fuse
from qfx.backends.triton.passes.join_rows import join_rows
from qfx.backends.triton.passes.merge_siblings import merge_siblings
from qfx.backends.triton.passes.write_in_place import write_in_place
from qfx.backends.triton.rules import RULES
from qfx.backends.triton.site import SHARES, Site
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.passes import _match as m
from qfx.passes._build import call

_LOG = logging.getLogger("qfx.triton")
_aten = torch.ops.aten
_OF_NUMBERS: dict[Any, Any] = {torch.sym_max: max, torch.sym_min: min}
_PRODUCTS = tuple(
    f"qfx_triton::{name}" for name in ("linear_weight_only", "gemm8", "gemm4", "gemm_mixed", "linear_mixed")
)
_MOST_OF_STEP = 16
# Small kernels of Inductor that do not wait for each other become one; by rule, nothing is measured at the first call.
_TOGETHER = {"combo_kernels": True, "combo_kernels_pointwise_only": True, "combo_kernels_autotune": 0}
_NO_MEMORY = (
    "qfx: beside activations, kernels take memory for partial sums, and from 1,024 tokens a call on for one weight in "
    "floats; next step: fewer tokens a call, or a smaller batch"
)
_STEP = "leave it out of the recipe, or give it another format"
_PAIRS = "take integers for both (x per token, w per channel or in groups of whole multiples of 32), or f8e4m3 for both"


class Lowered:
    """A lowered graph: called with the placeholders' values in order, it returns the outputs as a flat tuple.

    kernels: what executes each node, by name. notes: what does not run as asked. first_call: seconds that the first
    call took (compilation), None before it.
    """

    def __init__(self, gm: fx.GraphModule, kernels: dict[str, str], notes: list[Note], mode: str | None) -> None:
        self.kernels, self.notes = kernels, notes
        self.first_call: float | None = None
        self._changed = _written_in_place(gm)
        self._count = len(gm.graph.output_node().args[0]) + len(self._changed)  # type: ignore[arg-type]
        options = {} if mode == "eager" else list_mode_options(mode or "default")
        self._graphs = bool(options.get("triton.cudagraphs"))  # graphs of CUDA, which reuse the memory of outputs
        gm.recompile()
        self._run: Callable[..., Any] = gm if mode == "eager" else _compiled(gm, options)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run; inputs that the graph changes are changed, and stand among the outputs."""
        started = time.perf_counter() if self.first_call is None else 0.0
        if self._graphs:
            self._mark(inputs)
        with torch.no_grad():
            found = iter(self._called(inputs))
            outputs = tuple(inputs[self._changed[i]] if i in self._changed else next(found) for i in range(self._count))
            if self._graphs:
                outputs = tuple(
                    o if i in self._changed or not isinstance(o, Tensor) else o.clone() for i, o in enumerate(outputs)
                )
        if self.first_call is None:
            self.first_call = time.perf_counter() - started
            _LOG.info("the first call of a graph of %d nodes took %.1f s", len(self.kernels), self.first_call)
        return outputs

    def _called(self, inputs: tuple[Any, ...]) -> Any:
        try:
            return self._run(*inputs)
        except torch.OutOfMemoryError as error:
            error.add_note(_NO_MEMORY)
            raise

    def _mark(self, inputs: tuple[Any, ...]) -> None:
        """What the graph writes into stays where it is (caches): graphs of CUDA need no copy of it."""
        for i in self._changed.values():
            if isinstance(inputs[i], Tensor) and not hasattr(inputs[i], "_dynamo_static_input_type"):
                torch._dynamo.mark_static_address(inputs[i], guard=False)


def lower(gm: fx.GraphModule, *, mode: str | None = None, share: bool = False) -> Lowered:
    """Lower a quantized graph in normal form; `gm` stays as it is.

    mode: one of Inductor's ("reduce-overhead" runs CUDA graphs), None for its default; "eager" runs the ops one after
    the other, as the interpreter always does. share: hold packed weights that another graph holds, too, and no copy of
    them. Raises UnsupportedError where the device has no kernels.
    """
    where = _device_of(gm)
    found = device.find(where)
    own = graph.copy(gm)
    own.meta[SHARES] = share
    kernels = {
        n.name: f"{graph.schema_name(n) or graph.op_name(n)} (torch)"
        for n in own.graph.nodes
        if n.op == "call_function"
    }
    fqns = {n.name: graph.fqn_of(n) for n in own.graph.nodes if n.op == "call_function"}
    write_in_place(own)
    few_queries(own, kernels)
    fold_groups(own)
    merge_siblings(own)
    join_rows(own, found, kernels)
    notes = [] if found.interpreted or tuning.has_any(found) else [_untuned(found)]
    taken: dict[str, fx.Node] = {}
    for node in list(own.graph.nodes):
        rule = RULES.get(graph.schema_name(node)) if node.op == "call_function" else None
        if rule is None:
            continue
        names = computed(node)
        told = rule(Site(own, node, found))
        if isinstance(told, str):
            kernels.update(dict.fromkeys(names, f"{graph.schema_name(node)} (torch)"))
            reason = f"runs in torch's reference arithmetic, which is slow: {told}"
            notes += [Note(fqns[name], reason, _STEP, source_line(node) or "") for name in names]
            continue
        kernels.update(dict.fromkeys(names, told.kernel))
        taken[node.name] = node
        if told.told:
            notes += [Note(fqns[name], told.told, _PAIRS, source_line(node) or "", minor=True) for name in names]
    for node in own.graph.nodes:  # what took the place of a node, and its name, computes what it did
        if node.name in taken:
            note_computed(node, taken[node.name])
    graph.clean(own)
    fuse(own, kernels)
    own = graph.copy(own)  # without the tensors that no node reads any more
    return Lowered(own, kernels, notes, "eager" if found.interpreted and mode is None else mode)


def _device_of(gm: fx.GraphModule) -> torch.device:
    """The one device of a graph's tensors."""
    values = [v for n in gm.graph.nodes for v in pytree.tree_leaves(graph.val(n)) if isinstance(v, Tensor)]
    found = {v.device for v in values if v.dim() and v.device.type != "meta"}
    others = found - {torch.device("cpu")}
    if len(others) > 1:
        raise UnsupportedError(
            explain(
                "a graph on several devices cannot be lowered to Triton",
                expected="one GPU",
                found=", ".join(sorted(map(str, others))),
                next_step="put the model on one GPU, or compile its parts one by one",
            )
        )
    return next(iter(others)) if others else torch.device("cpu")


def _untuned(found: Device) -> Note:
    reason = f"no measured configurations for {found.name}: kernels run with those of a heuristic"
    return Note("graph", reason, "run `qfx tune MODEL` once on this GPU", minor=True)


def _written_in_place(gm: fx.GraphModule) -> dict[int, int]:
    """Let the graph copy changed inputs into themselves, and not return them: {output: input} of those."""
    output = gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names = [n.name for n in placeholders]
    changed = {place: names.index(name) for place, name in gm.meta.get("qfx_mutations", {}).items() if name in names}
    if not changed:
        return {}
    targets = {placeholders[i] for i in changed.values()}
    with gm.graph.inserting_before(output):
        for place, result in enumerate(results):
            if place not in changed and isinstance(result, fx.Node) and _is_view_of(result, targets):
                results[place] = call(gm, _aten.clone.default, result, like=result)
        for place, i in changed.items():
            if results[place] is not placeholders[i]:
                call(gm, _aten.copy_.default, placeholders[i], results[place], like=output)
    output.args = ([r for place, r in enumerate(results) if place not in changed],)
    return changed


def _is_view_of(node: fx.Node, targets: set[fx.Node]) -> bool:
    """Whether a value may share memory with an input that changes."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        one = todo.pop()
        if one in targets:
            return True
        if one not in seen and gives_views(one):
            todo += one.all_input_nodes
        seen.add(one)
    return False


def _compiled(gm: fx.GraphModule, options: dict[str, Any]) -> Callable[..., Any]:
    """The graph compiled by Inductor. Its tensors never change, so that no guard looks at them.

    Inductor's own kernels are not launched before the one before them has ended, whatever its setting for it: it takes
    other ops for such as let nothing begin before their end, and leaves out to wait in kernels that load nothing, or
    nothing of the op just before. `kernels.early` lets the next one begin at once.
    """
    for node in gm.graph.nodes:  # torch 2.11 compiles no calls of these with plain numbers
        node.target = _OF_NUMBERS.get(node.target, node.target)
    gm.recompile()
    symbols = any(isinstance(s, torch.SymInt) for n in gm.graph.nodes for s in _sizes(n))
    numbers = any(isinstance(graph.val(n), torch.SymInt) for n in gm.graph.nodes if n.op == "placeholder")
    options = {**options, "triton.enable_pdl": False, "guard_filter_fn": _only_of_inputs}
    if _is_step(gm):
        options |= _TOGETHER

    def run(*inputs: Any) -> Any:
        return gm(*inputs)

    # Dynamo counts compilations by code object, and does not take a graph's own inside another compiled function.
    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    # Of sizes that stay as they are Inductor makes better code: a number that changes is found at the second call.
    dynamic = True if symbols else None if numbers else False
    return torch.compile(own, fullgraph=True, dynamic=dynamic, options=options)


def _is_step(gm: fx.GraphModule) -> bool:
    """Whether all products are of few tokens, as in a step of decoding, whose time goes into starting kernels."""
    # (torch.Size.numel would fix each symbol among the sizes to the number that it stands for)
    rows = [math.prod(m.shape(n)[:-1]) for n in gm.graph.nodes if graph.schema_name(n) in _PRODUCTS]
    return bool(rows) and all(isinstance(r, int) and r <= _MOST_OF_STEP for r in rows)


def _only_of_inputs(guards: Any) -> list[bool]:
    return list(torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards))


def _sizes(node: fx.Node) -> list[Any]:
    return [s for v in pytree.tree_leaves(graph.val(node)) if isinstance(v, Tensor) for s in v.shape]
