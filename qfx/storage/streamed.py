"""Models larger than memory: a folder of safetensors opened as a live transformers model whose weights stay on disk.

    folder (config.json, model-00001-of-00003.safetensors, ...) -> headers -> views of mapped files -> module

Parameters are views of the mapped files, in the dtype that is stored; a page is read when it is first used, and
`qfx.storage.spill.rest` lets go of it. What is made of such a weight (rewritten, packed) goes into a temporary file.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qfx.errors import QfxWarning, explain, listed
from qfx.hf import hub
from qfx.storage.files import DTYPES
from qfx.storage.skeleton import set_generation
from qfx.storage.spill import Spill, give_back, is_mapped, map_file, rest

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_MADE = 1 << 27  # bytes of weights made while a model opens, before what they were made of goes to rest


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype and shape, and the bytes [start, stop) of the file that hold it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def load(source: str | os.PathLike[str], *, scratch: str | os.PathLike[str] | None = None) -> hub.Loaded:
    """Open a model of transformers, from a folder or by its hub name, without reading its weights.

    scratch: the folder of the temporary file for what is made of the weights; it should be on a disk with room for the
    model (left out: the system's folder for temporary files). Raises FileNotFoundError for a missing shard, ValueError
    for a truncated or altered one, a model that is quantized already and weights that are not those of its class.
    """
    folder = hub.resolve(source)
    kind, config = hub.class_of(folder)
    if (folder / "qfx.json").is_file():
        raise ValueError(explain(f"{folder} is quantized already", next_step="qfx.load opens it"))
    hub.check_float(folder, config)
    place = Spill(Path(tempfile.gettempdir() if scratch is None else scratch))
    tensors = mapped(folder, place)
    if not tensors:
        raise ValueError(explain(f"the weight files of {folder} hold no tensor", next_step="copy the folder again"))
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.nbytes
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    with hub.without_bar(), _kept_as_made(place, tensors):
        model = _filled(kind, config, tensors, dtype, folder)
    _settled(model, place)
    return hub.Loaded(model.eval(), hub.load_tokenizer(folder), folder)


def mapped(folder: Path, scratch: Spill) -> dict[str, Tensor]:
    """Name -> tensor of every weight file of a model folder, none of them read. Raises as `load` does."""
    found: dict[str, Tensor] = {}
    for path, names in _files(folder).items():
        entries = header(path)
        if lost := [name for name in names if name not in entries]:
            raise ValueError(
                explain(
                    f"{path} is not the shard that {INDEX} speaks of",
                    expected=f"a tensor {lost[0]!r} in it",
                    found=f"{len(entries)} other tensors",
                    next_step="copy the whole folder again",
                )
            )
        whole = map_file(path, scratch)
        for name in names or entries:
            found[name] = _view(whole, entries[name], scratch)
    return found


def float_bytes(folder: Path) -> int | None:
    """Bytes that the weights of a folder take in float32; None where they are no safetensors files."""
    try:
        entries = [entry for path in _files(folder) for entry in header(path).values()]
    except FileNotFoundError:
        return None
    return sum(4 * torch.Size(entry.shape).numel() for entry in entries)


def free_memory() -> int | None:
    """Bytes of memory that the system can still give; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


def header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds. Raises ValueError where it is truncated, altered or no safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise _broken(path, size, "its header is not complete")
        try:
            fields = json.loads(file.read(length))
            entries = {name: _entry(fields[name], 8 + length) for name in fields if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _broken(path, size, f"its header cannot be read: {type(error).__name__}: {error}") from error
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != at or entry.stop - at != torch.Size(entry.shape).numel() * entry.dtype.itemsize:
            raise _broken(path, size, f"the place of {name!r} does not fit its shape {list(entry.shape)}")
        at = entry.stop
    if at != size:
        raise _broken(path, size, f"it should have {at} bytes")
    return entries


def _files(folder: Path) -> dict[Path, list[str]]:
    """Each weight file of a folder with the names that the index gives it; no names where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: []}
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf", ".safetensors")
        )
        raise FileNotFoundError(
            explain(
                f"{folder} holds no weights that can stay on disk",
                expected=f"{SINGLE}, or shards and {INDEX}",
                found=listed(others) or "no weights",
                next_step="load it with transformers and save it again (save_pretrained writes safetensors)",
            )
        )
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in places.items():
            files.setdefault(folder / Path(file).name, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            explain(f"{index} is truncated or no index of shards: {error}", next_step="copy the folder again")
        ) from error
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise FileNotFoundError(
            explain(
                f"{len(missing)} of {len(files)} shards of {folder} are missing: {listed(missing)}",
                next_step="copy or download them, too",
            )
        )
    return files


def _entry(field: Mapping[str, Any], offset: int) -> Entry:
    kind = field["dtype"]
    if kind not in DTYPES:
        raise ValueError(f"dtype {kind!r}, known are {', '.join(DTYPES)}")
    start, stop = field["data_offsets"]
    return Entry(DTYPES[kind], tuple(field["shape"]), offset + start, offset + stop)


def _view(whole: Any, entry: Entry, scratch: Spill) -> Tensor:
    count = torch.Size(entry.shape).numel()
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.start % entry.dtype.itemsize == 0:
        return torch.frombuffer(whole, dtype=entry.dtype, count=count, offset=entry.start).reshape(entry.shape)
    raw = torch.frombuffer(whole, dtype=torch.uint8, count=entry.stop - entry.start, offset=entry.start)
    return scratch.keep(raw.clone().view(entry.dtype).reshape(entry.shape))  # an old writer did not align it


def _filled(kind: Any, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> nn.Module:
    """The model of these tensors. Raises ValueError where they are not those of the class."""
    try:
        model: nn.Module
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise hub.wrong_weights(kind, folder, str(error).strip().splitlines()[-1]) from error
    if missing := sorted(info["missing_keys"]):
        raise hub.wrong_weights(kind, folder, f"{len(missing)} of its weights are missing: {listed(missing)}")
    if more := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{len(more)} weights in {folder} are none of {kind.__name__} and are not used: {listed(more)}",
            QfxWarning,
            stacklevel=4,
        )
    model.config.name_or_path = str(folder)  # type: ignore[union-attr]
    set_generation(model, folder)
    return model


@contextmanager
def _kept_as_made(place: Spill, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Weights that transformers makes of several tensors (experts merged), or casts, go into the temporary file one by
    one, and what they were made of goes to rest. Of modules of other threads nothing is touched."""
    here, made = threading.get_ident(), 0

    def keep(_: nn.Module, __: str, given: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal made
        if given is None or threading.get_ident() != here or given.device.type != "cpu" or is_mapped(given):
            return None
        kept = nn.Parameter(place.keep(given.detach()), given.requires_grad)
        if not is_mapped(kept):
            return None
        vars(kept).update(vars(given))
        made += kept.nbytes
        rest(kept)
        if made >= _MADE:
            made = 0
            rest(*tensors.values())
        return kept

    handle = register_module_parameter_registration_hook(keep)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _settled(model: nn.Module, place: Spill) -> None:
    """Weights that are no views of the files (converted, merged, cast) go into the temporary file."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None or is_mapped(old):
                    continue
                if id(old) not in moved:
                    kept = place.keep(old.detach())
                    if kept is old.detach() or not is_mapped(kept):
                        continue
                    moved[id(old)] = nn.Parameter(kept, old.requires_grad) if isinstance(old, nn.Parameter) else kept
                store[name] = moved[id(old)]  # type: ignore[assignment]
    give_back()


def _broken(path: Path, size: int, what: str) -> ValueError:
    return ValueError(
        explain(f"{path} is truncated or no safetensors file ({size} bytes): {what}", next_step="copy it again")
    )
