"""PackedStates: what a model gets from a quantized cache in the place of its keys or values.

A tensor by its looks ([B, G, L, D], dtype, device), without data of its own. What attention does with keys and values
is run over the codes, or remembered until it can be:

    scaled_dot_product_attention(q, keys, values, ...)                 qfx.kv.attend.attend
    matmul(q, keys.transpose(2, 3)), matmul(p, values)                 qfx.kv.attend.scores, weighted
    x[:, :, None].expand(...).reshape(...), repeat_interleave(x, n, 1)  heads repeated: noted only
    x[:, :, a:b], x.transpose(2, 3), x.contiguous(), x.to(its dtype)    noted only

For anything else the states are dequantized as a whole, and a QfxWarning says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qfx.errors import explain, warn
from qfx.kv.attend import View
from qfx.kv.attend import attend as _attend
from qfx.kv.attend import scores as _scores
from qfx.kv.attend import weighted as _weighted

_ATTRIBUTES = (
    *("__get__", "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size"),
    *("get_device", "__len__", "__hash__", "is_contiguous", "stride", "storage_offset"),
)

# Loops over tiles, whose number changes with every token: a compiler leaves them as they are.
attend = torch.compiler.disable(_attend)
scores = torch.compiler.disable(_scores)
weighted = torch.compiler.disable(_weighted)


@dataclass(frozen=True)
class _What:
    """view's keys (role 0) or values (1); heads repeated; how the shape stands: "" [B, H, L, D], "t" its last two
    transposed, "5" [B, G, 1, L, D], "x" the same expanded to `repeat`."""

    view: View
    role: int
    repeat: int = 1
    form: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        batch, heads, length, width = self.view.shape(self.role)
        if self.form in ("5", "x"):
            return batch, heads, self.repeat if self.form == "x" else 1, length, width
        heads *= self.repeat
        return (batch, heads, width, length) if self.form == "t" else (batch, heads, length, width)


class PackedStates(Tensor):
    """See the module. `dense()` gives the floats."""

    what: _What

    @staticmethod
    def __new__(cls, what: _What) -> PackedStates:
        like = what.view.rest[what.role]
        made: PackedStates = Tensor._make_wrapper_subclass(cls, what.shape, dtype=like.dtype, device=like.device)
        made.what = what
        return made

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def dense(self) -> Tensor:
        """The states as they come back, of this shape and dtype."""
        what = self.what
        x = what.view.dense(what.role)
        if what.form in ("5", "x"):
            return x[:, :, None].expand(what.shape)
        x = x.repeat_interleave(what.repeat, 1) if what.repeat > 1 else x
        return x.transpose(2, 3) if what.form == "t" else x

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(name)
        known = rule is not None and (not kwargs or name in _NAMED)
        found = rule(*args, **kwargs) if rule is not None and known else NotImplemented
        if found is NotImplemented:
            _say(name)
            found = func(*_dense(args), **_dense(kwargs))
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _say(str(func))
        return func(*_dense(args), **_dense(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedStates({list(self.shape)}, {'values' if self.what.role else 'keys'})"


def packed(view: View) -> tuple[PackedStates, PackedStates]:
    """Keys and values of a view."""
    found: tuple[PackedStates, PackedStates] = _both(view)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]  # no compiler knows how to make a tensor of this class
def _both(view: View) -> tuple[PackedStates, PackedStates]:
    return PackedStates(_What(view, 0)), PackedStates(_What(view, 1))


def _dense(value: Any) -> Any:
    if isinstance(value, PackedStates):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(_dense(one) for one in value)
    return {key: _dense(one) for key, one in value.items()} if isinstance(value, dict) else value


def _say(name: str) -> None:
    warn(
        explain(
            f"'{name}' does not read a quantized cache: its history is dequantized as a whole for every call",
            expected="scaled_dot_product_attention, or matmul with keys and with values",
            next_step="load the model with attn_implementation='sdpa' (or 'eager')",
        ),
        stacklevel=3,
    )


def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if not _are_states(key, value) or isinstance(query, PackedStates) or dropout_p:
        return NotImplemented
    k, v = key.what, value.what
    if _tracked(query, attn_mask, *k.view.rest, *v.view.rest):
        return NotImplemented
    if (k.view is not v.view and len(k.view) != len(v.view)) or (k.role, v.role, k.form, v.form) != (0, 1, "", ""):
        return NotImplemented
    if query.dim() != 4 or query.shape[0] != key.shape[0] or not _divides(query.shape[1], k, v, grouped=enable_gqa):
        return NotImplemented
    step = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(query, k.view, attn_mask, step, causal=is_causal)


def _matmul(a: Any, b: Any) -> Any:
    if isinstance(a, PackedStates) or not isinstance(b, PackedStates):
        return NotImplemented
    what = b.what
    if a.dim() != 4 or what.form != ("" if what.role else "t"):
        return NotImplemented
    if a.shape[0] != b.shape[0] or b.shape[1] not in (1, a.shape[1]):
        return NotImplemented
    if a.shape[3] != b.shape[2] or _tracked(a, what.view.rest[what.role]):
        return NotImplemented
    return weighted(a, what.view) if what.role else scores(a, what.view)


def _transpose(x: Any, a: int, b: int) -> Any:
    if x.dim() != 4 or {a % 4, b % 4} != {2, 3}:
        return NotImplemented
    return _but(x, form="" if x.what.form == "t" else "t")


def _getitem(x: Any, index: Any) -> Any:
    what = x.what
    index = index if isinstance(index, tuple) else (index,)
    if what.form or not 3 <= len(index) <= 5 or not all(_whole(i) for i in (*index[:2], *index[3:])):
        return NotImplemented
    tokens = index[2]
    if tokens is None and what.repeat == 1:
        return _but(x, form="5")
    if isinstance(tokens, slice) and tokens.step in (None, 1) and len(index) < 5:
        start, end, _ = tokens.indices(x.shape[2])
        return _but(x, view=what.view.narrow(start, max(start, end)))
    return NotImplemented


def _whole(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _expand(x: Any, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if x.what.form != "5" or len(sizes) != 5:
        return NotImplemented
    if any(size not in (-1, old) for at, (size, old) in enumerate(zip(sizes, x.shape, strict=True)) if at != 2):
        return NotImplemented
    return _but(x, form="x", repeat=max(int(sizes[2]), 1))


def _reshape(x: Any, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    batch, heads, length, width = x.what.view.shape(x.what.role)
    wanted = (batch, heads * x.what.repeat, length, width)
    if x.what.form not in ("x", "") or len(sizes) != 4:
        return NotImplemented
    if any(size not in (-1, due) for size, due in zip(sizes, wanted, strict=True)):
        return NotImplemented
    return _but(x, form="")


def _repeat_interleave(x: Any, repeats: Any, dim: int | None = None) -> Any:
    if x.what.form or dim not in (1, -3) or not isinstance(repeats, int):
        return NotImplemented
    return _but(x, repeat=x.what.repeat * repeats)


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    same = all(a in (x.dtype, x.device, str(x.device)) or isinstance(a, bool) for a in (*args, *kwargs.values()))
    return x if same else NotImplemented


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _are_states(*values: Any) -> bool:
    return all(isinstance(value, PackedStates) for value in values)


def _divides(heads: int, k: _What, v: _What, *, grouped: bool) -> bool:
    own = k.view.shape(0)[1] * k.repeat
    return k.repeat == v.repeat and (own in (1, heads) or (grouped and heads % own == 0))


def _tracked(*values: Tensor | None) -> bool:
    """Gradients go through dequantized states."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in values)


def _but(x: PackedStates, **changes: Any) -> PackedStates:
    return PackedStates(replace(x.what, **changes))


_RULES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _sdpa,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "__getitem__": _getitem,
    "expand": _expand,
    "reshape": _reshape,
    "repeat_interleave": _repeat_interleave,
    "contiguous": _same,
    "detach": _same,
    "to": _to,
}
_NAMED = ("scaled_dot_product_attention", "repeat_interleave", "to", "contiguous")  # arguments by name, as here
