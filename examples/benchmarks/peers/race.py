"""Peers side by side: each is built in its own process, then all are called in turn, round after round."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
PAUSE = 0.05  # seconds between two peers: threads that spin after a call are asleep by then


@dataclass(frozen=True)
class Entry:
    """A row to be: its name, the file under peers/ that builds it, and that file's option."""

    name: str
    module: str
    option: str = ""


@dataclass
class Result:
    """What became of an entry. seconds: medians by part, from the rounds of this run; failed: why there are none."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    size: int | None = None
    version: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    outputs: list[np.ndarray] | None = None
    failed: str = ""


class _Process:
    """A worker, the file that its messages go to, and what it said."""

    def __init__(self, entry: Entry, job: Any, folder: Path) -> None:
        self.entry, self.rounds = entry, dict[str, list[float]]()
        self.result = Result(entry.name)
        name = "".join(c if c.isalnum() else "_" for c in entry.name)
        self.log, self.saved = folder / f"{name}.log", folder / f"{name}.npz"
        self.saved.unlink(missing_ok=True)
        command = [sys.executable, "-m", "examples.benchmarks.peers.worker"]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        request = {
            "module": f"examples.benchmarks.peers.{entry.module}",
            "option": entry.option,
            "job_module": type(job).__module__,
            "job_type": type(job).__name__,
            "job": dataclasses.asdict(job),
            "outputs": str(self.saved),
        }
        self._say(json.dumps(request))
        if answer := self._answer():
            self.result.size, self.result.version = answer["size"], answer["version"]
            self.result.facts = answer["facts"]
            if self.saved.exists():
                with np.load(self.saved) as arrays:
                    self.result.outputs = [arrays[key] for key in arrays.files]

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.result.failed = self.result.failed or "its process ended"

    def _answer(self) -> dict[str, Any] | None:
        """The next answer; None where it is an error or the process is gone, whose reason is then kept."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.result.failed = f"its process ended with status {code}: {said[-1] if said else 'it said nothing'}"
            return None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.result.failed = answer["error"]
            return None
        return answer

    def time(self, *, warm: bool) -> None:
        """One turn: where `warm`, a call that brings its weights back into the caches; then one that counts."""
        for counts in (False, True) if warm else (True,):
            self._say("time")
            answer = None if self.result.failed else self._answer()
            if answer is None:
                return
            for part, seconds in answer["seconds"].items() if counts else ():
                self.rounds.setdefault(part, []).append(seconds)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Race:
    """Builds the entries one after the other, and times them in turn while the `with` block is open."""

    def __init__(self, entries: Sequence[Entry], job: Any, folder: Path, say: Callable[[str], None]) -> None:
        self._entries, self._job, self._folder, self._say = entries, job, folder, say
        self._processes: list[_Process] = []

    def __enter__(self) -> Race:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for entry in self._entries:
                started = time.perf_counter()
                self._processes.append(process := _Process(entry, self._job, self._folder))
                took = f"{time.perf_counter() - started:.0f} s"
                self._say(f"{entry.name}: {process.result.failed or 'built'} ({took})")
                if process.result.failed:
                    process.close()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()

    def run(self, rounds: int, *, warm: bool = True) -> list[Result]:
        """Time each peer once a round, where `warm` after a call that is not timed; results in the entries' order."""
        if rounds < 1:
            raise ValueError(f"rounds must be 1 or more, found {rounds}")
        for _ in range(rounds):
            for process in self._processes:
                if not process.result.failed:
                    time.sleep(PAUSE)
                    process.time(warm=warm)
        for process in self._processes:
            if not process.result.failed:
                process.result.seconds = {part: median(values) for part, values in process.rounds.items()}
        return [process.result for process in self._processes]
