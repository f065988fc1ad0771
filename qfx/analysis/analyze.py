"""`qfx.analyze`: where a model is sensitive to few bits, from one pass over data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from qfx import data as batches
from qfx import graph
from qfx.analysis.energies import energies
from qfx.analysis.losses import LABELS, Loss, find
from qfx.analysis.measured import some
from qfx.analysis.score import FORMATS, By, Options, score_graph
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.weights import rounding_of
from qfx.capture_calls import capture_calls
from qfx.data import Call
from qfx.errors import Note, check_flags
from qfx.filling import to_length
from qfx.format import Format
from qfx.passes.annotate import annotate, kind_of
from qfx.passes.quantize import refuse
from qfx.pipeline import prepare, told
from qfx.plan import Plan
from qfx.quantize import check_float, evaluating
from qfx.recipe import Recipe

_SEEN = 4096  # positions by whose energy weights are rounded, as in plans: their values are held side by side


def analyze(
    model: nn.Module, data: Iterable[Any], *, loss: str | Loss | None = None, method: str = "quant-fisher",
    formats: Iterable[str | Format] | None = None, units: By = "heads", recipe: Any = None, measure: int = 4,
    task_weight: float = 1.0, samples: int | None = None, seed: int = 0, progress: bool = True, strict: bool = False,
) -> Sensitivity:  # fmt: skip
    """How much `model` loses in each candidate format of each unit: heads' rows and columns, other weights, caches.

    data: batches as for `qfx.plan`; samples: how many of it are used (None: all). loss: None for the model's own
    distribution, which needs no labels; a task: "causal-lm", "classification", "qa", "embedding", or any callable
    `loss(outputs, batch)` that gives a scalar or one value a sample. A batch's `labels` (`start_positions`,
    `end_positions`) are for the loss, not for the model; a batch may also be (inputs, labels). task_weight: share of
    the task's scores beside the general ones. method: see `qfx.analysis.scores`, "all" for each of them. formats:
    candidates for weights. units: "heads", or "layers" for whole weights. recipe: what is not to be quantized, formats
    of activations, rounding. measure: units of each kind to be measured, to bring the scores to scale; 0 for none.

    The model is not changed. Raises ValueError for bad data, labels that are missing and losses that are not finite;
    UnsupportedError where torch.export does not take the model, and under strict where heads cannot be told apart.
    """
    check_flags(progress=progress, strict=strict)
    check_float(model, "analyze")
    asked = None if recipe is None else Recipe.parse(recipe)
    options = Options(
        method=method, formats=FORMATS if formats is None else tuple(str(f) for f in formats), by=units,
        measure=measure, task_weight=task_weight, seed=seed,
        rounding=rounding_of(asked),
    )  # fmt: skip
    if loss is not None:
        find(loss)
    given = list(limited(data, samples))
    labelled = [labelled_batch(batch, loss is not None) for batch in given]
    calls = batches.calls(model, [inputs_of(model, batch) for batch in labelled])
    with evaluating(model):
        flat, outputs, gm, notes = _prepared(model, calls)
        if notes:
            labelled = [_as_read(batch, gm, inputs) for batch, inputs in zip(labelled, flat, strict=True)]
        skip: list[str] = []
        if asked is not None:
            notes += [*annotate(gm, asked), *refuse(gm)]
            skip = _left_out(gm, asked)
        found, more = score_graph(
            gm, flat, options, outputs=outputs, loss=loss, labelled=labelled, skip=skip,
            seen=energies(gm, some(flat, _SEEN), asked), progress=progress,
        )  # fmt: skip
    told([*notes, *more], strict=strict)
    found.provenance.update(_provenance(model, calls, options, loss))
    return found


def limited(data: Iterable[Any], samples: int | None) -> Iterable[Any]:
    """Batches until so many samples are reached; None for all. Raises ValueError for data that is no iterable."""
    batches.check_iterable(data)
    seen = 0
    for batch in data:
        yield batch
        first = next((v for v in _leaves(batch) if isinstance(v, Tensor) and v.dim()), None)
        seen += 1 if first is None else len(first)
        if samples is not None and seen >= samples:
            return


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple):
        return [leaf for value in batch for leaf in _leaves(value)]
    return [batch]


def labelled_batch(batch: Any, wanted: bool) -> Any:
    """A pair (inputs, labels) as a mapping, where there is a loss and the second is one value a sample."""
    if wanted and isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(labels, Tensor) and (isinstance(inputs, Mapping) or labels.dim() == 1):
            named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
            return {**named, "labels": labels}
    return batch


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """What the model itself is called with: without labels."""
    if not isinstance(batch, Mapping):
        return batch
    if set(batch) == {"inputs", "labels"} and "inputs" not in inspect.signature(model.forward).parameters:
        return batch["inputs"]
    return {name: value for name, value in batch.items() if name not in LABELS}


def _prepared(model: nn.Module, calls: list[Call]) -> tuple[list[list[Any]], tuple[str, ...], Any, list[Note]]:
    """(inputs of the graph by batch, names of its outputs, the prepared graph, whether texts were filled)."""
    captured, flat, notes = capture_calls(model, calls)
    prepare(captured.gm)
    return flat, captured.outputs, captured.gm, notes


def _as_read(batch: Any, gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    """A batch of texts as the graph reads it, filled to one length, for a loss that reads the tokens, too."""
    names = [node.meta["qfx_name"] for node in gm.graph.find_nodes(op="placeholder")]
    held = {**(batch if isinstance(batch, Mapping) else {}), **dict(zip(names, inputs, strict=True))}
    labels, length = held.get("labels"), held["input_ids"].shape[-1]
    if isinstance(labels, Tensor) and labels.dim() == 2:
        held["labels"] = to_length("labels", labels, length)
    return held


def _left_out(gm: Any, recipe: Recipe) -> list[str]:
    """Weights to which the recipe gives no format."""
    names = []
    for node in gm.graph.nodes:
        kind = kind_of(node)
        if kind not in (None, "attention") and graph.weight_of(node) is not None:
            fqn = graph.fqn_of(node)
            if "w" not in recipe.formats_for(kind, fqn):
                names.append(fqn)
    return names


def _provenance(model: nn.Module, calls: list[Call], options: Options, loss: str | Loss | None) -> dict[str, Any]:
    empty = Plan.of(model, Recipe.parse("w8a8"))
    shapes = [[list(v.shape) for v in _leaves((a, k)) if isinstance(v, Tensor)][:1] for a, k in calls]
    return {
        "model": type(model).__name__,
        "fingerprint": empty.fingerprint,
        "versions": empty.versions,
        "batches": len(calls),
        "shape": shapes[0][0] if shapes[0] else [],
        "loss": None if loss is None else find(loss)[0],
        "task_weight": None if loss is None else options.task_weight,
        "rounding": options.rounding,
        "seed": options.seed,
    }
