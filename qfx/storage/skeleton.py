"""A transformers model of a saved config, to be filled with saved tensors: no weight is initialised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qfx.errors import explain, first_line, reading

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
    config = config_of(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the saved model; this one is float yet
    with reading(path / CONFIG):
        model = of_config(config, name=name, dtype=dtype, implementations=implementations)
    set_generation(model, path)
    return model


def config_of(folder: Path) -> Any:
    """The transformers config of a folder. Raises ValueError where it cannot be read."""
    import transformers

    with read_by_transformers(f"the config of {folder}"):
        return transformers.AutoConfig.from_pretrained(folder)


def set_generation(model: Any, folder: Path) -> None:
    """Give a model the generation config of a folder, where there is one. Raises ValueError where it cannot be read."""
    import transformers

    if (folder / GENERATION).is_file():
        with read_by_transformers(str(folder / GENERATION)):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


@contextmanager
def read_by_transformers(what: str) -> Iterator[None]:
    """Makes ValueErrors of the errors of many kinds, some of their own, by which transformers and tokenizers tell a bad
    file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {first_line(error)}") from error


def of_config(config: Any, *, dtype: torch.dtype, implementations: Mapping[str, Any], name: str = "") -> nn.Module:
    """The model of a transformers config, its weights without content. ValueError where its class is not known.

    name: of the class; "" for the first of the config's architectures.
    """
    import transformers
    from transformers.initialization import no_init_weights

    names = [name] if name else config.architectures or ["no architectures"]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise ValueError(
            explain(
                f"transformers {transformers.__version__} has no class {names[0]!r}",
                next_step="pass a float model of that class: qfx.load(folder, model)",
            )
        )
    with torch.random.fork_rng(devices=[]), no_init_weights():
        try:
            model: nn.Module = kind._from_config(config, dtype=dtype, **implementations)
        except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError, RuntimeError) as error:
            what = f"the config makes no {kind.__name__}: {type(error).__name__}: {first_line(error)}"
            raise ValueError(explain(what, next_step="copy config.json again")) from error
    return model
