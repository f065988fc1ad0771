"""The `quantization_config` that config.json of a quantized transformers model carries, as a plain dictionary.

    {"quant_method": "qfx", "version": 6, "qfx": "0.1.0", "recipe": {...}, "model": {...}, "sha256": "..."}

recipe: what was asked, as `Recipe.to_dict` writes it; None where it is not known. model: the record of
`qfx.storage.describe`, equal modules told once, and the digest of each tensor (`qfx.storage.checkpoint`); it is there
only in files, and sha256 is its digest. A checkpoint of a model that trains with fake quantization has
`"training": true`; it is loaded into a model prepared likewise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from qfx.errors import explain, nearest
from qfx.hf.attach import METHOD
from qfx.plan import versions
from qfx.recipe import Recipe
from qfx.storage.describe import Record, grouped, spread
from qfx.storage.files import sha256_text

VERSION = 6  # 1: a byte for each zero point, 2: no caches, no attention, 3: no sha256, 4: no gains, 5: no notes
_READ = (1, 2, 3, 4, 5, VERSION)
_KEYS = ("quant_method", "version", "qfx", "recipe", "strict", "model", "sha256", "training")
_MODEL = {
    "class",
    "dtype",
    "implementations",
    "modules",
    "parameters",
    "tied",
    "buffers",
    "centred",
    "tensors",
    "caches",
    "attention",
    "notes",
}
_AGAIN = "copy config.json again, or quantize and save the model again"


def wrap(recipe: Recipe | None, record: Record | None) -> dict[str, Any]:
    """The dictionary for a model that was quantized by `recipe`; record None leaves `model` out."""
    fields: dict[str, Any] = {
        "quant_method": METHOD, "version": VERSION, "qfx": versions()["qfx"],
        "recipe": None if recipe is None else recipe.to_dict(),
    }  # fmt: skip
    if record is not None:
        named = {key: grouped(record[key]) for key in ("modules", "parameters")}
        fields["model"] = {**record, **named}
        fields["sha256"] = _digest(fields["model"])
    return fields


def unwrap(fields: Mapping[str, Any], where: str) -> tuple[Recipe | None, Record | None]:
    """(recipe, record) of what `wrap` gave. Raises ValueError for another version, unknown keys, altered fields, and a
    model that is in training."""
    if fields.get("quant_method") != METHOD:
        raise ValueError(f"{where} is no quantization_config of qfx, found {fields.get('quant_method')!r}")
    wrote = fields.get("qfx", "unknown")
    if fields.get("version", VERSION) not in _READ:
        raise ValueError(
            explain(
                f"{where} comes from another version of qfx",
                expected=f"version {VERSION} or earlier",
                found=f"version {fields['version']}, written by qfx {wrote}",
                next_step="install the version that wrote it, or quantize and save the model again",
            )
        )
    for key in fields:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r} in {where}, {nearest(str(key), _KEYS)}")
    try:
        recipe = None if fields.get("recipe") is None else Recipe.parse(fields["recipe"])
    except ValueError as error:
        own = versions()["qfx"]
        other = wrote not in (own, "unknown")
        hint = f"it was written by qfx {wrote}, this is qfx {own}: install that version" if other else _AGAIN
        raise ValueError(explain(f"the recipe in {where} cannot be read: {error}", next_step=hint)) from error
    if fields.get("training"):
        raise ValueError(_in_training(recipe, where))
    model = fields.get("model")
    if model is not None and fields.get("version", VERSION) > 3 and fields.get("sha256") != _digest(model):
        raise ValueError(explain(f"'model' in {where} was altered", next_step=_AGAIN))
    return recipe, _record(model, where)


def wrap_training(recipe: Recipe | None) -> dict[str, Any]:
    """The dictionary for a model that `prepare_qat` prepared by `recipe`."""
    return {**wrap(recipe, None), "training": True}


def _in_training(recipe: Recipe | None, where: str) -> str:
    asked = "the same recipe" if recipe is None else repr(recipe.name or "the same recipe")
    return explain(
        "a checkpoint of a model that qfx.prepare_qat prepared: float weights, and the scales of its fake quantization",
        found=f"'training' in {where}",
        next_step=f"model = qfx.prepare_qat(float_model, {asked}, data), then trainer.train(resume_from_checkpoint="
        "folder) or model.load_state_dict(safetensors.torch.load_file(file)); qfx.convert(model) makes the quantized "
        "model of it, which save_pretrained writes for loading",
    )


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that a transformers model was quantized by, where it is known."""
    found = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    recipe = getattr(found, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else None


def _record(model: object, where: str) -> Record | None:
    if model is None:
        return None
    try:
        assert isinstance(model, Mapping)
        model = {"caches": {}, "attention": {}, "notes": [], **model}
        assert set(model) == _MODEL
        modules, parameters = spread(model["modules"], sqnr=True), spread(model["parameters"], sqnr=False)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(explain(f"'model' in {where} was altered", next_step=_AGAIN)) from error
    return {**model, "modules": modules, "parameters": parameters}


def _digest(model: object) -> str:
    return sha256_text(json.dumps(model, sort_keys=True))
