"""The report on a terminal: a table, what the rows with a number mean, totals, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qfx.errors import listed
from qfx.kv.summary import CacheSummary, named
from qfx.reporting.fold import Folded, fold
from qfx.reporting.rows import Row

if TYPE_CHECKING:
    from qfx.report import Report

# Of the kernels that compute a node the one that does the work: the first of these that is there.
_MAIN = ("MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "Attention", "MoE", "Conv", "Gemm", "MatMul")
_WIDEST = {"asked": 18, "runs as": 30, "bytes": 8, "SQNR": 5}  # columns; the node's name takes the rest
_NAME = 24  # columns that a name has, where there is room for more than _GIVES
_GIVES = {"runs as": 15, "node": 12, "asked": 8}  # in this order texts give way, down to these; numbers never do


def show(report: Report, console: Console, *, all_rows: bool, folded: bool = True) -> None:
    """Print a report. Reasons stand under the table, each once with all its nodes. folded: layers alike are one row."""
    reasons: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.node)
    numbers = {reason: number for number, reason in enumerate(reasons, 1)}
    rows = [row for row in report.rows if all_rows or not row.quantized]
    lines = fold(rows, _looks) if folded else [Folded(row.node, (row,)) for row in rows]
    if lines or all_rows:
        console.print(_table(report.title, lines, numbers, console.width))
    else:  # a head without rows says nothing
        console.print(f"[italic]{escape(report.title or 'qfx report')}[/]: no node is in float")
    if len(lines) < len(rows):
        console.print(
            "[dim]a row of several nodes: the bytes of all, the least SQNR; each by itself: fold=False, --each[/]"
        )
    for reason, nodes in reasons.items():
        console.print(f"[yellow]\\[{numbers[reason]}][/] {escape(listed(nodes, 6))}: {escape(reason)}", highlight=False)
    t = report.totals
    graphs = f"{t['graphs']} graph(s)" if t["graphs"] else "not compiled"
    first = "" if report.first_calls is None else f", first calls {report.first_calls:.1f} s"
    console.print(
        f"{t['linear_quantized']} of {t['linear']} linear nodes quantized, {t['weight_coverage']:.1%} of weight bytes, "
        f"{t['work_coverage']:.1%} of matmul work; {t['effective_bits']:.2f} bits per weight; "
        f"{_size(t['bytes_before'])} -> {_size(t['bytes_after'])} ({t['compression']:.2f}x); "
        f"{graphs}{first}"
    )
    if report.cache is not None:
        _show_cache(report.cache, console)
    for note in report.notes:
        if note.reason not in reasons:
            console.print(f"[yellow]note[/] {escape(str(note))}", highlight=False)


def _looks(row: Row) -> tuple[str, str, str, str]:
    """What the table shows of a row beside its name and numbers."""
    return row.op, row.asked, main_kernel(row.kernel), row.reason


def _table(title: str, lines: Sequence[Folded], numbers: dict[str, int], width: int) -> Table:
    table = Table(
        title=escape(title or "qfx report"), title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    measured = any(line.sqnr_db is not None for line in lines)
    widths = {name: most for name, most in _WIDEST.items() if measured or name != "SQNR"}
    left = width - sum(widths.values()) - len(widths) - 1
    lacking = max(_NAME - left, 0)
    widths = {"node": max(_NAME, left), **widths}
    for name, least in _GIVES.items():
        given = min(lacking, widths[name] - least)
        widths[name], lacking = widths[name] - given, lacking - given
    for name, most in widths.items():
        number = name in ("bytes", "SQNR")
        table.add_column(name, overflow="fold", width=most, justify="right" if number else "left", no_wrap=number)
    for line in lines:
        row = line.rows[0]
        kernel = escape(main_kernel(row.kernel) or "folded into others")
        if row.reason:
            kernel += f" [yellow]\\[{numbers[row.reason]}][/]"
        sqnr = [] if not measured else ["" if line.sqnr_db is None else f"{line.sqnr_db:.1f}"]
        size = _size(line.nbytes) if line.nbytes else ""
        table.add_row(escape(_wrapped(line.name, widths["node"])), escape(row.asked or "float"), kernel, size, *sqnr)
    return table


def _wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width`, broken behind its dots where it has one there."""
    lines = []
    while len(name) > width:
        at = name.rfind(".", 0, width) + 1 or width
        lines.append(name[:at])
        name = name[at:]
    return "\n".join([*lines, name])


def _show_cache(cache: CacheSummary, console: Console) -> None:
    """The cache of keys and values: layers of one format together."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("cache", "keys and values", "bytes a token", "of f16"):
        table.add_column(name, overflow="fold", justify="left" if name in ("cache", "keys and values") else "right")
    for name, rows in named(cache.rows):
        window = f", a window of {rows[0].window} tokens" if rows[0].window else ""
        beside = ", of cross-attention" if rows[0].cross else ""
        size, ratio = f"{rows[0].bytes_per_token:g}", f"{rows[0].ratio:.3f}"
        table.add_row(escape(name + window + beside), escape(rows[0].asked), size, ratio)
    console.print(table)
    context = 1 << 13
    console.print(
        f"cache: {cache.bytes_per_token:,.0f} bytes a token, {cache.ratio:.3f} of f16; {context:,} tokens "
        f"of a sequence take {_size(cache.nbytes(context))}"
    )


def wide(console: Console, table: Table, least: int) -> None:
    """Print a table of numbers in at least so many columns: a long line is better than a number that is cut."""
    Console(file=console.file, width=max(console.width, least), force_terminal=console.is_terminal).print(table)


def main_kernel(kernels: str) -> str:
    """`Abs+ReduceMax+MatMulInteger+Mul` -> `MatMulInteger +3`: the kernel that does the work, how many others."""
    parts = [part.strip() for part in kernels.split("+")]
    if len(parts) == 1:
        return kernels
    main = next((part for name in _MAIN for part in parts if name in part), parts[0])
    return f"{main} +{len(parts) - 1}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
