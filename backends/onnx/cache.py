"""A folder of entries that several processes may read and write at once: whole, checked, bounded in size.

An entry is a folder named by its key, with files and an `entry.json` that names them with size and checksum. It is
written under another name and renamed when it is whole. The entries used longest ago go when there are too many bytes.
Nothing in it is code: JSON, and what the caller writes (ONNX models and their weights).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qfx.errors import first_line, warn
from qfx.processor import each

GIB = 1 << 30
MOST_BYTES = 8 * GIB
_ENTRY = "entry.json"
_PART = 16 << 20
_STALE = 3600.0  # seconds after which a temporary folder belongs to a process that died
_GONE = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True)
class Cache:
    """A cache in a folder, which is made when the first entry is written. No method raises for what the disk does.

    max_bytes: entries used longest ago are removed above it; an entry that is larger by itself is not kept.
    """

    folder: Path
    max_bytes: int = MOST_BYTES

    def get(self, key: str, threads: int = 1) -> tuple[Path, Any] | None:
        """(folder, fields) of an entry, None where there is none. A damaged one is removed, with a QfxWarning."""
        path = self._path(key)
        try:
            fields = _checked(path, threads)
        except _GONE:
            return None
        except (OSError, ValueError) as error:
            warn(f"the cached entry {path} is damaged and is made anew: {error}; next step: none, or check the disk")
            self.remove(path)
            return None
        with suppress(OSError):  # what a read-only cache cannot note
            os.utime(path)
        return path, fields

    @contextmanager
    def writing(self, threads: int = 1) -> Iterator[Writer | None]:
        """A new entry: its files go to `writer.folder`, `writer.commit(key, fields)` makes it visible.

        None where the folder cannot be written, with a QfxWarning. What is not committed is removed at the end.
        """
        path = self.folder / "tmp" / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            path.mkdir(parents=True)
            if shutil.disk_usage(path).free < _PART:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError as error:
            self.unusable(error)
            _remove_tree(path)
            yield None
            return
        try:
            yield Writer(self, path, threads)
        finally:
            _remove_tree(path)

    def unusable(self, error: Exception) -> None:
        """Say that the cache cannot be written."""
        what = f"the cache of compiled models in {self.folder} cannot be written"
        step = "make room, set QFX_CACHE_DIR to another folder, or options={'cache': False}"
        warn(f"{what}: {first_line(error)}; next step: {step}")

    def entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, folder) of every entry, the one used longest ago first."""
        found = []
        for path in self.folder.glob("v1/*/*"):
            with suppress(OSError):
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append((path.stat().st_mtime, size, path))
        return sorted(found)

    def trim(self, keep: Path | None = None) -> None:
        """Remove the entries used longest ago until there are at most `max_bytes`, and what dead processes left."""
        found = self.entries()
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self.max_bytes:
                break
            if path != keep:
                self.remove(path)
                total -= size
        for path in self.folder.glob("tmp/*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:
                    _remove_tree(path)

    def _path(self, key: str) -> Path:
        return self.folder / "v1" / key[:2] / key

    def remove(self, path: Path) -> None:
        """Take an entry away in one step, so that no other process sees half of it."""
        grave = self.folder / "tmp" / f"{os.getpid()}-{secrets.token_hex(6)}"
        with suppress(OSError):
            grave.parent.mkdir(parents=True, exist_ok=True)
            path.rename(grave)
        _remove_tree(grave)


@dataclass(frozen=True)
class Writer:
    """An entry being written into `folder`."""

    cache: Cache
    folder: Path
    threads: int = 1

    def commit(self, key: str, fields: Any) -> Path | None:
        """Make the entry visible; its folder, or None where it was not kept (with a QfxWarning).

        An entry that stands there already, from another process, stays.
        """
        target = self.cache._path(key)
        try:
            files = {p.name: [p.stat().st_size, digest(p, self.threads)] for p in sorted(self.folder.iterdir())}
            total = sum(file.stat().st_size for file in self.folder.iterdir())
            if total > self.cache.max_bytes:
                what = f"an entry has {total} bytes, the cache holds {self.cache.max_bytes}"
                raise OSError(errno.EFBIG, what)
            body = json.dumps({"files": files, "fields": fields}, allow_nan=False)
            (self.folder / _ENTRY).write_text(f"{_sha(body)}\n{body}", encoding="utf-8")
            target.parent.mkdir(parents=True, exist_ok=True)
            _rename(self.folder, target)
        except OSError as error:
            self.cache.unusable(error)
            return None
        self.cache.trim(keep=target)
        return target


def digest(path: Path, threads: int = 1) -> str:
    """Hex checksum of a file: crc32 of each 16 MiB (against damage, not against forgery), all of them by sha256."""
    size = path.stat().st_size
    with path.open("rb") as file:
        handle = file.fileno()

        def part(start: int) -> int:
            return zlib.crc32(_pread(handle, min(_PART, size - start), start))

        sums = each(part, range(0, size, _PART), threads)
    return _sha(json.dumps([size, *sums]))


def _pread(handle: int, size: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, size, start)
    with open(os.dup(handle), "rb") as file:
        file.seek(start)
        return file.read(size)


def _checked(path: Path, threads: int) -> Any:
    """The fields of an entry. Raises OSError or ValueError where it is not what was written."""
    head, _, body = (path / _ENTRY).read_text(encoding="utf-8").partition("\n")
    if head != _sha(body):
        raise ValueError(f"{_ENTRY} was altered or cut short")
    entry = json.loads(body)
    for name, (size, want) in entry["files"].items():
        file = path / name
        try:
            found = file.stat().st_size
        except FileNotFoundError as error:
            if (path / _ENTRY).exists():
                raise ValueError(f"{name} is missing") from error
            raise  # another process removed the entry meanwhile
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
        if digest(file, threads) != want:
            raise ValueError(f"the checksum of {name} is not that of what was written")
    return entry["fields"]


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not (target / _ENTRY).exists():
            raise


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
