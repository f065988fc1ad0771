"""`qfx.plan` and `qfx.quantize`: decide on the exported graph, then write into the live module."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from qfx import data as batches
from qfx.allocation.allocate import Given
from qfx.allocation.asked import with_budget
from qfx.analysis.losses import Loss
from qfx.analysis.sensitivity import Sensitivity
from qfx.data import Call
from qfx.decide import decide
from qfx.errors import Note, check_flags, explain
from qfx.hf.attach import attach
from qfx.kv.live import with_caches
from qfx.kv.planning import check_model
from qfx.live import attending
from qfx.live.modules import prepared_parts, quantized_parts
from qfx.live.places import Place, find
from qfx.live.writeback import check_rounded, write_back
from qfx.passes.rewrites import check_record
from qfx.pipeline import alike, told
from qfx.plan import Plan
from qfx.recipe import DATA_ROUNDINGS, Recipe
from qfx.reporting.told import remember
from qfx.storage import streamed

ModelLike = nn.Module | str | os.PathLike[str]
COLLECTED_BYTES = 2**26  # weights that are worth a full garbage collection, half a second or more in a large process
RecipeLike = Any  # a preset name, a Recipe, a mapping or a path: what Recipe.parse takes


def plan(
    model: ModelLike, recipe: RecipeLike = "w8a8", data: Iterable[Any] | None = None, *, strict: bool = False,
    progress: bool = True, resume: str | os.PathLike[str] | None = None, memory: int | None = None,
    units: Literal["heads", "layers"] | None = None, avg_bits: float | None = None, max_bytes: int | None = None,
    ratio: float | None = None, max_loss: float | None = None, max_memory: int | None = None, batch: int | None = None,
    context: int | None = None, loss: str | Loss | None = None,
    sensitivity: Sensitivity | None = None, **overrides: Any,
) -> Plan:  # fmt: skip
    """Decide formats, rewrites and scales for `model`; the model is not changed.

    model: a module, or the folder of a transformers model, whose weights are then read as they are needed and never all
    at once (see `qfx.storage.streamed`).
    data: batches (tensors, tuples or dicts of keyword arguments); needed by recipes with static activations or rewrites
    that choose factors; where given, `Plan.sensitivities["sqnr_db"]` says the error of each node on the first batch.
    resume: a folder for the finished blocks of a rounding that needs data: after an interruption the same call goes on
    behind the last one, with the same result. memory: bytes of activations that such a rounding holds between two
    blocks, the rest goes to a temporary file. overrides: fields of the recipe to change. strict: what cannot be had
    as asked is an UnsupportedError, no warning.
    avg_bits, max_bytes, ratio, max_loss, max_memory (of a device, at `batch` and `context`): one budget, under which
    weights that rules for op kinds give a format get each its own (see `Recipe.allocation`); units: whether each head
    does, or whole weights. What these lose is told by `allocation.method`, by a `sensitivity` (see `qfx.analyze`), or
    for a task: by its loss, as `qfx.analyze` takes it,
    with labels in the batches.
    A model that torch.export does not take is planned by its module types, with a warning, where the recipe allows it.
    Raises ValueError for bad data, recipes and weights.
    """
    check_flags(strict=strict, progress=progress)
    model = _opened(model)
    check_float(model)
    asked = Recipe.parse(recipe).override(**overrides) if overrides else Recipe.parse(recipe)
    asked = with_budget(
        asked, units=units, batch=batch, context=context, avg_bits=avg_bits, max_bytes=max_bytes, ratio=ratio,
        max_loss=max_loss, max_memory=max_memory,
    )  # fmt: skip
    if asked.needs_data and data is None:
        raise ValueError(
            explain(
                f"recipe {asked.name!r} needs calibration data",
                next_step="pass data=batches (about 128 samples of what the model will see; "
                "a language model writes some itself: qfx.generated_batches(model))",
            )
        )
    if resume is not None and asked.rounding not in DATA_ROUNDINGS:
        what = f"recipe {asked.name!r} has nothing to resume: it does not work block by block"
        raise ValueError(explain(what, expected=f"rounding {' or '.join(map(repr, DATA_ROUNDINGS))}"))
    calls, given = _given(model, asked, data, loss, sensitivity)
    with evaluating(model):
        return _planned(
            model, asked, calls, strict=strict, progress=progress, resume=resume, memory=memory, given=given
        )


def quantize(
    model: ModelLike, recipe: RecipeLike | Plan = "w8a8", data: Iterable[Any] | None = None, *, strict: bool = False,
    resume: str | os.PathLike[str] | None = None, memory: int | None = None, **overrides: Any,
) -> nn.Module:  # fmt: skip
    """Quantize `model` in place by a recipe or a plan, and return it.

    A folder of a transformers model is opened without reading its weights; the model that is returned has its packed
    weights in a temporary file, and `qfx.save` streams them.
    Linear layers, embeddings, patch convolutions and expert weights become packed; norms are folded where the recipe
    rewrites. generate(), state_dict(), deepcopy() and torch.compile(backend="qfx") go on working. Errors come before
    anything is changed; only an interrupt while weights are written leaves some of them packed. See `plan` for the
    arguments.
    """
    check_flags(strict=strict)
    model = _opened(model)
    made = made_for(model, recipe, data, strict=strict, resume=resume, memory=memory, **overrides)
    with torch.no_grad():
        places = checked_places(model, made, strict=strict)
        attentions, notes = attending.find(model, made)
        check_model(model, made.caches)
        told(notes, strict=strict)
        live = attending.attend(write_back(model, made, places), attentions)
        found = attach(with_caches(live, made.caches, strict=strict), made.recipe)
    remember(found, [*map(Note.parse, made.notes), *notes])
    return found


def made_for(
    model: nn.Module, recipe: RecipeLike | Plan, data: Iterable[Any] | None = None, *, strict: bool = False,
    resume: str | os.PathLike[str] | None = None, memory: int | None = None, **overrides: Any,
) -> Plan:  # fmt: skip
    """The plan that is given, checked against the model, or one made now. See `plan` for the arguments."""
    if not isinstance(recipe, Plan):
        made = plan(model, recipe, data, strict=strict, resume=resume, memory=memory, **overrides)
        if sum(p.nbytes for p in model.parameters()) >= COLLECTED_BYTES:
            gc.collect()  # the graphs are cycles, which would keep every float weight alive
        return made
    check_float(model)
    if overrides or data is not None or resume is not None or memory is not None:
        raise ValueError("a plan is complete: no data and no recipe fields beside it; next step: leave them out")
    recipe.check(model, strict=strict)
    return recipe


def checked_places(model: nn.Module, made: Plan, *, strict: bool = False) -> list[Place]:
    """Where the plan's weights lie in the model, with every error that writing them could raise; nothing is changed."""
    for record in made.rewrites:
        check_record(model, record, made.tensors)
    places, notes = find(model, made)
    told(notes, strict=strict)
    check_rounded(model, made, places)
    return places


