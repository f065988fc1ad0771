"""Kernels as a GPU would get them: what is compiled for both chips is carried out and gives what is due."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs the tests of the kernels")
ROOT = Path(__file__).parents[2]
KERNELS = "tests/backends/triton"
CHOSEN = [
    "test_weight_only.py::test_every_format[u4/g128]",
    "test_weight_only.py::test_every_format[nf4/g64]",
    "test_gemm8.py::test_every_way_of_dispatch[1-1-128-2-0-formats0]",
    "test_gemm8.py::test_many_rows_in_every_dtype[dtype2-formats2]",
    "test_gemm4.py::test_activation_and_residual",
    "test_norm_quantize.py",
    "test_cache_append.py::test_halves[dtype0]",
    "test_cache_attention.py::test_every_format[i4]",
    "test_float_attention.py::test_a_cache_of_fixed_length",
    "test_quantized_attention.py::test_it_is_the_reference[q=i8/tok k=i8/tok-causal]",
    "test_experts_gemm.py::test_every_pair[i8/tok-i8/ch]",
]


def run(capability: str, *arguments: str, early: bool = False) -> subprocess.CompletedProcess[str]:
    """early: kernels are launched before the one before them has ended."""
    environment = {**os.environ, "QFX_TEST_PTX": capability, "TORCHINDUCTOR_ENABLE_PDL": str(int(early))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("capability", "early"), [("80", False), pytest.param("90", False, marks=pytest.mark.slow), ("90", True)]
)
def test_some_kernels_of_every_kind(capability: str, early: bool) -> None:
    done = run(capability, *(f"{KERNELS}/{test}" for test in CHOSEN), early=early)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_kernels(capability: str) -> None:
    done = run(capability, "-n", "2", "-m", "not slow", KERNELS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


BROKEN = """
import torch, triton, triton.language as tl
from qfx.backends.triton.launch import launch

@triton.jit
def sums(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0) if MASKED else tl.load(x_ptr + at)
    tl.store(out_ptr, tl.sum(x))

def total(masked):
    x, out = torch.arange(100.0), torch.zeros(1)
    launch(sums, (1,), x, out, 100, BLOCK=256, MASKED=masked, config={"num_warps": 4})
    return float(out)

def test_masked():
    assert total(True) == 4950

def test_beyond_the_end():
    total(False)

@triton.jit
def turned(x_ptr, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + BLOCK - 1 - at)
    if ORDERED:
        tl.debug_barrier()
    tl.store(x_ptr + at, x)

def in_place(ordered):
    x = torch.arange(256.0)
    launch(turned, (1,), x, BLOCK=256, ORDERED=ordered, config={"num_warps": 4})
    return x

def test_in_order():
    assert torch.equal(in_place(True), torch.arange(256.0).flip(0))

def test_a_warp_overwrites_what_another_reads():
    in_place(False)
"""


def test_a_read_beyond_the_end_and_a_race_are_found(tmp_path: Path) -> None:
    test = tmp_path / "test_broken.py"
    test.write_text(BROKEN)
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    done = run("90", str(test), "--rootdir", str(tmp_path))
    assert "2 failed, 2 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "outside" in done.stdout and "ld.global" in done.stdout
    assert "nothing orders the two" in done.stdout and "st.global" in done.stdout
