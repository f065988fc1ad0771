"""Bits where they pay: the planned mix beside baselines of the same bytes, on the same tokens.

    python examples/benchmarks/allocation.py --json numbers.json --plot kld.png
    python examples/benchmarks/allocation.py --budget 3 --budget u4/g64/f16 --seeds 5

A budget is average bits of all weights that have a format (scales, zero points and padding counted), or a uniform
format's own bytes. Every row is the model quantized for true, by the same rounding ("mse"), within the budget; its
bytes are those of the report. Candidates of a baseline are chosen, and the plan is made, on calibration text; KL
divergence to float32 (nats a token), perplexity and the share of equal best tokens are those of other text.

Random mixes and inverted ones exchange the planned formats among weights of one shape. Inverted twice: by what each
weight gains by a bit beside the others, as measured, and by the loss that Quant-Fisher predicts for it alone.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.allocation` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks import allocation_baselines as baselines
from examples.benchmarks.peers import table
from qfx import annotation
from qfx.analysis.measured import Measure
from qfx.analysis.score import Options, score_graph
from qfx.analysis.units import units
from qfx.annotation import Formats
from qfx.capture import capture_export
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.interop.gguf_energy import input_energy
from qfx.measuring import measure
from qfx.pipeline import prepare
from qfx.plan import Plan

TINY = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny_lm"
LENGTH = 512
BUDGETS = ("2.5", "3", "4", "5", "6", "u3/g64/f16", "u4/g64/f16")
GOALS = {"3": 0.75, "4": 0.8, "u3/g64/f16": 0.75, "u4/g64/f16": 0.8}  # of the KLD of uniform, at most
COLUMNS = {"bits": "bits", "size_bytes": "MB", "kld": "KLD", "ratio": "of uniform", "perplexity": "perplexity",
           "top1": "same best token"}  # fmt: skip
FAMILIES = {
    "uniform": baselines.uniform,
    "uniform, filled up": baselines.uniform_filled,
    "by layer type": baselines.by_type,
    "Q4_K_M-style mix": baselines.k_mix,
}
PLANNED, LAYERS = "planned, heads", "planned, layers only"
BY_GAIN, BY_LOSS = "inverted, measured gain", "inverted, predicted loss"
Row = dict[str, Any]
By = Literal["heads", "layers"]


class Bench:
    """One causal language model, calibration windows and others, its units, and what its float logits are."""

    def __init__(self, folder: Path = TINY, calibration: int = 16, evaluation: int = 8) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        if calibration + evaluation > len(windows):
            raise ValueError(f"the text has {len(windows)} windows of {LENGTH} tokens, asked for {calibration} "
                             f"and {evaluation} others")  # fmt: skip
        self.evaluation = windows[-evaluation:]
        self.data = [{"input_ids": pair, "use_cache": False} for pair in windows[:calibration].split(2)]
        self.float = self.logits(self.model)
        captured = capture_export(self.model, (), self.data[0])
        prepare(captured.gm)
        self.weights = baselines.Weights(units(captured.gm)[0])
        batches = [captured.flatten((), batch) for batch in self.data]
        formats = Options(formats=("u3/g32/f16",), heads=False, caches=False, measure=0)
        scores, _ = score_graph(captured.gm, batches, formats, outputs=captured.outputs, progress=False)
        self.losses = {name: row["u3/g32/f16"] for name, row in scores.score().items()}
        self.measure = Measure(captured.gm, batches, units=list(self.weights.units.values()), outputs=captured.outputs)
        linears = [fqn for fqn in self.weights.of if isinstance(self.model.get_submodule(fqn), torch.nn.Linear)]
        self.energy = input_energy(self.model, linears, self.data)
        base = Format.parse("u4/g32/f16")
        targets = [{"target": target, "w": str(base)} for target in ("linear", "embedding", "tied")]
        self.base = qfx.plan(self.model, {"name": "benchmark", "rules": targets, "rounding": "mse"})

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """f32 [windows, tokens, vocabulary] of the evaluation text."""
        return torch.cat([model(input_ids=pair, use_cache=False).logits for pair in self.evaluation.split(2)])

    def budget(self, text: str) -> int:
        """Bytes that a budget stands for. Raises ValueError for what is neither a number nor a format."""
        try:
            return math.floor(float(text) * self.weights.elements / 8)
        except ValueError:
            fmt = Format.parse(text)
            return self.weights.nbytes(self.weights.whole(lambda _: fmt))

    def plan_of(self, formats: Mapping[str, Formats]) -> Plan:
        """A plan with these formats of weights."""
        made = copy.deepcopy(self.base)
        for fqn, roles in made.annotations.items():
            own = fqn if fqn in formats else self._tied(fqn)
            roles["w"] = annotation.to_json(formats[own])
        return made

    def _tied(self, fqn: str) -> str:
        """The name of the weight that the linear `fqn` shares."""
        held = self.model.get_submodule(fqn).weight
        return next(other for other in self.weights.of if self.model.get_submodule(other).weight is held)

    def figures(self, plan: Plan) -> Row:
        """What the model quantized by a plan is worth on the evaluation text."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            model = qfx.quantize(copy.deepcopy(self.model), plan)
        size = sum(row.bytes_after for row in qfx.report(model) if row.node in self.weights.of)
        found = self.logits(model)
        return {
            "bits": 8 * size / self.weights.elements,
            "size_bytes": size,
            "kld": measure.kld(self.float, found),
            "perplexity": measure.perplexity(found, self.evaluation),
            "top1": measure.top1_agreement(self.float, found),
        }

    def best(self, candidates: Sequence[baselines.Assignment]) -> tuple[baselines.Assignment, float] | None:
        """The candidate of the least divergence on the calibration text, None where there is none."""
        scored = [(self.measure.kld(a), i) for i, a in enumerate(candidates)]
        return (candidates[min(scored)[1]], min(scored)[0]) if scored else None

    def gains(self, budget: int) -> dict[str, float]:
        """unit -> what its weight gains by one bit more, beside the others in the largest uniform format that fits.

        In groups of 64; in nats of the calibration text; a weight's gain is shared by its units.
        """
        bits, group = (2, 3, 4, 5, 6, 8), 64
        uniform = [self.weights.whole(lambda _, b=b: baselines.affine(b, group)) for b in bits]  # type: ignore[misc]
        at = max([i for i, one in enumerate(uniform[:-1]) if self.weights.nbytes(one) <= budget], default=0)
        base, more = uniform[at], uniform[at + 1]
        self.measure.anchor(base)
        loss, found = self.measure.kld(base), {}
        for own in self.weights.of.values():
            gain = loss - self.measure.kld(base | {unit.name: more[unit.name] for unit in own})
            found.update({unit.name: gain / len(own) for unit in own})
        return found

    def outliers(self, budget: int) -> dict[str, Formats] | None:
        """The best base for columns kept apart."""
        found: list[tuple[float, int, dict[str, Formats]]] = []
        for i, base in enumerate(baselines.UNIFORM):
            formats = baselines.outlier_columns(self.weights, budget, base, self.model, self.energy)
            size = 0 if formats is None else self.weights.nbytes(self.weights.whole(lambda _, base=base: base))  # type: ignore[misc]
            if formats is not None and size >= baselines.NEAR * budget:
                found.append((self._calibration_kld(self.plan_of(formats)), i, formats))
        return min(found, key=lambda row: row[:2])[2] if found else None

    @torch.no_grad()
    def _calibration_kld(self, plan: Plan) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            model = qfx.quantize(copy.deepcopy(self.model), plan)
        pairs = [measure.kld(self.model(**batch).logits, model(**batch).logits) for batch in self.data[:4]]
        return statistics.mean(pairs)


