"""Measured configurations: buckets, files, which of them wins, and choices that are watched and tried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qfx.backends.triton import tuning
from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.errors import QfxWarning

GPU = Device("NVIDIA Test (1)", (9, 0), 132, 232448)
BEST = {"BLOCK_M": 64, "num_warps": 8}
KINDS = [BEST, {"BLOCK_M": 16}, {"FROM": 0}]


def found(kernel: str, problem: str, m: int, device: Device = GPU) -> Config | None:
    """What was measured, of a kernel that has the constants of KINDS."""
    return tuning.tuned(device, kernel, problem, m, lambda _: KINDS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFX_TUNED_DIR", str(tmp_path / "own"))
    return tmp_path / "own"


@given(st.integers(0, 20000))
def test_a_bucket_is_the_next_power_of_two(m: int) -> None:
    most = tuning.bucket(m)
    assert most == 8192 if m > 8192 else m <= most < max(2 * m, 2)


def test_what_is_written_is_found_and_the_rest_stays(folder: Path) -> None:
    assert found("gemm", "n=8 k=8", 5) is None and not tuning.has_any(GPU)
    path = tuning.write(folder, GPU, {("gemm", "n=8 k=8", "8"): BEST, ("gemm", "n=8 k=8", "16"): {"BLOCK_M": 16}})
    assert path == folder / "NVIDIA_Test_1.json" == tuning.file_of(folder, GPU)
    assert found("gemm", "n=8 k=8", 5) == BEST and tuning.has_any(GPU)
    tuning.write(folder, GPU, {("gemm", "n=8 k=8", "16"): {"BLOCK_M": 32}, ("gemv", "n=8 k=8", "1"): {"SPLIT": 2}})
    assert json.loads(path.read_text()) == {
        "gemm": {"n=8 k=8": {"8": BEST, "16": {"BLOCK_M": 32}}},
        "gemv": {"n=8 k=8": {"1": {"SPLIT": 2}}},
    }
    assert [found("gemm", "n=8 k=8", m) for m in (4, 8, 9, 17)] == [None, BEST, {"BLOCK_M": 32}, None]
    assert found("gemm", "n=8 k=8", 8, Device("other", (9, 0), 1, 1)) is None


def test_the_named_folder_wins_over_the_users_own_over_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    user = tmp_path / "cache" / "tuned"
    for place, buckets in ((tuning.SHIPPED, "124"), (user, "24"), (folder, "4")):
        tuning.write(place, GPU, {("gemm", "p", b): {"FROM": len(place.parts) + len(place.name)} for b in buckets})
    sources = [found("gemm", "p", int(b)) for b in "124"]
    assert sources == [{"FROM": len(p.parts) + len(p.name)} for p in (tuning.SHIPPED, user, folder)]
    assert tuning.own_folder() == folder
    monkeypatch.delenv("QFX_TUNED_DIR")
    assert tuning.own_folder() == user
    assert found("gemm", "p", 4) == found("gemm", "p", 2)
    monkeypatch.setenv("QFX_CACHE_DIR", "")
    assert tuning.own_folder() is None and found("gemm", "p", 1) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated or no JSON"),
        ("[]", "is no JSON object"),
        ('{"gemm": []}', "no configurations of kernels under 'gemm'"),
        ('{"gemm": {"p": null}}', "no configurations of kernels under 'gemm'"),
        ('{"gemm": {"p": {"1": "fast"}}}', "no configurations of kernels under 'gemm'"),
        ('{"gemm": {"p": {"1": {"BLOCK_M": 16.5}}}}', "no configurations of kernels under 'gemm'"),
        ('{"gemm": {"p": {"many": {"BLOCK_M": 16}}}}', "no configurations of kernels under 'gemm'"),
    ],
)
def test_a_damaged_file_is_told(folder: Path, text: str, message: str) -> None:
    folder.mkdir()
    tuning.file_of(folder, GPU).write_text(text)
    tuning._of_device.cache_clear()
    with pytest.raises(ValueError, match=rf"(?s){message}.*next step: remove the file, and run `qfx tune` again"):
        found("gemm", "p", 1)
    with pytest.raises(ValueError, match=message):
        tuning.write(folder, GPU, {})


def test_choices_are_watched_and_tried() -> None:
    def choose() -> object:
        return tuning.tuned(GPU, "gemm", "p", 3, lambda most: [BEST, {"MOST": most}])

    with tuning.watched() as choices:
        assert choose() is None
    assert choices == {("gemm", "p", "4"): [BEST, {"MOST": 4}]}, "of all rows in the bucket"
    with tuning.trying(("gemm", "p", "4"), BEST):
        assert choose() == BEST
        assert found("gemm", "other", 3) is None
    assert choose() is None


def test_configurations_of_other_constants_are_passed_over_and_told_once(folder: Path) -> None:
    tuning.write(folder, GPU, {("gemm", "p", "1"): {"BLOCK": 8}, ("gemm", "p", "2"): {"BLOCK": 9}})
    tuning.write(folder, GPU, {("gemm", "p", "4"): {**BEST, "OTHER": 1}, ("gemm", "p", "8"): BEST})
    message = r"gemm on NVIDIA Test \(1\)(?s:.*)found: BLOCK\n.*run `qfx tune` again"
    with pytest.warns(QfxWarning, match=message):
        assert found("gemm", "p", 1) is None
    assert found("gemm", "p", 2) is None
    with pytest.warns(QfxWarning, match="found: BLOCK_M OTHER num_warps"):
        assert found("gemm", "p", 4) is None
    assert found("gemm", "p", 8) == BEST


_WRITER = """
import sys
from pathlib import Path
from qfx.backends.triton import tuning
from qfx.backends.triton.device import Device
device = Device("GPU", (9, 0), 132, 232448)
for i in range(60):
    tuning.write(Path(sys.argv[1]), device, {("gemm", f"{sys.argv[2]}={i}", "16"): {"BLOCK_M": 16}})
"""


def test_two_processes_that_add_to_one_file_lose_nothing(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), name]) for name in ("n", "k")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    held = json.loads((tmp_path / "GPU.json").read_text())["gemm"]
    assert len(held) == 120
    assert [path.name for path in tmp_path.iterdir()] == ["GPU.json"]
