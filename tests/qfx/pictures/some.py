"""Units, scores, heads and a plan of a model of two layers, without any model."""

from __future__ import annotations

from qfx.analysis.head_types import Head
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.units import Unit
from qfx.format import Format
from qfx.plan import Plan
from qfx.recipe import Recipe

FORMATS = ("u2/g32", "u3/g32", "u4/g32")
HEADS, LAYERS, WIDTH = 3, 2, 64


def units() -> list[Unit]:
    found = [Unit("table", "table", "embedding", "", (100, WIDTH))]
    for layer in (f"layers.{i}" for i in range(LAYERS)):
        for kind, heads in (("q", HEADS), ("k", 1)):
            fqn = f"{layer}.{kind}_proj"
            found += [
                Unit(f"{fqn}.{kind}{h}", fqn, kind, layer, (32, WIDTH), 0, 32 * h, 32 * h + 32, h, f"{layer}.attn")
                for h in range(heads)
            ]
        found.append(Unit(f"{layer}.up", f"{layer}.up", "linear", layer, (128, WIDTH)))
    return found


def score(unit: Unit, text: str) -> float:
    """Falls with the bits; grows with the place among the units."""
    place = [u.name for u in units()].index(unit.name) + 1
    return place * 10.0 ** -Format.parse(text).bits


def heads() -> tuple[Head, ...]:
    kinds = ("positional", "semantic", "mixed")
    return tuple(
        Head(f"layers.{i}.attn", f"layers.{i}", h, 0, kinds[h], previous=0.9 if h == 0 else 0.1, sink=0.6)
        for i in range(LAYERS)
        for h in range(HEADS)
    )


def sensitivity(*, caches: bool = True, measured: bool = True) -> Sensitivity:
    every = units()
    if caches:
        every.append(Unit("layers.0.attn.cache_k0", "layers.0.attn", "cache_k", "layers.0", (32,), head=0))
    scores = {u.name: {t: score(u, t) if u in units() else 0.5 for t in FORMATS} for u in every}
    some = {u.name: {t: 1.5 * scores[u.name][t] for t in FORMATS} for u in units()[1:5]} if measured else {}
    return Sensitivity(
        tuple(every), FORMATS, {"quant-fisher": scores}, some, heads(),
        provenance={"model": "Tiny", "batches": 2, "shape": [2, 9]}, notes=("a note about <heads>",),
    )  # fmt: skip


def plan() -> Plan:
    made = Plan(Recipe.parse("w4a16"))
    rows = {}
    for i, unit in enumerate(units()):
        fmt = Format.parse(FORMATS[i % 3])
        rows[unit.name] = {
            "kind": unit.kind, "layer": unit.layer, "head": unit.head, "format": str(fmt),
            "bytes": unit.nbytes(fmt), "elements": unit.elements, "score": score(unit, str(fmt)),
        }  # fmt: skip
    made.sensitivities["allocation"] = {
        "budget": {"avg_bits": 4, "bytes": 20000}, "bytes": 19990, "average_bits": 3.998, "method": "measured",
        "predicted": 0.02, "gap": 0.0, "measured_before": 0.021, "measured": 0.0199, "what": "KL divergence",
        "evaluations": 3, "units": rows,
    }  # fmt: skip
    return made
