"""`torch.compile(model, backend="qfx")`: Dynamo's graph, quantized and lowered, fresh when its weights change."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph, names
from qfx.compiled import frame
from qfx.compiled.apart import apart
from qfx.compiled.encoder import encoder_apart
from qfx.compiled.frame import Frame
from qfx.compiled.overlap import overlapping, refused
from qfx.compiled.records import GraphRecord, all_records, remember
from qfx.compiled.template import State, Template
from qfx.compiled.training import drops, training
from qfx.compiled.warm import Entry, Found, Storing, Warm
from qfx.errors import Note, UnsupportedError, explain, warn
from qfx.kv.held import caches_of, is_quantized
from qfx.live import attending
from qfx.names import Translation
from qfx.options import Options, checked_mode
from qfx.pipeline import apply_plan, told
from qfx.recipe import Recipe, Rule
from qfx.reporting import sqnr
from qfx.reporting.rows import Row, graph_rows
from qfx.sources import input_name, keep_sources, source_of, static_names
from qfx.storage.spill import give_back

_MOST_SCALARS = 8  # graphs kept for different values of Python floats


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. Takes Dynamo's graph and example inputs, returns what runs instead.

    options: see `qfx.options.Options`. mode: one of Inductor's where Triton runs the graph ("reduce-overhead" is CUDA
    graphs); for a model on the CPU only None and "default".
    Raises ValueError for unknown options and modes, and for a model in train() mode. Where a graph cannot be quantized
    or lowered the untouched graph runs, with a QfxWarning that names the cause; with strict=True that is an error.
    """
    at = frame.at_compile()
    parsed = Options.parse(options, checked_mode(mode, example_inputs, at.root))
    if at.training or any(drops(node) for node in gm.graph.nodes):
        raise training()
    compiled = CompiledGraph(gm, example_inputs, parsed, at, options)
    if not compiled.untouched:
        _warn_detached(example_inputs, at)
    return compiled


@dataclass(frozen=True, eq=False)
class Built:
    """A graph quantized and lowered for one set of weights. lowered: None where the untouched graph runs."""

    lowered: Any
    record: GraphRecord
    translation: Translation

    def run(self, template: Template, args: Sequence[Any]) -> tuple[Any, ...]:
        """Outputs for Dynamo's flat arguments; those that the graph changes are changed."""
        outputs = self.lowered(*template.inputs(args))
        mutations = template.interface.mutations
        if mutations:
            with torch.no_grad():
                outputs = apart(outputs, {output: args[i] for output, i in mutations.items()})
                for output, i in mutations.items():
                    args[i].copy_(outputs[output])
            outputs = outputs[len(mutations) :]
        return tuple(outputs)


