"""Fixtures of all tests."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.interpreter import language_patched_once

CARRIED_OUT_FOR = os.environ.get("QFX_TEST_PTX", "")  # a capability: kernels are compiled for it and run by tests.ptx
if CARRIED_OUT_FOR:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if CARRIED_OUT_FOR:
    from tests.ptx.launches import carry_out_all

    carry_out_all(CARRIED_OUT_FOR)


@atexit.register
def no_list_of_leaks() -> None:
    """Triton's bindings list on stderr what lives at the very end of a process, which says nothing about the tests."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays, and is most of the heap: no garbage collection walks through it.

    Nor does one come every 700 objects: tracing makes millions that live for long, and each full collection walks
    through all of them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Kernels are interpreted in all of the tests, without what Triton's interpreter does twice."""
    if CARRIED_OUT_FOR:
        yield
        return
    with language_patched_once():
        yield


@pytest.fixture(autouse=True)
def calls_found_out_anew() -> None:
    """Tests that put something in the place of a choice of kernels get what they chose."""
    from qfx.backends.triton import repeated  # after TRITON_INTERPRET is set

    repeated.forget()


@pytest.fixture(autouse=True, scope="session")
def no_word_of_python_3_13_0() -> None:
    """Dynamo warns under that release of Python alone; tests count warnings."""
    from torch._dynamo import config  # after TRITON_INTERPRET is set: it imports Triton

    config.issue_3_13_0_warning = False


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """Drops torch's record of fake operators, which holds the shapes of every graph captured in the process.

    It is never hit for a later graph's symbolic shapes, and every full garbage collection walks through all of it.
    """
    yield
    FakeTensorMode.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def tuned_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of a GPU that nobody tuned every compiled model says so; here it has a file, of a choice that no kernel makes."""
    from qfx.backends.triton import device, tuning

    gpu = torch.device("cuda")
    if not torch.cuda.is_available() or device.reason_against(gpu):
        yield
        return
    folder = tmp_path_factory.mktemp("tuned")
    tuning.write(folder, device.find(gpu), {("none", "none", "1"): {}})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QFX_TUNED_DIR", str(folder))
        yield


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test or run compiled is found; a test of the cache asks for `cache_folder`."""
    monkeypatch.setenv("QFX_CACHE_DIR", "")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache_on_disk: None) -> Path:
    """An empty folder that is the cache of compiled models during the test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QFX_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before and after the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_threads() -> Iterator[None]:
    """How many threads torch has is put back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
