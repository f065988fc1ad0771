"""Launches that begin before the kernel before them has ended: by torch's own setting, where the GPU can."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from qfx.backends.triton import launch, lowering
from qfx.backends.triton.device import A100, H200, INTERPRETER, Device
from qfx.backends.triton.kernels.weight_only import sum_splits
from tests.backends.triton.aot_cache_attention import case as cached
from tests.backends.triton.aot_float_attention import case as floats
from tests.backends.triton.aot_weight_only import case as weights
from tests.backends.triton.cases import DEVICE, Case
from tests.graphs import capture

HERE = Path(inspect.getfile(sum_splits.fn)).parent


def launched(case: Case, on: Device, *, early: bool) -> list[launch.Launch]:
    with config.patch({"triton.enable_pdl": early}), launch.recorded(on) as found:
        case.run()
    return found


CASES = [
    weights("u4/g128", 1, 4096, 4096, torch.float16),
    weights("u4/g128", 16, 4096, 4096, torch.float16),
    weights("i8/ch", 64, 4096, 4096, torch.float16),
    floats((32, 8)),
    cached("i8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_step_of_decoding_launches(case: Case) -> None:
    for one in launched(case, H200, early=True):
        assert one.arguments["EARLY"] is True and one.options["launch_pdl"] is True
    for on, early in ((H200, False), (A100, True), (INTERPRETER, True)):
        for one in launched(case, on, early=early):
            assert one.arguments["EARLY"] is False and "launch_pdl" not in one.options


def test_kernels_wait_before_anything_else() -> None:
    found = 0
    for path in sorted(HERE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(a.arg == "EARLY" for a in node.args.args):
                if node.name == "wait_for_earlier":
                    continue
                assert ast.get_docstring(node) is not None
                assert ast.unparse(node.body[1]) == "wait_for_earlier(EARLY)", node.name
                found += 1
    assert found > 20


def test_kernels_that_may_not_wait_are_not_launched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Inductor writes: one that loads nothing does not wait, and what comes behind it waits for it alone."""
    asked: list[dict[str, object]] = []

    def compiled(function: object, *, options: dict[str, object], **_: object) -> object:
        asked.append(options)
        return function

    gm = capture(torch.nn.Linear(4, 4), torch.ones(2, 4, device=DEVICE))
    with config.patch({"triton.enable_pdl": True}):
        monkeypatch.setattr(torch, "compile", compiled)
        lowering.lower(gm, mode="default")
    assert [options["triton.enable_pdl"] for options in asked] == [False]


def test_it_is_called_without_a_gpu() -> None:
    parts, out = torch.ones(3, 8, device=DEVICE), torch.empty(8, device=DEVICE)
    with config.patch({"triton.enable_pdl": True}):
        launch.launch(sum_splits, (1,), parts, None, out, 8, 8, SPLITS=3, BLOCK=8, ACT="", config={"num_warps": 1})
    assert out.eq(3).all()
