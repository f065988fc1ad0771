"""A transformers model of a saved config, to be filled with saved tensors: no weight is initialised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qfx.errors import explain

CONFIG, GENERATION = "config.json", "generation_config.json"


def skeleton(path: Path, name: str, *, dtype: torch.dtype, implementations: Mapping[str, Any]) -> nn.Module:
    """The model of class `name` that `config.json` in a folder describes, its weights without content.

    implementations: attn_implementation and experts_implementation of the saved model. Raises ValueError where there is
    no config or transformers does not have its class.
    """
    if not (path / CONFIG).is_file():
        raise ValueError(
            explain(
                f"{path} holds no {CONFIG}, so the model's class is not known",
                next_step="pass a float model of the same structure: qfx.load(folder, model)",
            )
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the saved model; this one is float yet
    model = of_config(config, name=name, dtype=dtype, implementations=implementations)
    if (path / GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def of_config(config: Any, *, dtype: torch.dtype, implementations: Mapping[str, Any], name: str = "") -> nn.Module:
    """The model of a transformers config, its weights without content. ValueError where its class is not known.

    name: of the class; "" for the first of the config's architectures.
    """
    import transformers
    from transformers.initialization import no_init_weights

    names = [name] if name else config.architectures or ["no architectures"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(
            explain(
                f"transformers {transformers.__version__} has no class {names[0]!r}",
                next_step="pass a float model of that class: qfx.load(folder, model)",
            )
        )
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: nn.Module = kind._from_config(config, dtype=dtype, **implementations)
    return model
