"""`qfx.export_onnx`: a model, quantized by a recipe or plan or as it is, as an ONNX file that runs without qfx."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qfx import data as batches
from qfx.capture import capture_export
from qfx.data import Call
from qfx.decoding.cache_scales import cache_formats, need_data
from qfx.decoding.encoder_decoder import is_encoder_decoder
from qfx.decoding.export import export_decoder, export_encoder_decoder
from qfx.errors import UnsupportedError, check_flags, explain
from qfx.exported import Exported, Order, quantize, write
from qfx.format import Format
from qfx.hf.hub import is_causal_lm
from qfx.inputs import beside_tokens, example_inputs, need_inputs, without_cache
from qfx.kv.files import asked_caches, for_file
from qfx.other_sizes import fixed_sizes, other_sizes
from qfx.plan import Plan
from qfx.quantize import check_float, check_unprepared, checked_module, evaluating
from qfx.recipe import Recipe
from qfx.storage.files import path_of
from qfx.storage.spill import Spill

RUNTIMES = ("onnxruntime", "standard")


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
    inputs its configuration tells (token ids with their mask, and with types where there are several). Sizes that the
    model lets vary vary in the file (`dynamic`); give the example sizes of 2 or more there. recipe, plan: as for
    qfx.quantize (a recipe with static activations needs `data`), of a float model; without both the model is written as
    it is, which is quantized where qfx.quantize quantized it. runtime: "onnxruntime" uses its own operators where they
    are faster, "standard" only those of ai.onnx. external_bytes: weights of more bytes in all
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
    checked_module(model, "export the module given to torch.compile")
    checked_ending(path)
    folder = Path(path).suffix != ".onnx" and is_causal_lm(model)
    pair = Path(path).suffix != ".onnx" and not folder and is_encoder_decoder(model)
    target = Path(path) if folder or pair else _checked_path(path)
    _check_options(runtime, recipe, plan)
    _check_external(external_bytes)
    _check_prefill(prefill, runtime)
    caches = _checked_kv(kv, folder=folder, data=data)
    asked = None if recipe is None else Recipe.parse(recipe)
    check_unprepared(model)
    if (plan is not None and plan.annotations) or (asked is not None and not asked.only_caches):
        check_float(model, "export")
    held = asked_caches(model, asked, plan)
    found, beside = for_file(held, kv, has_cache=folder, data=data is not None)
    if folder and isinstance(data, Iterator):
        data = list(data)  # the recipe reads it, and the caches
    order = Order(asked, plan, data, runtime, prefill is not None, strict, external_bytes, tuple(beside))
    if pair:
        return export_encoder_decoder(model, args, target, order)
    if folder:
        formats = cache_formats(found) if caches is None else caches
        return export_decoder(model, target, order, caches=formats, all_logits=all_logits)
    return _export_file(model, _call(model, args), target, order, dynamic=dynamic)


def _export_file(model: nn.Module, call: Call, target: Path, order: Order, *, dynamic: bool) -> Exported:
    """A model of one forward; its own tensors are read, none is changed."""
    args, kwargs = call
    with evaluating(model), Spill(target.parent) as spill:
        order = order.planned(model)
        captured = capture_export(model, args, without_cache(model, kwargs, args), dynamic=dynamic)
        notes = other_sizes(captured, model, args, kwargs, type(model).__name__)
        notes += fixed_sizes(captured, type(model).__name__) if dynamic else []
        notes = [*order.beside, *notes, *quantize(captured, order, spill)]
        return write(captured, notes, target, order, spill)


def _call(model: nn.Module, args: Any) -> Call:
    if args is None:
        found = example_inputs(model)
        if found is None:
            raise need_inputs(model)
        return (), {**found, **beside_tokens(model, found)}
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
    suffix = path_of(path).suffix
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


def _check_external(count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        step = "0 for a file of weights at any size; leave it out for one beyond 32 MiB"
        raise ValueError(explain("external_bytes=", expected="bytes, or None", found=repr(count), next_step=step))


def _check_options(runtime: str, recipe: Any, plan: Plan | None) -> None:
    if runtime not in RUNTIMES:
        raise ValueError(explain("unknown runtime", expected=" or ".join(map(repr, RUNTIMES)), found=repr(runtime)))
    if recipe is not None and plan is not None:
        raise ValueError(explain("both a recipe and a plan", expected="one of them", next_step="leave one out"))
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(explain("the plan", expected="a qfx.Plan", found=type(plan).__name__))