def planned(bench: Bench, budget: int, by: By, *, refine: int = 300) -> Plan:
    """What qfx plans for at most so many bytes, its units cut by "heads" or whole ("layers").

    refine: how many assignments may be measured to improve the first.
    """
    rules = bench.base.recipe.to_dict()["rules"]
    recipe = {"name": "planned", "rounding": "mse", "rules": rules, "allocation": {"refine": refine}}
    return qfx.plan(bench.model, recipe, bench.data, units=by, avg_bits=8 * budget / bench.weights.elements)


def whole_of(plan: Plan) -> dict[str, Formats]:
    """The formats of whole weights from which a plan by heads set out: those of units="layers"; empty where unknown."""
    judged = plan.sensitivities.get("allocation", {}).get("judged", {})
    return {fqn: Format.parse(text) for fqn, text in judged.get("whole", {}).items()}


def assignment_of(weights: baselines.Weights, plan: Plan) -> baselines.Assignment:
    """Unit name -> its format in a plan. Heads that a plan puts side by side are told by their own names."""
    told = plan.sensitivities.get("allocation", {}).get("units", {})
    found: baselines.Assignment = {}
    for fqn, own in weights.of.items():
        names = [unit.name for unit in own]
        each: Sequence[Format] = annotation.each(plan.formats(fqn)["w"])
        if all(name in told for name in (names if fqn not in told else [fqn])):
            each = [Format.parse(told[name]["format"]) for name in (names if fqn not in told else [fqn])]
        assert len(each) in (1, len(own)), (fqn, each)
        found.update(zip(names, list(each) * (len(own) // len(each)), strict=True))
    return found


def rows(bench: Bench, text: str, *, seeds: int = 8, plan: Callable[[Bench, int, By], Plan] = planned) -> list[Row]:
    """One dict for each way, of one budget. plan: makes the planned ones."""
    weights, budget = bench.weights, bench.budget(text)
    found: list[Row] = []

    def add(name: str, made: Plan, **more: Any) -> None:
        figures = bench.figures(made)
        if figures["size_bytes"] > budget:
            raise AssertionError(f"{name} takes {figures['size_bytes']} bytes of {budget}")
        found.append({"peer": name, **figures, **more})

    heads = plan(bench, budget, "heads")
    whole = whole_of(heads)
    plans = {LAYERS: bench.plan_of(whole) if whole else plan(bench, budget, "layers"), PLANNED: heads}
    for name, made in plans.items():
        own = assignment_of(weights, made)
        add(name, made, calibration=bench.measure.kld(own), remarks=said(weights.formats(own)))
    mix = assignment_of(weights, plans[PLANNED])
    others = {f"random {seed}": baselines.shuffled(weights, mix, seed) for seed in range(seeds)}
    others |= {name: baselines.inverted(weights, mix, losses) for name, losses in
               ((BY_GAIN, bench.gains(budget)), (BY_LOSS, bench.losses))}  # fmt: skip
    for name, other in others.items():
        add(name, bench.plan_of(weights.formats(other)), calibration=bench.measure.kld(other))
    for name, family in FAMILIES.items():
        best = bench.best(family(weights, budget))
        if best is not None:
            formats = weights.formats(best[0])
            add(name, bench.plan_of(formats), calibration=best[1], remarks=said(formats))
    apart = bench.outliers(budget)
    if apart is not None:
        add("outlier channels apart", bench.plan_of(apart), remarks=said(apart))
    return _with_ratio(found[len(plans) :] + found[: len(plans)])


def _with_ratio(found: list[Row]) -> list[Row]:
    """Each row with its KLD as part of that of `uniform`, where there is one."""
    uniform = next((row["kld"] for row in found if row["peer"] == "uniform"), None)
    return [{**row, "ratio": row["kld"] / uniform} if uniform else row for row in found]


def said(formats: Mapping[str, Formats]) -> str:
    """How many weights (or parts of equal size) have which format: `u4/g64:30 u3/g64:12`."""
    counts: dict[str, int] = {}
    for value in formats.values():
        for fmt in annotation.each(value):
            text = str(fmt).removesuffix("/f16")
            counts[text] = counts.get(text, 0) + 1
    return " ".join(f"{text}:{count}" for text, count in sorted(counts.items(), key=lambda item: -item[1]))


def verdicts(text: str, found: Sequence[Row]) -> list[str]:
    """What the rows of one budget say about the goals, in words; those missed begin with MISSED."""
    by = {row["peer"]: row["kld"] for row in found}
    randoms = [kld for name, kld in by.items() if name.startswith("random")]
    own = min(by[PLANNED], by[LAYERS])
    others = {name: kld for name, kld in by.items() if not name.startswith("planned")}
    nearest = min(others, key=lambda name: others[name])
    part = own / others[nearest]
    heads = by[PLANNED] / by[LAYERS]
    told = [
        (part < 1, f"the planned mix has {part:.3f} of the KLD of the best baseline ({nearest})"),
        (heads <= 1, f"heads have {heads:.3f} of the KLD of whole layers"),
    ]
    if text in GOALS and "uniform" in by:
        part = own / by["uniform"]
        told.append((part <= GOALS[text], f"{part:.3f} of uniform's KLD, wanted at most {GOALS[text]}"))
    if randoms:
        mean = statistics.mean(randoms)
        spread = statistics.stdev(randoms) if len(randoms) > 1 else 0.0
        figures = f"planned {by[PLANNED]:.5f}, random {mean:.5f} (spread {spread:.5f})"
        told += [
            (by[PLANNED] < min(randoms) and mean < by[name], f"{figures}, {name} {by[name]:.5f}")
            for name in (BY_GAIN, BY_LOSS)
        ]
    return [f"{'holds' if good else 'MISSED'}: {line}" for good, line in told]


def plot(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """KL divergence over true bits a weight, a line for each way, on a logarithmic axis; random ones as their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines: dict[str, list[tuple[float, float]]] = {}
    for found in runs.values():
        randoms = [row for row in found if row["peer"].startswith("random")]
        for row in [row for row in found if row not in randoms]:
            lines.setdefault(row["peer"], []).append((row["bits"], row["kld"]))
        if randoms:
            lines.setdefault("random (mean)", []).append(
                (randoms[0]["bits"], statistics.mean(row["kld"] for row in randoms))
            )
    figure, axis = plt.subplots(figsize=(10, 7))
    for name, points in lines.items():
        bits, klds = zip(*sorted(points), strict=True)
        own = name.startswith("planned")
        axis.plot(bits, klds, label=name, marker="o" if own else ".", linewidth=2.5 if own else 1.2,
                  linestyle="-" if own else "--", zorder=3 if own else 2)  # fmt: skip
    axis.set(yscale="log", xlabel="bits a weight, scales and zero points included",
             ylabel="KL divergence to float32, nats a token")  # fmt: skip
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Llama of transformers.")] = TINY,
    budget: Annotated[list[str] | None, typer.Option(help="Average bits, or a format whose bytes are it.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random mixes.")] = 8,
    calibration: Annotated[int, typer.Option(min=2, help="Windows of 512 tokens.")] = 16,
    evaluation: Annotated[int, typer.Option(min=2, help="Other windows of 512 tokens.")] = 8,
    refine: Annotated[int, typer.Option(min=0, help="Assignments measured to improve a plan.")] = 300,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw KL divergence over bits.")] = None,
) -> None:
    """Hold planned mixes against baselines of the same bytes, and print a table for each budget."""
    torch.set_num_threads(threads)
    console = table.console()
    bench = Bench(model, calibration, evaluation)
    runs: dict[str, list[Row]] = {}
    for text in budget or BUDGETS:
        runs[text] = rows(bench, text, seeds=seeds, plan=partial(planned, refine=refine))
        bits = 8 * bench.budget(text) / bench.weights.elements
        console.print(table.shown(runs[text], COLUMNS, f"budget {text}: {bits:.3f} bits a weight"))
        for line in verdicts(text, runs[text]):
            console.print(line, highlight=False)
    found = {"where": table.place(threads), "model": str(model), "runs": {t: {"rows": r} for t, r in runs.items()}}
    table.write(json_file, found)
    if plot_file is not None:
        plot(plot_file, runs)


if __name__ == "__main__":
    typer.run(main)
