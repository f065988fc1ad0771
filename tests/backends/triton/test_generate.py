"""generate() through Triton: as many graphs as there are kinds of steps, the tokens of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
import qfx.compile
from qfx.backends.triton import lowering
from qfx.errors import QfxWarning
from tests.backends.triton.cases import DEVICE

tf = pytest.importorskip("transformers", reason="pip install qfx[hf]")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TOKENS = 4


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[lowering.Lowered]:
    """Every graph that is lowered during the test."""
    found: list[lowering.Lowered] = []
    lower = lowering.lower

    def kept(gm: Any, *, mode: str | None = None, share: bool = False) -> lowering.Lowered:
        found.append(lower(gm, mode=mode or MODE[0], share=share))
        return found[-1]

    monkeypatch.setattr(lowering, "lower", kept)
    monkeypatch.setattr("qfx.kv.cache._reads_codes", lambda _: True)  # as on a GPU
    return found


MODE: list[str | None] = [None]


def small(layers: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "vocab_size": 90}
    config = tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    return tf.LlamaForCausalLM(config).eval().to(DEVICE)


def generated(backend: str, recipe: str, kv: Any, *, layers: int = 2, prompt: int = 21, tokens: int = TOKENS) -> Tensor:
    model = small(layers)
    model.forward = torch.compile(
        model.forward, backend="qfx", options={"recipe": recipe, "backend": backend, "cache": False}
    )
    cache = None if kv is None else qfx.QuantizedCache(model.config, kv, max_length=64)
    how = {"cache_implementation": "static"} if kv is None else {"past_key_values": cache}
    ids = torch.randint(90, (1, prompt), device=DEVICE)
    found: Tensor = model.generate(ids, max_new_tokens=tokens, do_sample=False, **how)
    return found


@pytest.mark.parametrize(
    ("recipe", "kv"),
    [
        ("w4a8", {"k": ["i8", "i3"], "v": "i4"}),
        pytest.param("w8a8", None, marks=pytest.mark.slow),
        pytest.param("w4a16", "i4", marks=pytest.mark.slow),
        pytest.param("fp8", "i8", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_graph_serves_every_step(recipe: str, kv: Any, lowered: list[lowering.Lowered]) -> None:
    torch.manual_seed(1)
    found = generated("triton", recipe, kv)
    assert len(lowered) == 2, "one for the prompt, one for each token after it"
    kernels = set(lowered[1].kernels.values())
    assert kv is None or {"cache_attention (Triton)", "cache_append (Triton)"} <= kernels
    assert not [note for graph in lowered for note in graph.notes if not note.minor]
    torch._dynamo.reset()
    torch.manual_seed(1)
    assert torch.equal(found, generated("reference", recipe, kv))


def test_a_cache_that_no_kernel_takes_is_told(lowered: list[lowering.Lowered], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qfx.backends.triton.cache_layout.reason_against", lambda *_: "heads of 512 channels")
    with pytest.warns(QfxWarning, match="torch's reference arithmetic, which is slow: heads of 512 channels"):
        generated("triton", "w4a16", "i8", layers=1, prompt=3, tokens=2)
    kernels = set(lowered[1].kernels.values())
    wanted = {"qfx::cache_attention (torch)", "qfx::cache_append (torch)", "linear_weight_only u4/g64/f16 (Triton)"}
    assert wanted <= kernels, kernels


@pytest.mark.slow
def test_compiled_by_inductor(lowered: list[lowering.Lowered], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setitem(globals(), "MODE", ["default"])
    found = generated("triton", "w8a8", "i4")
    assert len(lowered) == 2
    torch._dynamo.reset()
    torch.manual_seed(1)
    assert torch.equal(found, generated("reference", "w8a8", "i4"))
