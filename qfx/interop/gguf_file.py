"""A GGUF file that is there: metadata and tensors, of one file or of the parts into which a large one is cut.

llama.cpp's `llama-gguf-split` names parts `m-00001-of-00003.gguf`; the first has the metadata, each some
tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfx.errors import UnsupportedError, explain, listed, nearest
from qfx.interop.gguf_blocks import BLOCK_TYPES
from qfx.interop.gguf_export import need_gguf

PLAIN = ("F32", "F16", "BF16")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A file that was checked: its metadata, and tensors by name. The data is mapped, not read."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Metadata and tensors of a GGUF file, whose size is checked; of a part those of all parts beside it.

    Raises FileNotFoundError, also for a part that is missing, ValueError for a file that is none or is cut short,
    UnsupportedError for types of tensors that are not known, ImportError without gguf.
    """
    file = Path(path)
    first = _part(file)
    count = int(first.fields.get("split.count", 1))
    if count <= 1:
        return first
    parts = [_part(part) for part in _parts(file, count)]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    promised = int(parts[0].fields.get("split.tensors.count", len(tensors)))
    if len(tensors) != promised:
        raise ValueError(
            explain(
                f"{file} and the parts beside it are not of one model",
                expected=f"{promised} tensors",
                found=f"{len(tensors)} in {count} parts",
                next_step="copy all parts again",
            )
        )
    return GgufFile(file, parts[0].fields, tensors)


def _parts(file: Path, count: int) -> list[Path]:
    """The paths of all parts, the first one first."""
    named = _PART.fullmatch(file.name)
    if named is None or int(named[2]) != count:
        raise ValueError(
            explain(
                f"{file} is one of {count} parts",
                expected=f"a name such as {file.stem}-00001-of-{count:05}.gguf, by which the others are found",
                next_step="give the parts the names that llama-gguf-split gave them, or join them with it (--merge)",
            )
        )
    found = [file.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        what = f"{file} is one of {count} parts, and others are not beside it"
        raise FileNotFoundError(explain(what, expected=listed(missing), next_step="copy all parts into one folder"))
    return found


def _part(file: Path) -> GgufFile:
    """What one file holds."""
    gguf = need_gguf()
    if not file.is_file():
        raise FileNotFoundError(explain(f"there is no file {file}", next_step="give the path of a .gguf file"))
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(explain(f"{file} is no GGUF file", expected="its first bytes are 'GGUF'"))
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(
            explain(
                f"{file} is cut short, altered, or of a version or type that gguf does not know: {error}",
                found=f"{file.stat().st_size} bytes",
                next_step="copy the file again, or install a newer gguf",
            )
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        if kind not in BLOCK_TYPES and kind not in PLAIN:
            known = nearest(kind, [*BLOCK_TYPES, *PLAIN])
            raise UnsupportedError(explain(f"{file}: tensor {name!r} is of type {kind}", expected=known))
    return GgufFile(file, fields, tensors)
