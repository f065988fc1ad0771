"""The report: node by node, what was asked, what runs, why they differ, bytes and error. No layer stays float unseen."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qfx.errors import Note
from qfx.format import Format


@dataclass(frozen=True)
class Row:
    """One node.

    node: FQN. op: linear, embedding, conv, attention, experts. asked: formats by role ("x=i8/tok w=i8/ch"), "" where the
    recipe asks for nothing. kernel: what executes it. reason: why that differs from what was asked, else "".
    elements, bytes_before, bytes_after: of the weight; scales and zero points are counted. macs: multiply-accumulates of one call at the
    traced shapes. sqnr_db: of the node's output against fp32, None where it was not measured.
    """

    node: str
    op: str
    asked: str = ""
    kernel: str = ""
    reason: str = ""
    elements: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int = 0
    sqnr_db: float | None = None
    shared: bool = False  # the weight's bytes are counted at another row

    @property
    def quantized(self) -> bool:
        return "w=" in self.asked and not self.reason


@dataclass(frozen=True)
class Report:
    """Rows, notes and totals of one model. `rows` holds every linear-like node, embedding, convolution and attention."""

    rows: tuple[Row, ...]
    notes: tuple[Note, ...] = ()
    graphs: int = 0
    title: str = ""
    other_bytes: int = 0  # parameters and buffers that no row counts: norms, biases, tables

    @property
    def totals(self) -> dict[str, Any]:
        """coverage of weight bytes and of matmul work, effective bits per weight, bytes before and after."""
        weights = [r for r in self.rows if r.bytes_before and not r.shared]
        matmuls = [r for r in self.rows if r.op in ("linear", "experts", "conv")]
        before, after = sum(r.bytes_before for r in weights), sum(r.bytes_after for r in weights)
        done = sum(r.bytes_before for r in weights if r.quantized)
        work, done_work = sum(r.macs for r in matmuls), sum(r.macs for r in matmuls if r.quantized)
        elements = sum(r.elements for r in weights)
        return {
            "graphs": self.graphs,
            "linear": len(matmuls),
            "linear_quantized": sum(r.quantized for r in matmuls),
            "weight_coverage": done / before if before else 0.0,
            "work_coverage": done_work / work if work else 0.0,
            "effective_bits": 8 * after / elements if elements else 0.0,
            "bytes_before": before + self.other_bytes,
            "bytes_after": after + self.other_bytes,
            "compression": (before + self.other_bytes) / max(1, after + self.other_bytes),
        }

    def to_json(self) -> str:
        """The whole report as JSON text: totals, rows, notes."""
        return json.dumps(
            {"title": self.title, "totals": self.totals, "rows": [asdict(r) for r in self.rows],
             "notes": [asdict(n) for n in self.notes]},
            indent=1,
        )  # fmt: skip

    def show(self, console: Console | None = None, *, all_rows: bool = True) -> None:
        """Print the report to the terminal."""
        console = console or Console()
        console.print(self._table(all_rows))
        t = self.totals
        console.print(
            f"{t['linear_quantized']} of {t['linear']} linear nodes quantized, {t['weight_coverage']:.1%} of weight bytes, "
            f"{t['work_coverage']:.1%} of matmul work; {t['effective_bits']:.2f} bits per weight; "
            f"{_size(t['bytes_before'])} -> {_size(t['bytes_after'])} ({t['compression']:.2f}x); {t['graphs']} graph(s)"
        )
        for note in self.notes:
            console.print(f"[yellow]note[/] {note}", highlight=False)

    def _table(self, all_rows: bool) -> Table:
        table = Table(title=self.title or "qfx report", title_justify="left")
        for name in ("node", "op", "asked", "runs as", "bytes", "SQNR dB"):
            table.add_column(name, overflow="fold", justify="right" if name in ("bytes", "SQNR dB") else "left")
        rows = self.rows if all_rows else tuple(r for r in self.rows if not r.quantized)
        for row in rows:
            kernel = f"{row.kernel} [yellow]({row.reason})[/]" if row.reason else row.kernel
            sizes = f"{_size(row.bytes_before)} -> {_size(row.bytes_after)}" if row.bytes_before else ""
            sqnr = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
            table.add_row(row.node, row.op, row.asked or "float", kernel, sizes, sqnr)
        return table

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@dataclass(frozen=True)
class GraphRecord:
    """What one compiled graph reports, under the module whose forward it came from."""

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    failed: str = ""


# Reports by module, kept only as long as the module lives. Nothing else is remembered between calls.
_GRAPHS: weakref.WeakKeyDictionary[Any, list[GraphRecord]] = weakref.WeakKeyDictionary()


def remember(owner: Any, record: GraphRecord) -> None:
    """Keep the record of a compiled graph with the module (or code object) that it was compiled from."""
    _GRAPHS.setdefault(owner, []).append(record)


def report(model: Any) -> Report:
    """The report of a model: quantized by `qfx.quantize`, compiled by `torch.compile(backend="qfx")`, or both.

    Accepts the module itself, the compiled module, or a compiled function. Linear layers of the module that are in no
    compiled graph and not quantized are listed as running in torch. Raises ValueError for a model that qfx never saw.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        function = getattr(model, "_torchdynamo_orig_callable", model)
        records = [("", r) for r in _GRAPHS.get(getattr(function, "__code__", function), [])]
        return _merge(records, [], "compiled function")
    records = [(path, r) for path, module in model.named_modules() for r in _GRAPHS.get(module, [])]
    compiled = {f"{path}.{row.node}" if path else row.node for path, r in records for row in r.rows}
    live = list(_live_rows(model, compiled))
    if not records and not any(row.quantized for row in live):
        raise ValueError(
            "expected a model that qfx quantized or compiled, found neither; next step: call the compiled model once, or "
            "qfx.quantize(model, recipe), then qfx.report(model)"
        )
    return _merge(records, live, type(model).__name__)