class CompiledGraph:
    """One graph of Dynamo's, quantized and lowered. Called with Dynamo's flat arguments; several threads may call it.

    Each call compares identity, version, place and a few words of every weight with those that were packed. Where one
    changed (in place, swapped, load_state_dict), or where other weights come than before (layers that share their
    forward, a deep copy), the graph is quantized and lowered for them. What was made for weights lives as long as they
    do. Changes in place that count no version (through `.data`, of inference tensors) are seen by the first, middle and
    last words of weights on the CPU: one of other values alone goes unseen, as all of them do on a GPU.
    Outputs never share memory with inputs that they would be views of.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, at: Frame, asked: Any = None
    ) -> None:
        self._source = gm
        self._options = options
        self._asked = asked
        self._lock = threading.RLock()
        keep_sources(gm)
        self._statics = static_names(gm, example_inputs)
        self._templates: dict[tuple[float, ...], Template] = {}
        self._scalars: tuple[int, ...] = ()
        self._warm = Warm(gm, options, self._statics)
        self._broken: Built | None = None  # set where the graph itself, whatever its weights, cannot be had
        self._shared: Built | None = None  # set where inputs shared memory with one that the graph changes
        self.untouched = self._make(example_inputs, at)[1].lowered is None

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        found = self._find(args)
        if found is None:
            at = frame.at_call()
            with self._lock:
                found = self._find(args) or self._make(args, at)
        template, built = found
        if built.record.frame.training:
            raise training()
        if template is None or built.lowered is None:
            return tuple(self._source.forward(*args))
        changed = template.interface.mutations.values()
        if changed and (pair := overlapping(args, template.interface.inputs, changed)) is not None:
            self._tell_shared(args, pair, frame.at_call())
            return tuple(self._source.forward(*args))
        collector = sqnr.collecting()
        if collector is not None:
            collector.add(built.record, *self._pair(template, built, args))
        return built.run(template, args)

    def _tell_shared(self, args: Sequence[Any], pair: tuple[int, int], at: Frame) -> None:
        """Say once, under strict at each call, that calls with such inputs run in torch."""
        with self._lock:
            if self._shared is not None:
                return
            placeholders = [n for n in self._source.graph.nodes if n.op == "placeholder"]
            error = refused(*(input_name(source_of(placeholders[i]), placeholders[i].name) for i in pair))
            if self._options.strict:
                raise error
            self._shared = self._untouched(args, at, error)

    def _find(self, args: Sequence[Any]) -> tuple[Template | None, Built] | None:
        """What was made for these arguments, if it still fits them."""
        if self._broken is not None:
            return None, self._broken
        template = self._templates.get(self._values(args) if self._scalars else ())
        built = None if template is None else template.find(args)
        return None if built is None else (template, built)

    def _values(self, args: Sequence[Any]) -> tuple[float, ...]:
        return tuple([float(args[i]) for i in self._scalars])

    def _make(self, args: Sequence[Any], at: Frame) -> tuple[Template | None, Built]:
        template = state = None
        try:
            live = self._live(args)
            before = State.of([args[i] for i in self._statics])
            key, found = self._stored(args, at, live)
            template = self._template(args, live, found)
            state = State.of(template.weights(args))
            built = None
            if found is not None and before.holds([args[i] for i in self._statics]):
                built = self._reopened(found, args, at)
            if built is None:
                built = self._build(template, args, at, key)
        except Exception as error:
            if self._options.strict or isinstance(error, ValueError):
                raise
            built = self._untouched(args, at, error)
        if template is None or state is None:
            self._broken = built
        else:
            template.keep(args, state, built)
        return template, built

    def _live(self, args: Sequence[Any]) -> set[int]:
        """Indices of buffers that are inputs, since their values change from call to call."""
        live = {i for t in self._templates.values() for i in t.live}
        template = self._templates.get(self._values(args))
        return live if template is None else live | template.newly_live(args)

    def _template(self, args: Sequence[Any], live: set[int], found: Found | None) -> Template:
        """The graph for these arguments without weights; captured anew for other scalars and for changing buffers."""
        template = self._templates.get(self._values(args))
        if template is not None and template.fits(args) and live == template.live:
            return template
        if found is not None:
            template = Template.known(self._source, live, found.entry.interface)
        else:
            template = Template.of(self._source, args, live)
        self._scalars = tuple(template.interface.scalars)
        while len(self._templates) >= _MOST_SCALARS:
            del self._templates[next(iter(self._templates))]
        self._templates[self._values(args)] = template
        return template

    def _stored(self, args: Sequence[Any], at: Frame, live: set[int]) -> tuple[str | None, Found | None]:
        """The key on disk, and what is kept under it. Weights that change in place (training) have none."""
        template = self._templates.get(self._values(args))
        if template is not None and live == template.live and template.knows(args):
            return None, None
        key = self._warm.key(args, live, self._translation(args, at), packed=self._is_packed(at))
        return key, self._warm.find(key)

    def _reopened(self, found: Found, args: Sequence[Any], at: Frame) -> Built | None:
        """What was built before, perhaps by another process; None where its files cannot be run."""
        lowered = self._warm.reopen(found)
        if lowered is None:
            return None
        entry = found.entry
        notes = [*self._lacking(args, at), *entry.notes]
        self._tell(notes, at)
        return Built(lowered, self._record(args, at, entry.rows, notes), self._translation(args, at))

    def _build(self, template: Template, args: Sequence[Any], at: Frame, key: str | None) -> Built:
        translation = self._translation(args, at)
        gm = template.with_weights(args, translation)
        lacking = self._lacking(args, at)
        notes = self._quantize(gm, at)
        with self._warm.storing(key) as storing:
            lowered, saved = self._lowered(gm, storing)
            notes += [*lowered.notes, *getattr(lowered, "slow", ())]
            all_notes = [*lacking, *notes]
            self._tell(all_notes, at)
            rows = graph_rows(gm, lowered.kernels, all_notes)
            program = getattr(lowered, "stored", None) if saved else None
            if storing is not None and program is not None:
                entry = Entry(template.interface, tuple(notes), tuple(rows), program)
                found = self._warm.kept(entry, storing)
                lowered = (found and self._warm.reopen(found)) or lowered
                graph.let_go(gm)
                give_back()
        return Built(lowered, self._record(args, at, rows, all_notes, lowered=lowered), translation)

    def _lowered(self, gm: fx.GraphModule, storing: Storing | None) -> tuple[Any, bool]:
        """Lowered, and whether its models are saved; where the disk refuses them, it is lowered all the same."""
        name, strict, mode = self._options.backend, self._options.strict, self._options.mode
        if storing is None:
            return lower(gm, name, strict=strict, mode=mode), False
        try:
            return lower(gm, name, strict=strict, mode=mode, folder=storing.folder), True
        except RuntimeError as error:
            if isinstance(error, UnsupportedError):
                raise
            lowered = lower(gm, name, strict=strict, mode=mode)
            storing.cache.unusable(error)
            return lowered, False

    def _is_packed(self, at: Frame) -> bool:
        """Whether the model holds parts that qfx.quantize quantized, or is to have a quantized cache."""
        return at.root is not None and is_quantized(at.root)

    def _quantize(self, gm: fx.GraphModule, at: Frame) -> list[Note]:
        """By the plan or recipe. A model that qfx.quantize quantized keeps what it left in float, unless asked."""
        recipe, kv = self._options.recipe, self._options.kv
        if self._options.default and self._is_packed(at):
            if kv is None:
                return []
            recipe = Recipe(name="kv", rules=(kv,))
        notes = apply_plan(gm, self._options.plan, recipe)
        return [*notes, *_float_cache(gm, kv)]

    def _pair(
        self, template: Template, built: Built, args: Sequence[Any]
    ) -> tuple[fx.GraphModule, fx.GraphModule, list[Any]]:
        """The float and the quantized graph for these weights, made for a moment, and the graph's inputs."""
        plain, quantized = (template.with_weights(args, built.translation) for _ in range(2))
        self._quantize(quantized, built.record.frame)
        return plain, quantized, list(template.inputs(args))

    def _translation(self, args: Sequence[Any], at: Frame) -> Translation:
        """From the names in the frame's module to those in the model that was compiled."""
        known = {} if at.root is None else names.index(at.root)
        return Translation.between([(fqn, args[i]) for i, fqn in self._statics.items()], known)

    def _lacking(self, args: Sequence[Any], at: Frame) -> list[Note]:
        """Notes where the plan speaks of nodes that the model cannot have, where a cache is asked for, and where the
        model's encoder is in no graph."""
        left = encoder_apart(at.root, [args[i] for i in self._statics], all_records())
        if self._options.plan is None or at.root is None:
            return [*left, *self._caches(at)]
        own = {name for names_ in names.index(at.root).values() for name in names_}
        own |= {name for name, _ in at.root.named_modules(remove_duplicate=False)}
        attentions = attending.planned(self._options.plan)  # called by their module and operator
        named = {fqn: fqn.rpartition(".")[0] if fqn in attentions else fqn for fqn in self._options.plan.annotations}
        lost = [fqn for fqn, name in named.items() if name not in own]
        what = f"the plan gives formats to {len(lost)} name(s) that the model lacks: {', '.join(lost[:3])}"
        return [*left, *([Note("plan", what, "plan again for this model")] if lost else []), *self._caches(at)]

    def _caches(self, at: Frame) -> list[Note]:
        """A note where formats of a cache are asked of a model that has none: whoever calls it makes its cache."""
        plan, recipe = self._options.plan, self._options.recipe
        if not (recipe.cache_rules if plan is None else plan.caches) or (at.root is not None and caches_of(at.root)):
            return []
        step = "pass past_key_values=qfx.QuantizedCache(model.config, ...), or call qfx.quantize with it before"
        return [Note("cache", "formats of a cache have no effect here: whoever calls the model makes its cache", step)]

    def _untouched(self, args: Sequence[Any], at: Frame, error: Exception) -> Built:
        reason = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        next_step = "see the cause above; strict=True turns this into an error"
        note = Note("graph", f"runs in torch, not quantized: {reason}", next_step, at.place)
        self._tell([note], at)
        record = self._record(args, at, (), [note], failed=reason)
        return Built(None, record, Translation())

    def _record(
        self,
        args: Sequence[Any],
        at: Frame,
        rows: Sequence[Row],
        notes: Sequence[Note],
        failed: str = "",
        lowered: Any = None,
    ) -> GraphRecord:
        translation = self._translation(args, at)
        weights = tuple((translation(fqn), weakref.ref(args[i])) for i, fqn in self._statics.items())
        first_call = functools.partial(getattr, lowered, "first_call", None)
        return remember(GraphRecord(tuple(rows), tuple(notes), weights, at, self._asked, failed, first_call))

    def _tell(self, notes: Sequence[Note], at: Frame) -> None:
        """Say what no graph of the same model has said before: a graph for other shapes has the same to say."""
        own = [r for r in all_records() if r.frame.same_as(at) and r.options == self._asked]
        said = {note for record in own for note in record.notes}
        told([n for n in notes if n not in said], strict=self._options.strict)


