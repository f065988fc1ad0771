"""A model that generates with a packed cache of fixed length gives the same with the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import qfx
from qfx.backends.triton import cache_append, cache_attention
from tests.backends.triton.cases import DEVICE
from tests.qfx.kv.test_cache import drift, ids, logits, small

pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")
HEADS = {"k": ["i8", "i3"], "v": ["i3", "i4"], "residual": 5, "sinks": 0}
OPS = {"cache_append": cache_append, "cache_attention": cache_attention}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@pytest.mark.slow  # test_generate has it with both kinds of heads, all of it lowered
@pytest.mark.parametrize("kv", ["i4", HEADS], ids=str)
def test_a_compiled_step_gives_the_logits_of_the_reference(kv: Any) -> None:
    model, tokens = small().to(DEVICE), ids(56)[:1].to(DEVICE)
    found = []
    for backend in (None, swapped):
        cache: Any = qfx.QuantizedCache(model.config, kv, max_length=64)
        step: Any = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        logits(model, tokens[:, :52], cache)
        before = int(cache.layers[0].memory[0])
        found.append(logits(step, tokens[:, 52:], cache, (1,) * 3))
        assert int(cache.layers[0].memory[0]) > before, "tokens were stored by the steps"
    assert drift(found[1], found[0]) < 1e-5
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
