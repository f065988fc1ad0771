"""Files that are whole or not there: every write goes to a temporary name, is flushed, and is then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qfx.errors import explain
from qfx.storage.spill import flat_bytes, rest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SHORT = " requested and "  # numpy's words where a part of an array is written, without an error number
_PART = 1 << 22  # bytes that are written at once
_LEFT = 3600  # seconds in which nobody wrote to a temporary file whose process was killed

DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64, "F32": torch.float32,
    "I32": torch.int32, "U32": torch.uint32, "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16,
    "U16": torch.uint16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""The names of safetensors for dtypes."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path. Raises ValueError for "", which would be the folder that one is in."""
    if not os.fspath(path):
        expected, step = "a file or folder", "look for a variable that is not set; '.' is the folder you are in"
        raise ValueError(explain("the path is empty", expected=expected, next_step=step))
    return Path(path)


def temporary(folder: Path, name: str) -> list[Path]:
    """The temporary files for a name (a pattern of glob) in a folder, of this process and others."""
    return list(folder.glob(f".{name}.{'[0-9a-f]' * 12}.tmp"))


def remove_left(folder: Path, name: str) -> None:
    """Remove the temporary files for a name (a pattern of glob) that a process left which was killed."""
    for path in temporary(folder, name):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT:
                path.unlink()


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Callable[[str], Path]]:
    """Write several files of one folder so that either all of them appear or none does.

    Yields `stage(name) -> Path`, the temporary path to write to. At the end of the block each file is flushed to the
    disk and then renamed, in the order of the calls; other files of the folder stay as they are. Where the block or a
    flush fails, what was there before is unchanged. Raises OSError; where the disk is full its message says so.
    """
    root = path_of(folder)
    made = _make_folder(root)
    paths: dict[str, Path] = {}
    modes: dict[str, int] = {}

    def stage(name: str) -> Path:
        if not name:
            raise IsADirectoryError(errno.EISDIR, "a file is needed here, found a folder", str(root))
        assert name == Path(name).name, f"a plain file name is needed, found {name!r}"
        if name not in paths:
            remove_left(root, escape(name))
            paths[name] = root / f".{name}.{secrets.token_hex(6)}.tmp"
            paths[name].touch(exist_ok=False)
            modes[name] = (root / name if (root / name).exists() else paths[name]).stat().st_mode & 0o777
        return paths[name]

    try:
        yield stage
        for path in paths.values():
            _flush(path)
        for name, path in paths.items():
            path.chmod(modes[name])
        _move([(path, root / name) for name, path in paths.items()])
        _flush(root)
    except BaseException as error:
        for path in paths.values():
            path.unlink(missing_ok=True)
        if made is not None:
            _remove_empty(root, made)
        _say_full(error, root)
        raise


@contextmanager
def staged_folder(folder: str | os.PathLike[str], *, last: str) -> Iterator[Path]:
    """Write several files of one folder, by functions that write whole files, so that all of them appear or none does.

    Yields a new folder to write to, in `folder`. At the end of the block its files move to `folder`, `last` after all
    others. Where the block fails, what was there before is unchanged. Raises OSError.
    """
    root = path_of(folder)
    made = _make_folder(root)
    stage = root / f".{secrets.token_hex(6)}.tmp"
    done = False
    try:
        stage.mkdir()
        yield stage
        paths = sorted(stage.iterdir(), key=lambda path: (path.name == last, path.name))
        _move([(path, root / path.name) for path in paths])
        _flush(root)
        done = True
    except OSError as error:
        _say_full(error, root)
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made is not None and not done:
            _remove_empty(root, made)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lets one process at a time through, for those that read a file of this folder, add to it and write it.

    The folder is made. It waits for the others; systems and file systems without locks let all through.
    """
    root = path_of(folder)
    _make_folder(root)
    if fcntl is None:
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises OSError as `staged` does."""
    target = path_of(path)
    with staged(target.parent) as stage:
        stage(target.name).write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. Raises OSError as `staged` does."""
    write_bytes(path, text.encode())


def read_json(path: Path, next_step: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError for anything else, FileNotFoundError where there is no file."""
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(explain(f"{path} is truncated or no JSON: {error}", next_step=next_step)) from error
    if not isinstance(fields, dict):
        raise ValueError(explain(f"{path} is no JSON object", found=type(fields).__name__, next_step=next_step))
    return fields