def lower(gm: fx.GraphModule, name: str, *, strict: bool, mode: str | None = None, folder: Path | None = None) -> Any:
    """Lower a quantized graph with the backend of that name; "auto" is ONNX Runtime for graphs on the CPU, else Triton.

    mode: Inductor's, for Triton. folder: where ONNX Runtime saves its models.
    """
    devices = {v.device.type for v in map(graph.val, gm.graph.nodes) if isinstance(v, Tensor)}
    usual = "onnx" if devices <= {"cpu", "meta"} else "triton"
    name = usual if name == "auto" else name
    if name in ("openvino", "triton"):
        try:
            return _lower(gm, name, mode)
        except UnsupportedError as error:
            if strict:
                raise
            instead = "onnx" if usual == "onnx" else "reference"
            lowered = lower(gm, instead, strict=strict, folder=folder)
            title, other = _TITLES[name], _TITLES[instead]
            step = "leave the option 'backend' out, or rewrite this part of the model"
            if name == usual:
                step = "see the cause; the results are as asked, their computation is slow"
            lowered.notes.append(Note("graph", f"runs in {other}, since {title} does not take it: {error}", step))
            return lowered
    if name == "onnx":
        from qfx.backends import onnx

        return onnx.lower(gm, strict=strict, folder=folder)
    from qfx.backends import reference

    return reference.lower(gm, strict=strict)


