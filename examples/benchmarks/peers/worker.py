"""One peer in a process of its own: `race.py` starts it and talks to it in lines of JSON.

A process each, because the threads of one library spin after a call and would slow the next library down. What the
libraries print goes to the log file that is standard error; the answers have the old standard output for themselves.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class Built:
    """A peer that is ready.

    time: runs it once and says the seconds of each part. outputs: what it is judged by, one array for each evaluation
    input (None: it is not judged). size: bytes of its weights as it keeps them. version: the library's. facts: more to
    show, by name. warm: runs enough of it to bring its weights into the caches (None: as much as `time` does).
    """

    time: Callable[[], dict[str, float]]
    outputs: Callable[[], list[np.ndarray]] | None
    size: int
    version: str
    facts: dict[str, Any] = field(default_factory=dict)
    warm: Callable[[], object] | None = None


def serve(answers: IO[str], commands: IO[str], request: dict[str, Any]) -> None:
    """Build the peer that the request names, then do as told until the other side hangs up."""

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        job_type = getattr(importlib.import_module(request["job_module"]), request["job_type"])
        job = job_type(**request["job"])
        built: Built = importlib.import_module(request["module"]).build(job, request["option"])
        if built.outputs is not None and request["outputs"] is not None:
            np.savez(request["outputs"], *built.outputs())
        answer(size=built.size, version=built.version, facts=built.facts)
        for line in commands:
            if line.strip() == "time":
                answer(seconds=built.time())
            elif line.strip() == "warm":
                (built.warm or built.time)()
                answer(seconds={})
    except Exception as error:  # noqa: BLE001  (whatever a library raises is the row's reason)
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Read the request from the first line of standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(answers, sys.stdin, json.loads(sys.stdin.readline()))
    answers.flush()
    os._exit(0)  # some libraries hang or crash while they are torn down


if __name__ == "__main__":
    main()
