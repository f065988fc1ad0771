"""`qfx.export_onnx`: a model, quantized by a recipe or plan or as it is, as an ONNX file that runs without qfx."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from qfx import data as batches
from qfx import decoder, graph
from qfx.capture import Captured, capture_export
from qfx.data import Call
from qfx.errors import Note, UnsupportedError, explain
from qfx.hub import is_causal_lm
from qfx.inputs import example_inputs, need_inputs, without_cache
from qfx.passes._match import arguments
from qfx.pipeline import apply_plan, prepare, told
from qfx.plan import Plan, versions
from qfx.quantize import evaluating
from qfx.quantize import plan as make_plan
from qfx.recipe import Recipe
from qfx.rows import segment_of
from qfx.segments import asked

RUNTIMES = ("onnxruntime", "standard")
DECODER = "model.onnx"  # the name of a decoder's model in its folder


@dataclass(frozen=True)
class Exported:
    """What was written. files: the model first. notes: what is not as asked. formats: by node, as in the metadata."""

    files: tuple[Path, ...]
    nbytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[Note, ...] = field(repr=False)
    formats: Mapping[str, Mapping[str, str]] = field(repr=False)
    shared_cache: bool = False  # a decoder whose cache grows where it lies

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.files[0]


def export_onnx(
    model: nn.Module, args: Any, path: str | os.PathLike[str], *, recipe: Any = None, plan: Plan | None = None,
    runtime: str = "onnxruntime", kv: str | None = None, prefill: str | None = None, data: Iterable[Any] | None = None,
    dynamic: bool = True, strict: bool = False, external_bytes: int | None = None, all_logits: bool = False,
) -> Exported:  # fmt: skip
    """Write `model` as ONNX to `path` (.onnx); the model is not changed.

    For a causal language model `path` may be a folder: then one graph with a cache of keys and values is written, which
    reads prompts and writes token after token, with the configuration that `qfx.onnx.load` and onnxruntime-genai need.
    It gives the logits of the last token, with `all_logits` those of every new token. The tokenizer is yours to save.

    args: example inputs: a tensor, a tuple, or a dict of keyword arguments; None for a model of transformers whose
    inputs its configuration tells. Sizes that the model lets vary vary in the file (`dynamic`); give the example sizes
    of 2 or more there. recipe, plan: as for qfx.quantize (a recipe with static activations needs `data`); without both
    the model is written as it is, which is quantized where qfx.quantize quantized it. runtime: "onnxruntime" uses its
    own operators where they are faster, "standard" only those of ai.onnx. external_bytes: weights of more bytes in all
    go to `<path>.data` (64 MiB; always where a file would pass 2 GB).
    prefill: "i8/tok" rounds the input of weight-only linears to 8 bits per token where 16 or more tokens are read at
    once, and computes with integers: prompts are read faster; the session then holds these weights in 8 bits too.
    Quantized weights lie in the file as their codes; those of formats without a kernel are unpacked by what reads it,
    which a warning says. What cannot be had as asked is a warning too, under `strict` an UnsupportedError.
    Raises ValueError for bad arguments, UnsupportedError for a model without an ONNX form, OSError where the files
    cannot be written: then nothing is left behind.
    """
    _check_model(model)
    folder = Path(path).suffix != ".onnx" and is_causal_lm(model)
    target = Path(path) / DECODER if folder else _checked_path(path)
    _check_options(runtime, kv, recipe, plan)
    _check_prefill(prefill, runtime)
    asked = None if recipe is None else Recipe.parse(recipe)
    if folder:
        prepared = functools.partial(_decoder, model, target, recipe=asked, plan=plan, data=data, runtime=runtime)
        return prepared(
            prefill=prefill is not None, strict=strict, all_logits=all_logits, external_bytes=external_bytes
        )
    call = _call(model, args)
    with evaluating(model):
        if asked is not None and asked.needs_data:
            plan = make_plan(model, asked, data, strict=strict)
        captured, notes = _quantized(model, call, asked, plan, dynamic=dynamic, strict=strict)
        how: Any = {"prefill": prefill is not None, "strict": strict, "external_bytes": external_bytes}
        return _write(captured, notes, target, runtime, **how)


def _decoder(
    model: nn.Module, target: Path, *, recipe: Recipe | None, plan: Plan | None, data: Any, runtime: str, strict: bool,
    all_logits: bool, external_bytes: int | None, prefill: bool,
) -> Exported:  # fmt: skip
    """The folder of a decoder; its configuration is written last and makes it complete."""
    from qfx.backends.onnx import genai

    with evaluating(model):
        if recipe is not None and recipe.needs_data:
            plan = make_plan(model, recipe, data, strict=strict)
        if plan is not None:
            plan.check(model, strict=strict)
        captured, names = decoder.capture_decoder(model, last_only=not all_logits)
        notes = _planned(captured, recipe, plan, strict=strict)
        if not decoder.fuse_cache(captured, names):
            reason = "its cache is read by more than attention: it grows by a copy for each token"
            notes.append(Note(type(model).__name__, reason, "none needed for the result", minor=True))
        how: Any = {"prefill": prefill, "strict": strict, "external_bytes": external_bytes}
        written = _write(captured, notes, target, runtime, **how, inputs=names)
        sizes = decoder.cache_sizes(model)
    genai.write_config(model, target.parent, written.inputs, sizes, shared=written.shared_cache)
    return written


def _write(
    captured: Captured, notes: list[Note], target: Path, runtime: str, *, strict: bool, external_bytes: int | None,
    prefill: bool, inputs: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    from qfx.backends.onnx import export, lowering

    gm = captured.gm
    outputs = _outputs(captured)
    builder, built = lowering.build(gm, runtime=runtime, prefill=prefill)
    _assert_no_floats(builder, gm)
    notes = [*notes, *built.notes]
    told(notes, strict=strict)
    formats = _formats(gm)
    metadata = {
        "qfx.formats": json.dumps(formats, sort_keys=True),
        "qfx.versions": json.dumps(versions(), sort_keys=True),
        "qfx.runtime": runtime,
        **({"qfx.cache": "shared" if _grows_in_place(built, inputs) else "copied"} if inputs else {}),
        "qfx.notes": json.dumps([str(note) for note in notes]),
    }
    written = export.write(
        builder,
        built,
        target,
        outputs=outputs,
        documents={n.name: f"{graph.fqn_of(n)}: {graph.op_name(n)}" for n in gm.graph.nodes if n.op == "call_function"},
        metadata=metadata,
        external_bytes=export.EXTERNAL_BYTES if external_bytes is None else external_bytes,
        inputs=inputs,
    )
    names = tuple(i.name for i in built.model.graph.input)
    found = tuple(o.name for o in built.model.graph.output)
    shared_cache = metadata.get("qfx.cache") == "shared"
    return Exported(written.files, written.nbytes, written.opset, names, found, tuple(notes), formats, shared_cache)


def _grows_in_place(built: Any, inputs: Mapping[str, str]) -> bool:
    """Does every layer's cache grow where it lies?"""
    fused = [node for node in built.model.graph.node if node.op_type == "GroupQueryAttention"]
    return 2 * len(fused) == len(inputs)


