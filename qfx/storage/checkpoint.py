"""The safetensors files of a model folder, one or several: what they hold, read and checked tensor by tensor.

Digests are of tensors, not of files, so that it does not matter how the tensors are spread over files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qfx.errors import explain, listed
from qfx.storage.files import DTYPES
from qfx.storage.spill import flat_bytes, rest

ONE, INDEX, SUFFIX = "model.safetensors", "model.safetensors.index.json", ".safetensors"
NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
WRITER, SAVE_PRETRAINED = "qfx_writer", "save_pretrained"  # in the metadata of what transformers writes
_THREADS = 4
_PART = 1 << 22  # bytes that are hashed at once


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> 16 hex digits of the sha256 over dtype, shape and content of a tensor."""
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter lock
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def shards(tensors: Mapping[str, Tensor], limit: int) -> dict[str, list[str]]:
    """File -> names of the tensors in it, in their order: one file, or several of at most `limit` bytes each.

    A tensor that is larger has a file of its own. Raises ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"a file of weights has 1 byte or more, found a limit of {limit}")
    parts: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if parts[-1] and held + tensor.nbytes > limit:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += tensor.nbytes
    if len(parts) == 1:
        return {ONE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}{SUFFIX}": names for i, names in enumerate(parts, 1)}


def index_text(tensors: Mapping[str, Tensor], files: Mapping[str, Sequence[str]]) -> str:
    """The index of several files, as transformers writes it."""
    places = {name: file for file, names in files.items() for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n"


def files_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the weights of a folder. Raises FileNotFoundError where one is missing (named).

    Where there is one file and an index of several, those were saved later if all are there: transformers leaves the
    one file where it writes several, and removes the several where it writes one.
    """
    root = Path(folder)
    one, several = (root / ONE).is_file(), (root / INDEX).is_file()
    try:
        names = _indexed(root / INDEX) if several else [ONE]
    except ValueError:
        if not one:
            raise
        names = [ONE]
    missing = [name for name in names if not (root / name).is_file()]
    if missing and one:
        return [root / ONE]
    if missing:
        what = f"{len(missing)} of {len(names)} files with weights are missing: {listed(missing)}"
        step = "copy the whole folder, every file that model.safetensors.index.json names"
        raise FileNotFoundError(errno.ENOENT, explain(what, next_step=step), str(root))
    return [root / name for name in names]


def _indexed(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is truncated or altered: {error}; next step: copy it again") from error


def by_transformers(folder: str | os.PathLike[str]) -> bool:
    """Whether `save_pretrained` wrote the weights of a folder. False where they are missing or cannot be read."""
    try:
        with _opened(files_of(folder)[0]) as handle:
            return bool((handle.metadata() or {}).get(WRITER) == SAVE_PRETRAINED)
    except (OSError, ValueError):
        return False


def headers(files: Sequence[Path], expected: Mapping[str, str]) -> dict[str, Tensor]:
    """Name -> a tensor of its dtype and shape on the meta device, of every tensor in the files.

    Raises ValueError for a file that is cut short or is no safetensors file, and where one of the expected tensors is
    in none of the files.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                part = handle.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    if missing := [name for name in expected if name not in found]:
        what = f"{len(missing)} tensors are not in {_shown(files)}: {listed(missing)}"
        raise ValueError(explain(what, next_step="copy the whole folder again: a file with weights is missing"))
    return found


def check(files: Sequence[Path], expected: Mapping[str, str]) -> None:
    """Compare every tensor with the digest that was noted when it was saved; no more than a few are in memory.

    Raises ValueError naming those that were altered.
    """
    _read(files, expected, keep=False)


def read(files: Sequence[Path], expected: Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor of the files, on the CPU. Raises ValueError as `headers` and `check` do."""
    headers(files, expected)
    return _read(files, expected, keep=True)


def _read(files: Sequence[Path], expected: Mapping[str, str], *, keep: bool) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    altered: list[str] = []
    for file in files:
        with _opened(file) as handle, ThreadPoolExecutor(_THREADS) as pool:

            def one(name: str, handle: Any = handle) -> tuple[str, Tensor | None, bool]:
                tensor = handle.get_tensor(name)
                good = name not in expected or _digest(tensor) == expected[name]
                return name, tensor if keep else None, good

            for name, tensor, good in pool.map(one, list(handle.keys())):
                if not good:
                    altered.append(name)
                if tensor is not None:
                    kept[name] = tensor
    if altered:
        raise ValueError(
            explain(
                f"{len(altered)} tensors in {_shown(files)} were altered: {listed(altered)}",
                expected="the content that they had when qfx saved them",
                next_step="copy the files again; to change a model, load it, change it and save it",
            )
        )
    return kept


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({file.stat().st_size} bytes): {error}\n"
            "  next step: copy the file again, or save the model again"
        ) from error


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    hashed = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode(), usedforsecurity=False)
    for part in flat_bytes(plain).split(_PART):
        hashed.update(part.numpy().data)
        rest(part)
    return hashed.hexdigest()[:16]


def _shown(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"the {len(files)} files with weights in {files[0].parent}"
