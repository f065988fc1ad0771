"""Peers side by side: each is built in its own process, then all are called in turn, round after round.

`alone`: only one of them is in memory at a time. Each starts anew for every turn, from the files that its first start
left in the job's folder, and runs a little before the turn that counts.
"""

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

from examples.benchmarks.peers.load import Load

ROOT = Path(__file__).resolve().parents[3]
PAUSE = 0.05  # seconds between two peers: threads that spin after a call are asleep by then


@dataclass(frozen=True)
class Entry:
    """A row to be: its name, the file under peers/ that builds it, and that file's option.

    python: the interpreter of an environment that it needs for itself ("": this one).
    """

    name: str
    module: str
    option: str = ""
    python: str = ""


@dataclass
class Result:
    """What became of an entry. seconds, best: medians and shortest by part, of this run; failed: why there are none."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    size: int | None = None
    version: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    outputs: Sequence[np.ndarray] | None = None
    failed: str = ""


class Saved(Sequence[np.ndarray]):
    """The arrays of an .npz file, each read when it is asked for: none is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path) as arrays:
            self._names: list[str] = arrays.files

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        with np.load(self.path) as arrays:
            names = self._names[index]
            return arrays[names] if isinstance(names, str) else [arrays[name] for name in names]


class _Process:
    """A worker, the file that its messages go to, and what it said. It runs from `start` to `close`."""

    def __init__(self, entry: Entry, job: Any, folder: Path, *, held: bool) -> None:
        self.entry, self.rounds, self._held = entry, dict[str, list[float]](), held
        self.result = Result(entry.name)
        name = "".join(c if c.isalnum() else "_" for c in entry.name)
        self.log, self.saved = folder / f"{name}.log", folder / f"{name}.npz"
        self._job = job
        self._process: subprocess.Popen[str] | None = None

    @property
    def id(self) -> int:
        """The system's number of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, judged: bool) -> None:
        """Build the peer; `judged`: and keep its outputs for the accuracy."""
        with self.log.open("w" if judged else "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [self.entry.python or sys.executable, "-m", "examples.benchmarks.peers.worker"],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        request = {
            "module": f"examples.benchmarks.peers.{self.entry.module}",
            "option": self.entry.option,
            "job_module": type(self._job).__module__,
            "job_type": type(self._job).__name__,
            "job": dataclasses.asdict(self._job),
            "outputs": str(self.saved) if judged else None,
        }
        self.saved.unlink(missing_ok=True)
        self._say(json.dumps(request))
        answer = self._answer()
        if answer is not None and judged:
            self.result.size, self.result.version = answer["size"], answer["version"]
            self.result.facts = answer["facts"]
            if self.saved.exists():
                outputs = Saved(self.saved)
                self.result.outputs = list(outputs) if self._held else outputs

    def _say(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.result.failed = self.result.failed or "its process ended"

    def _answer(self) -> dict[str, Any] | None:
        """The next answer; None where it is an error or the process is gone, whose reason is then kept."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.result.failed = f"its process ended with status {code}: {said[-1] if said else 'it said nothing'}"
            return None
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.result.failed = answer["error"]
            return None
        return answer

    def time(self, load: Load) -> None:
        """One turn: a part of a call that brings its weights back into the caches; then the call that counts."""
        for command in ("warm", "time"):
            if command == "time":
                load.begin(self.id)
            self._say(command)
            answer = None if self.result.failed else self._answer()
            if answer is None:
                return
            for part, seconds in answer["seconds"].items():
                self.rounds.setdefault(part, []).append(seconds)
        load.end(self.id)

    def close(self) -> None:
        """End the process; without one nothing happens."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Race:
    """Builds the entries one after the other, and times them in turn while the `with` block is open.

    judge: is told each result as soon as there is one. Its outputs then stay in their file and go with it when the
    judge has seen them, but for those of the first entry, the reference, which go with the others at the end.
    """

    def __init__(
        self, entries: Sequence[Entry], job: Any, folder: Path, say: Callable[[str], None], *, alone: bool = False,
        judge: Callable[[Result], None] | None = None,
    ) -> None:  # fmt: skip
        self._entries, self._job, self._folder, self._say, self._alone = entries, job, folder, say, alone
        self._judge = judge
        self._processes: list[_Process] = []
        self.load = Load()

    def __enter__(self) -> Race:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            for entry in self._entries:
                started = time.perf_counter()
                process = _Process(entry, self._job, self._folder, held=self._judge is None)
                self._processes.append(process)
                process.start(judged=True)
                took = f"{time.perf_counter() - started:.0f} s"
                self._say(f"{entry.name}: {process.result.failed or 'built'} ({took})")
                if process.result.failed or self._alone:
                    process.close()
                if self._judge is not None:
                    self._judge(process.result)
                    if len(self._processes) > 1:
                        _forget(process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()
            if self._judge is not None:
                _forget(process)

    @property
    def results(self) -> list[Result]:
        """What became of the entries so far, in their order."""
        return [process.result for process in self._processes]

    def run(self, rounds: int) -> list[Result]:
        """Time each peer once a round; the results are in the order of the entries."""
        if rounds < 1:
            raise ValueError(f"rounds must be 1 or more, found {rounds}")
        for _ in range(rounds):
            for process in self._processes:
                if not process.result.failed:
                    self._turn(process)
        for process in self._processes:
            if not process.result.failed:
                process.result.seconds = {part: median(values) for part, values in process.rounds.items()}
                process.result.best = {part: min(values) for part, values in process.rounds.items()}
        return [process.result for process in self._processes]

    def _turn(self, process: _Process) -> None:
        if self._alone:
            process.start(judged=False)
        if not process.result.failed:
            time.sleep(PAUSE)
            process.time(self.load)
        if self._alone:
            process.close()


def _forget(process: _Process) -> None:
    """Let the outputs go, which of a large vocabulary are large files."""
    process.result.outputs = None
    process.saved.unlink(missing_ok=True)
