"""Decoding with torch.compile(backend="qfx"): the reference's tokens, and no compilation per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qfx
from qfx.backends.onnx import session
from tests.qfx.conftest import Counts
from tests.zoo import ZOO, ids

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def llama() -> Any:
    """That of the zoo, with one of its two layers."""
    model: Any = ZOO["llama"]()[0]
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def tokens(model: Any, count: int, cache: str | None) -> torch.Tensor:
    prompt = ids(5)
    found: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None,
        cache_implementation=cache,
    )  # fmt: skip
    return found[:, prompt.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("cache", [pytest.param(None, marks=pytest.mark.slow), "static"])
def test_greedy_tokens_are_the_references_and_steps_compile_nothing(
    cache: str | None, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    sessions: list[int] = []
    options = session.options

    def counted(threads: int) -> Any:
        sessions.append(threads)
        return options(threads)

    monkeypatch.setattr(session, "options", counted)
    for name in ("reference", "auto"):
        torch._dynamo.reset()
        model = llama()
        model.forward = torch.compile(model.forward, backend="qfx", options={"backend": name, "strict": True})
        tokens(model, 4, cache), tokens(model, 6, cache)
        warm = (counts.graphs, counts.lowered, len(sessions))
        found[name] = tokens(model, 16, cache)
        assert (counts.graphs, counts.lowered, len(sessions)) == warm, "no compilation and no session per token"
        assert qfx.report(model).totals["linear_quantized"] == 7 + 1
    assert found["auto"].shape == (2, 16) and torch.equal(found["reference"], found["auto"])
    assert counts.graphs <= 8, "four at most for each: two lengths of the prompt's pass, two of a step's"


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, pytest.param("static", marks=pytest.mark.slow)])
def test_generation_starts_warm_and_steps_compile_nothing(
    cache: str | None, counts: Counts, cache_folder: Path
) -> None:
    found, graphs, lowered = [], [], 0
    for _ in range(2):
        torch._dynamo.reset()
        model = llama()
        model.forward = torch.compile(model.forward, backend="qfx")
        before, lowered = counts.graphs, counts.lowered
        tokens(model, 4, cache), tokens(model, 6, cache)
        warm = counts.graphs
        found.append(tokens(model, 16, cache))
        graphs.append((warm - before, counts.graphs - warm))
    assert graphs[0] == graphs[1] and graphs[0][1] == 0, "as many graphs as the first time, none for a token"
    assert counts.lowered == lowered, "all of them were on disk"
    assert torch.equal(*found)


@torch.no_grad()
def test_a_module_compiled_in_place_generates_through_its_graphs(counts: Counts) -> None:
    model: Any = ZOO["llama"]()[0]
    plain = tokens(model, 4, None)
    model.compile(backend="qfx")
    assert torch.equal(tokens(model, 4, None), plain) and counts.graphs > 0


def test_generate_of_what_torch_compile_returns_is_not_compiled_and_the_report_says_so(counts: Counts) -> None:
    fast: Any = torch.compile(ZOO["llama"]()[0], backend="qfx")
    tokens(fast, 2, None)
    assert counts.graphs == 0, "torch hands out the original's generate(), which calls the original"
    with pytest.raises(
        ValueError, match=r"generate\(\) of what torch.compile returned runs the original.*model.compile\("
    ):
        qfx.report(fast)
