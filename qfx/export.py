"""`qfx.export_onnx`: a model, quantized by a recipe or plan or as it is, as an ONNX file that runs without qfx."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from qfx import data as batches
from qfx import graph
from qfx.capture import Captured, capture_export
from qfx.data import Call
from qfx.decoding import decoder, encoder_decoder
from qfx.decoding.cache_scales import cache_formats, cache_scales, need_data
from qfx.errors import Note, UnsupportedError, check_flags, explain
from qfx.format import Format
from qfx.hf.hub import is_causal_lm
from qfx.inputs import example_inputs, need_inputs, without_cache
from qfx.kv.files import asked_caches, for_file
from qfx.live.attending import without
from qfx.live.segments import asked
from qfx.other_sizes import other_sizes
from qfx.passes._match import arguments
from qfx.pipeline import apply_plan, prepare, told
from qfx.plan import Plan, versions
from qfx.quantize import evaluating
from qfx.quantize import plan as make_plan
from qfx.recipe import Recipe
from qfx.reporting.rows import segment_of
from qfx.storage.files import staged_folder
from qfx.storage.spill import Spill, give_back

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
    runtime: str = "onnxruntime", kv: str | Mapping[str, str] | None = None, prefill: str | None = None,
    data: Iterable[Any] | None = None, dynamic: bool = True, strict: bool = False, external_bytes: int | None = None,
    all_logits: bool = False,
) -> Exported:  # fmt: skip
    """Write `model` as ONNX to `path` (.onnx); the model is not changed.

    For a causal language model `path` may be a folder, a name without an ending: then one graph with a cache of keys
    and values is written, which reads prompts and writes token after token, with the configuration that `qfx.onnx.load`
    and onnxruntime-genai need.
    It gives the logits of the last token, with `all_logits` those of every new token. The tokenizer is yours to save.
    An encoder-decoder goes to a folder too: `encoder.onnx` runs once and gives the keys and values that the decoder's
    layers attend to, `model.onnx` is the decoder with its cache, which gives the logits of every new token.

    args: example inputs: a tensor, a tuple, or a dict of keyword arguments; None for a model of transformers whose
    inputs its configuration tells. Sizes that the model lets vary vary in the file (`dynamic`); give the example sizes
    of 2 or more there. recipe, plan: as for qfx.quantize (a recipe with static activations needs `data`); without both
    the model is written as it is, which is quantized where qfx.quantize quantized it. runtime: "onnxruntime" uses its
    own operators where they are faster, "standard" only those of ai.onnx. external_bytes: weights of more bytes in all
    go to `<path>.data` (32 MiB; always where a file would pass 2 GB), which takes less memory to open than one file.
    prefill: "i8/tok" rounds the input of weight-only linears to 8 bits per token where 16 or more tokens are read at
    once, and computes with integers: prompts are read faster; the session then holds these weights in 8 bits too.
    kv: "i8" or "i4" stores a decoder's cache in 8 or 4 bits, with a fixed scale for each channel of each head, found on
    `data` (batches of token ids). A prompt still attends in float before it is stored. Left out: as near as the file
    comes to the caches of the plan, the recipe or the model (see `qfx.kv.files`), which a warning says.
    Quantized weights lie in the file as their codes; those of formats without a kernel are unpacked by what reads it,
    which a warning says. What cannot be had as asked is a warning too, under `strict` an UnsupportedError.
    Raises ValueError for bad arguments, UnsupportedError for a model without an ONNX form, OSError where the files
    cannot be written: then nothing is left behind.
    """
    check_flags(dynamic=dynamic, strict=strict, all_logits=all_logits)
    _check_model(model)
    checked_ending(path)
    folder = Path(path).suffix != ".onnx" and is_causal_lm(model)
    pair = Path(path).suffix != ".onnx" and not folder and encoder_decoder.is_encoder_decoder(model)
    target = Path(path) / DECODER if folder or pair else _checked_path(path)
    _check_options(runtime, recipe, plan)
    _check_prefill(prefill, runtime)
    caches = _checked_kv(kv, folder=folder, data=data)
    asked = None if recipe is None else Recipe.parse(recipe)
    held = asked_caches(model, asked, plan)
    found, beside = for_file(held, kv, has_cache=folder, data=data is not None)
    caches = cache_formats(found) if caches is None else caches
    if pair:
        how: Any = {"runtime": runtime, "prefill": prefill is not None, "external_bytes": external_bytes}
        how["beside"] = beside
        return _pair(model, args, target.parent, recipe=asked, plan=plan, data=data, strict=strict, **how)
    if folder:
        data = list(data) if isinstance(data, Iterator) else data  # the recipe reads it, and the caches
        prepared = functools.partial(
            _decoder,
            model,
            target,
            recipe=asked,
            plan=plan,
            data=data,
            runtime=runtime,
            caches=caches,
            beside=beside,
        )
        return prepared(
            prefill=prefill is not None, strict=strict, all_logits=all_logits, external_bytes=external_bytes
        )
    call = _call(model, args)
    with evaluating(model):
        if asked is not None and asked.needs_data:
            plan = make_plan(model, asked, data, strict=strict)
        with Spill(target.parent) as spill:
            captured, notes = _quantized(model, call, asked, plan, spill, dynamic=dynamic, strict=strict)
            how = {"prefill": prefill is not None, "strict": strict, "external_bytes": external_bytes}
            return _write(captured, [*beside, *notes], target, runtime, spill, **how)


def _decoder(
    model: nn.Module, target: Path, *, recipe: Recipe | None, plan: Plan | None, data: Any, runtime: str, strict: bool,
    all_logits: bool, external_bytes: int | None, prefill: bool, caches: Mapping[str, Format] | None,
    beside: list[Note],
) -> Exported:  # fmt: skip
    """The folder of a decoder: all of its files, or none. The configuration comes last and makes it complete."""
    from qfx.backends.onnx import genai

    folder = target.parent
    with evaluating(model), staged_folder(folder, last=genai.CONFIG) as stage, Spill(folder) as spill:
        if recipe is not None and recipe.needs_data:
            plan = make_plan(model, recipe, data, strict=strict)
        if plan is not None:
            plan.check(model, strict=strict)
        captured, names = decoder.capture_decoder(model, last_only=not all_logits)
        recipe, plan, left = (recipe, plan, []) if caches is None else without(recipe, plan)
        notes = [*beside, *left, *_planned(captured, recipe, plan, spill, strict=strict)]
        if not decoder.fuse_cache(captured, names):
            notes.append(_not_shared(model, captured))
        if caches is not None:
            notes += decoder.quantize_cache(captured, names, caches, cache_scales(model, data, caches))
        how: Any = {"prefill": prefill, "strict": strict, "external_bytes": external_bytes}
        written = _write(captured, notes, stage / target.name, runtime, spill, **how, inputs=names)
        sizes = decoder.stored_sizes(captured, names)
        genai.write_config(model, stage, written.inputs, sizes, shared=written.shared_cache)
    return replace(written, files=tuple(folder / file.name for file in written.files))


def _pair(
    model: nn.Module, args: Any, folder: Path, *, recipe: Recipe | None, plan: Plan | None, data: Any, strict: bool,
    beside: list[Note], **how: Any,
) -> Exported:  # fmt: skip
    """The folder of an encoder-decoder: all of its files, or none."""
    at = encoder_decoder.DOCUMENT
    with evaluating(model), staged_folder(folder, last=at) as stage, Spill(folder) as spill:
        inputs = encoder_decoder.encoder_inputs(model, args)
        if recipe is not None and recipe.needs_data:
            plan = make_plan(model, recipe, data, strict=strict)
        if plan is not None:
            plan.check(model, strict=strict)
        how["strict"] = strict
        sizes = encoder_decoder.cache_sizes(model, inputs)
        captured, names, notes = encoder_decoder.capture_encoder(model, inputs)
        notes += [*beside, *encoder_decoder.own_generate(model)]
        notes += _planned(captured, recipe, plan, spill, strict=strict)
        encoder = _write(captured, notes, stage / encoder_decoder.ENCODER, spill=spill, **how, inputs=names)
        captured, names, pasts = encoder_decoder.capture_decoder(model, inputs, sizes)
        notes = _planned(captured, recipe, plan, spill, strict=strict)
        if not encoder_decoder.fuse_cache(captured, pasts):
            notes.append(_not_shared(model, captured))
        written = _write(captured, notes, stage / encoder_decoder.DECODER, spill=spill, **how, inputs=names)
        encoder_decoder.write_document(model, stage, sorted(inputs.keys() - set(encoder.inputs)))
    return Exported(
        files=tuple(folder / file.name for file in (*written.files, *encoder.files)),
        nbytes=written.nbytes + encoder.nbytes,
        opset=max(written.opset, encoder.opset),
        inputs=written.inputs,
        outputs=written.outputs,
        notes=(*encoder.notes, *written.notes),
        formats={**encoder.formats, **written.formats},
        shared_cache=written.shared_cache,
    )


def _write(
    captured: Captured, notes: list[Note], target: Path, runtime: str, spill: Spill, *, strict: bool,
    external_bytes: int | None, prefill: bool, inputs: Mapping[str, str] | None = None,
) -> Exported:  # fmt: skip
    from qfx.backends.onnx import export, lowering
    from qfx.backends.onnx.session_options import INTEGERS, INTEGERS_KEY, has_integer_products

    gm = captured.gm
    outputs = _outputs(captured)
    give_back()
    builder, built = lowering.build(gm, runtime=runtime, prefill=prefill)
    give_back()
    _assert_no_floats(builder, gm)
    notes = [*notes, *built.notes]
    told(notes, strict=strict)
    formats = _formats(gm)
    metadata = {
        "qfx.formats": json.dumps(formats, sort_keys=True),
        "qfx.versions": json.dumps(versions(), sort_keys=True),
        "qfx.runtime": runtime,
        **({"qfx.cache": "shared" if _grows_in_place(built, inputs) else "copied"} if _pasts(inputs) else {}),
        **({INTEGERS_KEY: INTEGERS} if has_integer_products(built.model.graph.node) else {}),
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
        rest=spill.rest,
    )
    names = tuple(i.name for i in built.model.graph.input)
    found = tuple(o.name for o in built.model.graph.output)
    shared_cache = metadata.get("qfx.cache") == "shared"
    return Exported(written.files, written.nbytes, written.opset, names, found, tuple(notes), formats, shared_cache)


def _grows_in_place(built: Any, inputs: Mapping[str, str] | None) -> bool:
    """Does every layer's cache grow where it lies?"""
    from qfx.backends.onnx.branch import every_node

    nodes = built.model.graph.node
    fused = [node for node in nodes if any(n.op_type == "GroupQueryAttention" for n in every_node([node]))]
    return 2 * len(fused) == len(_pasts(inputs))


