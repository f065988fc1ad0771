"""qfx.QfxConfig: checked where it is made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import qfx
from qfx import QfxConfig, Recipe
from qfx.hf.quantizer import QfxHfQuantizer
from tests.zoo import ZOO


def test_what_a_recipe_may_be(tmp_path: Path) -> None:
    wanted = Recipe.parse("w4a16")
    file = tmp_path / "mine.json"
    file.write_text(wanted.to_json())
    for source in ("w4a16", wanted, wanted.to_dict(), file):
        assert QfxConfig(recipe=source).recipe == wanted
    assert QfxConfig().recipe == Recipe.parse("w8a8")
    assert QfxConfig("w4a16", rounding="mse").recipe == wanted.override(rounding="mse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "w4a61"}, r"unknown preset 'w4a61', did you mean 'w4a16'\?"),
        ({"recipe": "w8a8", "rounded": "mse"}, r"unknown key 'rounded' in Recipe, did you mean 'rounding'\?"),
        ({"recipe": 4}, r"a recipe is a preset's name, a path, a dictionary or a Recipe, found int"),
    ],
)
def test_what_it_may_not_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QfxConfig(**arguments)


@pytest.mark.parametrize("strict", [True, False])
def test_as_json_and_back(strict: bool) -> None:
    made = QfxConfig("w4a16+w8a8", strict=strict)
    fields = json.loads(made.to_json_string())
    again = AutoQuantizationConfig.from_dict(fields)
    assert isinstance(again, QfxConfig) and (again.recipe, again.strict) == (made.recipe, strict)
    assert dict(made) == made.to_dict() == copy.deepcopy(made).to_dict() and "QfxConfig" in repr(made)
    assert QfxConfig.from_dict(fields, return_unused_kwargs=True, other=1)[1] == {"other": 1}


def test_it_leads_to_the_quantizer() -> None:
    found = AutoHfQuantizer.from_config(QfxConfig("w4a16"), pre_quantized=False)
    assert type(found) is QfxHfQuantizer and not found.pre_quantized
    assert found.is_serializable() and found.is_trainable and not found.requires_calibration


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'bits' in quantization_config in config.json"):
        QfxConfig.from_dict({"quant_method": "qfx", "bits": 4})


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")  # torch 2.12's
def test_a_forward_that_copies_its_configuration_compiles() -> None:
    """An encoder-decoder that makes its own cache copies its configuration, and Dynamo traces the copy."""
    torch._dynamo.reset()
    model, inputs = ZOO["bart"]()
    model = qfx.quantize(model, "w8a8")
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**inputs | {"use_cache": True})
        assert torch.equal(found[0], model(**inputs)[0])