_TITLES = {"openvino": "OpenVINO", "triton": "Triton", "onnx": "ONNX Runtime", "reference": "torch's reference kernels"}


def _lower(gm: fx.GraphModule, name: str, mode: str | None) -> Any:
    """With one of the backends that may not be there, or not take every graph."""
    if name == "openvino":
        from qfx.backends import openvino

        return openvino.lower(gm)
    from qfx.backends import triton

    return triton.lower(gm, mode=mode, share=True)  # graphs of one model for other sizes hold its weights once


def _float_cache(gm: fx.GraphModule, kv: Rule | None) -> list[Note]:
    """Notes on what the option `kv` is not about: what is cached, and attention that reads a cache of packed codes."""
    if kv is None:
        return []
    names = [graph.schema_name(n) for n in gm.graph.nodes]
    asked, notes = " ".join(f"{role}={text}" for role, text in kv.texts.items()), []
    if "qfx::cache_attention" in names:
        reason = f"{asked} was asked, but attention reads the codes of a qfx.QuantizedCache, whose own formats hold"
        notes.append(Note("kv", reason, "leave the option kv out, or give the cache these formats"))
    if "qfx::quantized_attention" in names:
        own = "a cache that is handed in, and one that is handed out, stays as it is (float, if it is no quantized one)"
        step = "pass past_key_values=qfx.QuantizedCache(model.config) to store it in few bits"
        notes.append(Note("kv", f"attention multiplies {asked}; {own}", step, minor=True))
    return notes


def _warn_detached(example_inputs: Sequence[Any], at: Frame) -> None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs):
        message = explain(
            "gradients are enabled, but a graph compiled by qfx gives detached outputs",
            source=at.place or None,
            next_step="call the model under torch.no_grad() or torch.inference_mode()",
        )
        warn(message, at.place)
