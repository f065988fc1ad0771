"""qfx.passes.normalize over the zoo: nothing that is a linear layer stays hidden, and the function stays the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qfx import graph
from qfx.capture import Captured, capture_export
from qfx.passes.normalize import NORMALIZE, left_over, normalize
from tests.graphs import Function, capture, counts, error
from tests.zoo import ZOO, Inputs

# name: (linear, layer_norm or rms_norm, rope, attention, grouped_linear), two layers each
EXPECTED: dict[str, tuple[int, int, int, int, int]] = {
    "bert": (13, 5, 0, 2, 0),
    "roberta": (14, 5, 0, 2, 0),
    "distilbert": (14, 6, 0, 2, 0),
    "electra": (13, 5, 0, 2, 0),
    "gpt2": (9, 5, 0, 2, 0),
    "opt": (13, 5, 0, 2, 0),
    "gpt_neox": (9, 5, 4, 2, 0),
    "gptj": (13, 3, 4, 2, 0),
    "bloom": (9, 6, 0, 2, 0),
    "falcon": (9, 3, 4, 2, 0),
    "llama": (15, 5, 4, 2, 0),
    "mistral": (15, 5, 4, 2, 0),
    "qwen3": (15, 9, 4, 2, 0),
    "gemma2": (15, 9, 4, 2, 0),
    "gemma3": (15, 13, 4, 2, 0),
    "phi3": (9, 5, 4, 2, 0),
    "olmo2": (15, 9, 4, 2, 0),
    "mixtral": (11, 5, 4, 2, 4),
    "qwen3_moe": (11, 9, 4, 2, 4),
    "gpt_oss": (11, 5, 4, 2, 4),
    "t5": (37, 12, 0, 6, 0),
    "bart": (33, 12, 0, 6, 0),
    "vit": (14, 5, 0, 2, 0),
    "whisper": (33, 12, 0, 6, 0),
    "clip": (27, 11, 0, 4, 0),
}
OVERLAPPING = {"whisper": ["model.encoder.conv1", "model.encoder.conv2"]}  # kernels of 3 with strides of 1 and 2
ACTIVATIONS = {
    "gptj": "gelu",
    "gpt2": "gelu",
    "bloom": "gelu",
    "t5": "gelu",
    "clip": "quick_gelu",
    "gpt_oss": "quick_gelu",
}
QUICK = {"bert", "gpt2", "llama", "bloom", "mixtral", "vit"}


def cases(*, quick: bool) -> Iterator[tuple[str, str | None]]:
    for name in ZOO:
        if (name in QUICK) is quick:
            yield name, "eager"
            if not quick:
                yield name, None
    if not quick:
        yield from ((name, None) for name in sorted(QUICK))


def check(name: str, attention: str | None) -> None:
    model, inputs = ZOO[name](attention=attention)
    captured = capture_export(model, (), inputs)
    normalize(captured.gm)
    found = counts(captured.gm)
    norms = found.get("layer_norm", 0) + found.get("rms_norm", 0)
    attentions = found.get("scaled_dot_product_attention", 0) + found.get("attention", 0)
    got = (found["linear"], norms, found.get("rope", 0), attentions, found.get("grouped_linear", 0))
    assert got == EXPECTED[name]
    assert [graph.fqn_of(node) for node in left_over(captured.gm)] == OVERLAPPING.get(name, [])
    assert found.get(ACTIVATIONS.get(name, ""), 2) >= 2
    assert same_outputs(model, captured, inputs) <= 1e-4


@torch.no_grad()
def same_outputs(model: torch.nn.Module, captured: Captured, inputs: Inputs) -> float:
    return error(model(**inputs), captured.gm(*captured.flatten((), inputs)))


@pytest.mark.parametrize(("name", "attention"), list(cases(quick=True)))
def test_architectures(name: str, attention: str | None) -> None:
    check(name, attention)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), list(cases(quick=False)))
def test_more_architectures(name: str, attention: str | None) -> None:
    check(name, attention)


def test_half_precision() -> None:
    model, inputs = ZOO["llama"](attention="eager")
    model.bfloat16()
    captured = capture_export(model, (), inputs)
    assert normalize(captured.gm)["rms_norm"] == 5
    found = counts(captured.gm)
    assert (found["rms_norm"], found["rope"], found["scaled_dot_product_attention"]) == (5, 4, 2)
    assert same_outputs(model, captured, inputs) <= 3e-2


def test_matches_are_counted_by_pass() -> None:
    gm = capture(Function(lambda own, x: (x + 0) @ own.w, w=torch.randn(4, 6)), torch.randn(3, 4))
    assert normalize(gm) == {**dict.fromkeys((p.__name__ for p in NORMALIZE), 0), "cleanup": 1, "linear": 1}
    assert set(normalize(gm).values()) == {0}


def test_left_over_names_what_is_not_a_linear_layer() -> None:
    model = Function(lambda own, x: torch.conv1d(x, own.w), w=torch.randn(4, 3, 2))
    gm = capture(model, torch.randn(2, 3, 8))
    normalize(gm)
    assert [graph.op_name(node) for node in left_over(gm)] == ["conv1d"]
