"""GroupQueryAttention: caches of any length, masks of any kind, RoPE before the heads, and the form without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx import run
from qfx.passes.cleanup import cleanup
from qfx.passes.kv_cache import kv_cache
from qfx.passes.masks import masks
from tests.backends.onnx.checks import sqnr
from tests.backends.onnx.files import File
from tests.graphs import Function, capture


def attend(own: Any, ids: Tensor, keep: Tensor, x: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor) -> Any:
    """Projections [B, S, 32] of 4 query and 2 key heads over a cache; `own.kind` says how the mask is made."""
    batch, new = ids.shape
    q = (x @ own.q).view(batch, new, 4, 8).transpose(1, 2)
    k, v = ((x @ w).view(batch, new, 2, 8).transpose(1, 2) for w in (own.k, own.v))
    keys, values = torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)
    old = past_k.shape[2]
    places, columns = torch.arange(new)[:, None] + old, torch.arange(new + old)
    seen: Any = (columns <= places)[None, None] & keep[:, None, None, :]
    if own.kind == "window":
        seen = seen & (columns > places - 3)
    if own.kind == "padding only":
        seen = keep[:, None, None, :].expand(batch, 1, new, old + new)
    if own.kind == "alibi":
        seen = torch.where(seen, bias[:, :, None, None] * columns, -torch.inf)
    y = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True, scale=0.25)
    return y.transpose(1, 2).reshape(batch, new, 32) * 2, keys, values


KINDS = ["causal", "window", "padding only", "alibi"]


def inputs(old: int, new: int, batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(old * 10 + new)
    keep = torch.ones(batch, old + new, dtype=torch.bool)
    keep[-1, :1] = old == 0
    past = [torch.randn(batch, 2, old, 8, generator=g) for _ in range(2)]
    x = torch.randn(batch, new, 16, generator=g)
    return [torch.zeros(batch, new, dtype=torch.int64), keep, x, *past, torch.tensor([[0.5, 0.25, 0.1, 0.05]])]


def built(kind: str, runtime: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    function = Function(attend, q=torch.randn(16, 32), k=torch.randn(16, 16), v=torch.randn(16, 16))
    function.kind = kind  # type: ignore[assignment]
    gm = capture(function, *inputs(5, 3), dynamic=True)
    run.run(gm, [cleanup, masks, cleanup])
    kv_cache(gm, pasts=["inputs_3", "inputs_4"], total="inputs_1", new="inputs_0")
    run.run(gm, [cleanup])
    file = File(gm, runtime=runtime)
    return function, file.session, file.stage.model


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_mask_and_any_length(kind: str, runtime: str) -> None:
    function, session, model = built(kind, runtime)
    kinds = [node.op_type for node in model.graph.node]
    assert ("GroupQueryAttention" in kinds) == (runtime == "onnxruntime")
    for old, new, batch in ((0, 4, 2), (5, 1, 2), (9, 1, 3), (4, 3, 1)):
        given = inputs(old, new, batch)
        with torch.no_grad():
            expected = function(*given)
        feeds = {f"inputs_{i}": t.numpy() for i, t in enumerate(given)}
        names = {i.name for i in session.get_inputs()}
        found = session.run(None, {k: v for k, v in feeds.items() if k in names})
        for e, f in zip(expected, found, strict=True):
            assert sqnr(e, torch.from_numpy(np.array(f))) > 100, (kind, old, new)


def test_heads_are_views_that_cost_nothing() -> None:
    _, _, model = built("causal", "onnxruntime")
    assert "Transpose" not in [node.op_type for node in model.graph.node]
