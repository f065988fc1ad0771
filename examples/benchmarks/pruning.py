"""Does leaving out attention save more than it costs? Heads and attention values pruned, and quantized besides.

    python examples/benchmarks/pruning.py --json numbers.json

An experiment on the tiny language model, on the scale of all others: KL divergence to the float model on text that
chose nothing, and true bytes. Two kinds of pruning:

values  attention probabilities below a threshold become zero, the others stay as they are or are scaled up to a sum of
        1 again; of a float and of a 4-bit model. Saves no weights; the share of zeros is what a kernel could leave out.
heads   whole query heads are left out (their rows of q and columns of o), those first whose loss is least on the
        calibration text; beside them the same heads kept in 2 bits, and heads drawn at random.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.pruning` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.allocation import Bench
from examples.benchmarks.peers import table
from qfx import Format, graph
from qfx.analysis.units import Unit
from qfx.capture import capture_export
from qfx.measuring import measure
from qfx.passes._match import arguments
from qfx.pipeline import prepare
from qfx.storage.files import write_text

LOW, LOWER = Format.parse("u4/g32/f16"), Format.parse("u2/g32/f16")
THRESHOLDS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1)
SHARES = (0.1, 0.2, 0.3, 0.5)
Head = tuple[str, int]  # the name of an attention, a query head
VALUES = {"zeros": "zeros", "float": "KLD", "float_scaled": "scaled", "low": "4 bits", "low_scaled": "4 bits, scaled"}
HEADS = {"bytes": "MB", "kld": "KLD", "saved": "% of bytes saved"}


def sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, threshold: float,
    scaled: bool, told: list[float],
) -> Tensor:  # fmt: skip
    """Attention [B, H, S, D] without probabilities below a threshold. told: gets the share of zeros, of those seen."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask if mask.dtype == torch.bool else seen & (mask > -1e4)
        scores = scores if mask.dtype == torch.bool else scores + mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    kept = torch.where(weights < threshold, 0.0, weights)
    told.append(float((kept[seen] == 0).float().mean()))
    if scaled:
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-20)
    return kept @ v


def thresholded(gm: fx.GraphModule, threshold: float, told: list[float], *, scaled: bool) -> fx.GraphModule:
    """A copy of a prepared graph whose attentions leave out small probabilities."""
    changed = graph.copy(gm)
    for node in list(changed.graph.nodes):
        if graph.schema_name(node) == "aten::scaled_dot_product_attention":
            given = arguments(node)
            values = (given["query"], given["key"], given["value"], given["attn_mask"])
            call = _call(given["is_causal"], given["scale"], threshold, scaled, told)
            with changed.graph.inserting_before(node):
                new = changed.graph.call_function(call, values)
            node.replace_all_uses_with(new)
            changed.graph.erase_node(node)
    changed.recompile()
    return changed


def _call(causal: bool, scale: float | None, threshold: float, scaled: bool, told: list[float]) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sparse(q, k, v, mask, causal, scale, threshold, scaled, told)

    return attend


