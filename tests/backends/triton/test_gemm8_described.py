"""gemm8 by tensor descriptors: bit for bit what pointers give for integers, and when there are none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qfx.backends.triton import descriptors, gemm8_config, launch, tune, tune_works, tuning
from qfx.backends.triton import gemm8 as module
from qfx.backends.triton.device import A100, H100, H200, INTERPRETER, Device
from qfx.backends.triton.gemm8_config import Problem
from qfx.backends.triton.launch import Config
from qfx.backends.triton.quantize_rows import quantize_dynamic
from tests.backends.triton.aot_gemm8 import e4m3, int8
from tests.backends.triton.cases import DEVICE, INTERPRETED
from tests.backends.triton.test_gemm8 import TOLERANCE, W_FLOAT, W_INT, X_FLOAT, X_INT, Layer, error
from tests.backends.triton.test_tune import timer

pytestmark = pytest.mark.skipif(os.environ.get("QFX_TEST_PTX") == "80", reason="compute capability 8.0 has none")
FORMATS = [("i8/tok", "i8/ch"), ("u8/tok", "u8/ch"), ("f8e4m3/tok", "f8e4m3/ch"), ("f8e4m3/g32/dyn", "f8e4m3/b32x64")]
EXACT = TOLERANCE[torch.float32] if INTERPRETED else 2e-3  # of e4m3; integers are equal


def form(columns: int = 32, halves: int = 1, programs: int = 1) -> Config:
    return {
        "DESCRIPTORS": 1, "BLOCK_M": 64, "BLOCK_N": columns, "BLOCK_K": 32, "HALVES": halves, "GROUP": 2,
        "PERSISTENT": programs, "PROMOTE": 32, "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


class Dispatch:
    """Sets what configuration is chosen and keeps which kernels are started."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.config: Config | None = None
        self.started: list[str] = []
        real = gemm8_config.configuration
        patch.setattr(module, "configuration", lambda *given: self.config or real(*given))
        patch.setattr(module, "launch", self.launch)

    def launch(self, kernel: Any, grid: Sequence[int], *given: Any, **more: Any) -> None:
        self.started.append(kernel.fn.__name__)
        launch.launch(kernel, grid, *given, **more)

    def both(self, layer: Layer, x: Tensor, config: Config, **more: Any) -> tuple[Tensor, Tensor]:
        """By descriptors, and by pointers."""
        self.config = config
        found = layer(x, **more)
        self.config = None
        assert self.started[-1] == "gemm8_described"
        return found, layer(x, **more)


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Dispatch:
    return Dispatch(monkeypatch)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 90), k=st.integers(1, 200), data=st.data())
def test_integers_of_any_shape_are_those_of_pointers(m: int, n: int, k: int, data: st.DataObject) -> None:
    layer = Layer(n, k, data.draw(st.sampled_from(X_INT)), data.draw(st.sampled_from(W_INT)), seed=m)
    config = form(data.draw(st.sampled_from([32, 64])), data.draw(st.sampled_from([1, 2])))
    with pytest.MonkeyPatch.context() as patch:
        found, pointers = Dispatch(patch).both(layer, layer.x(m), config)
    assert torch.equal(found, pointers)


@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 90), k=st.integers(1, 200), data=st.data())
def test_e4m3_of_any_shape_is_that_of_the_reference(m: int, n: int, k: int, data: st.DataObject) -> None:
    layer = Layer(n, k, data.draw(st.sampled_from(X_FLOAT)), data.draw(st.sampled_from(W_FLOAT)), seed=m)
    x = layer.x(m)
    with pytest.MonkeyPatch.context() as patch:
        found, _ = Dispatch(patch).both(layer, x, form(halves=data.draw(st.sampled_from([1, 2]))))
    assert error(found, layer.reference(x)) <= EXACT


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(("columns", "halves", "programs"), [(32, 1, 0), (32, 2, 1), (128, 1, 2)])
def test_every_form(dispatch: Dispatch, formats: tuple[str, str], columns: int, halves: int, programs: int) -> None:
    layer = Layer(150, 70, *formats)
    x = layer.x(70)
    found, pointers = dispatch.both(layer, x, form(columns, halves, programs))
    assert error(found, layer.reference(x)) <= EXACT
    assert torch.equal(found, pointers) or formats[0].startswith("f8")


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
def test_epilogue_activates_and_adds(dispatch: Dispatch, act: str) -> None:
    layer = Layer(50, 300, "u8/tok", "u8/ch")
    x, residual = layer.x(20), torch.randn(20, 50, device=DEVICE) * 10
    functions = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
    found, pointers = dispatch.both(layer, x, form(), residual=residual, act=act)
    assert error(found, functions[act](layer.reference(x)) + residual) <= TOLERANCE[torch.float32]
    # a compiler may contract sums and products of one and not of the other
    assert torch.equal(found, pointers) if INTERPRETED else error(found, pointers) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_cast_once(dispatch: Dispatch, dtype: torch.dtype) -> None:
    layer = Layer(65, 77, "i8/tok", "i8/ch")
    found, pointers = dispatch.both(layer, layer.x(80, dtype), form())
    assert found.dtype == dtype and torch.equal(found, pointers)


def test_no_rows_are_no_launch(dispatch: Dispatch) -> None:
    layer = Layer(50, 64, "i8/tok", "i8/ch")
    dispatch.config = form()
    assert layer(layer.x(0)).shape == (0, 50) and "gemm8_described" not in dispatch.started


