"""The ordered list of all passes that bring a captured graph to one normal form."""

from __future__ import annotations

from torch import fx

from qfx import run
from qfx.passes.attention import attention
from qfx.passes.cleanup import cleanup
from qfx.passes.experts import experts
from qfx.passes.gelu import gelu
from qfx.passes.linear import linear
from qfx.passes.patch_embedding import patch_embedding
from qfx.passes.rms_norm import rms_norm
from qfx.passes.rope import rope

NORMALIZE: tuple[run.Pass, ...] = (
    cleanup,
    linear,
    patch_embedding,
    experts,
    rms_norm,
    rope,
    attention,
    gelu,
    cleanup,
)


def normalize(gm: fx.GraphModule) -> dict[str, int]:
    """Run them all in place; returns how often each one matched."""
    gm.meta["qfx_matches"] = {}
    run.run(gm, NORMALIZE)
    return dict(gm.meta["qfx_matches"])
