"""Models with experts through torch.compile: the reference's logits, by kernels, with nothing told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from tests.backends.triton.cases import DEVICE
from tests.graphs import error
from tests.zoo import ZOO

pytest.importorskip("transformers", reason="pip install qfx[hf]")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def compiled(name: str, backend: str, recipe: str) -> tuple[Tensor, list[Any]]:
    """Logits, and the rows of the report that are experts."""
    model, inputs = ZOO[name]()
    model.to(DEVICE)
    given = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    options: dict[str, Any] = {"backend": backend, "recipe": recipe, "cache": False, "strict": backend == "triton"}
    run = torch.compile(model, backend="qfx", options=options)
    logits: Tensor = run(**given).logits
    rows = [row for row in qfx.report(run) if "experts" in row.node]
    torch._dynamo.reset()
    return logits, rows


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mixtral", "w4a16"),
        ("gpt_oss", "w4a16"),
        ("qwen3_moe", "w8a8"),
        pytest.param("qwen3_moe", "nf4", marks=pytest.mark.slow),
        pytest.param("mixtral", "w4a8", marks=pytest.mark.slow),
        pytest.param("mixtral", "fp8", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_reference(name: str, recipe: str) -> None:
    found, rows = compiled(name, "triton", recipe)
    kernel = "grouped_weight_only" if recipe in ("w4a16", "nf4") else "grouped_gemm"
    assert {row.kernel.partition(" ")[0] for row in rows} == {kernel} and len(rows) == 4
    assert error(compiled(name, "reference", recipe)[0], found) < 1e-5
