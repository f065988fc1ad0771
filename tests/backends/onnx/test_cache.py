"""The folder of entries: whole, checked, bounded, shared by processes, and never in the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qfx.backends.onnx import cache as module
from qfx.backends.onnx.cache import Cache, digest
from qfx.errors import QfxWarning
from qfx.storage.folders import default_folder

KEY, OTHER = "ab" + "0" * 62, "cd" + "1" * 62


def put(cache: Cache, key: str, content: bytes = b"weights", fields: Any = 7) -> Path | None:
    with cache.writing() as writer:
        assert writer is not None
        (writer.folder / "0.data").write_bytes(content)
        return writer.commit(key, fields)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_what_is_put_is_found_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.get(KEY) is None, "a folder that is not there is an empty cache"
    where = put(cache, KEY, fields={"a": [1, None, "x"]})
    assert where is not None and cache.get(KEY) == (where, {"a": [1, None, "x"]})
    assert (where / "0.data").read_bytes() == b"weights"
    assert cache.get(OTHER) is None
    assert not list((tmp_path / "new" / "folder" / "tmp").iterdir())


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.writing() as writer:
        assert writer is not None
        (writer.folder / "x").write_bytes(b"1")
    with pytest.raises(KeyError), cache.writing() as writer:
        raise KeyError
    assert files(tmp_path) == [] and cache.get(KEY) is None


def test_of_two_writers_the_first_wins(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert put(cache, KEY, b"first", 1) == put(cache, KEY, b"second", 2)
    found = cache.get(KEY)
    assert found is not None and found[1] == 1 and (found[0] / "0.data").read_bytes() == b"first"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "0.data").write_bytes(b"weighTs"), r"the checksum of 0\.data"),
        (lambda p: (p / "0.data").write_bytes(b"weigh"), r"0\.data has 5 bytes instead of 7"),
        (lambda p: (p / "0.data").unlink(), r"0\.data is missing"),
        (lambda p: (p / "entry.json").write_text("{}"), r"entry\.json was altered or cut short"),
        (lambda p: (p / "entry.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda p: (p / "entry.json").write_text((p / "entry.json").read_text()[:-1]), r"altered or cut short"),
    ],
)
def test_damage_is_told_once_and_the_entry_made_anew(tmp_path: Path, damage: Any, message: str) -> None:
    cache = Cache(tmp_path)
    where = put(cache, KEY)
    assert where is not None
    damage(where)
    with pytest.warns(QfxWarning, match=message):
        assert cache.get(KEY) is None
    assert cache.get(KEY) is None, "it is gone, without a second warning"
    put(cache, KEY)
    assert cache.get(KEY) is not None


def test_every_byte_counts(tmp_path: Path) -> None:
    """Negative control of the checksum: one bit anywhere in a file of several parts."""
    path = tmp_path / "file"
    content = bytearray(os.urandom(5000))
    original, part = module._PART, 1024
    try:
        module._PART = part
        path.write_bytes(content)
        want = digest(path)
        assert want == digest(path, threads=3)
        for at in (0, 1023, 1024, 4999):
            content[at] ^= 1
            path.write_bytes(content)
            assert digest(path) != want
            content[at] ^= 1
        path.write_bytes(content[1024:2048] + content[:1024] + content[2048:])
        assert digest(path) != want, "the order of the parts counts"
    finally:
        module._PART = original


def test_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2500)
    keys = [f"{i:02d}" + "e" * 62 for i in range(3)]
    for age, key in zip((300, 200, 100), keys, strict=True):
        where = put(cache, key, b"x" * 600)
        assert where is not None
        os.utime(where, (time.time() - age, time.time() - age))
    assert cache.get(keys[0]) is not None, "now it is the one used last"
    put(cache, KEY, b"x" * 600)
    assert [cache.get(key) is not None for key in (*keys, KEY)] == [True, False, True, True]
    assert sum(size for _, size, _ in cache.entries()) <= 2500


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100)
    with pytest.warns(QfxWarning, match=r"cannot be written: .*an entry has 200 bytes, the cache holds 100"):
        assert put(cache, KEY, b"x" * 200) is None
    assert cache.get(KEY) is None


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old, young = tmp_path / "tmp" / "1-old", tmp_path / "tmp" / "2-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"1")
    os.utime(old, (1, 1))
    put(cache, KEY)
    assert not old.exists() and young.exists(), "a process may be writing the young one"


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "sub")
    with pytest.warns(QfxWarning, match=r"cannot be written[\s\S]*QFX_CACHE_DIR") as caught, cache.writing() as writer:
        assert writer is None
    assert len(caught) == 1 and cache.get(KEY) is None


def test_a_read_only_disk_is_read_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    put(cache, KEY)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for owner, name in ((os, "utime"), (Path, "mkdir"), (Path, "rename"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, refuse)
    assert cache.get(KEY) is not None
    with pytest.warns(QfxWarning, match="Read-only file system") as caught, cache.writing() as writer:
        assert writer is None
    assert len(caught) == 1


def test_a_full_disk_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.warns(QfxWarning, match="No space left") as caught, cache.writing() as writer:
        assert writer is None
    assert len(caught) == 1 and files(tmp_path) == []


# The imports take far longer than the work: they are made once, then the processes part.
_WRITERS = """
import os
import sys
from pathlib import Path
from qfx.backends.onnx.cache import Cache

def write():
    cache = Cache(Path(sys.argv[1]), max_bytes=30_000)
    for i in range(60):
        key = f"{i % 12:02d}" + "a" * 62
        found = cache.get(key)
        if found is not None:
            content = (found[0] / "0.data").read_bytes() if (found[0] / "0.data").exists() else None
            assert content in (None, bytes([i % 12]) * 4000), "half an entry"
            continue
        with cache.writing() as writer:
            (writer.folder / "0.data").write_bytes(bytes([i % 12]) * 4000)
            writer.commit(key, i % 12)

processes = []
for _ in range(3):
    process = os.fork()
    if not process:
        write()
        os._exit(0)
    processes.append(process)
codes = [os.waitpid(process, 0)[1] for process in processes]
print(codes)
"""


def test_several_processes_at_once(tmp_path: Path) -> None:
    forked = "ignore:This process:DeprecationWarning"  # Python 3.12 warns where a library has threads
    command = [sys.executable, "-W", "error", "-W", forked, "-c", _WRITERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.split("\n")[-2] == "[0, 0, 0]", done.stderr
    left = Cache(tmp_path, max_bytes=30_000)
    assert 0 < sum(size for _, size, _ in left.entries()) <= 40_000
    assert all(left.get(path.name) is not None for _, _, path in left.entries())


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QFX_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "qfx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "qfx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "qfx", "a relative one is ignored, as its standard says"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == tmp_path / "Library" / "Caches" / "qfx"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "qfx" / "Cache"
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.setenv("QFX_CACHE_DIR", "")
    assert default_folder() is None, "empty: no cache"


def test_without_a_home_there_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QFX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert default_folder() is None
