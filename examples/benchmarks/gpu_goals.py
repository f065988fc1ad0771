"""The goals of the GPU kernels, each computed from the rows that `gpu_kernels.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.benchmarks.gpu_peers import CUBLAS, SDPA

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """what: in words, with the number to reach. found: the least number of the rows it speaks of, None without one."""

    what: str
    least: float
    found: float | None
    strict: bool = False

    @property
    def state(self) -> str:
        """reached, missed, or not measured."""
        if self.found is None:
            return "not measured"
        return "reached" if self.found > self.least or (self.found == self.least and not self.strict) else "missed"

    def __str__(self) -> str:
        number = "" if self.found is None else f"{self.found:.3f}, "
        return f"goal: {self.what} >{'' if self.strict else '='} {self.least:g}: {number}{self.state}"


def _least(rows: Iterable[Row], number: Callable[[Row], float | None]) -> float | None:
    found = [x for x in map(number, rows) if x is not None]
    return min(found, default=None)


def _least_best(groups: Iterable[Iterable[Row]], number: Callable[[Row], float | None]) -> float | None:
    """The least number of the best rows of groups."""
    best = [max((x for x in map(number, rows) if x is not None), default=None) for rows in groups]
    return min((x for x in best if x is not None), default=None)


def ratio(row: Row, peer: str) -> float | None:
    """How many times faster than a peer; 0 of a kernel that failed or gave a wrong result."""
    if "failed" in row:
        return 0.0
    other = row["peers"].get(peer)
    return None if other is None else float(other) / float(row["seconds"])


def to_best(row: Row, peer: str) -> float | None:
    """How many times faster than the fastest form of a peer: of those whose names begin so."""
    if "failed" in row:
        return 0.0
    found = [ratio(row, name) for name in row["peers"] if name.startswith(peer)]
    return min((x for x in found if x is not None), default=None)


def _linear(rows: Sequence[Row], fmt: str, m: Iterable[int], kind: str = "linear", n: int = 0) -> list[Row]:
    wanted = set(m)
    return [
        row for row in rows
        if row["facts"][:1] == [kind] and row["facts"][1] == fmt and row["rows"] in wanted
        and (not n or row["facts"][3:] == [n, n])
    ]  # fmt: skip


def _weights(rows: Sequence[Row], w: str, m: Iterable[int], n: int = 0) -> list[Row]:
    return [row for row in _linear(rows, "", m, n=n) if row["facts"][2] == w]


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All of them; rows: of every case that was run. One that failed counts as 0, so that no goal is reached by it."""
    share: Callable[[Row], float | None] = lambda row: 0.0 if "failed" in row else row.get("share")  # noqa: E731
    to_cublas: Callable[[Row], float | None] = lambda row: ratio(row, CUBLAS)  # noqa: E731
    found = [
        Goal(f"{name}, one row: share of a copy's bandwidth", least, _least(_weights(rows, w, (1,)), share))
        for name, w, least in (
            ("W8A16 (i8/ch)", "i8/ch", 0.8), ("W4A16 (u4/g128/f16)", "u4/g128/f16", 0.7),
            ("W3A16 (u3/g128/f16)", "u3/g128/f16", 0.55), ("W2A16 (u2/g64/f16)", "u2/g64/f16", 0.55),
        )
    ]  # fmt: skip
    four = _weights(rows, "u4/g128/f16", (1,), 8192)
    first = _least(four, to_cublas)
    found += [
        Goal("W4A16, one row, 8192x8192: times cuBLAS bf16", 2.2, first),
        Goal(
            "W8A16, one row, 8192x8192: times cuBLAS bf16", 1.5, _least(_weights(rows, "i8/ch", (1,), 8192), to_cublas)
        ),
    ]
    few = _least(_weights(rows, "u4/g128/f16", (2, 4, 8, 16, 32), 8192), to_cublas)
    kept = None if first is None or few is None else few / first
    found.append(Goal("W4A16 keeps of that, up to 32 rows", 0.85, kept))
    for name, x in (("INT8", "i8/tok"), ("FP8", "f8e4m3/tok")):
        many = _linear(rows, x, (4096, 8192), "product")
        found += [
            Goal(f"{name} product, 4096 rows and more: share of twice cuBLAS bf16's rate", 0.6, _least(many, share)),
            Goal(f"{name} product, 4096 rows and more: times cuBLAS bf16", 1.6, _least(many, to_cublas)),
        ]
        forms = [_linear(rows, x, (m,), "form") for m in (4096, 8192)]
        found += [
            Goal(
                f"{name} product, the best form with descriptors: share of twice cuBLAS bf16's rate",
                0.6,
                _least_best(forms, share),
            ),
            Goal(
                f"{name} product, the best form with descriptors: times cuBLAS bf16", 1.6, _least_best(forms, to_cublas)
            ),
        ]
    caches = [row for row in rows if row["family"] == "decode" and row["facts"][0] in ("i8", "fp8")]
    found += [
        Goal("attention over i8 and fp8 caches: share of a copy's bandwidth", 0.65, _least(caches, share)),
        Goal("attention over i8 and fp8 caches: times SDPA bf16", 1.0, _least(caches, lambda row: to_best(row, SDPA))),
    ]
    floats = [row for row in rows if row["family"] == "decode" and row["facts"][0] == "float"]
    found.append(
        Goal(
            "attention over float caches of fixed length: times SDPA",
            1.0,
            _least(floats, lambda row: to_best(row, SDPA)),
        )
    )
    prompts = [row for row in rows if row["family"] == "prefill"]
    flash = _least(prompts, lambda row: to_best(row, SDPA))
    norms = [row for row in rows if row["family"] == "norm" and row["facts"][0] == "norm"]
    found += [
        Goal("attention of prompts with int8 q.k: times SDPA f16", 1.0, flash, strict=True),
        Goal("norm + quantize: share of a copy's bandwidth", 0.75, _least(norms, share)),
    ]
    return found
