"""A model that generates with a packed cache of fixed length writes the same text with the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

import qfx
from qfx.backends.triton import cache_append, cache_attention
from tests.backends.triton.cases import DEVICE
from tests.qfx.kv.test_cache import ids, small

pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")
OPS = {"cache_append": cache_append, "cache_attention": cache_attention}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def swapped(gm: fx.GraphModule, inputs: Any) -> Any:
    """A backend of torch.compile that puts the kernels' ops in the place of the reference's."""
    found = 0
    for node in gm.graph.nodes:
        name = str(node.target).partition(".")[2].partition(".")[0]
        if node.op == "call_function" and str(node.target).startswith("qfx.") and name in OPS:
            node.target = getattr(torch.ops.qfx_triton, name)
            found += 1
    assert found, "there is a cache in the graph"
    gm.recompile()
    return gm.forward


@pytest.mark.parametrize("kv", ["i4", {"k": ["i8", "i3"], "v": ["i3", "i4"], "residual": 5, "sinks": 0}], ids=str)
def test_the_same_text(kv: Any) -> None:
    model = small().to(DEVICE)
    prompt = ids(50)[:1].to(DEVICE)
    texts = []
    for backend in (None, swapped):
        cache: Any = qfx.QuantizedCache(model.config, kv, max_length=80)
        step: Any = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        with torch.no_grad():
            token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            text = [token]
            for _ in range(12):
                token = step(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                text.append(token)
        texts.append(torch.cat(text, 1))
    assert torch.equal(*texts)
    assert texts[0].unique().numel() > 2
