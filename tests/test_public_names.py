"""The public API: its names are there, importing it is quick, and no order of imports hides them."""

from __future__ import annotations

import sys

import pytest

import qfx
from tests.processes import python

CALLABLES = (
    "add_adapters", "advise", "analyze", "convert", "distillation_loss", "export_awq", "export_bnb",
    "export_compressed_tensors", "export_gguf", "export_gptq", "generated_batches", "hidden_state_loss",
    "import_checkpoint", "import_gguf", "load", "load_adapters", "merge_adapters", "part_batches", "plan",
    "prepare_qat", "presets", "quantize", "report", "save",
)  # fmt: skip
TYPES = ("Format", "Plan", "QATSchedule", "QfxWarning", "Recipe", "Report", "Sensitivity", "UnsupportedError")


@pytest.mark.parametrize("name", CALLABLES)
def test_functions(name: str) -> None:
    assert name in dir(qfx)
    function = getattr(qfx, name)
    assert callable(function)
    assert function.__doc__


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    assert name in dir(qfx)
    assert isinstance(getattr(qfx, name), type)


def test_all_is_what_stands_here() -> None:
    assert {*CALLABLES, *TYPES} <= set(qfx.__all__)
    assert all(hasattr(qfx, name) for name in qfx.__all__)


def test_the_config_for_transformers_is_there_where_it_is_asked_for() -> None:
    from qfx import QfxConfig

    assert "QfxConfig" in dir(qfx) and QfxConfig is qfx.QfxConfig
    assert QfxConfig(recipe="w4a16").recipe == qfx.Recipe.parse("w4a16")


def test_the_cache_for_transformers_is_there_where_it_is_asked_for() -> None:
    from qfx import QuantizedCache

    assert "QuantizedCache" in dir(qfx) and QuantizedCache is qfx.QuantizedCache
    assert QuantizedCache.__doc__


@pytest.mark.parametrize("name", ["QfxConfig", "QuantizedCache"])
def test_what_needs_transformers_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for held in [held for held in sys.modules if held.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, held)
    with pytest.raises(ImportError, match=rf"qfx\.{name} needs transformers; next step: pip install 'qfx\[hf\]'"):
        getattr(qfx, name)


def test_exported_models_are_opened_after_import_qfx_alone() -> None:
    code = "import qfx, sys; assert 'onnx' in dir(qfx) and 'qfx.onnx' not in sys.modules; print(qfx.onnx.load.__name__)"
    assert python(code) == "load"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        qfx.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_import_leaves_heavy_modules_out() -> None:
    heavy = "'transformers', 'onnxruntime', 'onnx', 'gguf', 'scipy'"
    code = f"import qfx, sys; print(*(m for m in ({heavy}) if m in sys.modules))"
    assert python(code) == ""


def test_modules_of_the_same_name_do_not_hide_functions() -> None:
    code = (
        "import importlib, qfx\n"
        "for name in ('quantize', 'report', 'plan', 'save', 'presets', 'compile'):\n"
        "    importlib.import_module(f'qfx.{name}')\n"
        "assert all(callable(getattr(qfx, n)) for n in ('quantize', 'report', 'plan', 'save', 'load', 'presets'))\n"
    )
    python(code)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert qfx.__version__ == version("qfx")
