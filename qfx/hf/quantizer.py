"""`QfxHfQuantizer`: how transformers loads a model that qfx quantized, quantizes one while it loads, and saves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from qfx.errors import Note, explain
from qfx.hf.attach import METHOD, register_when_loaded
from qfx.hf.config import QfxConfig
from qfx.hf.parameterless import tell_device
from qfx.hf.saved import Placed, keep_float_ties
from qfx.kv.held import is_quantized
from qfx.kv.live import with_caches
from qfx.live.attending import attend
from qfx.pipeline import told
from qfx.recipe import Recipe
from qfx.reporting.told import remember
from qfx.storage import checkpoint
from qfx.storage.describe import describe, float_class, state

if TYPE_CHECKING:
    from qfx.hf.streaming import Streaming


class QfxHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Two ways in. A saved model (pre_quantized): its quantized modules are put into the empty model, and transformers
    loads the packed tensors like any others. A float one: each weight is packed as soon as it is read."""

    requires_calibration = False
    quantization_config: QfxConfig

    def __init__(self, quantization_config: QfxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._placed: Placed | None = None
        self._waiting: tuple[nn.Module, list[str]] | None = None
        self._streaming: Streaming | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before anything is read, what cannot be done: ValueError."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            step = "leave 'disk' out of device_map; packed weights are smaller"
            raise ValueError(explain("quantized weights cannot be offloaded to the disk", next_step=step))
        config = self.quantization_config
        if self.pre_quantized and config.model is None:
            what = "config.json says that qfx quantized the model, but not how: quantization_config has no 'model'"
            step = "save the model with save_pretrained or qfx.save; for float weights remove quantization_config"
            raise ValueError(explain(what, next_step=step))
        if not self.pre_quantized and config.recipe is not None and config.recipe.needs_data:
            raise ValueError(
                explain(
                    f"recipe {config.recipe.name!r} needs calibration data, which from_pretrained does not have",
                    expected="a recipe that needs none, such as 'w8a8' or 'w4a16'",
                    next_step="load the float model, then call qfx.quantize(model, recipe, data=batches)",
                )
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the model to be, which transformers tells here."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            self._waiting = (model, [str(file) for file in checkpoint_files or ()])
            return model
        assert config.model is not None
        _later(checkpoint_files)
        files, expected = [Path(file) for file in checkpoint_files or ()], config.model["tensors"]
        if not files:
            step = "give from_pretrained the folder, or use qfx.load"
            raise ValueError(explain("a quantized model is read from its files, found a state_dict", next_step=step))
        found = checkpoint.headers(files, expected)
        checkpoint.check(files, expected)
        self._placed = Placed.into(model, config.model, found, self._dtype)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if self._placed is not None:
            assert config.model is not None
            self._placed.finish(model)
            turned = _in_another_basis(model, config.model["class"], config.recipe)
            told([*turned, *self._placed.untied], strict=False)
            with_caches(attend(model, self._placed.attention), self._placed.caches)
            remember(model, [*self._placed.notes, *turned, *self._placed.untied])
        elif self._streaming is not None:
            self._streaming.finish(model)
        self._placed = self._streaming = None
        _name_as_they_are(model)
        model.config.quantization_config = self.quantization_config = QfxConfig.of(config.recipe)  # type: ignore[union-attr]
        return tell_device(model)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether the weight of this name is packed while it is loaded."""
        return self._streaming is not None and self._streaming.takes(param_name)

    def get_quantize_ops(self) -> Any:
        """What packs a weight that was read."""
        assert self._streaming is not None
        return self._streaming.operation()

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Saved models hold their tensors by the names of the live one: nothing is renamed or merged.

        transformers asks this once the empty model stands and its meta-device context is left: a float model is planned
        here.
        """
        if self._waiting is not None:
            from qfx.hf.streaming import Streaming  # of transformers' loader, which may just be importing this file

            config, (waiting, files), self._waiting = self.quantization_config, self._waiting, None
            assert config.recipe is not None
            self._streaming = Streaming(waiting, config.recipe, files, strict=config.strict)
        return [] if self.pre_quantized else weight_conversions

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: every tensor once. config.json gets the record of the modules.

        Raises ValueError for a model that holds nothing quantized any more.
        """
        if not is_quantized(model):
            raise ValueError(
                explain(
                    "the model is marked as quantized by qfx, but holds nothing that qfx quantized",
                    next_step="to save it as a float model, remove model.hf_quantizer and config.quantization_config",
                )
            )
        prefix = str(getattr(model, "base_model_prefix", ""))
        tensors, tied = state(model, f"{prefix}." if prefix else "")
        _name_as_they_are(model)
        record = {**describe(model, tied), "tensors": checkpoint.digests(tensors)}
        model.config.quantization_config = QfxConfig.of(self.quantization_config.recipe, record)  # type: ignore[union-attr]
        return tensors, {checkpoint.WRITER: checkpoint.SAVE_PRETRAINED}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A quantized model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train above packed weights, which have no gradient themselves (see `qfx.training.adapters`)."""
        return True


def mark(model: Any, recipe: Recipe | None) -> None:
    """Give a live quantized model its quantizer and quantization_config."""
    config = QfxConfig.of(recipe)
    model.hf_quantizer = QfxHfQuantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.config.quantization_config = config
    keep_float_ties(model)
    _name_as_they_are(model)


def _in_another_basis(model: nn.Module, saved: str, recipe: Recipe | None) -> list[Note]:
    """A note on a part of a model whose rotated states the rest of it turned back."""
    own = float_class(model).__name__
    if own == saved or recipe is None or "rotate" not in recipe.rewrites:
        return []
    reason = f"the recipe of the saved {saved} rotates states where it can, which only the last layer undoes"
    return [Note(own, reason, f"for states as the float model gives them quantize the {own} itself")]


def _later(files: Any) -> None:
    """In transformers' list of files: the several of a later save in the place of the one beside them."""
    if isinstance(files, list) and len(files) == 1 and Path(files[0]).name == checkpoint.ONE:
        files[:] = map(str, checkpoint.files_of(Path(files[0]).parent))


def _name_as_they_are(model: nn.Module) -> None:
    """transformers renames and splits tensors when it saves, so that they are those of the first checkpoint; packed
    ones cannot be split."""
    model._weight_conversions = []  # type: ignore[assignment]


register_when_loaded()  # where this file was imported before transformers' table of quantizers
