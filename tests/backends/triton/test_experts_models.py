"""Models with experts through torch.compile: the reference's logits, by kernels, with nothing told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends.triton import lower, lowering
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE
from tests.graphs import Function, capture, counts, error
from tests.zoo import ZOO

pytest.importorskip("transformers", reason="pip install qfx[hf]")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@pytest.mark.slow
@torch.no_grad()
def test_generated_tokens_are_those_of_the_reference() -> None:
    tokens = []
    for backend in ("triton", "reference"):
        model: Any = ZOO["mixtral"]()[0].to(DEVICE)
        options: dict[str, Any] = {"backend": backend, "recipe": "w8a8", "cache": False}
        model.forward = torch.compile(model.forward, backend="qfx", options=options)
        ids = torch.randint(60, (1, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        tokens.append(model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static"))
        torch._dynamo.reset()
    assert torch.equal(*tokens)


@pytest.mark.slow
@torch.no_grad()
def test_experts_that_were_quantized_before_are_read_packed() -> None:
    model, inputs = ZOO["qwen3_moe"]()
    model = qfx.quantize(model.to(DEVICE), "w4a16")
    given = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    found, kernels = {}, {}
    for backend in ("reference", "triton"):
        run = torch.compile(model, backend="qfx", options={"backend": backend, "cache": False})
        found[backend] = run(**given).logits
        kernels[backend] = {row.kernel for row in qfx.report(run) if "experts" in row.node}
        torch._dynamo.reset()
    assert kernels["triton"] == {"grouped_weight_only u4/g128 (Triton)"}
    assert error(found["reference"], found["triton"]) < 1e-5


class Experts(nn.Module):
    """Rows sorted by expert times the experts' matrices, [E, K, N] as some models have them or turned."""

    def __init__(self, *, turned: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned = turned
        self.w = nn.Parameter(torch.randn(3, 64, 24, dtype=dtype) if turned else torch.randn(3, 24, 64, dtype=dtype))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """x [T, 64] -> [T, 24]."""
        y: Tensor = torch.ops.qfx.grouped_linear(x, self.w.mT if self.turned else self.w, offs)
        return y


def lowered(formats: dict[str, str], dtype: torch.dtype = torch.float32, *, turned: bool = False) -> tuple[Any, float]:
    """A layer of experts as it is lowered, and its error against the graph before."""
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    offs = torch.tensor([2, 2, 8], dtype=torch.int32, device=DEVICE)
    gm = capture(Experts(turned=turned, dtype=dtype), x, offs)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse({"name": "experts", "rules": [{"target": "experts", **formats}]}))
    found = lower(gm)
    return found, error(gm(x, offs), found(x, offs))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("formats", "kernel"),
    [
        ({"w": "u4/g32"}, "grouped_weight_only u4/g32 (Triton)"),
        ({"x": "i8/tok", "w": "i4/g32"}, "grouped_gemm i8/tok x i4/g32 (Triton)"),
        ({"x": "f8e4m3/tok", "w": "f8e4m3/ch"}, "grouped_gemm f8e4m3/tok x f8e4m3/ch (Triton)"),
        ({"w": "none"}, "grouped_floats (Triton)"),
    ],
    ids=str,
)
def test_experts_are_lowered(formats: dict[str, str], kernel: str, turned: bool) -> None:
    found, wrong = lowered(formats, turned=turned)
    assert [k for k in found.kernels.values() if "grouped" in k] == [kernel]
    assert wrong < 1e-5 and not found.notes


def routed(own: Any, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """A router's linear, and a row for each of two experts of a token."""
    picked = x[torch.arange(2 * x.shape[0], device=x.device) // 2]
    return nn.functional.linear(x, own.router), torch.ops.qfx.grouped_linear(picked, own.w, offs)


@pytest.mark.parametrize(
    ("x_format", "w_format", "count"), [("u8/tok", "u8/ch", 1), ("i8/tok", "i4/g32", 1), ("i8/dyn", "i8/ch", 2)]
)
def test_rows_that_are_picked_are_rounded_once(x_format: str, w_format: str, count: int) -> None:
    torch.manual_seed(0)
    model = Function(routed, w=torch.randn(3, 24, 64), router=torch.randn(3, 64))
    x, offs = torch.randn(5, 64, device=DEVICE), torch.tensor([3, 3, 9], dtype=torch.int32, device=DEVICE)
    gm = capture(model, x, offs)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse({"name": "all", "rules": [{"target": "*", "x": x_format, "w": w_format}]}))
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering.Lowered, "__init__", lambda self, own, *rest: calls.append(counts(own)))
        lower(gm)
    assert calls[0]["quantize_dynamic"] == count and calls[0]["grouped_gemm"] == 1
    assert error(gm(x, offs), lower(gm)(x, offs)) < 1e-5


@pytest.mark.parametrize(
    ("formats", "why"),
    [
        ({"x": "i8/tok", "w": "u4/g16"}, "whole multiples of 32"),
        ({"x": "i8/tok", "w": "nf4/g32"}, "both f8e4m3"),
        ({"x": "f8e5m2/tok", "w": "i8/ch"}, "'f8e5m2/tok'"),
    ],
    ids=str,
)
def test_a_pair_without_a_product_of_8_bits_is_told(formats: dict[str, str], why: str) -> None:
    found, wrong = lowered(formats)
    assert f"grouped_weight_only {formats['w']} (Triton) of an input rounded to {formats['x']} (torch)" in set(
        found.kernels.values()
    )
    (note,) = found.notes
    assert note.minor and "torch rounds the input" in note.reason and why in note.reason
    assert wrong < 1e-5


@pytest.mark.parametrize(
    ("dtype", "formats", "why"),
    [
        (torch.float32, {"w": "i4/g10"}, "no multiples of 16"),
        (torch.float64, {"w": "i4/g32"}, "torch.float64"),
        (torch.float64, {"w": "none"}, "torch.float64"),
    ],
    ids=str,
)
def test_what_has_no_kernel_runs_in_the_reference_and_is_told(
    dtype: torch.dtype, formats: dict[str, str], why: str
) -> None:
    found, wrong = lowered(formats, dtype)
    assert any(kernel.startswith("qfx::grouped_linear") for kernel in found.kernels.values())
    (note,) = found.notes
    assert not note.minor and "torch's reference arithmetic" in note.reason and why in note.reason
    assert wrong == 0.0