def _quantized(
    model: nn.Module, call: Call, recipe: Recipe | None, plan: Plan | None, *, dynamic: bool, strict: bool
) -> tuple[Captured, list[Note]]:
    """The quantized graph; the model's own tensors are read, none is changed."""
    args, kwargs = call
    if plan is not None:
        plan.check(model, strict=strict)
    captured = capture_export(model, args, kwargs if args else without_cache(model, kwargs), dynamic=dynamic)
    if captured.mutations:
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} changes its inputs or buffers, which a file cannot",
                found=", ".join(sorted(captured.gm.meta["qfx_mutations"].values())),
                next_step="export a forward that returns what it changes",
            )
        )
    return captured, _planned(captured, recipe, plan, strict=strict)


def _planned(captured: Captured, recipe: Recipe | None, plan: Plan | None, *, strict: bool) -> list[Note]:
    """Bring the graph to the form in which plans speak of it, and quantize it where that is asked."""
    notes = prepare(captured.gm)
    if plan is None and recipe is None:
        return notes
    return [*notes, *apply_plan(captured.gm, plan, recipe or Recipe.parse("w8a8"), strict=strict)]


def _outputs(captured: Captured) -> list[str]:
    """A name for each distinct output of the graph."""
    results = captured.gm.graph.output_node().args[0]
    assert isinstance(results, Sequence)
    named: dict[fx.Node, str] = {}
    for result, name in zip(results, captured.outputs, strict=True):
        if isinstance(result, fx.Node):
            named.setdefault(result, name)
    if not named:
        raise UnsupportedError("expected a model that returns tensors, found none; next step: return at least one")
    return list(named.values())


