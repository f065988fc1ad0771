"""What an analysis found: scores and measurements of each unit in each format, types of heads. Saved as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from qfx.analysis.head_types import Head, prior_of_units
from qfx.analysis.predictors import EVERY, Prediction, compare
from qfx.analysis.scores import Scores
from qfx.analysis.units import Unit
from qfx.errors import explain, nearest
from qfx.format import Format
from qfx.storage.files import json_text, read_json, write_text

_KIND, _VERSION = "qfx-sensitivity", 1
_STEP = "qfx.analyze(...).save(file)"


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """units: parts of weights, and of caches, that have scores. formats: the candidates, in the order asked for.

    scores: method -> unit -> format -> predicted loss. measured: unit -> format -> loss with that unit alone quantized.
    heads: what each attention head does. what: the measured quantity. provenance: model, data, loss, versions. notes:
    what could not be told, and why. `score` and `calibrated` take the first method where none is named.
    """

    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    scores: dict[str, Scores]
    measured: Scores = field(default_factory=dict)
    heads: tuple[Head, ...] = ()
    what: str = "KL divergence, nats per position"
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that have scores; the first is that which was asked for."""
        return tuple(self.scores)

    def score(self, method: str | None = None) -> Scores:
        """unit -> format -> predicted loss. Raises ValueError for a method without scores."""
        if method is None:
            return self.scores[self.methods[0]]
        if method not in self.scores:
            raise ValueError(
                explain(
                    f"the analysis has no scores of {method!r}",
                    expected=", ".join(self.scores),
                    next_step=f"{nearest(method, self.scores)} or analyze with method={method!r}",
                )
            )
        return self.scores[method]

    def calibrated(self, method: str | None = None) -> Scores:
        """unit -> format -> loss, on the scale of the measurements.

        A measured unit has its own value. Others have their score times the geometric mean of measured over predicted
        of their kind and bits, between the bits that were measured by a line through the logarithms, of all kinds where
        their own was not measured. No unit loses more in more bits of the same groups. Without measurements these are
        the scores.
        """
        scores = self.score(method)
        ratios = self._ratios(method)
        kinds = {unit.name: unit.kind for unit in self.units}
        made: Scores = {}
        for name, by_format in scores.items():
            own = self.measured.get(name, {})
            found = {
                text: own.get(text, value * _ratio(ratios, kinds[name], Format.parse(text).bits))
                for text, value in by_format.items()
            }
            made[name] = _falling(found)
        return made

    def prior(self, task: str) -> dict[str, int]:
        """Unit of a head -> bits that the table of a task gives the head's type: "qa", "translation" or
        "classification". A prior alone: no source shows that types tell bits. Raises ValueError for other tasks."""
        return prior_of_units(self.heads, self.units, task)

    def predictions(self, method: str | None = None) -> list[Prediction]:
        """How well a method (None: each) predicts what was measured."""
        chosen = self.methods if method is None else (method,)
        return [row for name in chosen for row in compare(name, self.score(name), self.measured, self.units)]

    def _ratios(self, method: str | None) -> dict[tuple[str, int], float]:
        rows = compare("", self.score(method), self.measured, self.units)
        return {(row.kind, row.bits): row.ratio for row in rows if math.isfinite(row.ratio)}

    def to_json(self) -> str:
        """Everything as JSON text; what is infinite is null."""
        return json_text({"format": _KIND, "version": _VERSION, **asdict(self)})

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file. Raises OSError."""
        write_text(Path(file), self.to_json())

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Sensitivity:
        """What `save` wrote. Raises FileNotFoundError, and ValueError for a file that is nothing of the kind."""
        path = Path(file)
        return cls.from_json(read_json(path, _STEP), str(path))

    @classmethod
    def from_json(cls, held: Any, where: str = "the sensitivity") -> Sensitivity:
        """From what `to_json` wrote, parsed. Raises ValueError, naming `where`, for anything else."""
        if not isinstance(held, dict) or held.get("format") != _KIND:
            raise ValueError(explain(f"{where} holds no sensitivity", next_step=_STEP))
        if held.get("version") != _VERSION:
            found = held.get("version")
            raise ValueError(explain(f"{where} has another version", expected=_VERSION, found=found, next_step=_STEP))
        names = {f.name for f in fields(cls)}
        for key in held:
            if key not in names | {"format", "version"}:
                raise ValueError(f"unknown key {key!r} in {where}, {nearest(key, names)}")
        try:
            return cls(
                units=tuple(Unit(**{**unit, "shape": tuple(unit["shape"])}) for unit in held["units"]),
                formats=tuple(str(Format.parse(text)) for text in held["formats"]),
                scores={method: _numbers(table) for method, table in held["scores"].items()},
                measured=_numbers(held["measured"]),
                heads=tuple(Head(**head) for head in held["heads"]),
                what=held["what"],
                provenance=held["provenance"],
                notes=tuple(held["notes"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                explain(f"{where} cannot be read: {type(error).__name__}: {error}", next_step=_STEP)
            ) from error

    def show(self, console: Console | None = None, *, rows: int = 20) -> None:
        """Print the most sensitive units, the heads, and how well scores predict measurements."""
        from qfx.analysis.render import show

        show(self, console or Console(), rows)


def _numbers(table: Mapping[str, Mapping[str, float | None]]) -> Scores:
    return {
        str(unit): {str(Format.parse(text)): math.inf if value is None else float(value) for text, value in row.items()}
        for unit, row in table.items()
    }


def _ratio(ratios: Mapping[tuple[str, int], float], kind: str, bits: int) -> float:
    """Measured over predicted of the kind, of all kinds where it was not measured; 1 without measurements. Between
    bits that were measured by a straight line through the logarithms, beyond them as at the nearest."""
    for group in (kind, EVERY):
        known = sorted(b for k, b in ratios if k == group)
        if known:
            below = max((b for b in known if b <= bits), default=known[0])
            above = min((b for b in known if b >= bits), default=known[-1])
            share = (bits - below) / (above - below) if above > below else 0.0
            return math.exp((1 - share) * math.log(ratios[group, below]) + share * math.log(ratios[group, above]))
    return 1.0


def _falling(found: Mapping[str, float]) -> dict[str, float]:
    """The same, no value above that of fewer bits in the same groups."""
    made = dict(found)
    least: dict[tuple[str, str], float] = {}
    for text in sorted(found, key=lambda text: Format.parse(text).bits):
        fmt = Format.parse(text)
        key = (fmt.granularity, fmt.scale_type)
        made[text] = least[key] = min(found[text], least.get(key, math.inf))
    return made