def _merge(records: Sequence[tuple[str, GraphRecord]], live: Iterable[Row], title: str) -> Report:
    rows: dict[str, Row] = {}
    notes: dict[str, Note] = {}
    for path, record in records:
        for row in record.rows:
            name = f"{path}.{row.node}" if path else row.node
            rows.setdefault(name, replace(row, node=name))
        for note in record.notes:
            notes.setdefault(str(note), note)
    compiled = bool(records)
    for row in live:
        if row.node not in rows:
            reason = "in no compiled graph yet: runs in torch" if compiled and not row.quantized else row.reason
            rows[row.node] = replace(row, reason=reason)
        elif rows[row.node].sqnr_db is None:
            rows[row.node] = replace(rows[row.node], sqnr_db=row.sqnr_db)
    return Report(tuple(rows.values()), tuple(notes.values()), graphs=len(records), title=title)


def _live_rows(model: nn.Module, compiled: set[str]) -> Iterator[Row]:
    """Rows of the live module: quantized modules tell themselves, float linears and embeddings are listed as such.

    A float module whose weight is tied to that of one in `compiled` is left out: the weight is told there.
    """
    told = {_pointer(m) for fqn, m in model.named_modules() if fqn in compiled} - {None}
    for fqn, module in model.named_modules():
        row = getattr(module, "qfx_row", None)
        if callable(row):
            yield row(fqn)
        elif getattr(module, "qfx_packed", None):
            yield from packed_rows(fqn, module)
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if fqn not in compiled and _pointer(module) in told:
                continue
            kind = "linear" if isinstance(module, nn.Linear) else "embedding"
            kind = "conv" if isinstance(module, nn.modules.conv._ConvNd) else kind
            size = module.weight.numel() * module.weight.element_size()
            yield Row(fqn, kind, kernel="torch", elements=module.weight.numel(), bytes_before=size, bytes_after=size)


def _pointer(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    return weight.data_ptr() if weight is not None else None


def packed_rows(fqn: str, module: nn.Module) -> list[Row]:
    """Rows of the report for the packed parameters of a module."""
    rows = []
    for name, spec in getattr(module, "qfx_packed", {}).items():
        elements = torch.Size(spec.shape).numel()
        after = Format.parse(spec.format).nbytes(spec.shape)
        path = f"{fqn}.{name}" if fqn else name
        rows.append(
            Row(path.removesuffix(".weight"), "parameter", f"w={spec.format}", "qfx::dequantize, then torch", "",
                elements, elements * spec.dtype.itemsize, after)
        )  # fmt: skip
    return rows


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