def misplaced(matrix: Tensor) -> Tensor:
    """The same codes, one byte behind a multiple of 16: a buffer of another program."""
    memory = torch.zeros(matrix.numel() + 32, dtype=torch.uint8, device=matrix.device)
    shift = -memory.data_ptr() % 16 + 1
    held: Any = memory.untyped_storage()[shift : shift + matrix.numel()]
    found = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
    found.set_(held, 0, matrix.shape, (matrix.shape[1], 1))
    return found.copy_(matrix)


@pytest.mark.parametrize("which", ["x", "w"])
def test_operands_that_begin_anywhere_take_pointers(dispatch: Dispatch, which: str) -> None:
    layer = Layer(40, 64, "i8/tok", "i8/ch")
    dispatch.config = form()
    codes, scale, _ = quantize_dynamic(layer.x(20), None, "i8/tok")
    if which == "w":
        layer.weight[0] = misplaced(layer.weight[0])
    else:
        codes = misplaced(codes)
    assert not codes.storage_offset() and (codes if which == "x" else layer.weight[0]).data_ptr() % 16 == 1
    expected = (codes.double() @ layer.weight[0].double().T * scale.double() * layer.weight[1].double()).float()
    found = module.gemm8(codes, scale, None, layer.weight, None, None, *layer.formats, "", "f32")
    assert dispatch.started[0] == "gemm8" and error(found, expected) <= TOLERANCE[torch.float32]


def test_a_descriptor_that_does_not_end_with_the_row_is_noticed(
    dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(40, 48, "i8/tok", "i8/ch")  # 48 of k, tiles of 32: the last would read the next row
    codes, scale, _ = quantize_dynamic(layer.x(20), None, "i8/tok")
    wide = torch.randint(-127, 128, (62, 48), dtype=torch.int8, device=DEVICE)  # what is read too much is there
    wide[:20], wide[21:61] = codes, layer.weight[0]
    layer.weight[0], codes = wide[21:61], wide[:20]
    given = (codes, scale, None, layer.weight, None, None, *layer.formats, "", "f32")
    expected = module.gemm8(*given)
    dispatch.config = form()
    assert torch.equal(module.gemm8(*given), expected)

    def endless(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, [matrix.shape[0], 64], list(matrix.stride()), [rows, columns])

    monkeypatch.setattr(descriptors, "described", endless)
    assert error(module.gemm8(*given), expected) > 1e-2


def test_what_a_descriptor_can_stand_for() -> None:
    whole = torch.zeros(8, 64, dtype=torch.int8)
    assert descriptors.reason_against(whole) is None and descriptors.reason_against(whole[1:, :20]) is None
    for matrix, message in (
        (whole[:0], "no elements"),
        (whole.T, "side by side"),
        (torch.zeros(8, 20, dtype=torch.int8), "rows do not begin"),
        (misplaced(whole), "it does not begin"),
    ):
        assert message in str(descriptors.reason_against(matrix))
    found = descriptors.described(whole[1:, :20], 4, 16)
    assert (found.shape, found.strides, found.block_shape) == ([7, 20], [64, 1], [4, 16])


@pytest.mark.parametrize("problem", [Problem(8192, 8192), Problem(8192, 4096, True), Problem(4096, 7168, True, 128)])
def test_candidates_of_many_rows(problem: Problem) -> None:
    for device in (H100, H200):
        found = gemm8_config.described(device, problem, 4096)
        assert 2 <= len(found) <= 4 and all(config["PROMOTE"] == 128 for config in found)
        listed = gemm8_config.candidates(device, problem, 4096)
        assert all(config in listed for config in found) and len(listed) <= 20
        assert not gemm8_config.described(device, problem, 1023)
        assert not gemm8_config.heuristic(device, problem, 4096).get("DESCRIPTORS")
    assert not gemm8_config.described(A100, problem, 4096) and not gemm8_config.described(INTERPRETER, problem, 4096)
    assert not gemm8_config.described(H100, Problem(777, problem.k), 4096), "y is written element by element"


def test_sums_that_are_not_promoted_are_no_candidates() -> None:
    problem = Problem(8192, 8192, True)
    found = gemm8_config.described(H100, problem, 4096, promoted=False)
    assert found and all(config["PROMOTE"] == 0 for config in found)
    assert not any(config in gemm8_config.candidates(H100, problem, 4096) for config in found)


def recorded(device: Device, floating: bool) -> launch.Launch:
    """What a tuned configuration launches on a device."""
    case = (e4m3 if floating else int8)(4096, 8192, 4096, *FORMATS[2 if floating else 0])
    problem = Problem(8192, 4096, floating)
    config = gemm8_config.described(H100, problem, 4096)[0]
    with launch.recorded(device) as found, tuning.trying(("gemm8", str(problem), "4096"), config):
        case.run()
    return found[0]


@pytest.mark.parametrize("floating", [False, True])
def test_only_devices_that_have_descriptors_take_them(floating: bool) -> None:
    assert recorded(A100, floating).kernel.fn.__name__ == "gemm8"
    found = recorded(H100, floating)
    assert found.kernel.fn.__name__ == "gemm8_described" and found.grid == (132,)
    x, w = found.arguments["x"], found.arguments["w"]
    assert (x.shape, x.block_shape) == ([4096, 4096], [128, 128]) and w.shape == [8192, 4096]


def test_tuning_checks_and_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm8_config, "candidates", lambda *_: [form(), form(halves=2)])
    work = replace(tune_works.random_work(24, 40, "i8/tok", "i8/ch", torch.device(DEVICE)), only=("gemm8",))
    (found,) = tune.tune(work, 20, timer(10.0, 3.0, 2.0))
    assert found.best == form(halves=2) and not found.dropped
    assert tune.table_of([found]) == {("gemm8", "n=24 k=48 i8", "32"): form(halves=2)}
