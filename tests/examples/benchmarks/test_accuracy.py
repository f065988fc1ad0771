"""The benchmark of rounding: which rows there are, what is told of them, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from examples.benchmarks import accuracy
from examples.benchmarks.peers import qfx_rounding
from examples.benchmarks.peers.race import Result
from examples.benchmarks.peers.rounding import RoundingJob, group_bytes, linears, replaced

IDS = torch.tensor([[0, 1, 1]])


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(accuracy.main)
    return app


def result(name: str, size: int, *, noise: float = 0.0, failed: str = "") -> Result:
    logits = np.log(np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]], dtype=np.float32))
    logits[:, 0] += noise
    return Result(name, size=size, version="1", facts={"seconds": 2.0}, outputs=[logits], failed=failed)


def judged(results: list[Result]) -> list[dict[str, object]]:
    judge = accuracy.Judge(IDS, 100)
    for one in results:
        judge(one)
    return judge.rows


def found() -> list[dict[str, object]]:
    results = [
        result("float32", 400),
        result("HQQ 4/64", 60, noise=0.4),
        result("llama.cpp Q4_0", 40, noise=0.5),
        result("quanto qint4", 0, failed="ModuleNotFoundError: no quanto"),
        result("qfx gptq u4/g64", 60, noise=0.2),
        result("qfx rtn u4/g32", 50, noise=0.3),
    ]
    return judged(results)


def test_rows_have_bits_and_divergence_or_a_reason() -> None:
    by = {str(row["peer"]): row for row in found()}
    assert by["float32"]["kld"] == pytest.approx(0, abs=1e-7) and by["float32"]["bits"] == 32
    assert by["float32"]["kld_error"] == pytest.approx(0, abs=1e-7)
    assert 0 < float(str(by["HQQ 4/64"]["kld_error"])) < float(str(by["HQQ 4/64"]["kld"]))
    assert by["HQQ 4/64"]["bits"] == 4.8 and by["HQQ 4/64"]["seconds"] == 2.0
    assert 0 < float(str(by["qfx gptq u4/g64"]["kld"])) < float(str(by["HQQ 4/64"]["kld"]))
    assert by["quanto qint4"] == {"peer": "quanto qint4", "failed": "ModuleNotFoundError: no quanto"}


def test_nothing_is_told_without_the_float_model() -> None:
    rows = judged([result("HQQ 4/64", 60)])
    assert rows == [{"peer": "HQQ 4/64", "failed": "the float model has no outputs"}]


def test_a_peer_is_compared_with_rows_of_no_more_bytes() -> None:
    first, second = accuracy.verdicts(found())
    assert first.startswith("HQQ 4/64 (4.800 bits") and "qfx gptq u4/g64" in first
    assert second == "llama.cpp Q4_0: no row of qfx has as few bytes"


def test_rows_of_chosen_bits_and_names() -> None:
    names = [entry.name for entry in accuracy.entries([4], ["HQQ", "qfx gptq"])]
    assert names[:2] == ["float32", "HQQ 4/64"] and all("gptq" in name for name in names[2:]) and len(names) > 3
    every = [entry.name for entry in accuracy.entries(list(accuracy.PEERS), [])]
    assert {"qfx gptq u5/g64", "llama.cpp Q5_K_M matrix", "qfx gptq u6/g64", "llama.cpp Q6_K"} <= set(every)
    assert len(every) == len(set(every)) and not any("learned i8" in name for name in every)
    assert [name for name in every if "nf4" in name] == [
        "qfx rtn nf4/g64",
        "qfx mse-energy nf4/g64",
        "qfx gptq nf4/g64",
        "qfx planned nf4 4.31",
    ]


def test_what_the_rows_of_qfx_ask() -> None:
    uniform = qfx_rounding.recipe("u4/g64/f16 mse-energy awq", ["a", "b"], 3)
    assert [(rule.target, rule.w) for rule in uniform.rules] == [("a", "u4/g64/f16"), ("b", "u4/g64/f16")]
    assert (uniform.rounding, uniform.weighting, uniform.rewrites) == ("mse", "energy", ("awq",))
    assert uniform.num_calibration_samples == 3
    planned = qfx_rounding.recipe("4.31 planned", ["a", "b"], 3)
    assert planned.allocation is not None and planned.allocation.avg_bits == 4.31 and planned.rounding == "gptq"
    assert planned.ignore == ("*lm_head",) and planned.num_calibration_samples == 3
    assert "qfx planned 4.31" in [entry.name for entry in accuracy.entries([4], ["planned"])]
    more = qfx_rounding.recipe("4.31 planned-nf4", ["a", "b"], 3)
    assert more.allocation is not None and set(more.allocation.formats) - set(planned.allocation.formats) == {
        "nf4/g16/f16", "nf4/g32/f16", "nf4/g64/f16",
    }  # fmt: skip
    assert "qfx planned nf4 4.31" in [entry.name for entry in accuracy.entries([4], ["planned"])]


def test_one_peer_may_have_an_environment_of_its_own() -> None:
    found = {entry.name: entry.python for entry in accuracy.entries([4], [], "/lc/bin/python")}
    assert found.pop("llm-compressor 4/64") == "/lc/bin/python"
    assert set(found.values()) == {""}


def test_a_line_of_the_plot_is_a_method() -> None:
    names = [
        "qfx gptq u4/g64",
        "HQQ 4/64",
        "qfx gptq u2/g64",
        "float32",
        "qfx rtn u4/g64",
        "HQQ 2/64",
        "llama.cpp Q4_0",
    ]
    rows = [{"peer": name, "bits": float(i % 3), "kld": 1.0} for i, name in enumerate(names)]
    lines = accuracy.series([*rows, {"peer": "AutoRound 4/64", "failed": "no"}])
    assert list(lines) == ["HQQ", "llama.cpp", "qfx gptq", "qfx rtn"]
    assert [row["peer"] for row in lines["qfx gptq"]] == ["qfx gptq u4/g64", "qfx gptq u2/g64"]
    assert [row["bits"] for row in lines["HQQ"]] == [1.0, 2.0]


def test_the_plot_is_written(tmp_path: Path) -> None:
    accuracy.plot(tmp_path / "curve.png", found())
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_groups_that_are_not_full_are_counted_whole() -> None:
    assert group_bytes([(2, 100)], 4, 64) == 100 + 2 * 2 * 2
    assert group_bytes([(2, 100)], 2, 64, zero=0.25) == 50 + int(4 * 2.25)


def test_only_the_layers_are_rounded() -> None:
    up = nn.Linear(2, 3)
    model = nn.ModuleDict({"up": up, "lm_head": nn.Linear(3, 4)})
    assert list(linears(model)) == ["up"]
    replaced(model, {"up": torch.ones(3, 2)})
    assert torch.equal(up.weight, torch.ones(3, 2))
    with pytest.raises(AssertionError, match="lm_head"):
        replaced(model, {"lm_head": torch.ones(4, 3)})


def test_the_job_gives_whole_windows(tmp_path: Path) -> None:
    job = RoundingJob("tiny_lm", 4, 1, str(tmp_path))
    assert job.evaluation().shape == (8, 512)
    assert [batch["input_ids"].shape for batch in job.calibration(2)] == [(2, 512)] * 2


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    arguments = [
        "--bits",
        "8",
        "--only",
        "qfx rtn",
        "--samples",
        "2",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "n.json"),
    ]
    done = CliRunner().invoke(command(), arguments)
    assert done.exit_code == 0, done.output
    rows = {row["peer"]: row for row in json.loads((tmp_path / "n.json").read_text())["rows"]}
    assert 0 < rows["qfx rtn i8/g64"]["kld"] < 1e-3 and 8 < rows["qfx rtn i8/g64"]["bits"] < 8.5


def test_unknown_bits() -> None:
    done = CliRunner().invoke(command(), ["--bits", "9"])
    assert done.exit_code == 2
    assert "9 is none of" in done.output
