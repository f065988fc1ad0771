"""Attention that trains with fake quantization: F.scaled_dot_product_attention, taken as `qfx.live.attending` takes it.

    q, k, v, p      rounded as qfx::quantized_attention rounds them, of all heads alike or head by head, straight
                    through inside the range of their codes; scales of static formats are learned or observed
    keys, values    in train mode what a query would read of the plan's cache, were the tokens given one by one

In eval mode keys and values are read as they come, as a quantized model reads its prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qfx.backends.qat.quantizers import InputQuantizer, Scales
from qfx.errors import Note, UnsupportedError, explain
from qfx.format import Format
from qfx.kv.as_stored import stored
from qfx.kv.plans import Cached, read
from qfx.live import attending
from qfx.live.attending import Spec
from qfx.live.modules import PREPARED
from qfx.live.subclass import class_maker, subclass
from qfx.numerics import QParams
from qfx.ops import heads as attention_heads
from qfx.ops.attention import Operand, Rounders, attend, centre, is_centred
from qfx.ops.heads import ROLES
from qfx.passes.quantize_attention import BY_HAND
from qfx.plan import Plan
from qfx.training.fake_operands import ByHeads, operand

CHILD = "fake_quant_attention"


class FakeAttention(nn.Module):
    """What the attention of one module computes with. spec: as `attending.find` gives it; cached: None without a cache.

    Quantizers are children q, k, v, p, where they have a format. on: where it is False (see `qfx.training.schedule`)
    attention is that of the float model.
    """

    on = True

    def __init__(self, spec: Spec, cached: Cached | None, plan: Plan, scales: Scales, freeze_after: int | None) -> None:
        super().__init__()
        self.spec, self.cached = spec, cached
        formats = {role: attention_heads.read(text) for role, text in spec["formats"].items()}
        keys = formats.get("k")
        self.centred = isinstance(keys, Format) and is_centred(keys)
        for role, given in formats.items():
            assert given is not None
            scale, zero = (plan.tensors.get(f"{spec['name']}/{role}_{leaf}") for leaf in ("scale", "zero"))
            params = None if scale is None else QParams(scale, zero)
            self.add_module(role, operand(role, given, params, scales, freeze_after))

    def forward(
        self, func: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """F.scaled_dot_product_attention (func) of operands [B, H, S, D], rounded."""
        cached = self.cached if self.training else None
        plain = functools.partial(func, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        if not self.on or attending.of_cache(key, value) or (cached is None and not self.spec["formats"]):
            return plain(query, key, value, enable_gqa=enable_gqa)
        if query.dim() != 4:
            what = f"attention {self.spec['name']!r} has operands of {query.dim()} dimensions"
            raise UnsupportedError(explain(what, next_step="give it operands [B, H, S, D]"))
        heads = key.shape[1]
        key, value = attending.once(self.spec, key, value)
        held = None if cached is None else stored(query, key, value, cached)
        if self.spec["rotation"] is not None:
            query, key = (torch.ops.qfx.hadamard(x, *self.spec["rotation"], False) for x in (query, key))
            held = None if held is None else held._replace(keys=self._turned(held.keys))
        centred = self._centred(key)
        if held is None and "p" not in self.spec["formats"]:
            key = key if centred is False else centre(key, centred)[0]
            rounded = [self._rounded(role, x).to(x.dtype) for role, x in zip("qkv", (query, key, value), strict=True)]
            return plain(*rounded, enable_gqa=enable_gqa or key.shape[1] < heads)
        each = Rounders(*(functools.partial(self._operand, role) for role in ROLES))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attend(
            each, query, key, value, attn_mask, None, scale, is_causal, 0.0, centred=centred, dropout=dropout_p,
            stored=held,
        )  # fmt: skip

    def qparams(self) -> dict[str, QParams]:
        """Role -> scale and zero point of each static format, as a plan holds them."""
        found = {role: self._modules.get(role) for role in ROLES}
        return {
            role: one.qparams()
            for role, one in found.items()
            if isinstance(one, InputQuantizer) or (isinstance(one, ByHeads) and one.params is not None)
        }

    def _centred(self, key: Tensor) -> bool | Tensor:
        """What `attention_ops.centre` takes for the keys."""
        own = self._modules.get("k")
        return own.centred(key) if isinstance(own, ByHeads) else self.centred

    def _turned(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.qfx.hadamard(x, *self.spec["rotation"], False)
        return found

    def _rounded(self, role: str, x: Tensor) -> Tensor:
        """f32, as it comes back from the format of the role."""
        own, x = self._modules.get(role), x.to(torch.float32)
        found: Tensor = x if own is None else own(x)
        return found

    def _operand(self, role: str, x: Tensor) -> Operand:
        return Operand(self._rounded(role, x))

    def extra_repr(self) -> str:
        return "" if self.cached is None else f"cache: {self.cached.format}"


def find(model: nn.Module, plan: Plan) -> tuple[dict[str, tuple[Spec, Cached | None]], list[Note]]:
    """Name of each module -> the formats of its attention and of its cache, and notes about what stays in float.

    Raises what `attending.find` does.
    """
    specs, notes = attending.find(model, plan)
    found: dict[str, tuple[Spec, Cached | None]] = {owner: (spec, None) for owner, spec in specs.items()}
    by_hand = {fqn.rpartition(".")[0] for fqn, layout in plan.layouts.items() if layout == BY_HAND}
    for cached in read(plan.caches):
        owner = cached.layer.fqn
        if cached.is_plain:
            continue
        if owner in by_hand:
            reason = f"a cache of {cached.format} was asked, but its attention is spelled out: trains with float keys"
            notes.append(Note(owner, reason, attending.STEP))
            continue
        spec = specs.get(owner) or {"name": owner, "formats": {}, "rotation": None}
        found[owner] = (spec, cached)
    return found, notes


def prepare_attention(module: nn.Module, fake: FakeAttention) -> None:
    """Let a module's attention compute with fake quantization."""
    setattr(module, CHILD, fake.train(module.training))
    kind: Any = type(module)
    module.__class__ = _class_of(kind)


def put_trained(plan: Plan, module: nn.Module) -> None:
    """Put the scales of a prepared module's attention into the plan."""
    fake = module._modules.get(CHILD)
    assert isinstance(fake, FakeAttention)
    for role, (scale, zero) in fake.qparams().items():
        plan.tensors[f"{fake.spec['name']}/{role}_scale"] = scale
        if zero is not None:
            plan.tensors[f"{fake.spec['name']}/{role}_zero"] = zero


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    forward = attending.catching(base, lambda self: self._modules[CHILD], _say)
    return subclass(base, {"forward": forward, PREPARED: getattr(base, PREPARED, base)}, "Fake")


def _say(module: nn.Module) -> None:
    fake = module._modules[CHILD]
    assert isinstance(fake, FakeAttention)
    asked = dict(fake.spec["formats"])
    if fake.cached is not None:
        asked["cache"] = str(fake.cached.format)
    attending.say_float(fake.spec["name"], asked)