class Heads:
    """The query heads of the benchmark's model, and models without some of them, or with some in fewer bits."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.units: dict[Head, list[Unit]] = {}
        for unit in bench.weights.units.values():
            if unit.kind in ("q", "o") and unit.attention is not None and unit.head is not None:
                self.units.setdefault((unit.attention, unit.head), []).append(unit)

    @torch.no_grad()
    def model(self, formats: Mapping[str, Format], without: Sequence[Head] = ()) -> Any:
        """A copy whose units have rounded values; the columns of o of the heads `without` are zero."""
        made = copy.deepcopy(self.bench.model)
        for name, fmt in formats.items():
            unit = self.bench.weights.units[name]
            self._part(made, unit).copy_(self.bench.measure.weights.part(unit, fmt)[1])
        for head in without:
            for unit in self.units[head]:
                if unit.kind == "o":
                    self._part(made, unit).zero_()
        return made

    def _part(self, model: Any, unit: Unit) -> Tensor:
        weight: Tensor = model.get_submodule(unit.fqn).weight
        return weight if unit.axis is None else weight.narrow(unit.axis, unit.start, unit.stop - unit.start)

    def ranked(self) -> list[Head]:
        """Those first without which the float model loses least on the calibration text."""
        lost = {head: self._calibrated(self.model({}, [head])) for head in self.units}
        return sorted(lost, key=lambda head: lost[head])

    @torch.no_grad()
    def _calibrated(self, model: Any) -> float:
        batch = self.bench.data[0]
        return measure.kld(self.bench.model(**batch).logits, model(**batch).logits)

    def formats(self, lower: Sequence[Head] = ()) -> dict[str, Format]:
        """4 bits for everything, 2 for some heads."""
        found = dict.fromkeys(self.bench.weights.units, LOW)
        return found | {unit.name: LOWER for head in lower for unit in self.units[head]}

    def nbytes(self, formats: Mapping[str, Format], without: Sequence[Head] = ()) -> int:
        """Of the weights that are left, each unit by itself."""
        gone = {unit.name for head in without for unit in self.units[head]}
        return sum(self.bench.weights.units[name].nbytes(fmt) for name, fmt in formats.items() if name not in gone)

    def kld(self, model: Any) -> float:
        """To the float model on the evaluation text."""
        return measure.kld(self.bench.float, self.bench.logits(model))


def value_rows(bench: Bench, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each threshold."""
    heads = Heads(bench)
    models = {"float": bench.model, "low": heads.model(heads.formats())}
    graphs = {}
    for name, model in models.items():
        captured = capture_export(model, (), bench.data[0])
        prepare(captured.gm)
        graphs[name] = captured
    rows = []
    for threshold in (0.0, *thresholds):
        row: dict[str, Any] = {"peer": f"below {threshold:g}"}
        for name, captured in graphs.items():
            for scaled in (False, True):
                told: list[float] = []
                changed = thresholded(captured.gm, threshold, told, scaled=scaled)
                row[f"{name}{'_scaled' if scaled else ''}"] = _graph_kld(bench, captured, changed)
                row["zeros"] = sum(told) / len(told)
        rows.append(row)
    return rows


@torch.no_grad()
def _graph_kld(bench: Bench, captured: Any, gm: fx.GraphModule) -> float:
    pairs = bench.evaluation.split(2)
    found = [gm(*captured.flatten((), {"input_ids": pair, "use_cache": False}))[0] for pair in pairs]
    return measure.kld(bench.float, torch.cat(found))


def head_rows(bench: Bench, shares: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Rows for each share of heads: left out of the float model, left out of the 4-bit one, kept in 2 bits, random."""
    heads = Heads(bench)
    order, low = heads.ranked(), heads.formats()
    drawn = random.Random(seed).sample(order, len(order))
    full = heads.nbytes(low)
    rows: list[dict[str, Any]] = [
        {"peer": "4 bits", "bytes": full / 1e6, "kld": heads.kld(heads.model(low)), "saved": 0.0}
    ]
    for share in shares:
        few, some = order[: round(share * len(order))], drawn[: round(share * len(order))]
        lower = heads.formats(few)
        none: dict[str, Format] = {}
        for name, formats, without in (
            (f"float, {share:.0%} of heads left out", none, few),
            (f"4 bits, {share:.0%} of heads left out", low, few),
            (f"4 bits, {share:.0%} at random left out", low, some),
            (f"4 bits, {share:.0%} of heads in 2 bits", lower, []),
        ):
            size = heads.nbytes(formats, without) if formats else None
            found: dict[str, Any] = {"peer": name, "kld": heads.kld(heads.model(formats, without))}
            if size is not None:
                found |= {"bytes": size / 1e6, "saved": 100 * (1 - size / full)}
            rows.append(found)
    return rows


def main(
    evaluation: Annotated[int, typer.Option(min=1, help="Windows of text on which is measured.")] = 8,
    seed: Annotated[int, typer.Option(help="Draws random heads.")] = 0,
    quick: Annotated[bool, typer.Option(help="One threshold, one share: to see it run.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Prune attention values and heads, and print what that costs."""
    bench = Bench(calibration=2, evaluation=evaluation)
    values = value_rows(bench, THRESHOLDS[2:3] if quick else THRESHOLDS)
    heads = head_rows(bench, SHARES[1:2] if quick else SHARES, seed)
    console = table.console()
    console.print(table.shown(values, VALUES, "attention probabilities below a threshold are zero: KLD to float"))
    console.print(table.shown(heads, HEADS, "query heads left out: KLD to float"))
    if json_file is not None:
        write_text(json_file, json.dumps({"values": values, "heads": heads}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
