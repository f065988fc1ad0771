"""`torch.compile(model, backend="qfx")`: Dynamo's graph, quantized and lowered, fresh when its weights change."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.capture import Captured, capture_dynamo
from qfx.errors import Note, QfxWarning, explain
from qfx.options import Options
from qfx.pipeline import apply_plan, prepare, told
from qfx.report import GraphRecord, Row, remember
from qfx.rows import graph_rows


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The Dynamo backend. Takes Dynamo's graph and example inputs, returns what runs instead.

    options: see `qfx.options.Options`. mode: only None and "default" (Inductor's modes have no meaning here).
    Raises ValueError for unknown options and for a model in train() mode. Where a graph cannot be quantized or lowered
    the untouched graph runs, with a QfxWarning that names the cause; with strict=True that is an error.
    """
    if mode not in (None, "default"):
        raise ValueError(explain(f"mode {mode!r} is Inductor's", expected="no mode", next_step="leave mode= out"))
    parsed = Options.parse(options)
    owner, root = _owner()
    _refuse_training(gm, root)
    _warn_detached(example_inputs)
    try:
        return CompiledGraph(gm, example_inputs, parsed, owner)
    except Exception as error:
        if parsed.strict or isinstance(error, ValueError):
            raise
        reason = f"{type(error).__name__}: {error}"
        notes = "".join(f"\n{n}" for n in getattr(error, "__notes__", ()))
        warnings.warn(
            explain(
                f"a graph runs in torch, not quantized: {reason}{notes}",
                next_step="see the cause above; strict=True turns this into an error",
            ),
            QfxWarning,
            stacklevel=2,
        )
        if owner is not None:
            remember(owner, GraphRecord((), (Note("graph", reason, "see the warning's cause"),), failed=reason))
        return gm.forward


class CompiledGraph:
    """One graph of Dynamo's, quantized and lowered. Called with Dynamo's flat arguments; several threads may call it.

    Each call compares the identity and version of every parameter with those that were packed; where one changed (in
    place, swapped, load_state_dict) the graph is quantized and lowered anew before it runs.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, owner: object | None = None
    ) -> None:
        self._source = gm
        self._options = options
        self._lock = threading.Lock()
        self._owner = owner
        self._captured: Captured = capture_dynamo(gm, example_inputs)
        self._notes = prepare(self._captured.gm)
        self._build(example_inputs)
        if owner is not None:
            remember(owner, GraphRecord(tuple(self.rows), tuple(self.notes)))

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self._changed(args):
            with self._lock:
                if self._changed(args):
                    self._refresh(args)
        lowered, captured = self._lowered, self._captured
        outputs = lowered(*[args[i] for i in captured.inputs])
        if captured.mutations:
            for output, i in captured.mutations.items():
                args[i].copy_(outputs[output])
            outputs = outputs[len(captured.mutations) :]
        return tuple(outputs)

    def _build(self, args: Sequence[Any]) -> None:
        gm = graph.copy(self._captured.gm)
        notes = [*self._notes, *apply_plan(gm, self._options.plan, self._options.recipe, strict=self._options.strict)]
        lowered = lower(gm, self._options.backend, strict=self._options.strict)
        told([*notes, *lowered.notes], strict=self._options.strict)
        self._lowered = lowered
        self.notes = [*notes, *lowered.notes]
        self.rows: list[Row] = graph_rows(gm, lowered.kernels, self.notes)
        self._seen = [(i, args[i], _version(args[i])) for i in self._captured.params.values()]
        self._scalars = [(i, v) for i, v in self._captured.scalars.items()]

    def _changed(self, args: Sequence[Any]) -> bool:
        for i, tensor, version in self._seen:
            now = args[i]
            if now is not tensor or (version >= 0 and now._version != version):
                return True
        return any(float(args[i]) != value for i, value in self._scalars)

    def _refresh(self, args: Sequence[Any]) -> None:
        if any(float(args[i]) != value for i, value in self._scalars):
            self._captured = capture_dynamo(self._source, args)
            self._notes = prepare(self._captured.gm)
        for fqn, i in self._captured.params.items():
            graph.set_tensor(self._captured.gm, fqn, args[i])
        self._build(args)


def lower(gm: fx.GraphModule, name: str, *, strict: bool) -> Any:
    """Lower a quantized graph with the backend of that name; "auto" is ONNX Runtime for graphs on the CPU."""
    if name == "auto":
        devices = {v.device.type for v in map(graph.val, gm.graph.nodes) if isinstance(v, Tensor)}
        name = "onnx" if devices <= {"cpu", "meta"} else "reference"
    if name == "onnx":
        from qfx.backends import onnx

        return onnx.lower(gm, strict=strict)
    from qfx.backends import reference

    return reference.lower(gm, strict=strict)


def _version(tensor: Any) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _owner() -> tuple[object | None, nn.Module | None]:
    """The module (else the code object) whose frame Dynamo compiles, and the module; None where Dynamo does not say."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        translator = InstructionTranslator.current_tx()
        modules = [v for v in translator.f_locals.values() if isinstance(v, nn.Module)]
    except (ImportError, AttributeError):
        return None, None
    return (modules[0], modules[0]) if modules else (translator.f_code, None)


def _refuse_training(gm: fx.GraphModule, root: nn.Module | None) -> None:
    training = root is not None and root.training and torch.is_grad_enabled()
    for node in gm.graph.nodes:
        training |= _drops(node)
    if training or (root is not None and root.training):
        raise ValueError(
            explain(
                "torch.compile(backend='qfx') is for inference, and the model is in train() mode",
                expected="model.eval()",
                found="model.train()",
                next_step="call model.eval() before compiling; to train through quantization use QAT (qfx.prepare_qat)",
            )
        )


def _drops(node: fx.Node) -> bool:
    """A dropout that is active: only a model in training has one."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "dropout":
        return False
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return training is True and node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5) != 0


def _warn_detached(example_inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs):
        warnings.warn(
            explain(
                "gradients are enabled, but a graph compiled by qfx gives detached outputs",
                next_step="call the model under torch.no_grad() or torch.inference_mode()",
            ),
            QfxWarning,
            stacklevel=2,
        )