def planned(model: nn.Module, recipe: Recipe) -> tuple[Plan, list[Note]]:
    """The plan of a recipe that needs no data, and notes about what cannot be had; nothing is told yet."""
    with evaluating(model):
        made, notes, _ = decide(model, recipe, [], progress=False)
    if not (made.annotations or made.caches):
        raise _nothing(model, recipe, notes)
    return made, notes


def _planned(
    model: nn.Module, recipe: Recipe, calls: list[Call], *, strict: bool, progress: bool,
    resume: str | os.PathLike[str] | None, memory: int | None, given: Given | None = None,
) -> Plan:  # fmt: skip
    made, notes, said = decide(model, recipe, calls, progress=progress, resume=resume, memory=memory, given=given)
    if not (made.annotations or made.rewrites or made.caches):
        raise _nothing(model, recipe, notes)
    told(notes if strict else [n for n in notes if n not in said], strict=strict)
    made.notes = [str(note) for note in notes]
    return made


def _given(
    model: nn.Module, recipe: Recipe, data: Iterable[Any] | None, loss: str | Loss | None,
    sensitivity: Sensitivity | None,
) -> tuple[list[Call], Given]:  # fmt: skip
    """The calls of the model, without labels where there is a loss; and what predicts the loss of units."""
    if recipe.allocation is None and not (loss is None and sensitivity is None):
        what = f"a {'loss' if loss is not None else 'sensitivity'} says where bytes are spent, and there is no budget"
        raise ValueError(explain(what, next_step="give one, such as avg_bits=4"))
    if loss is not None and sensitivity is not None:
        raise ValueError("a sensitivity was found for a loss already: give one of them")
    if data is None:
        return [], Given(sensitivity)
    if loss is None:
        return batches.calls(model, data, recipe.num_calibration_samples), Given(sensitivity)
    from qfx.analysis.analyze import inputs_of, labelled_batch, limited

    labelled = [labelled_batch(batch, True) for batch in limited(data, recipe.num_calibration_samples)]
    return batches.calls(model, [inputs_of(model, batch) for batch in labelled]), Given(None, loss, labelled)


def _nothing(model: nn.Module, recipe: Recipe, notes: list[Note]) -> ValueError:
    found = [f"{sum(1 for _ in model.parameters())} parameters", *map(str, alike(notes))]
    return ValueError(
        explain(
            f"recipe {recipe.name!r} gives no format to anything in {type(model).__name__}",
            expected="at least one linear layer, embedding, expert or patch convolution that a rule matches",
            found="\n    ".join(found),
            next_step="qfx.presets() lists recipes; a rule's target is an op kind, a name, a glob or 're:<regex>'",
        )
    )


def _opened(model: ModelLike) -> nn.Module:
    """The model, or that of a folder."""
    return streamed.load(model).model if isinstance(model, str | os.PathLike) else model


def checked_module(model: object, uncompiled: str) -> nn.Module:
    """The model. Raises ValueError for what is no module, and for a compiled one: `uncompiled` is the next step."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(explain("the model is compiled", next_step=uncompiled))
    if not isinstance(model, nn.Module):
        raise ValueError(explain("a model is needed", expected="a torch.nn.Module", found=type(model).__name__))
    return model


def check_float(model: object, verb: str = "quantize") -> None:
    """Raises ValueError for what is no float model: compiled ones, quantized ones. verb: what it is needed for."""
    module = checked_module(model, f"{verb} the module given to torch.compile, and compile it afterwards")
    if done := quantized_parts(module):
        what = f"the model is quantized already: {len(done)} parts, the first is {done[0]!r}"
        raise ValueError(explain(what, next_step=f"{verb} the float model: load the float weights again"))
    check_unprepared(module)


def check_unprepared(module: nn.Module) -> None:
    """Raises ValueError for a model that trains with fake quantization."""
    if ready := prepared_parts(module):
        what = f"the model is prepared for training: {len(ready)} parts, the first is {ready[0]!r}"
        raise ValueError(explain(what, next_step="qfx.convert(model) makes a quantized model of it"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode in which it was.

    What torch.export made refuses eval(): its graph has the mode in which it was exported.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
    except NotImplementedError:
        for module, _ in modes:
            module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
