"""What would int8 products gain if two were in flight? An experiment for compute capability 9.0, no kernel of qfx.

    python examples/benchmarks/gluon_int8.py --json numbers.json

Triton lets products in a loop overlap only where sums are f32: after each step of int8 it waits, and the tensor cores
idle until the next begins. Gluon, the language beneath it, leaves waiting to the program. Here a step begins while the
one before it runs, and tiles of the next results come while the last go to memory. Scales per row and per channel,
bf16, nothing else. The names of Gluon change from version to version, and no interpreter runs it (a test plays the
memory unit and the tensor cores instead): it would become a kernel of qfx only if it is worth it.

Results at odd shapes are checked first, then it is timed beside the forms of `gemm8` and torch._int_mm as
`gpu_kernels.py` does it. Exit code 1 where a result is wrong, 2 without such a GPU.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import gpu_cases, gpu_kernels, gpu_peers
from examples.benchmarks.gluon_int8_kernel import int8_product
from examples.benchmarks.gpu_cases import Case
from examples.benchmarks.gpu_work import Made
from qfx.backends.triton import device
from qfx.backends.triton.descriptors import LEAST
from qfx.storage.files import write_text

BLOCK_M, BLOCK_N, BLOCK_K, WARPS, GROUP = 128, 256, 128, 8, 8
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, stages: int) -> Tensor:
    """x int8 [m, k], x_scale f32 [m], w int8 [n, k], w_scale f32 [n], k a multiple of 16 -> bf16 [m, n]."""
    m, n, k = x.shape[0], *w.shape
    y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    x_blocks = TensorDescriptor.from_tensor(x, [BLOCK_M, BLOCK_K], LAYOUT)
    w_blocks = TensorDescriptor.from_tensor(w, [BLOCK_N, BLOCK_K], LAYOUT)
    programs = min(-(-m // BLOCK_M) * -(-n // BLOCK_N), device.of(x).processors)
    int8_product[(programs,)](x_blocks, w_blocks, y, x_scale, w_scale, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, stages,
                              GROUP, num_warps=WARPS)  # fmt: skip
    return y


def case(n: int, k: int, rows: int, stages: int) -> Case:
    """Random codes and scales."""

    def make(where: torch.device) -> Made:
        x = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=where)
        count = gpu_peers.copies(n * k, where)
        weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=where) for _ in range(count)]
        x_scale, w_scale = torch.rand(rows, device=where) + 0.5, torch.rand(n, device=where) + 0.5

        def expected() -> list[Tensor]:
            sums = x.double() @ weights[0].double().T
            return [sums * x_scale[:, None] * w_scale[None, :]]

        calls: gpu_peers.Calls = [partial(product, x, x_scale, w, w_scale, stages) for w in weights]
        peers: dict[str, Any] = {gpu_peers.CUBLAS: partial(gpu_peers.cublas, n, k, rows, where)}
        return Made("gluon", calls, expected, n * k + x.nbytes + 2 * rows * n, 2 * rows * n * k, peers)

    return Case("w8a8", f"gluon {BLOCK_M}x{BLOCK_N} {stages} stages {n}x{k}", rows, make, "8 bit", 5e-3,
                ("form", "i8/tok", "i8/ch", n, k), LEAST)  # fmt: skip


def cases() -> tuple[list[Case], list[Case]]:
    """What is only checked: edges, few steps, many tiles of a program; what is timed."""
    shapes = ((272, 16, 1), (272, 528, 300), (8208, 128, 4000), (520, 4096, 129))
    checks = [case(n, k, rows, stages) for n, k, rows in shapes for stages in (3, 4)]
    others = [c for c in gpu_cases.timed() if c.family == "w8a8" and c.facts[0] in ("product", "form")]
    return checks, [*others, *(case(*gpu_cases.LARGE, rows, stages) for rows in (4096, 8192) for stages in (4, 3))]


def run(console: Console, where: torch.device, checks: Sequence[Case], timed: Sequence[Case]) -> list[dict[str, Any]]:
    """The rows of both; nothing is timed after a wrong result."""
    known: dict[Any, float] = {}
    rows = [gpu_kernels.checked(one, where) for one in checks]
    if not any("failed" in row for row in rows):
        limit = gpu_kernels.limits(where)
        console.print(f"limit: {limit['8 bit'] / 1e12:.0f} Top/s (twice cuBLAS bf16)")
        for one in timed:
            rows.append(gpu_kernels.checked(one, where))
            if "failed" not in rows[-1]:
                gpu_kernels.measured(rows[-1], one, where, limit, known)
            rows[-1].pop("made", None)
            gc.collect()  # graphs hold their weights in cycles
            torch.cuda.empty_cache()
    for row in rows:
        row.pop("made", None)
    gpu_kernels.show(console, rows, "int8 products")
    return rows


def main(json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers there.")] = None) -> None:
    """Check, time, print."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != LEAST[0]:
        sys.stderr.write("this needs a GPU of compute capability 9.0 (H100, H200)\n")
        raise typer.Exit(2)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with torch.no_grad():
        rows = run(Console(width=170), torch.device("cuda"), *cases())
    if json_file is not None:
        write_text(json_file, json.dumps(rows, indent=1, default=str) + "\n")
    if any("failed" in row for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
