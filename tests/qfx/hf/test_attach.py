"""Registration with transformers: it costs nothing before transformers is there, and leaves nothing else behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qfx
from qfx.errors import QfxWarning
from qfx.hf.attach import METHOD, _register, attach, is_pretrained, register_when_loaded
from tests.processes import python
from tests.zoo import ZOO

TABLE = "transformers.quantizers.auto"
ASK = (
    f"import {TABLE} as t\n"
    "print(t.AUTO_QUANTIZER_MAPPING['qfx'].__name__, t.AUTO_QUANTIZATION_CONFIG_MAPPING['qfx'].__name__)"
)
KNOWN = "QfxHfQuantizer QfxConfig"


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["import qfx, transformers", "import transformers, qfx", f"import {TABLE}, qfx", "import qfx.hf.quantizer"]
)
def test_transformers_knows_qfx_in_every_order_of_imports(order: str) -> None:
    assert python(f"{order}\n{ASK}") == KNOWN


def test_nothing_is_loaded_other_modules_are_found_as_ever_and_the_finder_leaves() -> None:
    code = (
        "import sys\nbefore = list(sys.meta_path)\nimport torch\nmiddle = list(sys.meta_path)\nimport qfx\n"
        "import qfx.hf.attach\nqfx.hf.attach.register_when_loaded()\nassert 'transformers' not in sys.modules\n"
        "assert [f for f in sys.meta_path if f not in middle] == sys.meta_path[:1]\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('transformers.quantizers_of_others') is None\nimport colorsys\n"
        "print(type(colorsys.__spec__.loader).__name__, [f for f in sys.meta_path if f not in middle] != [])\n"
        f"import {TABLE}\n"
        "print([type(f).__name__ for f in sys.meta_path if f not in middle and type(f).__module__.startswith('qfx')])\n"
        f"print(sys.modules['{TABLE}'].__spec__.loader.__class__.__name__)\n{ASK}"
    )
    assert python(code) == f"SourceFileLoader True\n[]\nSourceFileLoader\n{KNOWN}"


def test_registering_twice_is_once() -> None:
    table = sys.modules[TABLE] if TABLE in sys.modules else __import__(TABLE, fromlist=["x"])
    before = dict(table.AUTO_QUANTIZER_MAPPING)
    register_when_loaded()
    assert before == table.AUTO_QUANTIZER_MAPPING and METHOD in before


def test_a_transformers_that_does_not_fit_is_told_and_goes_on() -> None:
    class Table:
        AUTO_QUANTIZER_MAPPING: dict[str, Any] = {}

    with pytest.warns(
        QfxWarning, match=r"cannot register with transformers .*AttributeError(.|\n)*transformers>=5\.17"
    ):
        _register(Table())


def test_models_of_transformers_are_marked_and_others_left_alone() -> None:
    plain = nn.Linear(2, 2)
    assert not is_pretrained(plain) and attach(plain, None) is plain and not hasattr(plain, "hf_quantizer")
    model: Any = ZOO["gpt2"]()[0]
    assert is_pretrained(model)
    attach(model, qfx.Recipe.parse("w8a16"))
    assert model.hf_quantizer.quantization_config.recipe.name == "w8a16" and model.quantization_method == "qfx"
    assert model.config.quantization_config is model.hf_quantizer.quantization_config
    mine = model.hf_quantizer
    attach(model, qfx.Recipe.parse("w4a16"))
    assert model.hf_quantizer is mine


def test_an_unquantized_model_is_untouched_by_the_import() -> None:
    model: Any = ZOO["gpt2"]()[0]
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert isinstance(model, transformers.GPT2LMHeadModel) and torch.get_default_dtype() == torch.float32