def json_text(fields: Any) -> str:
    """JSON text, indented; numbers that are not finite are null, which JSON has for them."""
    plain = json.loads(json.dumps(fields), parse_constant=lambda _: None)
    return json.dumps(plain, indent=1, allow_nan=False) + "\n"


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device, stride and sharing to `path`, whole or not at all. Raises OSError as `staged`."""
    target = path_of(path)
    with staged(target.parent) as stage:
        dump_safetensors(stage(target.name), tensors, metadata)


def dump_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file inside a `staged` block, tensor by tensor. Those that share memory are written each.

    The memory of a tensor that lies in a file is let go of as it is written (see `qfx.storage.spill`). Raises OSError
    where the file cannot be written, ValueError for a dtype that safetensors does not know.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so all of them are aligned
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors has no name for {tensor.dtype}, the dtype of {name!r}")
        size = tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        fields[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb", buffering=0) as file:
        _write(file, len(header).to_bytes(8, "little") + header)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous()
            for part in flat_bytes(plain).split(_PART) if plain.numel() else ():
                _write(file, part.numpy().data)
                rest(part)


def read_safetensors(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises FileNotFoundError where there is none, ValueError where it is truncated, no safetensors file, or where its
    content is not that of `sha256`.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such safetensors file", str(target))
    if sha256 is not None and (found := sha256_file(target)) != sha256:
        raise ValueError(
            f"{target} was altered or is truncated ({target.stat().st_size} bytes)\n  expected: sha256 {sha256}\n"
            f"  found: sha256 {found}\n  next step: copy the file again, or make it anew"
        )
    try:
        return load_file(target)
    except SafetensorError as error:
        raise ValueError(
            f"{target} is truncated or no safetensors file ({target.stat().st_size} bytes): {error}\n"
            "  next step: copy the file again, or make it anew"
        ) from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """The digest of a text, hexadecimal."""
    return hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raises OSError where no file can be written in a folder, which need not be there yet; nothing is left behind."""
    root = Path(folder)
    made = _make_folder(root)
    probe = root / f".{secrets.token_hex(6)}.tmp"
    try:
        probe.write_bytes(b"x")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        if made is not None:
            _remove_empty(root, made)


def _move(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename files in order; where that ends halfway (Ctrl-C, a disk that fails), what was there comes back."""
    if len(pairs) == 1:  # whole or not at all by itself: there is nothing to take back
        os.replace(*pairs[0])
        return
    former: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for path, target in pairs:
            if target.is_symlink() or target.is_file():
                former[target] = path.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
                _keep(target, former[target])
            done.append(target)
            os.replace(path, target)
    except BaseException:
        for (path, _), target in zip(pairs, done, strict=False):
            if not path.exists() and target not in former:
                target.unlink(missing_ok=True)
        for target, kept in former.items():
            if os.path.lexists(kept):  # a link to a file beside its former place leads nowhere here
                os.replace(kept, target)
        raise
    finally:
        for kept in former.values():
            kept.unlink(missing_ok=True)


def _keep(target: Path, kept: Path) -> None:
    """What is at `target`, a link itself, not what it leads to, under a second name."""
    try:
        os.link(target, kept, follow_symlinks=False)
    except OSError:  # a file system without links
        target.rename(kept)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    """All of the data: an unbuffered file may take a part only, before it says that the disk is full."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _make_folder(root: Path) -> Path | None:
    """Make the folder with its parents; the topmost one that was made, None where it stood already."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "a folder is needed here, found a file", str(root)) from error
    return missing[-1] if missing else None


def _remove_empty(root: Path, top: Path) -> None:
    """Remove the folders from `root` up to `top` as far as they are empty."""
    with suppress(OSError):
        for folder in (root, *root.parents):
            folder.rmdir()
            if folder == top:
                return


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk; folders that cannot be opened (Windows) are left to the system."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say_full(error: BaseException, root: Path) -> None:
    """Raise an error of a full disk again, in plain words; others are left to the caller."""
    short = isinstance(error, OSError) and error.errno is None and _SHORT in str(error)
    if short or (isinstance(error, OSError) and error.errno in _FULL):
        what = "the disk is full; nothing was changed. Free some space and save again"
        raise OSError(errno.ENOSPC if short else error.errno, what, str(root)) from error  # type: ignore[attr-defined]
