"""The report: node by node, what was asked, what runs, why they differ, bytes, error. No layer stays float unseen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from qfx import names
from qfx.compiled import records
from qfx.compiled.frame import asked_with, unknown, unwrapped
from qfx.compiled.records import GraphRecord
from qfx.data import calls
from qfx.errors import Note, check_flags, explain
from qfx.hf.quantization_config import recipe_of
from qfx.kv.summary import CacheSummary, summary
from qfx.reporting import live_rows as live
from qfx.reporting import render, sqnr
from qfx.reporting.padding import padding_note
from qfx.reporting.rows import Row
from qfx.reporting.told import remembered
from qfx.storage.files import json_text

_MATMULS = ("linear", "experts", "conv", "matmul")


@dataclass(frozen=True)
class Report:
    """Rows, notes and totals of one model. `rows` holds every linear-like node, embedding, convolution and attention.

    graphs: how many compiled graphs the rows come from. other_bytes: of parameters and buffers that no row counts
    (norms, biases, tables). added_bytes: of scales and factors of inputs, which the float model lacks. cache: what the
    model's cache of keys and values stores, where qfx quantized it.
    first_calls: seconds that the first calls of graphs for a GPU took, compilation included; None without such graphs.
    """

    rows: tuple[Row, ...]
    notes: tuple[Note, ...] = ()
    graphs: int = 0
    title: str = ""
    other_bytes: int = 0
    added_bytes: int = 0
    cache: CacheSummary | None = None
    first_calls: float | None = None

    @property
    def totals(self) -> dict[str, Any]:
        """graphs; linear: products with a weight, of all kinds; linear_quantized: those with a quantized weight;
        weight_coverage, work_coverage: the quantized share of weight bytes and of multiply-accumulates;
        effective_bits: per weight, scales included; bytes_before, bytes_after, compression: of all parameters.
        Where the cache is quantized: cache_bytes_per_token, of a sequence; cache_ratio: to 16 bits.
        """
        weights = [r for r in self.rows if r.bytes_before and not r.shared]
        matmuls = [r for r in self.rows if r.op in _MATMULS]
        before, after = sum(r.bytes_before for r in weights), sum(r.bytes_after for r in weights)
        done = sum(r.bytes_before for r in weights if r.quantized)
        elements = sum(r.elements for r in weights)
        before_all, after_all = before + self.other_bytes, after + self.other_bytes + self.added_bytes
        return {
            "graphs": self.graphs,
            "linear": len(matmuls),
            "linear_quantized": sum(r.quantized for r in matmuls),
            "weight_coverage": done / before if before else 0.0,
            "work_coverage": _work_coverage(matmuls),
            "effective_bits": 8 * after / elements if elements else 0.0,
            "bytes_before": before_all,
            "bytes_after": after_all,
            "compression": before_all / max(1, after_all),
            **self._of_cache(),
        }

    def max_context(self, memory: Any, batch: Any = 1) -> Any:
        """Tokens of each of `batch` sequences for which `memory` bytes hold the parameters and the quantized cache.

        Ints, or symbols of sympy, of which the result is an expression. Activations are not counted. Raises ValueError
        for a model without a quantized cache, and for too little memory.
        """
        if self.cache is None:
            step = "quantize with cache rules, such as qfx.quantize(model, 'w8a8+kv8')"
            raise ValueError(explain("the model has no quantized cache", next_step=step))
        return self.cache.max_context(memory - self.totals["bytes_after"], batch)

    def _of_cache(self) -> dict[str, Any]:
        if self.cache is None:
            return {}
        return {"cache_bytes_per_token": self.cache.bytes_per_token, "cache_ratio": self.cache.ratio}

    def to_json(self) -> str:
        """The report as JSON text: title, totals, rows, notes. An SQNR without noise is null, as one not measured."""
        rows, notes = ([asdict(one) for one in several] for several in (self.rows, self.notes))
        fields: dict[str, Any] = {"title": self.title, "totals": self.totals, "rows": rows, "notes": notes}
        if self.first_calls is not None:
            fields["first_calls"] = self.first_calls
        if self.cache is not None:
            fields["caches"] = [asdict(row) | {"ratio": row.ratio} for row in self.cache.rows]
        return json_text(fields)

    def show(self, console: Console | None = None, *, all_rows: bool = True, fold: bool = True) -> None:
        """Print the report to the terminal. all_rows=False: only the rows of what is not quantized.

        fold: nodes that differ in numbers of their names alone (layers, experts) are one row, such as
        `model.layers.0-5.mlp.up_proj`; False prints each.
        """
        check_flags(all_rows=all_rows, fold=fold)
        render.show(self, console or Console(), all_rows=all_rows, folded=fold)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def report(model: Any, data: Any = None) -> Report:
    """The report of a model: quantized by `qfx.quantize`, compiled by `torch.compile(backend="qfx")`, or both.

    model: the module itself, the compiled module, or a compiled function. Linears, embeddings and convolutions of the
    module that are neither quantized nor in a compiled graph are listed with what keeps them in torch.
    data: one batch (a dict of keyword arguments, a tuple or a tensor). The compiled model is called with it, and the
    SQNR of every quantized node's output against the float graph is measured, errors of earlier nodes of the same graph
    included (a router that chooses other experts changes all that follows); padding does not count. Modules that
    qfx.quantize packed show what was measured then.
    Raises ValueError for a model that qfx never saw, and for data where nothing compiled runs.
    """
    collector = None if data is None else _measured(model, data)
    options = asked_with(model)
    target = unwrapped(model)
    if isinstance(target, nn.Module):
        module = _of_module(target, options, collector)
        if module is None:
            raise _unseen(model)
        found = module
    else:
        graphs = [_with_sqnr(r, collector) for r in _asked(records.of_function(target), options)]
        if not graphs:
            raise _unseen(model)
        title = getattr(target, "__name__", "compiled function")
        found = Report(_merged(graphs), _notes(graphs), len(graphs), title, first_calls=_first_calls(graphs))
    return found if collector is None else _checked(found, collector)


def _checked(found: Report, collector: sqnr.Collector) -> Report:
    """The report, with a note where data was given and not used."""
    told = any(row.sqnr_db is not None for row in found.rows)
    if not collector.graphs and not told:
        raise ValueError(
            explain("data was given, but no compiled graph ran it", next_step="pass what torch.compile returned")
        )
    if collector.measured:
        return found
    what = "SQNR is what qfx.quantize measured" if told else "there is nothing to measure against"
    note = Note(
        "report",
        f"data was not used, {what}: the weights are packed already",
        "qfx.quantize(model, recipe, data=...) measures while it has the float weights",
        minor=True,
    )
    return replace(found, notes=(*found.notes, note))


def _of_module(model: nn.Module, options: Any, collector: sqnr.Collector | None) -> Report | None:
    graphs = _graphs_of(model, options, collector)
    failed: dict[str, str] = {}
    for record in graphs:
        if record.failed:
            reason = f"its graph could not be had, runs in torch: {record.failed.splitlines()[0]}"
            failed.update({fqn.rpartition(".")[0]: reason for fqn, _ in record.weights})
    rows = {row.node: row for row in _merged(graphs)}
    recipe = recipe_of(model)
    read = {name.removesuffix(".weight") for record in graphs for name, _ in record.weights}
    for row in live.live_rows(model, set(rows)):
        if row.op == "parameter" and not row.asked and row.node in read:
            continue  # rows of the graph say what it multiplies
        if row.node in rows:
            rows[row.node] = replace(rows[row.node], sqnr_db=rows[row.node].sqnr_db or row.sqnr_db)
        elif graphs and not row.quantized and not row.asked:
            reason = live.why_not(model, row.node, failed, graphs)
            rows[row.node] = replace(row, reason=reason, as_asked=False)
        elif not row.asked:
            rows[row.node] = replace(row, reason=live.why_float(model, row, recipe))
        else:
            rows[row.node] = replace(row, reason=row.reason or live.why_weight_only(model, row, recipe))
    cache = summary(model)
    if not graphs and not any(row.asked for row in rows.values()) and cache is None:
        return None
    rest, added = live.other_bytes(model, set(rows))
    name, first = type(model).__name__, _first_calls(graphs)
    notes = tuple(dict.fromkeys([*_notes(graphs), *padding_note(rows.values()), *remembered(model)]))
    return Report(tuple(rows.values()), notes, len(graphs), name, rest, added, cache, first)


def _graphs_of(model: nn.Module, options: Any, collector: sqnr.Collector | None) -> list[GraphRecord]:
    """The records of the graphs that read a weight of the model, or that are its own without any weight."""
    index = names.index(model)
    found = []
    for record in _asked(records.all_records(), options):
        named = _with_sqnr(record, collector).named(index)
        if named is not None:
            found.append(named)
        elif record.frame.root is model and not record.weights:
            found.append(record)
    return found


def _asked(found: Iterable[GraphRecord], options: Any) -> list[GraphRecord]:
    """Those compiled with these options, in the order in which they were made."""
    return sorted((r for r in found if options is unknown or r.options == options), key=lambda r: r.serial)


def _with_sqnr(record: GraphRecord, collector: sqnr.Collector | None) -> GraphRecord:
    """The record with what was measured of it."""
    found = {} if collector is None else collector.of(record)
    return replace(record, rows=tuple(replace(row, sqnr_db=found.get(row.node)) for row in record.rows))


def _merged(graphs: Sequence[GraphRecord]) -> tuple[Row, ...]:
    """One row for each node. Where graphs (for other shapes) differ, the row with the reason is shown."""
    rows: dict[str, Row] = {}
    for record in graphs:
        for row in record.rows:
            before = rows.setdefault(row.node, row)
            chosen = min(before, row, key=lambda r: (r.as_asked, not r.reason))
            measured = [r.sqnr_db for r in (before, row) if r.sqnr_db is not None]
            rows[row.node] = replace(chosen, sqnr_db=min(measured, default=None))
    return tuple(rows.values())


def _first_calls(graphs: Sequence[GraphRecord]) -> float | None:
    seconds = [s for s in (record.first_call() for record in graphs) if s is not None]
    return sum(seconds) if seconds else None


def _notes(graphs: Sequence[GraphRecord]) -> tuple[Note, ...]:
    found = [note for record in graphs for note in record.notes] + live.limit_notes(graphs)
    if any(r.options != graphs[0].options for r in graphs):
        what = "the model was compiled with several options: rows of all of them"
        found.append(Note("report", what, "qfx.report(compiled) shows the graphs of one of them", minor=True))
    return tuple(dict.fromkeys(found))


def _measured(model: Any, batch: Any) -> sqnr.Collector:
    """Call the model with one batch, its compiled graphs measured."""
    target = unwrapped(model)
    args: tuple[Any, ...] = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(target, nn.Module):
        args, kwargs = calls(target, [batch])[0]
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    with sqnr.measuring() as collector, torch.no_grad():
        model(*args, **kwargs)
    return collector


def _work_coverage(rows: Sequence[Row]) -> float:
    """Share of the multiply-accumulates. A row whose count is not known works as often as the busiest, by elements."""
    rate = max((r.macs / r.elements for r in rows if r.macs and r.elements), default=1.0)
    work = {r.node: r.macs or rate * r.elements for r in rows}
    total = sum(work.values())
    return sum(work[r.node] for r in rows if r.quantized) / total if total else 0.0


def _unseen(model: Any) -> ValueError:
    target = unwrapped(model)
    reason, step = live.recurrent(target) if isinstance(target, nn.Module) else ("", "")
    if reason:
        what = "qfx was given no graph of this model, and nothing in it is quantized: all of it runs in torch"
        return ValueError(explain(what, found=reason, next_step=f"{step}; or qfx.quantize(model, recipe)"))
    hint = ""
    if callable(getattr(unwrapped(model), "generate", None)) and isinstance(model, nn.Module):
        hint = (
            " (generate() of what torch.compile returned runs the original: "
            'call model.compile(backend="qfx") and generate with the model)'
        )
    elif unwrapped(model) is not model or getattr(model, "_compiled_call_impl", None) is not None:
        hint = (
            " (if it was called: Dynamo gave qfx no graph, and the model ran in float; TORCH_LOGS=graph_breaks says "
            "why; before torch 2.14 a module of torch.nn itself, such as Sequential, needs torch.compile(model), not "
            "model.compile())"
        )
    return ValueError(
        "expected a model that qfx quantized or compiled, found neither; next step: call the compiled model once, or "
        f"qfx.quantize(model, recipe), then qfx.report(model){hint}"
    )