def _pasts(inputs: Mapping[str, str] | None) -> list[str]:
    """The inputs that are caches which grow."""
    return [name for name in (inputs or {}).values() if name.startswith("past_key_values.")]


def _not_shared(model: nn.Module, captured: Captured) -> Note:
    own = any(graph.schema_name(n) == "qfx::quantized_attention" for n in captured.gm.graph.nodes)
    formats = "attention in formats of its own reads its cache in float"
    why = formats if own else "its cache is read by more than attention"
    reason = f"{why}: it grows by a copy for each token"
    return Note(type(model).__name__, reason, "none needed for the result", minor=True)


def _quantized(
    model: nn.Module, call: Call, recipe: Recipe | None, plan: Plan | None, spill: Spill, *, dynamic: bool, strict: bool
) -> tuple[Captured, list[Note]]:
    """The quantized graph; the model's own tensors are read, none is changed."""
    args, kwargs = call
    if plan is not None:
        plan.check(model, strict=strict)
    captured = capture_export(model, args, without_cache(model, kwargs, args), dynamic=dynamic)
    if captured.mutations:
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} changes its inputs or buffers, which a file cannot",
                found=", ".join(sorted(captured.gm.meta["qfx_mutations"].values())),
                next_step="export a forward that returns what it changes",
            )
        )
    notes = other_sizes(captured, model, args, kwargs, type(model).__name__)
    if captured.first_axis:
        what = "only the first axis of each input varies in the file: sizes of the others become too long to trace"
        notes.append(Note(type(model).__name__, what, "give an example (args=) of the size that is needed", minor=True))
    return captured, [*notes, *_planned(captured, recipe, plan, spill, strict=strict)]


