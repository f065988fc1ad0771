"""qfx quantizes PyTorch models as a compiler: one graph, formats on its nodes, several backends, nothing silent.

torch.compile(model, backend="qfx")                              # no data needed
qfx.quantize(model, "w8a8-smooth", data=batches)                 # calibrated, in place
qfx.report(model).show()                                         # what really runs, node by node
qfx.export_onnx(model, example, "model.onnx")                    # a file that runs without qfx
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qfx.advise import advise
from qfx.analysis.analyze import analyze
from qfx.analysis.sensitivity import Sensitivity
from qfx.convert import convert
from qfx.errors import QfxWarning, UnsupportedError
from qfx.export import export_onnx
from qfx.format import Format
from qfx.hf.attach import register_when_loaded as _register_when_loaded
from qfx.hf.generated import generated_batches
from qfx.interop import (
    export_awq,
    export_bnb,
    export_compressed_tensors,
    export_gguf,
    export_gptq,
    import_checkpoint,
    import_gguf,
)
from qfx.parts import part_batches
from qfx.plan import Plan
from qfx.presets import presets
from qfx.qat import prepare_qat
from qfx.quantize import plan, quantize
from qfx.recipe import Recipe, Rule
from qfx.report import Report, report
from qfx.save import load, save

# The modules advise, plan, quantize, report and save hold functions of their own names: `qfx.plan` is the function.
from qfx.training.adapters import add_adapters, load_adapters
from qfx.training.distillation import distillation_loss, hidden_state_loss
from qfx.training.merging import merge_adapters
from qfx.training.schedule import QATSchedule

if TYPE_CHECKING:
    from qfx import onnx as onnx
    from qfx.hf.config import QfxConfig as QfxConfig
    from qfx.kv.cache import QuantizedCache as QuantizedCache
else:

    def __getattr__(name: str) -> object:
        """`qfx.QfxConfig`, `qfx.QuantizedCache` and `qfx.onnx`: what they need is imported where they are used."""
        if name == "onnx":
            return importlib.import_module("qfx.onnx")
        if name not in ("QfxConfig", "QuantizedCache"):
            raise AttributeError(f"module 'qfx' has no attribute {name!r}")
        try:
            importlib.import_module("transformers.quantizers.auto" if name == "QfxConfig" else "transformers")
        except ModuleNotFoundError as error:
            raise ImportError(f"qfx.{name} needs transformers; next step: pip install 'qfx[hf]'") from error
        return getattr(importlib.import_module("qfx.hf.config" if name == "QfxConfig" else "qfx.kv.cache"), name)


__version__ = "0.1.0"

__all__ = [
    "Format",
    "Plan",
    "QATSchedule",
    "QfxWarning",
    "Recipe",
    "Report",
    "Rule",
    "Sensitivity",
    "UnsupportedError",
    "add_adapters",
    "advise",
    "analyze",
    "convert",
    "distillation_loss",
    "export_awq",
    "export_bnb",
    "export_compressed_tensors",
    "export_gguf",
    "export_gptq",
    "export_onnx",
    "generated_batches",
    "hidden_state_loss",
    "import_checkpoint",
    "import_gguf",
    "load",
    "load_adapters",
    "merge_adapters",
    "part_batches",
    "plan",
    "prepare_qat",
    "presets",
    "quantize",
    "report",
    "save",
]


def __dir__() -> list[str]:
    return sorted({*globals(), "QfxConfig", "QuantizedCache", "onnx"})


_register_when_loaded()
