from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qfx.storage import files


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1', "truncated or no JSON: Expecting"),
        (b"\xff\xfe\xff", "truncated or no JSON"),
        (b"[1, 2]", "is no JSON object\n  found: list\n  next step: look away"),
    ],
)
def test_a_file_that_holds_no_object(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json", "look away")
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert files.read_json(tmp_path / "a.json", "") == {"a": [1]}


def test_text_and_bytes(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "t.txt", "grün\n")
    files.write_bytes(tmp_path / "a" / "b" / "b.bin", b"\0\1")
    assert (tmp_path / "a" / "b" / "t.txt").read_text(encoding="utf-8") == "grün\n"
    assert (tmp_path / "a" / "b" / "b.bin").read_bytes() == b"\0\1"
    assert names(tmp_path / "a" / "b") == ["b.bin", "t.txt"]


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    files.write_bytes(tmp_path / "x", data)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_relative_path_without_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_text("plain.txt", "1")
    assert Path("plain.txt").read_text() == "1"


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.path_of(".") == files.path_of(Path()) == Path()
    for stage in (files.staged(""), files.staged_folder("", last="x")):
        with (
            pytest.raises(ValueError, match="the path is empty\n.*\n  next step: .* '.' is the folder you are in"),
            stage,
        ):
            raise AssertionError
    for path, message in (("", "the path is empty"), (".", "a file is needed here, found a folder")):
        with pytest.raises((ValueError, IsADirectoryError), match=message):
            files.write_text(path, "x")
    assert not names(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """The next time that the same file is written, once nobody can be writing to it any more."""
    code = (
        "import os, sys; from qfx.storage import files\n"
        "with files.staged(sys.argv[1]) as stage:\n    stage('a[1].x')\n    os.abort()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=environment, capture_output=True)
    (old, young), others = files.temporary(tmp_path, "*"), (".a[1].x.tmp", ".b.0123456789ab.tmp", "a.0123456789ab.tmp")
    for name in others:
        (tmp_path / name).touch()
    for path in (old, *(tmp_path / name for name in others)):
        os.utime(path, (0, 0))
    files.write_text(tmp_path / "a[1].x", "")
    assert names(tmp_path) == sorted([young.name, *others, "a[1].x"])


def test_permissions_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    expected = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    files.write_safetensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == expected
    (tmp_path / "t.safetensors").chmod(0o600)
    files.write_safetensors(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o600


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "same": base,
        "strided": base.t()[1:, ::2],
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "codes": torch.arange(5, dtype=torch.uint8),
        "f8": torch.ones(4).to(torch.float8_e4m3fn),
        "e8m0": torch.ones(4).to(torch.float8_e8m0fnu),
    }
    files.write_safetensors(tmp_path / "t", tensors, {"made": "here"})
    read = files.read_safetensors(tmp_path / "t", sha256=files.sha256_file(tmp_path / "t"))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.detach().float())


def test_failure_in_the_block_changes_nothing(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")

    def fails() -> None:
        with files.staged(tmp_path) as stage:
            stage("a").write_text("new")
            stage("b").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    with files.staged(tmp_path) as stage:
        stage("a").write_text("new")
        assert stage("a") == stage("a")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), files.staged(tmp_path / "x" / "y"):
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(NotADirectoryError, match="a folder is needed"):
        files.write_text(tmp_path / "f" / "t.txt", "1")


def test_name_with_a_folder_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="plain file name"), files.staged(tmp_path) as stage:
        stage("../a")


def limited(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files cannot grow over 64 KiB."""
    script = "import resource, sys, torch\nfrom pathlib import Path\nfrom qfx.storage import files\n"
    script += "folder = Path(sys.argv[1])\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize(
    "call",
    [
        "files.write_safetensors(folder / 'a', {'t': torch.ones(100_000)})",
        "files.write_bytes(folder / 'a', bytes(100_000))",
        "with files.staged(folder) as stage: torch.ones(100_000).numpy().tofile(stage('a'))",
    ],
)
def test_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, call: str) -> None:
    files.write_text(tmp_path / "a", "old")
    done = limited(call, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError")
    assert "the disk is full" in last
    assert "nothing was changed" in last
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_full_disk_found_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        files.write_text(tmp_path / "new" / "a", "1")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_other_errors_keep_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_text(tmp_path / "a", "1")
    assert "disk is full" not in str(caught.value)


def test_read_refuses_missing_truncated_altered(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no such safetensors file.*t\.safetensors"):
        files.read_safetensors(path)
    files.write_safetensors(path, {"a": torch.ones(100)})
    digest = files.sha256_file(path)
    whole = path.read_bytes()
    for cut in (0, 5, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            files.read_safetensors(path)
        with pytest.raises(ValueError, match="altered or is truncated"):
            files.read_safetensors(path, sha256=digest)
    path.write_bytes(whole[:-1] + b"\1")
    files.read_safetensors(path)  # without the digest a flipped byte goes unnoticed: the digest is what finds it
    with pytest.raises(ValueError, match=f"expected: sha256 {digest}"):
        files.read_safetensors(path, sha256=digest)


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("1")
    (tmp_path / "b").write_text("old")
    with files.staged_folder(tmp_path, last="a") as stage:
        files.write_text(stage / "a", "new")
        files.write_text(stage / "b", "new")
        assert (tmp_path / "b").read_text() == "old"
        assert not (tmp_path / "a").exists()
    assert [(n, (tmp_path / n).read_text()) for n in names(tmp_path)] == [("a", "new"), ("b", "new"), ("kept", "1")]


def test_the_last_file_moves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = os.replace

    def note(old: Path, new: Path) -> None:
        moved.append(new.name)
        replace(old, new)

    with files.staged_folder(tmp_path, last="a") as stage:
        for name in "bac":
            (stage / name).touch()
        monkeypatch.setattr(os, "replace", note)
    assert moved == ["b", "c", "a"]


def test_a_staged_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with files.staged_folder(tmp_path / "x" / "y", last="a") as stage:
            files.write_text(stage / "a", "new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert names(tmp_path) == []


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        name: torch.randint(0, 2, (3, 5)).to(dtype)
        for name, dtype in files.DTYPES.items()
        if name not in ("F8_E8M0", "C64", "U64", "U32", "U16")
    }
    tensors |= {"empty": torch.zeros(0, 3), "odd": torch.ones(3, dtype=torch.uint8), "strided": torch.arange(6.0)[::2]}
    files.write_safetensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    with safe_open(tmp_path / "t.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"} and set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found.double(), tensor.double()), name
    raw = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    places = {n: f["data_offsets"][0] for n, f in fields.items() if n != "__metadata__"}
    assert length % 8 == 0 and all(place % tensors[n].element_size() == 0 for n, place in places.items()), "aligned"


def test_a_dtype_that_safetensors_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no name for torch\.complex128, the dtype of 'z'"):
        files.write_safetensors(tmp_path / "t.safetensors", {"z": torch.zeros(2, dtype=torch.complex128)})
    assert names(tmp_path) == []


def test_numbers_that_are_not_finite_are_null() -> None:
    text = files.json_text({"a": [math.inf, math.nan, 1.5], "b": {"c": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": {"c": None}}
    assert text.endswith("}\n") and '\n "a": [' in text


OLD = {"a": "old a", "b": "old b", "kept": "1"}


def replaced(folder: Path, way: str) -> None:
    """Write a, b and new, two of which are there."""
    if way == "staged":
        with files.staged(folder) as stage:
            for name in ("a", "new", "b"):
                stage(name).write_text(f"new {name}")
        return
    with files.staged_folder(folder, last="a") as place:
        for name in ("a", "new", "b"):
            (place / name).write_text(f"new {name}")


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("way", ["staged", "folder"])
def test_an_end_between_two_files_brings_the_old_ones_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, error: type[BaseException], after: bool, linked: bool
) -> None:
    """Before each renaming, or right behind it."""
    replace = os.replace

    def no_link(*_: Path, **__: bool) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not linked:
        monkeypatch.setattr(os, "link", no_link)
    for stop in range(3):
        for name, text in OLD.items():
            (tmp_path / name).write_text(text)
        calls: list[Path] = []

        def broken(old: Path, new: Path, stop: int = stop, calls: list[Path] = calls) -> None:
            calls.append(new)
            if len(calls) != stop + 1:  # once: what is brought back is renamed, too
                replace(old, new)
                return
            if after:
                replace(old, new)
            raise error("stop")

        monkeypatch.setattr(os, "replace", broken)
        with pytest.raises(error, match="stop"):
            replaced(tmp_path, way)
        monkeypatch.setattr(os, "replace", replace)
        found = {name: (tmp_path / name).read_text() for name in names(tmp_path)}
        assert found == OLD
    replaced(tmp_path, way)
    assert names(tmp_path) == ["a", "b", "kept", "new"] and (tmp_path / "a").read_text() == "new a"


def test_one_file_that_is_there_is_never_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right behind its renaming: the former text is gone, so the new one stays."""
    replace = os.replace

    def interrupted(old: Path, new: Path) -> None:
        replace(old, new)
        raise KeyboardInterrupt

    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("way", ["staged", "folder"])
@pytest.mark.parametrize("leads", ["blob", "nowhere"])
def test_a_link_comes_back_as_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: str, way: str) -> None:
    """As downloads are kept: beside its place, where a folder is staged, it leads nowhere."""
    (tmp_path / "blob").write_text("old")
    (tmp_path / "a").symlink_to(leads)
    (tmp_path / "b").symlink_to("blob")
    before, replace = names(tmp_path), os.replace

    def broken(old: Path, new: Path) -> None:
        replace(old, new)
        if Path(new).name == "new":
            raise OSError(errno.EIO, "stop")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="stop"):
        replaced(tmp_path, way)
    assert names(tmp_path) == before
    assert [str((tmp_path / name).readlink()) for name in "ab"] == [leads, "blob"]
    assert (tmp_path / "blob").read_text() == "old"


def test_a_full_disk_is_said_of_a_staged_folder_too(tmp_path: Path) -> None:
    def write() -> None:
        with files.staged_folder(tmp_path / "x", last="a"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full; nothing was changed"):
        write()
    assert names(tmp_path) == []


def test_whether_a_folder_can_be_written_to_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "x/y"):
        files.check_writable(tmp_path / folder)
    assert names(tmp_path) == ["empty"]
    (tmp_path / "f").touch()
    with pytest.raises(NotADirectoryError):
        files.check_writable(tmp_path / "f" / "out")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(PermissionError):
        files.check_writable(tmp_path / "x" / "y")
    assert names(tmp_path) == ["empty", "f"]