def _planned(captured: Captured, recipe: Recipe | None, plan: Plan | None, spill: Spill, *, strict: bool) -> list[Note]:
    """Bring the graph to the form in which plans speak of it, and quantize it where that is asked."""
    notes = prepare(captured.gm)
    give_back()  # tracing makes much that goes
    if plan is None and recipe is None:
        return notes
    return [*notes, *apply_plan(captured.gm, plan, recipe or Recipe.parse("w8a8"), strict=strict, keep=spill.keep)]


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
        roles = {r: str(given[k]) for r, k in _ROLES.items() if given.get(k)}
        fqn, segment = graph.fqn_of(node), segment_of(node)
        if segment is not None:
            axis, number, part = segment
            parts[fqn] = [*(parts[fqn] if number else []), part]
            roles["w"] = asked(parts[fqn], axis)
        if roles:
            found[fqn] = roles
    return found


_ROLES = {role: f"{role}_format" for role in "xwqkvp"}


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
    if any(type(value).__module__ == "qfx.kv.cache" for value in (*call[0], *call[1].values())):
        step = "export to a folder, with kv='i8' or kv='i4' and data: the file then has a cache of its own"
        raise UnsupportedError(explain("a QuantizedCache is no input of a file", next_step=step))
    return call


def checked_ending(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a path with an ending of its own, such as m.onx, which would become a folder.

    What has digits is no ending (llama-3.2, gpt2.w8a8), nor are several words (facebook.opt-125m); a folder that is
    there may be named anyhow.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx" or not suffix[1:].isalpha() or Path(path).is_dir():
        return
    raise ValueError(
        explain(
            f"unknown ending {suffix!r}",
            expected="a file that ends in .onnx; for a language model or an encoder-decoder also a folder",
            found=str(path),
            next_step=f"{Path(path).with_suffix('.onnx')}, or the name of a folder without an ending",
        )
    )


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


def _checked_kv(kv: str | Mapping[str, str] | None, *, folder: bool, data: Any) -> dict[str, Format] | None:
    formats = cache_formats(kv)
    if formats is None:
        return None
    if not folder:
        raise ValueError(
            explain(
                f"kv={kv!r} without a cache",
                expected="a causal language model of transformers, and a folder to write it to",
                next_step="leave kv= out, or give a path without .onnx",
            )
        )
    if data is None:
        raise need_data(kv)
    return formats


def _check_options(runtime: str, recipe: Any, plan: Plan | None) -> None:
    if runtime not in RUNTIMES:
        raise ValueError(explain("unknown runtime", expected=" or ".join(map(repr, RUNTIMES)), found=repr(runtime)))
    if recipe is not None and plan is not None:
        raise ValueError(explain("both a recipe and a plan", expected="one of them", next_step="leave one out"))
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(explain("the plan", expected="a qfx.Plan", found=type(plan).__name__))