def _formats(gm: fx.GraphModule) -> dict[str, dict[str, str]]:
    """Formats of the quantized nodes by name."""
    found: dict[str, dict[str, str]] = {}
    parts: dict[str, list[tuple[str, int]]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("qfx."):
            continue
        given = arguments(node)
        roles = {r: str(given[k]) for r, k in (("x", "x_format"), ("w", "w_format")) if given.get(k)}
        fqn, segment = graph.fqn_of(node), segment_of(node)
        if segment is not None:
            axis, number, part = segment
            parts[fqn] = [*(parts[fqn] if number else []), part]
            roles["w"] = asked(parts[fqn], axis)
        if roles:
            found[fqn] = roles
    return found


def _assert_no_floats(builder: Any, gm: fx.GraphModule) -> None:
    """No quantized weight lies in the file as float32."""
    from qfx.backends.onnx.branch import read_by

    read = {name for node in builder.nodes for name in read_by(node)}
    weights = [str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and f"{n.target}.f32" in read]
    assert not weights, f"float copies of quantized weights: {weights[:3]}"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(explain("a model is needed", expected="a torch.nn.Module", found=type(model).__name__))
    if hasattr(model, "_orig_mod"):
        raise ValueError(explain("the model is compiled", next_step="export the module given to torch.compile"))


def _call(model: nn.Module, args: Any) -> Call:
    if args is None:
        found = example_inputs(model)
        if found is None:
            raise need_inputs(model)
        return (), found
    (call,) = batches.calls(model, [args])
    return call


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(
            explain("the path of the file to write", expected="a name that ends in .onnx", found=str(path))
        )
    if target.is_dir():
        raise ValueError(explain("no path of a model", expected="a file", found=f"the folder {target}"))
    return target


def _check_prefill(prefill: str | None, runtime: str) -> None:
    if prefill is None:
        return
    if prefill != "i8/tok":
        raise ValueError(explain(f"prefill={prefill!r}", expected="'i8/tok', or None", next_step="leave prefill= out"))
    if runtime == "standard":
        raise ValueError(
            explain(
                "prefill= needs kernels that ai.onnx has not",
                expected="runtime='onnxruntime'",
                found="runtime='standard'",
                next_step="leave prefill= out",
            )
        )


def _check_options(runtime: str, kv: str | None, recipe: Any, plan: Plan | None) -> None:
    if runtime not in RUNTIMES:
        raise ValueError(explain("unknown runtime", expected=" or ".join(map(repr, RUNTIMES)), found=repr(runtime)))
    if kv is not None:
        raise ValueError(explain(f"kv={kv!r}", expected="None: caches stay in float", next_step="leave kv= out"))
    if recipe is not None and plan is not None:
        raise ValueError(explain("both a recipe and a plan", expected="one of them", next_step="leave one out"))
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(explain("the plan", expected="a qfx.Plan", found=type(plan).__name__))
