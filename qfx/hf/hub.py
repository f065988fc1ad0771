"""transformers models by folder or hub name: the class that their config names, in float32, with tokenizer."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from qfx.errors import QfxWarning, explain, first_line, listed
from qfx.storage import checkpoint
from qfx.storage.files import path_of, write_text
from qfx.storage.skeleton import config_of, read_by_transformers

_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx", ".data")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OWN = "qfx"
_MADE_FLOAT = ("mxfp4", "fp8")  # methods whose weights transformers makes float ones where it has no kernels for them
_CONVERTED = ("awq", "bitsandbytes", "compressed-tensors", "gptq")  # what `qfx.interop.read` reads
_SHOWN = 5  # missing weights that a message lists


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer (None where it has none), and the folder that holds its files."""

    model: nn.Module
    tokenizer: Any
    folder: Path

    @property
    def is_causal_lm(self) -> bool:
        """The model predicts the next token."""
        return is_causal_lm(self.model)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the class that the model's config names (or else its own) predicts the next token."""
    names = getattr(getattr(model, "config", None), "architectures", None) or [type(model).__name__]
    return bool(re.search(r"(ForCausalLM|LMHeadModel)$", names[0]))


def load(source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Loaded:
    """Load a model of transformers from a folder or, where it is no folder, by its hub name.

    The cache is asked first: the network is used only for a model that is not there yet. Weights that the files lack
    are a QfxWarning. Raises ValueError where there is no such model, its class is unknown or needs code of its own, for
    weights that are cut short or those of another model, and for a checkpoint that another library quantized.
    """
    folder = resolve(source)
    kind, config = class_of(folder)
    check_float(folder, config, but=(_OWN, *_MADE_FLOAT))
    try:
        with without_bar():
            model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except SafetensorError as error:
        checkpoint.headers(sorted(folder.glob("*.safetensors")), {})  # which says what file it is
        raise ValueError(f"a file with weights in {folder} cannot be read: {error}") from error
    except RuntimeError as error:
        raise wrong_weights(kind, folder, str(error).strip().splitlines()[-1]) from error
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"{len(missing)} weights of {kind.__name__} are not in {folder} and hold random numbers: "
            f"{listed(missing, _SHOWN)}",
            QfxWarning,
            stacklevel=2,
        )
    return Loaded(model.eval().to(device), load_tokenizer(folder), folder)


def check_float(folder: Path, config: Any, *, but: Collection[str] = ()) -> None:
    """Raises ValueError where a model's config says that it is quantized, by another method than those of `but`."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", said)
    method = str(getattr(method, "value", method))
    if method not in but:
        step = "qfx.load opens it" if method == _OWN else "give the float model"
        if method in _CONVERTED:
            step += f", or what `qfx convert {folder} OUT --to qfx` makes of it, codes as they are"
        raise ValueError(explain(f"{folder} is quantized already, by {method}", next_step=step))


def wrong_weights(kind: Any, folder: Path, found: str) -> ValueError:
    """That the weights of a folder do not fit the class that its config names."""
    return ValueError(
        explain(
            f"the weights in {folder} are not those of {kind.__name__}, which its config.json names",
            expected="every weight of that class, in its shape",
            found=found,
            next_step="copy config.json and the weights of one model; a model whose head is new must be saved first",
        )
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; None where it has none. Raises ValueError where it cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    with read_by_transformers(f"the tokenizer of {folder}"):
        return AutoTokenizer.from_pretrained(folder)


def write_configs(model: nn.Module, folder: Path) -> None:
    """The configurations of a model and of its generation. Raises OSError where the disk does not take them."""
    config: Any = model.config
    write_text(folder / "config.json", config.to_json_string(use_diff=False))
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        write_text(folder / "generation_config.json", generation.to_json_string(use_diff=True))


def resolve(source: str | os.PathLike[str]) -> Path:
    """The folder of a model: `source` itself, or the cached or downloaded files of the hub name `source`.

    Raises ValueError where it is neither.
    """
    folder = path_of(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no model folder\n  expected: config.json and weights\n"
                f"  found: {', '.join(sorted(p.name for p in folder.iterdir())[:_SHOWN]) or 'nothing'}"
            )
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file\n  expected: the folder of a model, or a hub name")
    if not _HUB_NAME.fullmatch(str(source)):
        raise ValueError(
            f"there is no folder {source}\n  expected: the folder of a model, or a hub name such as org/name"
        )
    return _snapshot(str(source))


def bytes_on_disk(folder: Path) -> int:
    """Sum of the sizes of the files in a folder, sub-folders included, that hold weights."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in _WEIGHTS)


@contextmanager
def without_bar() -> Iterator[None]:
    """Without the progress bar of transformers, which prints even where it takes no time; as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HfHubHTTPError as error:
        raise ValueError(
            f"the hub does not give {name!r}: {first_line(error)}\n"
            "  next step: check the name; for a gated model run `hf auth login`"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{name!r} is no folder here, is not in the cache, and the hub cannot be reached\n"
            "  next step: give the path of a model folder, or connect once so that it is downloaded"
        ) from error


def class_of(folder: Path) -> tuple[Any, Any]:
    """The class of transformers that the config of a folder names, and the config.

    Raises ValueError where the config cannot be read or names a class that transformers does not have.
    """
    import transformers

    config = config_of(folder)
    names = list(config.architectures or ())
    if not names:
        return transformers.AutoModel, config
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no class {names[0]!r}, which {folder / 'config.json'} names\n"
            "  next step: load the model with its own code and call qfx.quantize(model, ...)"
        )
    return kind, config
