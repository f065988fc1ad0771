"""What a live model says of its caches: the formats of a plan, as an attribute."""

from __future__ import annotations

from torch import nn

from qfx.kv.plans import Caches
from qfx.live.modules import prepared_parts, quantized_parts

HELD = "qfx_caches"


def caches_of(model: nn.Module) -> Caches:
    """The caches that `qfx.kv.live.with_caches` gave a model; {} where there are none."""
    found: Caches = model.__dict__.get(HELD, {})
    return found


def is_quantized(model: nn.Module) -> bool:
    """Whether qfx quantized any part of a model, its cache included; one that is prepared for training is not."""
    return bool((caches_of(model) and not prepared_parts(model)) or quantized_parts(model))
