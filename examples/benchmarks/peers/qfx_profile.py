"""Where the time of a qfx encoder goes: ONNX Runtime's own profile of the sessions, summed by operator.

Profiling costs time itself: read the shares, and take the milliseconds of a call from the race.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime

import qfx
from examples.benchmarks.peers import qfx_encoder
from examples.benchmarks.peers.encoding import EncoderJob
from examples.benchmarks.peers.worker import Built
from qfx.backends.onnx import session

CALLS = 10


def build(job: EncoderJob, option: str) -> Built:
    """option: the recipe. facts["operators"]: operator -> (times it runs in a call, milliseconds of a call)."""
    plain = session.options

    def profiling(threads: int, entries: Any = None) -> Any:
        chosen = plain(threads, entries)
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(job.path / "profile")
        return chosen

    session.options = profiling  # of this process, which does nothing else
    built = qfx_encoder.build(job, option)
    for _ in range(CALLS):
        built.time()
    names = [s.end_profiling() for s in gc.get_objects() if isinstance(s, onnxruntime.InferenceSession)]
    events = [event for name in names for event in json.loads(Path(name).read_text(encoding="utf-8"))]
    for name in names:
        Path(name).unlink()
    return Built(built.time, None, built.size, qfx.__version__, {"operators": by_operator(events, CALLS)})


def by_operator(events: list[dict[str, Any]], calls: int) -> dict[str, tuple[float, float]]:
    """Of the last `calls` runs in a profile: each operator's nodes in a run, and its milliseconds."""
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for (operator, _), durations in runs.items():
        last = durations[-calls:]
        count, ms = found[operator]
        found[operator] = (count + 1, ms + sum(last) / len(last))
    return dict(found)
