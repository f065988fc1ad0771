"""What ties qfx to transformers without importing it: registration when it is loaded, and the mark on a live model.

transformers finds a quantizer by the name in config.json, in a table that `transformers.quantizers.auto` holds. Its own
functions (`register_quantization_config`, `register_quantizer`) put qfx into it, once that module is loaded; importing
qfx loads nothing of transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from qfx.errors import QfxWarning, explain
from qfx.recipe import Recipe

METHOD = "qfx"
_TABLE = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Register qfx with transformers: now where its table of quantizers is loaded, else as soon as it is.

    The second needs a finder in `sys.meta_path`, which acts on that one module and takes itself out when it did.
    """
    if _TABLE in sys.modules:
        _register(importlib.import_module(_TABLE))  # waits for another thread that is loading it
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_pretrained(model: nn.Module) -> bool:
    """A model of transformers; nothing is imported to tell."""
    found = sys.modules.get("transformers.modeling_utils")
    return found is not None and isinstance(model, found.PreTrainedModel)


def attach(model: nn.Module, recipe: Recipe | None) -> nn.Module:
    """Let a quantized transformers model know its quantizer, so that `save_pretrained` writes what `from_pretrained`
    reads. Other models, and those that another quantizer holds, are left alone. Parts without parameters tell their
    device."""
    from qfx.hf.parameterless import tell_device  # it needs the quantized modules, which need transformers nowhere

    tell_device(model)
    if is_pretrained(model) and getattr(model, "hf_quantizer", None) is None:
        from qfx.hf.quantizer import mark

        mark(model, recipe)
    return model


def mark_training(model: nn.Module, recipe: Recipe | None) -> None:
    """Let the config.json of a prepared transformers model's checkpoints say what they are, and tensors keep their
    names in them."""
    if is_pretrained(model) and getattr(model, "hf_quantizer", None) is None:
        from qfx.hf.quantization_config import wrap_training

        held: Any = model
        held.config.quantization_config = wrap_training(recipe)
        held._weight_conversions = []


def _register(table: Any) -> None:
    """Put qfx into transformers' table. A transformers that does not fit is a QfxWarning: it goes on without qfx."""
    started = sys.modules.get("qfx.hf.quantizer")
    if started is not None and not hasattr(started, "QfxHfQuantizer"):
        return  # it is what imports transformers just now, and registers itself at its end
    try:
        from qfx.hf.config import QfxConfig
        from qfx.hf.quantizer import QfxHfQuantizer

        if METHOD not in table.AUTO_QUANTIZER_MAPPING:
            table.register_quantization_config(METHOD)(QfxConfig)
            table.register_quantizer(METHOD)(QfxHfQuantizer)
    except Exception as error:  # noqa: BLE001  (importing transformers must not fail since qfx is there)
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        what = f"qfx cannot register with transformers {version}: {type(error).__name__}: {error}"
        step = "install transformers>=5.17; qfx.save and qfx.load go on working"
        warnings.warn(explain(what, next_step=step), QfxWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds `transformers.quantizers.auto` as the finders after it do, and has qfx registered once it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        for finder in [f for f in sys.meta_path if f is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """The module's own loader, and the registration after it."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self.own.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register(module)
