"""The experiment in Gluon: its steps on a memory unit and tensor cores that are as late, and as early, as they may be.

A copy makes its slot worthless as soon as it is asked for, and fills it when somebody waits for it. A product must find
its slot filled when it begins, and reads it only when a wait makes it end. What is right here reads nothing too early
and overwrites nothing too early on a GPU, in whatever order it works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from examples.benchmarks import gluon_int8, gluon_int8_kernel, gpu_kernels, gpu_peers
from qfx.backends.triton import timing
from tests.backends.triton.cases import DEVICE

SCRIPT = Path(gluon_int8.__file__)
NAMES = ("_place", "_ask", "_store", "int8_product")


class Values(torch.Tensor):
    """A tensor with the methods that Gluon's have."""

    def split(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self[..., 0], self[..., 1]


def values(x: Tensor) -> Any:
    return x.as_subclass(Values)


@dataclass
class Slot:
    """Shared memory of one tile; None: being written. transposed: how it is read."""

    held: list[Tensor | None] = field(default_factory=lambda: [None])
    transposed: bool = False

    def permute(self, order: tuple[int, int]) -> Slot:
        return Slot(self.held, order == (1, 0))

    def read(self) -> Tensor:
        assert self.held[0] is not None, "a product reads what is being written"
        return self.held[0].T if self.transposed else self.held[0]


@dataclass
class Barrier:
    """Phases are over when all bytes of what was asked have come."""

    done: int = 0
    expected: int = 0
    copies: list[tuple[Slot, Tensor]] = field(default_factory=list)


class Slots(list[Any]):
    def index(self, i: int) -> Any:  # type: ignore[override]
        return self[i]


@dataclass
class Blocks:
    """A descriptor: zeros beyond the edges."""

    matrix: Tensor
    block: tuple[int, int]
    layout: None = None

    def read(self, row: int, column: int) -> Tensor:
        found = torch.zeros(self.block, dtype=self.matrix.dtype)
        part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        found[: part.shape[0], : part.shape[1]] = part
        return found


@dataclass
class Pointer:
    """An address, or a tensor of them."""

    memory: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Sums:
    """An accumulator with the products that have not ended."""

    value: Tensor
    running: list[tuple[Slot, Slot, bool]] = field(default_factory=list)


class Machine:
    """What the kernel's names stand for, for one program. patience: how many products more than said a wait leaves."""

    def __init__(self, program: int, programs: int, patience: int = 0) -> None:
        self.patience, self.most = patience, 0
        integers: Any = SimpleNamespace(int8=torch.int8, int32=torch.int32, int64=torch.int64, float32=torch.float32)
        layouts = dict.fromkeys(("NVMMADistributedLayout", "BlockedLayout", "SliceLayout"), lambda *_, **__: None)
        gl = SimpleNamespace(
            **vars(integers), **layouts, constexpr=int, static_range=range, cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: a.clamp(max=b) if isinstance(a, Tensor) else min(a, b),
            where=lambda condition, a, b: a if condition else b, program_id=lambda _: program,
            num_programs=lambda _: programs, arange=lambda a, b, layout: torch.arange(a, b),
            allocate_shared_memory=lambda kind, shape, _: Slots(
                Barrier() if kind == torch.int64 else Slot() for _ in range(shape[0])
            ),
            zeros=lambda shape, kind, layout: Sums(torch.full(shape, 77, dtype=kind)),  # use_acc leaves these out
            convert_layout=lambda x, _: x, load=lambda at: at.memory[at.at], store=self.store,
        )  # fmt: skip
        self.names: dict[str, Any] = {
            "gl": gl, "_copy": self.copy, "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.ended,
            "mbarrier": SimpleNamespace(
                init=lambda bar, count: None, expect=self.expect, wait=self.wait, MBarrierLayout=lambda: None
            ),
        }  # fmt: skip
        for name in NAMES:
            self.names[name] = FunctionType(getattr(gluon_int8_kernel, name).fn.__code__, self.names, name)

    def store(self, at: Pointer, value: Tensor, mask: Tensor) -> None:
        at.memory.view(-1)[torch.as_tensor(at.at)[mask]] = value.as_subclass(Tensor)[mask]

    def expect(self, bar: Barrier, size: int, pred: bool) -> None:
        if pred:
            assert not bar.expected, "the barrier still waits for another copy"
            bar.expected = size

    def copy(self, blocks: Blocks, at: list[int], bar: Barrier, slot: Slot, pred: bool) -> None:
        if pred:
            slot.held[0] = None
            bar.copies.append((slot, blocks.read(*at)))

    def wait(self, bar: Barrier, phase: int) -> None:
        if bar.done & 1 != phase:
            return  # over already
        assert bar.expected and bar.expected == sum(x.numel() for _, x in bar.copies), "waits for ever"
        for slot, tile in bar.copies:
            slot.held[0] = tile
        bar.done, bar.expected, bar.copies = bar.done + 1, 0, []

    def multiply(self, a: Slot, b: Slot, acc: Sums, use_acc: bool, is_async: bool) -> Sums:
        assert is_async and a.read() is not None and b.read() is not None
        acc.running.append((a, b, use_acc))
        self.most = max(self.most, len(acc.running))
        return acc

    def ended(self, num_outstanding: int, deps: tuple[Sums]) -> Any:
        (acc,) = deps
        left = num_outstanding + (self.patience if num_outstanding else 0)
        while len(acc.running) > left:
            a, b, more = acc.running.pop(0)
            product = (a.read().double() @ b.read().double()).to(torch.int32)
            acc.value = acc.value + product if more else product
        return values(acc.value) if not num_outstanding else acc


def run(m: int, n: int, k: int, programs: int, stages: int, **more: int) -> tuple[Tensor, Tensor, int]:
    """What the kernel writes, what it should, and how many products ran at once; tiles of 16 x 128 x 16."""
    torch.manual_seed(m + n + k)
    x, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    x_scale, w_scale, y = torch.rand(m), torch.rand(n), torch.full((m, n), float("nan"))
    most = 0
    for program in range(programs):
        machine = Machine(program, programs, **more)
        machine.names["int8_product"](
            Blocks(x, (16, 16)), Blocks(w, (128, 16)), Pointer(y), Pointer(x_scale), Pointer(w_scale), m, n, k, 16, 128,
            16, stages, 2, 8,
        )  # fmt: skip
        most = max(most, machine.most)
    return y, (x.double() @ w.double().T * x_scale[:, None] * w_scale[None, :]).float(), most


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    ("m", "n", "k", "programs"),
    [(1, 1, 16, 1), (40, 300, 100, 1), (40, 300, 100, 4), (33, 257, 16, 2), (70, 130, 48, 10)],
)
def test_no_order_of_events_spoils_a_result(m: int, n: int, k: int, programs: int, stages: int) -> None:
    found, expected, most = run(m, n, k, programs, stages)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert most == (2 if k > 16 else 1)  # of 16, each is the last of its tile


