"""Layers of a `QuantizedCache` of fixed length in formats of which several tokens share a byte or a scale.

The memory never moves, and is written and read by the operators of `qfx.kv.packed_ops`, so that one compiled graph
serves every token. What a model gets for its keys and values are `Handle`s, which look like [B, G, max_length, D] and
hold nothing:

    scaled_dot_product_attention(q, keys, values, ...)                 qfx::cache_attention over the packed memory
    x[:, :, None].expand(...).reshape(...), repeat_interleave(x, n, 1)  heads repeated: noted only
    matmul(q, keys.transpose(2, 3)), matmul(p, values)                 floats of all places (qfx::cache_read)

Other operations raise UnsupportedError. A call of more than FEW new tokens gets floats, the new ones as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.errors import UnsupportedError, explain
from qfx.kv.formats import CacheFormat
from qfx.kv.packed_ops import FEW, allocate, memory_of, spec_of
from qfx.kv.static import StaticLayer

_PLAIN = ("__get__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__", "__hash__")
_SHAPES = (
    "__getitem__",
    "expand",
    "reshape",
    "contiguous",
    "transpose",
    "swapaxes",
    "detach",
    "repeat_interleave",
    "to",
)


class Handle(Tensor):
    """See the module. Each layer has a subclass for its keys and one for its values."""

    layer: Any = None
    role = 0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(cls.layer, *args, **kwargs)
        name = func.__name__
        if name in ("matmul", "__matmul__") and isinstance(args[1], Handle):
            return torch.matmul(args[0], _floats(args[1], cls))
        if name not in _PLAIN and name not in _SHAPES:
            raise UnsupportedError(
                explain(
                    f"'{name}' cannot read a quantized cache of fixed length",
                    expected="scaled_dot_product_attention, or matmul with keys and with values",
                    next_step="load the model with attn_implementation='sdpa' (or 'eager'), or leave max_length out",
                )
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return found.as_subclass(cls) if name in _SHAPES else found


def _attention(
    layer: PackedStaticLayer, query: Tensor, key: Any, value: Any, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p:
        raise UnsupportedError(explain("attention over a quantized cache has dropout", next_step="call model.eval()"))
    step = query.shape[-1] ** -0.5 if scale is None else scale
    length = layer.cumulative_length
    return torch.ops.qfx.cache_attention(query, layer.memory, length, attn_mask, step, is_causal, layer.spec)


def _floats(handle: Any, kind: type[Handle]) -> Tensor:
    """What a handle of this shape stands for."""
    layer = kind.layer
    both = torch.ops.qfx.cache_read(layer.memory, layer.cumulative_length, layer.spec)
    x: Tensor = both[kind.role]
    x = x.repeat_interleave(handle.shape[1] // x.shape[1], 1)
    return x if kind.role else x.transpose(2, 3)


class PackedStaticLayer(StaticLayer):
    """Keys and values of one layer, of at most `max_length` tokens, with sinks and residual as the format says.

    It reads as the growing cache of the same format does, token for token.
    """

    is_croppable = False

    def __init__(self, fmt: CacheFormat, where: str, max_length: int) -> None:
        super().__init__(fmt, where, max_length)
        self.kinds = self._kinds()  # not with the memory: a compiler that traces the first call makes no classes

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make the memory."""
        self.memory = allocate(self.fmt, keys, values, self.max_cache_len)
        self.spec = spec_of(self.fmt, keys, values, self.max_cache_len)
        self.blank = [x.new_zeros(()).expand(*x.shape[:2], self.max_cache_len, x.shape[3]) for x in (keys, values)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the handles' classes: those of a copy must read its own memory."""
        return {name: value for name, value in self.__dict__.items() if name != "kinds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kinds = self._kinds()

    def _kinds(self) -> list[type[Handle]]:
        return [type("Handle", (Handle,), {"layer": self, "role": role}) for role in (0, 1)]

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store and give what attention reads, see `StaticLayer.update`."""
        new, length = keys.shape[2], self.cumulative_length
        if new <= FEW:
            torch.ops.qfx.cache_append(self.memory, keys, values, length, self.spec)
            length.add_(new)
            return self.blank[0].as_subclass(self.kinds[0]), self.blank[1].as_subclass(self.kinds[1])
        places = torch.arange(new, device=keys.device) + length
        before = torch.ops.qfx.cache_read(self.memory, length, self.spec)
        k, v = (x.index_copy(2, places, one) for x, one in zip(before, (keys, values), strict=True))
        torch.ops.qfx.cache_append(self.memory, keys, values, length, self.spec)
        length.add_(new)
        return k, v

    def read(self, role: int) -> Tensor:
        """Floats of all places, of keys (0) or values (1)."""
        found: Tensor = torch.ops.qfx.cache_read(self.memory, self.cumulative_length, self.spec)[role]
        return found

    def tensors(self) -> list[Tensor]:
        """The memory."""
        return list(getattr(self, "memory", ()))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, a negative number of them; those of a group that is cut stay, as they come back.

        Raises ValueError for any other number, and for too many.
        """
        seen = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        if self.is_initialized:
            memory_of(self.memory, self.spec).remove(-tokens_to_remove, seen)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        super().reset()
        if self.is_initialized:
            self.memory[0].zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        for tensor in self.memory[1:]:
            tensor.copy_(tensor[beam_idx.to(tensor.device)])
