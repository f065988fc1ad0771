"""qfx.reporting.render: what the report looks like on a terminal of 100 columns."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from qfx.errors import Note
from qfx.report import Report
from qfx.reporting.render import _wrapped, main_kernel
from qfx.reporting.rows import Row

QUANTIZED = Row(
    "model.layers.0.self_attn.q_proj", "linear", "x=i8/tok w=i8/ch", "Abs+MatMulIntegerToFloat u8 x s8 + Mul", "", 4096,
    16384, 4352, 57344, 40.12,
)  # fmt: skip
ATTENTION = Row("model.layers.0.self_attn.scaled_dot_product_attention", "attention", "", "FusedMatMul f32 + Softmax")
FLOAT = Row("model.[odd].name", "linear", "", "torch", "excluded [by hand]: runs in torch", 4096, 16384, 16384, 57344)
NOTE = Note("model.other", "runs in torch: no [such] kernel", "write one", "model.py:3, in forward: x[0]")


def shown(report: Report, *, all_rows: bool = True, width: int = 100, fold: bool = True) -> str:
    file = io.StringIO()
    report.show(Console(file=file, width=width), all_rows=all_rows, fold=fold)
    return file.getvalue()


def test_every_line_fits_and_nothing_is_lost() -> None:
    text = shown(Report((QUANTIZED, ATTENTION, FLOAT), (NOTE,), graphs=1, title="Llama"))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    assert lines[0] == "Llama" and lines[1].split() == ["node", "asked", "runs", "as", "bytes", "SQNR"]
    first = next(line for line in lines if line.startswith("model.layers.0.self_attn.q_proj"))
    assert first.split()[:3] == ["model.layers.0.self_attn.q_proj", "x=i8/tok", "w=i8/ch"]
    assert "MatMulIntegerToFloat" in first and first.split()[-3:] == ["4.4", "KB", "40.1"]
    assert "[1] model.[odd].name: excluded [by hand]: runs in torch" in lines
    assert "torch [1]" in next(line for line in lines if line.startswith("model.[odd].name"))
    joined = " ".join(lines)
    assert "1 of 2 linear nodes quantized, 50.0% of weight bytes, 50.0% of matmul work" in joined
    assert "note model.other: runs in torch: no [such] kernel (at model.py:3, in forward: x[0])" in joined


def test_only_what_is_not_quantized() -> None:
    text = shown(Report((QUANTIZED, ATTENTION, FLOAT)), all_rows=False)
    assert "q_proj" not in text and "model.[odd].name" in text and "qfx report" in text


def test_nothing_in_float_is_a_line_and_no_empty_table() -> None:
    text = shown(Report((QUANTIZED,), title="Llama"), all_rows=False)
    assert text.splitlines()[0] == "Llama: no node is in float" and "runs as" not in text
    assert "qfx report" in shown(Report((QUANTIZED,)), all_rows=False)
    assert "runs as" in shown(Report(()))  # of all rows, none: the head stays


def test_what_no_graph_came_of_is_called_not_compiled() -> None:
    assert "; not compiled" in shown(Report((QUANTIZED,))) and "graph(s)" not in shown(Report((QUANTIZED,)))
    assert "; 2 graph(s)" in shown(Report((QUANTIZED,), graphs=2))


def test_no_column_for_what_was_not_measured() -> None:
    assert "SQNR" not in shown(Report((ATTENTION, FLOAT)))


def test_a_reason_of_many_nodes_is_one_line() -> None:
    rows = tuple(Row(f"layer.{i}", "linear", "w=nf4/g64", "MatMul", "stored as nf4", 8, 32, 4) for i in range(9))
    text = shown(Report(rows))
    assert text.count("stored as nf4") == 1 and "layer.5 and 3 more: stored as nf4" in text


def test_a_note_that_is_a_rows_reason_is_not_told_twice() -> None:
    text = shown(Report((FLOAT,), (Note(FLOAT.node, FLOAT.reason, "nothing"),)))
    assert text.count("excluded") == 1


@pytest.mark.parametrize(
    ("kernels", "main"),
    [
        ("Abs+ReduceMax+Div+Max+Div+QuantizeLinear+MatMulInteger+Mul", "MatMulInteger +7"),
        ("MatMulIntegerToFloat u8 x s8", "MatMulIntegerToFloat u8 x s8"),
        ("FusedMatMul f32 + Softmax f32", "FusedMatMul f32 +1"),
        ("Transpose+MultiHeadAttention+MatMul", "MultiHeadAttention +2"),
        ("Reshape+Transpose", "Reshape +1"),
        ("qfx::linear (reference)", "qfx::linear (reference)"),
        ("", ""),
    ],
)
def test_the_kernel_that_does_the_work(kernels: str, main: str) -> None:
    assert main_kernel(kernels) == main


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (4352, "4.4 KB"), (5.2e6, "5.2 MB"), (7.04e9, "7.0 GB")])
def test_sizes(count: int, text: str) -> None:
    assert f" {text} " in shown(Report((Row("a", "linear", bytes_before=int(count), bytes_after=int(count)),)))


@pytest.mark.parametrize("width", [80, 76])
def test_nothing_is_cut_on_a_narrow_terminal(width: int) -> None:
    text = shown(Report((QUANTIZED, ATTENTION, FLOAT)), width=width)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[1].split() == ["node", "asked", "runs", "as", "bytes", "SQNR"]
    at = next(i for i, line in enumerate(lines) if line.startswith("model.layers.0."))
    assert lines[at].split()[0] == "model.layers.0." and lines[at].split()[-3:] == ["4.4", "KB", "40.1"]
    assert lines[at + 1].split()[0] == "self_attn.q_proj", "broken behind a dot"


@pytest.mark.parametrize("width", [54, 60, 66, 75])
def test_numbers_are_whole_on_any_terminal(width: int) -> None:
    """A size without its unit would be read as another size."""
    lines = [line.rstrip() for line in shown(Report((QUANTIZED, ATTENTION, FLOAT)), width=width).splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[1].split()[-2:] == ["bytes", "SQNR"]
    assert next(line for line in lines if line.startswith("model.")).split()[-3:] == ["4.4", "KB", "40.1"]
    assert any(line.endswith("16.4 KB") for line in lines)


def _layers(sqnr: list[float]) -> tuple[Row, ...]:
    return tuple(
        replace(QUANTIZED, node=f"model.layers.{i}.mlp.{name}", sqnr_db=db)
        for i, db in enumerate(sqnr)
        for name in ("up", "down")
    )


def test_layers_alike_are_one_row() -> None:
    report = Report((*_layers([30.0, 20.0, 40.0]), ATTENTION))
    text = shown(report)
    (line,) = [line for line in text.splitlines() if "mlp.up" in line]
    assert line.split()[0] == "model.layers.0-2.mlp.up" and line.split()[-3:] == ["13.1", "KB", "20.0"]
    assert "a row of several nodes" in text and "6 of 6 linear nodes" in text
    each = shown(report, fold=False)
    assert each.count("mlp.up") == 3 and "several nodes" not in each
    assert len(json.loads(report.to_json())["rows"]) == 7


def test_what_differs_in_kernel_or_reason_keeps_a_row() -> None:
    first, second, third = (replace(QUANTIZED, node=f"a.{i}.q") for i in range(3))
    text = shown(Report((first, replace(second, reason="too odd"), replace(third, kernel="torch"))))
    assert all(f"a.{i}.q" in text for i in range(3)) and "several nodes" not in text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.b.c", ["a.b.c"]),
        ("layers.0.attention", ["layers.0.", "attention"]),
        ("layers.attention.key", ["layers.", "attention.", "key"]),
        ("scaled_dot_product", ["scaled_dot", "_product"]),
        ("", [""]),
    ],
)
def test_names_are_broken_behind_dots(name: str, lines: list[str]) -> None:
    assert _wrapped(name, 10).split("\n") == lines


def test_a_node_without_a_kernel_of_its_own() -> None:
    """Runtimes fold constants, and fuse nodes into the kernels of others."""
    assert "folded into others" in shown(Report((Row("a", "embedding", "w=i8/ch"),)))
