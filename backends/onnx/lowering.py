"""`lower`: a graph in normal form to a callable over ONNX Runtime sessions, with torch where ONNX has no form."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qfx import run
from qfx.backends.onnx import qmoe
from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.decompose import decompose
from qfx.backends.onnx.graph import SizeOf, StageModel, build_stage, carriers_of, emit_stage, reason_against
from qfx.backends.onnx.kernels import inspected
from qfx.backends.onnx.partition import Stage, stages_of
from qfx.backends.onnx.quant import is_float_product, is_integer_product
from qfx.backends.onnx.session import Session, SessionError
from qfx.backends.onnx.session_options import saturation_notes
from qfx.backends.onnx.slow_forms import SlowForm
from qfx.errors import Note, UnsupportedError, explain, source_line
from qfx.graph import fqn_of, get_tensor, let_go, schema_name
from qfx.passes.moe import moe

Slots = dict[fx.Node, Any]
_NEXT = (
    "express the model by other operators (fused modules of torch.nn: torch.backends.mha.set_fastpath_enabled(False))"
)


def supports(node: fx.Node) -> str | None:
    """None where ONNX Runtime can run the node here, else the reason why not."""
    if node.op != "call_function":
        return None
    owner = node.graph.owning_module
    assert owner is not None, "the node's graph belongs to no module"
    return reason_against(owner, node)


def lower(gm: fx.GraphModule, *, strict: bool = False, folder: Path | None = None) -> OnnxLowered:
    """Lower a graph in normal form to ONNX Runtime on the CPU.

    Operators without an ONNX form are decomposed into simpler ones; what then has none still runs in torch between ONNX
    sessions, with a note each. Raises UnsupportedError for these where `strict`. folder: where to save the optimized
    models (see `stored`).
    """
    _check_devices(gm)
    gm = _copied(gm)
    run.run(gm, [functools.partial(moe, fits=qmoe.fits)])
    reasons = decompose(gm, reason_against)
    while True:
        if strict and reasons:
            raise UnsupportedError(
                _refusal(reasons, "strict=True", "lower with strict=False to run these nodes in torch")
            )
        try:
            lowered = OnnxLowered(gm, reasons, folder)
        except SessionError as error:
            node = next((n for n in gm.graph.nodes if n.name == error.node and n not in reasons), None)
            if node is None:
                raise
            reasons[node] = error.reason
        else:
            let_go(gm)
            return lowered


def build(gm: fx.GraphModule, *, runtime: str = "onnxruntime", prefill: bool = False) -> tuple[Builder, StageModel]:
    """The whole graph as one ONNX model, and its builder, whose `external` weights are not all made yet.

    Inputs and outputs in f16 and bf16 are f32 in the model. prefill: weight-only products of many rows by integers of 8
    bits. Raises UnsupportedError for a graph with a node that has no ONNX form.
    """
    _check_devices(gm)
    gm = _copied(gm)
    if runtime != "standard" and not prefill:  # prompts by integers are products of their own
        run.run(gm, [functools.partial(moe, fits=qmoe.fits)])
    reasons = decompose(gm, functools.partial(reason_against, runtime=runtime))
    if reasons:
        step = _next_step(next(iter(reasons)), "rewrite this part of the model")
        raise UnsupportedError(_refusal(reasons, "a file needs one for every node", step))
    stages = stages_of(gm, set())
    stage = stages[0] if stages else Stage(eager=False)
    results = gm.graph.output_node().args[0]
    assert isinstance(results, list | tuple)
    stage.outputs = [r for r in results if isinstance(r, fx.Node)]
    stage.inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    builder, built = emit_stage(gm, stage, carriers_of(gm), runtime, prefill=prefill)
    built.notes += _half_note(gm, "which inputs and outputs of the file are, too")
    return builder, built


def _next_step(node: fx.Node, otherwise: str) -> str:
    """What to do about a node without an ONNX form: of what qfx quantized it is the formats that have none."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "qfx":
        return otherwise
    quantized = any(argument.name.endswith("_format") for argument in node.target._schema.arguments)
    return "other formats for it, such as those of w8a8 or w4a16" if quantized else otherwise


