"""qfx: qfx.quantize with a weight format and a rounding method, or with formats that it chooses itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import qfx
from examples.benchmarks.peers.rounding import RoundingJob, judged, linears
from examples.benchmarks.peers.worker import Built
from qfx.errors import QfxWarning


def build(job: RoundingJob, option: str) -> Built:
    """option: the format of weights, the rounding method ("mse" with its weighting), then rewrites: "u4/g64/f16 gptq",
    "u4/g64/f16 mse-energy", "i4/g32/f16 mse awq"; or bits a weight, for which formats are planned: "4.31 planned", or
    "4.31 planned-nf4" with NF4 among them."""
    model = job.module()
    names = list(linears(model))
    asked = recipe(option, names, job.samples)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        data = job.calibration() if asked.needs_data or asked.rounding == "mse" else None
        model = qfx.quantize(model, asked, data=data)
    seconds = time.perf_counter() - started
    rows = {row.node: row for row in qfx.report(model).rows}
    return judged(job, model, sum(rows[name].bytes_after for name in names), qfx.__version__, seconds)


def recipe(option: str, names: Sequence[str], samples: int) -> qfx.Recipe:
    """The recipe of an option, for the linears of these names."""
    fmt, method, *rewrites = option.split(" ")
    method, _, manner = method.partition("-")
    if method == "planned":
        rules = [{"target": "linear", "w": "u4/g64/f16"}]  # names are without a rule of their own: those would hold
        return qfx.Recipe.parse(f"heads-{manner}" if manner else "heads").override(
            rules=rules, ignore=["*lm_head"], allocation={"avg_bits": float(fmt)}, num_calibration_samples=samples
        )
    fields: dict[str, Any] = {
        "name": "benchmark",
        "rules": [{"target": name, "w": fmt} for name in names],
        "rounding": method,
        "weighting": manner or "uniform",
        "rewrites": rewrites,
        "num_calibration_samples": samples,
    }
    return qfx.Recipe.parse(fields)
