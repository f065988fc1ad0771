"""The Triton kernels on this GPU: are they right, and how near are they to the limits of the chip?

    python examples/benchmarks/gpu_kernels.py --json numbers.json
    python examples/benchmarks/gpu_kernels.py --only decode --only prefill
    TRITON_INTERPRET=1 python examples/benchmarks/gpu_kernels.py --check        without a GPU: results alone, small

First every kernel is checked on random data of odd shapes, outputs poisoned before, against its reference in f32. Then
each case is checked at its own size and timed: CUDA graphs of calls that take turns over copies of the weights (or
inputs), enough to pass twice the L2 cache; the median of the replays. The limits are measured in the same run: the
bandwidth of a copy, bytes read and written; the rate of a product of bf16 by cuBLAS, and twice that for 8 bits.
share: of the time that the limit would take, the bytes or the arithmetic, whichever takes longer. Peers: what is there
of cuBLAS, torch._int_mm, torch._scaled_mm, torch's attention in several forms, torchao; their numbers are how many
times faster than each the kernel is. In a goal a case that failed counts as 0, and of several forms the fastest.
Exit code 1 where a kernel failed or gave a wrong result, 2 without a GPU.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._inductor import config as inductor

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import gpu_cases, gpu_peers
from examples.benchmarks.gpu_cases import Case
from examples.benchmarks.gpu_goals import goals, ratio
from examples.benchmarks.gpu_work import Made
from qfx.backends.triton import device, timing
from qfx.errors import UnsupportedError
from qfx.storage.files import write_text

LAYERS = ("weight-only", "w8a8", "fp8", "w4a8", "mixed", "experts")
FAMILIES = (*LAYERS, "norm", "hadamard", "embedding", "decode", "prefill")
SIDE = 8192  # of the product that says what the peak is
COPIED = 1 << 30  # bytes


def limits(where: torch.device) -> dict[str, float]:
    """bandwidth: bytes a second of a copy, read and written. bf16, 8 bit: products and sums a second."""
    ends = [torch.empty(COPIED, dtype=torch.uint8, device=where) for _ in range(2)]
    bandwidth = 2 * COPIED / timing.seconds([partial(ends[0].copy_, ends[1])])
    rate = 2 * SIDE**3 / timing.seconds(gpu_peers.cublas(SIDE, SIDE, SIDE, where), budget=0.5)
    return {"bandwidth": bandwidth, "bf16": rate, "8 bit": 2 * rate}


def checked(case: Case, where: torch.device) -> dict[str, Any]:
    """A row with the error, or what failed."""
    row: dict[str, Any] = {
        "family": case.family, "title": case.title, "rows": case.rows, "facts": list(case.facts), "peers": {},
    }  # fmt: skip
    try:
        made = case.make(where)
        row.update(kernel=made.kernel, error=made.error(), bytes=made.bytes, products=made.products)
        if not row["error"] <= case.tolerance:
            row["failed"] = f"wrong result: relative error {row['error']:.2e}, at most {case.tolerance:g}"
        row["made"] = made
    except Exception as error:  # one kernel that fails shall not hide the others
        if timing.is_lost(where):
            raise
        row["failed"] = timing.said(error)
        if not isinstance(error, ValueError | UnsupportedError):
            traceback.print_exc(limit=-4)
    return row


def measured(
    row: dict[str, Any], case: Case, where: torch.device, limit: dict[str, float], known: dict[Any, float]
) -> None:
    """Add times, and how near they are to a limit. known: times of peers that were measured for other cases."""
    made: Made = row["made"]
    try:
        row["seconds"] = timing.seconds(made.calls)
    except Exception as error:  # a call that no CUDA graph can hold
        if timing.is_lost(where):
            raise
        row["failed"] = timing.said(error)
        return
    floor = made.bytes / limit["bandwidth"]
    if case.unit:
        floor = max(floor, made.products / limit[case.unit])
    row["share"] = floor / row["seconds"]
    for name, make in made.peers.items():
        key = (name, make.func, make.args) if isinstance(make, partial) else (name, case.title, case.rows)
        try:
            if key not in known:
                known[key] = timing.seconds(make())
            row["peers"][name] = known[key]
        except Exception as error:  # a peer that does not take this case
            if timing.is_lost(where):
                raise
            row.setdefault("without", {})[name] = timing.said(error)


def show(console: Console, rows: Sequence[dict[str, Any]], title: str) -> None:
    """The table."""
    table = Table("case", "rows", "kernel", "error", "us", "share", "times faster than", title=title)
    for row in rows:
        if "failed" in row:
            table.add_row(row["title"], str(row["rows"]), row.get("kernel", ""), f"[red]{row['failed']}[/red]")
            continue
        times = f"{row['seconds'] * 1e6:.1f}" if "seconds" in row else ""
        share = f"{row['share']:.0%}" if "share" in row else ""
        peers = ", ".join(f"{name} {ratio(row, name):.2f}" for name in row["peers"])
        table.add_row(row["title"], str(row["rows"]), row["kernel"], f"{row['error']:.1e}", times, share, peers)
    console.print(table)


def _here(cases: Sequence[Case], only: Sequence[str], here: device.Device) -> list[Case]:
    """Of the families asked for, those that the device has."""
    return [case for case in cases if case.family in only and case.least <= here.capability]


def run(
    console: Console, where: torch.device, only: Sequence[str], found: dict[str, Any], *, check: bool,
    keep: Callable[[], None] = lambda: None, until: float = math.inf,
) -> None:  # fmt: skip
    """Check all, then, unless `check`, time. The rows of both, the limits and the goals go to `found` one by one.

    keep: called behind each row. until: on the clock of time.monotonic, after which no other case is begun; those that
    are left are named in found["left"].
    """
    gc.collect()
    gc.freeze()  # a CUDA graph begins with a collection
    here = device.find(where)
    first = _here(gpu_cases.checks(here.interpreted), only, here)
    found.update(device=here.name, torch=torch.__version__, checks=[], rows=[], left=[])
    with torch.no_grad():
        for case in _begun(first, until, found["left"]):
            found["checks"].append(checked(case, where))
            found["checks"][-1].pop("made", None)
            keep()
        show(console, found["checks"], "results at odd shapes")
        if check:
            return
        found["limits"] = limits(where)
        known: dict[Any, float] = {}
        timed = _here(gpu_cases.timed(), only, here)
        for case in _begun(timed, until, found["left"]):
            row = checked(case, where)
            found["rows"].append(row)
            if "failed" not in row:
                measured(row, case, where, found["limits"], known)
            row.pop("made", None)
            keep()
            gc.collect()  # graphs hold their weights in cycles
            torch.cuda.empty_cache()
    show(console, found["rows"], f"{found['device']}, copies that pass the L2 cache, CUDA graphs")
    units = (("bandwidth", 1e9, "GB/s"), ("bf16", 1e12, "TFLOP/s"), ("8 bit", 1e12, "Top/s"))
    console.print("limits: " + ", ".join(f"{k} {found['limits'][k] / by:.0f} {unit}" for k, by, unit in units))
    reached = goals(found["rows"])
    found["goals"] = [
        {"goal": goal.what, "least": goal.least, "found": goal.found, "state": goal.state} for goal in reached
    ]
    for goal in reached:
        console.print(str(goal), soft_wrap=True, markup=False, highlight=False)
    if found["left"]:
        console.print(f"no time was left for {len(found['left'])} cases, of which goals know nothing", style="yellow")


def _begun(cases: Sequence[Case], until: float, left: list[str]) -> Iterator[Case]:
    """The cases that there is time for; the names of the others go to `left`."""
    for case in cases:
        if time.monotonic() < until:
            yield case
        else:
            left.append(f"{case.family} {case.title}, {case.rows} rows")


def place(check: bool) -> torch.device:
    """The GPU; the CPU where Triton interprets and results alone are asked for. Exits with 2 where there is neither."""
    if torch.cuda.is_available() and device.reason_against(torch.device("cuda")) is None:
        return torch.device("cuda")
    cpu = torch.device("cpu")
    if check and device.reason_against(cpu) is None:
        return cpu
    reason = device.reason_against(torch.device("cuda")) if torch.cuda.is_available() else "there is no GPU here"
    hint = "; TRITON_INTERPRET=1 with --check runs the kernels' results without one"
    sys.stderr.write(f"this needs an NVIDIA GPU of compute capability 8.0 or later: {reason}{hint}\n")
    raise typer.Exit(2)


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Families: {', '.join(FAMILIES)}; left out: all.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Results at odd shapes alone.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no other case after so many. Left out: all run.")] = None,
    early: Annotated[
        bool, typer.Option("--early", help="Kernels are launched before the one before has ended.")
    ] = False,
) -> None:
    """Check, time, print."""
    if unknown := set(only or ()) - set(FAMILIES):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(FAMILIES)}")
    where = place(check)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    started = time.perf_counter()
    console = Console(width=170)
    found: dict[str, Any] = {}
    folder = os.environ.get("OUT")
    path = json_file or (Path(folder) / "gpu_kernels.json" if folder else None)
    until = time.monotonic() + 60 * minutes if minutes is not None else math.inf

    def keep() -> None:  # what was measured before a device is lost, or the process ended, too
        found["took"] = time.perf_counter() - started
        if path is not None:
            shown = {key: [_plain(row) for row in value] if key in ("checks", "rows") else value
                     for key, value in found.items()}  # fmt: skip
            write_text(path, json.dumps(shown, indent=1, default=str) + "\n")

    try:
        with inductor.patch({"triton.enable_pdl": early}):
            run(console, where, only or FAMILIES, found, check=check, keep=keep, until=until)
    finally:
        keep()
    console.print(f"all in {found['took']:.0f} s")
    failed = [row for row in (*found["checks"], *found["rows"]) if "failed" in row]
    if failed:
        console.print(f"{len(failed)} failed", style="red")
        raise typer.Exit(1)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "made"}


if __name__ == "__main__":
    typer.run(main)