def test_one_product_too_many_in_flight_is_noticed() -> None:
    with pytest.raises(AssertionError, match="reads what is being written"):
        run(40, 300, 100, 1, 3, patience=1)


PROGRAM = """
import re, triton
from triton.backends.compiler import GPUTarget
from examples.benchmarks import gluon_int8 as module
from qfx.backends.triton.ahead import _usage
from triton.experimental.gluon._runtime import GluonASTSource

for stages in (3, 4):
    constants = dict(BLOCK_M=module.BLOCK_M, BLOCK_N=module.BLOCK_N, BLOCK_K=module.BLOCK_K, STAGES=stages,
                     GROUP=module.GROUP, num_warps=module.WARPS)
    blocks = "tensordesc<i8[{}, {}]," + repr(module.LAYOUT) + ">"
    signature = {"x": blocks.format(module.BLOCK_M, module.BLOCK_K), "w": blocks.format(module.BLOCK_N, module.BLOCK_K),
                 "y_ptr": "*bf16", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "m": "i32", "n": "i32", "k": "i32",
                 **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2, 8)}
    source = GluonASTSource(module.int8_product, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": module.WARPS})
    usage, ptx = _usage(built.asm["cubin"]), built.asm["ptx"]
    assert usage["stack"] == usage["local"] == 0 and built.metadata.shared <= 232448, (usage, built.metadata.shared)
    assert "cp.async.bulk.tensor" in ptx and "s32.s8.s8" in ptx
    assert sorted(re.findall(r"wgmma\\.wait_group\\S* (\\d)", ptx))[-1] == "1", "no product stays in flight"
"""


def test_it_compiles_with_a_product_in_flight(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_its_cases_are_the_products_that_the_other_benchmark_times() -> None:
    checks, timed = gluon_int8.cases()
    assert {case.rows for case in timed if case.title.startswith("gluon")} == {4096, 8192}
    assert {case.facts[0] for case in timed} == {"product", "form"} and len(checks) == 8


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_run_checks_then_times(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, stages: int) -> Tensor:
        return (factor * (x.double() @ w.double().T) * x_scale[:, None] * w_scale[None, :]).bfloat16()

    monkeypatch.setattr(gluon_int8, "product", product)
    monkeypatch.setattr(timing, "seconds", lambda calls, **_: float(len(calls)))
    monkeypatch.setattr(gpu_kernels, "SIDE", 16)
    monkeypatch.setattr(gpu_kernels, "COPIED", 64)
    some = [gluon_int8.case(32, 48, rows, 3) for rows in (5, 7)]
    rows = gluon_int8.run(Console(quiet=True), torch.device("cpu"), some[:1], some[1:])
    if factor == 1.0:
        assert [row["rows"] for row in rows] == [5, 7] and rows[1]["peers"] == {gpu_peers.CUBLAS: 1.0}
        assert "share" in rows[1] and not any("failed" in row for row in rows)
    else:
        assert len(rows) == 1 and rows[0]["failed"].startswith("wrong result: relative error 1.0")
    json.dumps(rows)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs a GPU of compute capability 9.0" in done.stderr, done.stderr
