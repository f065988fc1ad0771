"""The benchmark of training steps: its rows say what was timed and weighed, and it runs small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from examples.benchmarks import qat_step
from examples.benchmarks.peers.race import Result
from examples.benchmarks.peers.training import stays


def result(name: str, seconds: float, peak: int) -> Result:
    facts = {"loss": 1.0, "first_step_s": 2.0, "peak_bytes": peak}
    seconds_by_part = {"step": seconds, "processor": 4 * seconds}
    return Result(name, seconds_by_part, {"step": seconds / 2}, facts=facts)


def test_rows_are_relative_to_the_float_model_of_their_mode() -> None:
    results = [
        result("float32, compiled", 2.0, 100),
        result("qfx a, compiled", 3.0, 110),
        result("qfx a, eager", 3.0, 110),
        Result("torchao, compiled", failed="it is not here"),
    ]
    rows = qat_step.rows(results)
    assert [row.get("ratio") for row in rows] == [1.0, 1.5, None, None]
    assert [row.get("processor_ratio") for row in rows] == [1.0, 1.5, None, None] and rows[0]["processor_ms"] == 8000
    assert [row.get("memory_ratio") for row in rows] == [1.0, 1.1, None, None]
    assert rows[1]["step_ms"] == 3000 and rows[1]["best_ms"] == 1500 and rows[3]["failed"] == "it is not here"


def test_entries_are_the_rows_of_each_mode() -> None:
    found = qat_step.entries(["eager", "compiled"], ["torchao"], {"torchao": "/p"})
    assert [(e.name, e.module, e.option, e.python) for e in found] == [
        ("float32, eager", "qfx_training", "eager", ""),
        ("torchao int8-int4, eager", "torchao_training", "eager", "/p"),
        ("float32, compiled", "qfx_training", "compiled", ""),
        ("torchao int8-int4, compiled", "torchao_training", "compiled", "/p"),
    ]
    assert {e.option for e in qat_step.entries(["eager"], ["w2a16"], {})} == {"eager", "eager w2a16 learned"}


def test_what_stays_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False))
    model[1].weight = model[0].weight
    assert stays(model) == 4 * 64 + 4 * 16 + 8
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert stays(model, optimizer) == stays(model) + 2 * 4 * 64 + 4, "two moments and the number of steps"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": ["fast"]}, "fast is none of compiled, eager"),
        ({"model": ["gpt"]}, "gpt is none of tiny_lm"),
        ({"shape": ["2"]}, "2x512 is expected, found '2'"),
        ({"shape": ["0x8"]}, "2x512 is expected, found '0x8'"),
        ({"python": ["/bin/python"]}, "library=path is expected"),
    ],
)
def test_bad_options_are_refused(given: dict[str, list[str]], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        qat_step.main(**given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(Path(qat_step.__file__)), "--quick", "--threads", "1", "--mode", "eager"]
    command += ["--only", "w4a8", "--only", "torchao", "--json", str(numbers)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {row["peer"]: row for row in json.loads(numbers.read_text(encoding="utf-8"))["runs"]["tiny_2x16"]["rows"]}
    for name in ("float32, eager", "qfx w4a8 learned, eager", "qfx w4a8 observed, eager"):
        assert rows[name]["step_ms"] > 0 and rows[name]["peak_bytes"] > 0 and name in said
    torchao = rows["torchao int8-int4, eager"]
    assert torchao.get("failed", "").startswith("ModuleNotFoundError") or torchao["step_ms"] > 0