def _refusal(reasons: dict[fx.Node, str], expected: str, next_step: str) -> str:
    node, why = next(iter(reasons.items()))
    return explain(
        f"ONNX Runtime cannot run {len(reasons)} node(s) of this graph, first {node.name!r}: {why}",
        expected=f"operators with an ONNX form, because {expected}",
        found=str(node.target),
        node=node,
        next_step=next_step,
    )


def _check_devices(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, Tensor) and fake.device.type not in ("cpu", "meta"):
            raise UnsupportedError(
                explain(
                    "the ONNX Runtime backend runs on the CPU",
                    expected="tensors on the CPU",
                    found=str(fake.device),
                    node=node,
                    next_step="move the model with model.to('cpu'), or choose another backend",
                )
            )


class OnnxLowered:
    """A lowered graph: call it with the placeholders' values in order; it returns the outputs as a flat tuple.

    kernels: for each call_function node what executes it, read back from ONNX Runtime's optimized graph.
    notes: what runs otherwise than the graph says.
    """

    def __init__(self, gm: fx.GraphModule, eager: dict[fx.Node, str], folder: Path | None = None) -> None:
        self.notes = [
            Note(fqn_of(n), f"runs in torch: {why}", _next_step(n, _NEXT), source_line(n) or "")
            for n, why in eager.items()
        ]
        self._placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._stages = stages_of(gm, set(eager))
        carriers = carriers_of(gm)
        _keep_carriers(self._stages, carriers)
        self._models: dict[int, StageModel] = {}
        self._steps: list[Callable[[Slots], None]] = []
        for i, stage in enumerate(self._stages):
            if stage.eager:
                self._steps.append(_eager_step(gm, stage))
                continue
            built = self._models[i] = build_stage(gm, stage, carriers)
            self.notes += built.notes
            self._steps.append(_onnx_step(built, folder / str(i) if folder is not None else None))
        self._outputs = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        constants = [o for o in self._outputs if isinstance(o, fx.Node) and o.op == "get_attr"]
        self._constants: Slots = {n: get_tensor(gm, str(n.target)) for n in constants}
        self.notes += _half_note(gm, "outputs cast back")
        self.notes += saturation_notes([node for built in self._models.values() for node in built.model.graph.node])

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run. Raises ValueError where the number of inputs differs from the placeholders."""
        if len(inputs) != len(self._placeholders):
            raise ValueError(f"expected {len(self._placeholders)} inputs in placeholder order, found {len(inputs)}")
        slots: Slots = dict(zip(self._placeholders, inputs, strict=True))
        for step in self._steps:
            step(slots)
        return tuple(self._result(o, slots) for o in self._outputs)

    def _result(self, output: Any, slots: Slots) -> Any:
        if not isinstance(output, fx.Node):
            return output
        return self._constants[output] if output.op == "get_attr" else slots[output]

    @property
    def kernels(self) -> dict[str, str]:
        """Node name -> the ONNX Runtime kernels that compute it, or 'torch <operator>'."""
        return self._inspected[0]

    @property
    def slow(self) -> list[Note]:
        """Nodes that ONNX Runtime runs in a form known to be slow."""
        return self._inspected[1]

    @cached_property
    def _inspected(self) -> tuple[dict[str, str], list[Note]]:
        found: dict[str, str] = {}
        slow: list[Note] = []
        for i, stage in enumerate(self._stages):
            if stage.eager:
                found |= {n.name: f"torch {n.target}" for n in stage.nodes if n.target is not operator.getitem}
                continue
            nodes = {n.name: n for n in stage.nodes}
            integers = {name for name, node in nodes.items() if is_integer_product(node)}
            floats = {name for name, node in nodes.items() if is_float_product(node)}
            kernels, forms = inspected(self._models[i], list(nodes), integers, floats)
            found |= kernels
            slow += [_slow_note(form, nodes.get(form.owner)) for form in forms]
        return found, slow

    @property
    def stored(self) -> dict[str, Any] | None:
        """What `stored.Stored` needs to run the saved models, as JSON; None where a part of the graph runs in torch."""
        if any(stage.eager for stage in self._stages) or not all(map(_is_storable, self._outputs)):
            return None
        return {
            "inputs": [n.name for n in self._placeholders],
            "steps": [_stored_step(i, built) for i, built in self._models.items()],
            "outputs": [[o.name] if isinstance(o, fx.Node) else o for o in self._outputs],
        }

    @property
    def models(self) -> list[StageModel]:
        """The ONNX models, in order of execution."""
        return list(self._models.values())


def _slow_note(form: SlowForm, node: fx.Node | None) -> Note:
    name, where = ("graph", "") if node is None else (fqn_of(node), source_line(node) or "")
    return Note(
        name, form.reason, "the result is right; choose another format, or another version of onnxruntime", where
    )


def _is_storable(output: Any) -> bool:
    return output.op != "get_attr" if isinstance(output, fx.Node) else output is None or isinstance(output, int)


def _stored_step(i: int, built: StageModel) -> dict[str, Any]:
    return {
        "model": f"{i}.onnx",
        "inputs": [n.name for n in built.inputs],
        "sizes": [[n.name, axis] for n, axis in built.sizes],
        "outputs": [[n.name, not isinstance(n.meta["val"], Tensor)] for n in built.outputs],
        "in_place": sorted(built.in_place.items()),
    }


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module's tensors under a graph of its own."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def _keep_carriers(stages: Sequence[Stage], carriers: dict[Any, SizeOf]) -> None:
    """Values from which a later stage reads a size leave their stage."""
    for stage in stages:
        own = set(stage.nodes)
        for node, _ in carriers.values():
            if node in own and node not in stage.outputs and len(stages) > 1:
                stage.outputs.append(node)


def _onnx_step(built: StageModel, save: Path | None) -> Callable[[Slots], None]:
    session = Session(built.model, built.weights, built.in_place, save)
    integers = [not isinstance(n.meta["val"], Tensor) for n in built.outputs]

    def step(slots: Slots) -> None:
        feeds = [as_tensor(slots[n]) for n in built.inputs]
        feeds += [as_tensor(slots[n] if axis is None else slots[n].shape[axis]) for n, axis in built.sizes]
        for node, is_integer, value in zip(built.outputs, integers, session.run(feeds), strict=True):
            slots[node] = value.item() if is_integer else value

    return step


def as_tensor(value: Any) -> Tensor:
    """What a session takes for a tensor or a number."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return torch.tensor(value)
    return torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _eager_step(gm: fx.GraphModule, stage: Stage) -> Callable[[Slots], None]:
    constants = {n: get_tensor(gm, str(n.target)) for s in stage.nodes for n in s.all_input_nodes if n.op == "get_attr"}

    @torch.no_grad()
    def step(slots: Slots) -> None:
        for node in stage.nodes:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: constants[n] if n.op == "get_attr" else slots[n]
            )
            slots[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    return step


def _half_note(gm: fx.GraphModule, outside: str) -> list[Note]:
    halves = (torch.float16, torch.bfloat16)
    nodes = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr", "call_function")]
    packed = {n for n in nodes if n.op == "get_attr" and all(schema_name(u).startswith("qfx::") for u in n.users)}
    fakes = [n.meta.get("val") for n in nodes if n not in packed]
    found = sorted({str(f.dtype) for f in fakes if isinstance(f, Tensor) and f.dtype in halves})
    if not found:
        return []
    reason = f"{' and '.join(found)} values are computed in float32, {outside}"
    return [Note("graph", reason, "none needed; ONNX Runtime has no CPU kernels for them", minor=True)]
