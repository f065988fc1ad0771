"""qfx: qfx.quantize with a weight format and a rounding method."""

from __future__ import annotations

import time
import warnings
from typing import Any

import qfx
from examples.benchmarks.peers.rounding import RoundingJob, judged, linears
from examples.benchmarks.peers.worker import Built
from qfx.errors import QfxWarning


def build(job: RoundingJob, option: str) -> Built:
    """option: the format of weights, the rounding method ("mse" with its weighting), then rewrites: "u4/g64/f16 gptq",
    "u4/g64/f16 mse-energy", "i4/g32/f16 mse awq"."""
    fmt, method, *rewrites = option.split(" ")
    rounding, _, weighting = method.partition("-")
    model = job.module()
    names = list(linears(model))
    recipe: dict[str, Any] = {
        "name": "benchmark",
        "rules": [{"target": name, "w": fmt} for name in names],
        "rounding": rounding,
        "weighting": weighting or "uniform",
        "gptq": {"clip": True, "sweeps": 2},  # as the presets have it
        "rewrites": rewrites,
        "num_calibration_samples": job.samples,
    }
    asked = qfx.Recipe.parse(recipe)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        model = qfx.quantize(model, asked, data=job.calibration() if asked.needs_data or rounding == "mse" else None)
    seconds = time.perf_counter() - started
    rows = {row.node: row for row in qfx.report(model).rows}
    return judged(job, model, sum(rows[name].bytes_after for name in names), qfx.__version__, seconds)
