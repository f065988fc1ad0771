"""Options that are True or False take nothing else, in every public call: "no" would count as True."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qfx
from qfx.errors import check_flags
from qfx.hf.config import QfxConfig

OWN = {"Format", "Rule", "Recipe", "QATSchedule", "Sensitivity"}  # values that check their fields themselves


def flags() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(call, function, option) of every public function and method that takes a bool."""
    for name in sorted({*qfx.__all__, "QfxConfig", "QuantizedCache"} - OWN):
        found = getattr(qfx, name)
        calls = {name: found}
        if inspect.isclass(found):
            calls = {f"{name}.{key}": f for key, f in vars(found).items() if inspect.isfunction(f)}
        for call, function in calls.items():
            for option in inspect.signature(function).parameters.values() if callable(function) else ():
                if option.annotation == "bool":
                    yield call, function, option.name


CASES = list(flags())


def test_there_are_many() -> None:
    assert {("quantize", "strict"), ("plan", "progress"), ("export_onnx", "dynamic"), ("Report.show", "fold")} <= {
        (call, option) for call, _, option in CASES
    }
    assert len(CASES) >= 24


@pytest.mark.parametrize("value", ["yes", "no", 1, 0, None])
@pytest.mark.parametrize(("call", "function", "option"), CASES, ids=[f"{call} {option}" for call, _, option in CASES])
def test_other_values_are_refused(call: str, function: Callable[..., Any], option: str, value: object) -> None:
    """Before anything else is looked at."""
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    given = {p.name: None for p in needed if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    with pytest.raises(ValueError, match=rf"'{option}' takes a bool\n  expected: True or False\n  found: {value!r}"):
        function(**{**given, option: value})


def test_progress_of_quantize_is_that_of_its_plan() -> None:
    import torch

    with pytest.raises(ValueError, match="'progress' takes a bool"):
        qfx.quantize(torch.nn.Linear(4, 4), "w8a16", progress="no")


def test_a_configuration_in_a_file() -> None:
    written = QfxConfig("w4a16", strict=True).to_dict()
    assert QfxConfig.from_dict(written).strict is True
    with pytest.raises(ValueError, match="'strict' takes a bool"):
        QfxConfig.from_dict({**written, "strict": "no"})


def test_true_and_false_pass() -> None:
    check_flags(strict=True, progress=False)
    check_flags()
