"""Models that write token after token as folders: a decoder with its cache, an encoder beside its decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qfx import graph
from qfx.capture import Captured
from qfx.decoding import decoder, encoder_decoder
from qfx.decoding.cache_scales import cache_scales
from qfx.errors import Note
from qfx.exported import Exported, Order, quantize, write
from qfx.format import Format
from qfx.live.attending import without
from qfx.quantize import evaluating
from qfx.storage.files import staged_folder
from qfx.storage.spill import Spill

MODEL = "model.onnx"  # the name of a decoder's model in its folder


def export_decoder(
    model: nn.Module, folder: Path, order: Order, *, caches: Mapping[str, Format] | None, all_logits: bool
) -> Exported:
    """The folder of a decoder: all of its files, or none. The configuration comes last and makes it complete.

    caches: formats of keys ("k") and values ("v"), whose scales are found on the order's data. Raises as `write` does,
    UnsupportedError for a model that keeps no plain cache, too.
    """
    from qfx.backends.onnx import genai

    with (
        evaluating(model),
        _replacing(folder) as kept,
        staged_folder(folder, last=genai.CONFIG) as stage,
        Spill(folder) as spill,
    ):
        order = order.planned(model)
        captured, names = decoder.capture_decoder(model, last_only=not all_logits)
        notes = [*order.beside]
        if caches is not None:
            recipe, plan, left = without(order.recipe, order.plan)
            order, notes = replace(order, recipe=recipe, plan=plan), [*notes, *left]
        notes += quantize(captured, order, spill)
        if not decoder.fuse_cache(captured, names):
            notes.append(_not_shared(model, captured))
        if caches is not None:
            notes += decoder.quantize_cache(captured, names, caches, cache_scales(model, order.data, caches))
        written = write(captured, notes, stage / MODEL, order, spill, names)
        sizes = decoder.stored_sizes(captured, names)
        genai.write_config(model, stage, written.inputs, sizes, shared=written.shared_cache)
        kept.update(file.name for file in stage.iterdir())
    return replace(written, files=tuple(folder / file.name for file in written.files))


def export_encoder_decoder(model: nn.Module, args: Any, folder: Path, order: Order) -> Exported:
    """The folder of an encoder-decoder: all of its files, or none. args: as for `qfx.export_onnx`."""
    at = encoder_decoder.DOCUMENT
    with evaluating(model), _replacing(folder) as kept, staged_folder(folder, last=at) as stage, Spill(folder) as spill:
        inputs = encoder_decoder.encoder_inputs(model, args)
        order = order.planned(model)
        sizes = encoder_decoder.cache_sizes(model, inputs)
        captured, names, notes = encoder_decoder.capture_encoder(model, inputs)
        notes += [*order.beside, *encoder_decoder.own_generate(model), *quantize(captured, order, spill)]
        encoder = write(captured, notes, stage / encoder_decoder.ENCODER, order, spill, names)
        captured, names, pasts = encoder_decoder.capture_decoder(model, inputs, sizes)
        notes = quantize(captured, order, spill)
        if not decoder.fuse_cache(captured, pasts, total=encoder_decoder.MASK, new=encoder_decoder.IDS):
            notes.append(_not_shared(model, captured))
        written = write(captured, notes, stage / encoder_decoder.DECODER, order, spill, names)
        encoder_decoder.write_document(model, stage, sorted(inputs.keys() - set(encoder.inputs)))
        kept.update(file.name for file in stage.iterdir())
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


@contextmanager
def _replacing(folder: Path) -> Iterator[set[str]]:
    """Yields a set for the names of the files that are written to a folder. Once they are there, the other files of the
    model that was exported to it before go: who opens the folder would take it for that one, or nothing reads them."""
    from qfx.backends.onnx import genai
    from qfx.backends.onnx.export import weights_beside

    pair = (folder / encoder_decoder.DOCUMENT).is_file()
    models = [folder / MODEL, *([folder / encoder_decoder.ENCODER] if pair else [])]
    former = [folder / genai.CONFIG, folder / encoder_decoder.DOCUMENT, *models, *map(weights_beside, models)]
    kept: set[str] = set()
    yield kept
    for path in former:
        if path is not None and path.name not in kept:
            path.unlink(missing_ok=True)


def _not_shared(model: nn.Module, captured: Captured) -> Note:
    own = any(graph.schema_name(n) == "qfx::quantized_attention" for n in captured.gm.graph.nodes)
    formats = "attention in formats of its own reads its cache in float"
    why = formats if own else "its cache is read by more than attention"
    reason = f"{why}: it grows by a copy for each token"
    return Note(type(model).__name__, reason, "none needed for the result", minor=True)
