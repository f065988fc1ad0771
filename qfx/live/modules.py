"""Quantized modules that stand in a live model in the place of float ones.

`QuantLinear` replaces nn.Linear and Conv1D, `QuantEmbedding` nn.Embedding; both hold packed weights as buffers, so that
state_dict, deepcopy, device moves and torch.compile see ordinary tensors. For parameters that a module reads itself see
`qfx.live.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import qfx.ops.packed
import qfx.rewrites.rotation  # noqa: F401  (both register torch.ops.qfx)
from qfx.errors import explain
from qfx.format import Format
from qfx.live.parameters import keeping_types
from qfx.live.stored import differs, tell
from qfx.packing import Packed
from qfx.reporting.rows import Row


class PackedModule(nn.Module):
    """Packed buffers, the shape of the weight that they hold, and the type of the activations."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.sqnr_db: float | None = None

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, in the model's dtype."""
        raise NotImplementedError

    @property
    def stored(self) -> str:
        """How the packed tensors are to be read: formats, and what the weight was rotated by."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell(destination, prefix, self.stored)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Codes of another format are refused."""
        if wrong := differs(local_metadata, self.stored, prefix[:-1] or type(self).__name__):
            error_msgs.append(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _hold(self, stem: str, packed: Packed) -> None:
        for leaf, tensor in (("codes", packed.data), ("scale", packed.scale), ("zero", packed.zero)):
            self.register_buffer(f"{stem}_{leaf}", tensor)

    def _hold_operands(
        self, bias: Tensor | None, x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None
    ) -> None:
        """What a linear reads beside its weight and its input."""
        for leaf, tensor in (("x_scale", x_scale), ("x_zero", x_zero), ("smooth", smooth)):
            self.register_buffer(leaf, tensor)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep scales and codes in their own types when the model is cast: only the activations' dtype changes."""
        keeping_types(self, tuple(self._buffers), lambda: super(PackedModule, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device))
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        return self

    def _row_of(self, fqn: str, op: str, asked: str, after: int) -> Row:
        elements = torch.Size(self.shape).numel()
        before = elements * self.dtype.itemsize
        return Row(fqn, op, asked, f"qfx::{op} (reference)", "", elements, before, after, sqnr_db=self.sqnr_db)


def rotated(x: Tensor, rotation: tuple[int, int] | None, *, inverse: bool = False) -> Tensor:
    """x with its last axis rotated by (block, seed); x itself for None."""
    if rotation is None:
        return x
    y: Tensor = torch.ops.qfx.hadamard(x, *rotation, inverse)
    return y


def stored_as(formats: str, rotation: tuple[int, int] | None) -> str:
    """`PackedModule.stored` of a weight."""
    return formats if rotation is None else f"{formats}, rotated in blocks of {rotation[0]} by seed {rotation[1]}"


def linear_formats(x_format: str, w_format: str) -> str:
    """The formats of a linear for reports; x_format "" is an input in float."""
    return f"x={x_format} w={w_format}" if x_format else f"w={w_format}"


def linear_repr(linear: Any, formats: str) -> str:
    """What a packed linear's `extra_repr` tells."""
    around = " around a gain" if "gain" in linear._buffers else ""
    more = f", rotation={linear.rotation}{around}" if linear.rotation else ""
    return f"{linear.in_features}, {linear.out_features}, {formats}, bias={linear.bias is not None}{more}"


def turned(x: Tensor, rotation: tuple[int, int] | None, gain: Tensor | None) -> Tensor:
    """What a packed weight is multiplied with, for an input x [.., K] of its linear: x rotated.

    With a gain [K] x comes in the rotated basis: it is rotated back, multiplied by the gain, and rotated again.
    """
    if gain is not None:
        x = rotated(x, rotation, inverse=True) * gain.to(x.dtype)
    return rotated(x, rotation)


def as_read(weight: Tensor, rotation: tuple[int, int] | None, gain: Tensor | None) -> Tensor:
    """A packed weight [N, K] in the basis of its linear's own input."""
    return rotated(weight, rotation, inverse=True) if gain is None else turned(weight, rotation, gain)


def as_packed(weight: Tensor, rotation: tuple[int, int] | None, gain: Tensor | None) -> Tensor:
    """The inverse of `as_read`. Raises ValueError where a gain is 0, which nothing undoes."""
    if gain is None:
        return rotated(weight, rotation)
    if not bool((gain != 0).all()):
        what = (
            "a change of this weight would have to be divided by the gain of the norm before it, which is 0 in places"
        )
        raise ValueError(
            explain(what, next_step="leave the layer out, or untie it (rewrite 'untie') and quantize again")
        )
    return turned(weight, rotation, 1 / gain)


class _Quantized(PackedModule):
    """A packed weight (w_codes, w_scale, w_zero) and its format."""

    w_codes: Tensor
    w_scale: Tensor
    w_zero: Tensor | None

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__(tuple(packed.shape), dtype)
        self._hold("w", packed)
        self.w_format = str(packed.format)
        self.rotation: tuple[int, int] | None = None

    @property
    def stored(self) -> str:
        return stored_as(self.w_format, self.rotation)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, [N, K] in the model's dtype: for code that reads `.weight` itself."""
        return self._dequantized()

    def _dequantized(self) -> Tensor:
        weight: Tensor = torch.ops.qfx.dequantize(
            self.w_codes, self.w_scale, self.w_zero, self.w_format, self.shape[-1], self.dtype
        )
        return weight

    def _row(self, fqn: str, op: str, asked: str) -> Row:
        return self._row_of(fqn, op, asked, Format.parse(self.w_format).nbytes(self.shape))


class QuantLinear(_Quantized):
    """y = x W^T + b with a packed W [out_features, in_features].

    x_format "" leaves activations in float. Static formats carry x_scale (and x_zero); `smooth` [in_features] divides x
    first. Before that, `rotation` (block, seed) rotates it, as the packed weight is (see `qfx.rewrites.rotation`); with
    a gain [in_features] the input comes rotated, and the gain acts in the basis before (see `qfx.passes.rotate`).
    low: float factors [r, in_features] and [out_features, r] of a part of W that is not packed.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        *,
        x_format: str = "",
        x_scale: Tensor | None = None,
        x_zero: Tensor | None = None,
        smooth: Tensor | None = None,
        low: tuple[Tensor, Tensor] | None = None,
        rotation: tuple[int, int] | None = None,
        gain: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(packed, dtype)
        self.x_format = x_format
        if gain is not None:
            self.register_buffer("gain", gain)
        if low is not None:
            self.register_buffer("low_a", low[0])
            self.register_buffer("low_b", low[1])
        self.rotation = rotation
        self.out_features, self.in_features = packed.shape
        self.nf = self.out_features  # Conv1D's name for it
        self._hold_operands(bias, x_scale, x_zero, smooth)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x.dtype."""
        x = turned(x, self.rotation, self._buffers.get("gain"))
        y: Tensor = torch.ops.qfx.linear(
            x, self.w_codes, self.w_scale, self.w_zero, self.bias, self.x_scale, self.x_zero, self.smooth,
            self.x_format, self.w_format,
        )  # fmt: skip
        return y if self.low is None else y + self._beside(x, *self.low)

    @property
    def low(self) -> tuple[Tensor, Tensor] | None:
        """The factors of the part of W that is not packed, where there is one."""
        a, b = self._buffers.get("low_a"), self._buffers.get("low_b")
        return None if a is None or b is None else (a, b)

    def _beside(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        smooth = self._buffers["smooth"]
        x = x if smooth is None else x / smooth
        return nn.functional.linear(nn.functional.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def _dequantized(self) -> Tensor:
        found = super()._dequantized()
        if self.low is not None:
            found = found + self.low[1].to(found.dtype) @ self.low[0].to(found.dtype)
        return as_read(found, self.rotation, self._buffers.get("gain"))

    def extra_repr(self) -> str:
        return linear_repr(self, linear_formats(self.x_format, self.w_format))

    def qfx_row(self, fqn: str) -> Row:
        """This module's row of the report."""
        row = self._row(fqn, "linear", linear_formats(self.x_format, self.w_format))
        held = (self._buffers.get(name) for name in ("low_a", "low_b", "gain"))
        extra = sum(tensor.nbytes for tensor in held if tensor is not None)
        return replace(row, bytes_after=row.bytes_after + extra)


class QuantEmbedding(_Quantized):
    """Rows of a packed table [num_embeddings, embedding_dim]."""

    def __init__(self, packed: Packed, padding_idx: int | None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape, int32 or int64 -> [..., embedding_dim] in the model's dtype."""
        y: Tensor = torch.ops.qfx.embedding(
            ids, self.w_codes, self.w_scale, self.w_zero, self.w_format, self.embedding_dim, self.dtype
        )
        return y

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, w={self.w_format}"

    def qfx_row(self, fqn: str) -> Row:
        """This module's row of the report."""
        return self._row(fqn, "embedding", f"w={self.w_format}")


class QuantConv(QuantLinear):
    """A convolution computed as a linear over its windows.

    The windows do not overlap (stride == kernel, no padding, any number of dimensions), or there is one dimension.
    The packed weight is [out_channels, in_channels * taps].
    """

    def __init__(self, packed: Packed, conv: nn.Module, **formats: Any) -> None:
        bias = conv._parameters["bias"]
        super().__init__(packed, bias, **formats)
        self.kernel_size: tuple[int, ...] = tuple(conv.kernel_size)  # type: ignore[arg-type]
        self.stride: tuple[int, ...] = tuple(conv.stride)  # type: ignore[arg-type]
        self.padding: tuple[int, ...] = tuple(conv.padding)  # type: ignore[arg-type]
        channels: Any = conv.in_channels
        self.in_channels: int = channels
        self.out_channels = self.out_features
        # What other convolutions are not, for forwards that ask (MobileNet pads by kernel, stride and dilation).
        self.dilation, self.groups = (1,) * len(self.kernel_size), 1
        self.padding_mode, self.transposed = "zeros", False

    @property
    def weight(self) -> Tensor:
        """The kernel dequantized, [out_channels, in_channels, *kernel]."""
        return self._dequantized().reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, out_channels, *windows]."""
        return over_windows(self, x, super().forward)


def over_windows(conv: Any, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """What `linear` [.., in_channels * taps] -> [.., N] gives for each window that a convolution (see `QuantConv`) has
    in x [B, C, *size]: [B, N, *windows]."""
    apart = conv.stride == conv.kernel_size and not any(conv.padding)
    y = linear(_patches(x, conv.kernel_size) if apart else _windows(x, conv))
    return y.permute(0, y.dim() - 1, *range(1, y.dim() - 1))


def _windows(x: Tensor, conv: Any) -> Tensor:
    taps, stride = conv.kernel_size[0], conv.stride[0]
    x = nn.functional.pad(x, (conv.padding[0], conv.padding[0]))
    last = x.shape[2] - taps + 1
    stacked = torch.stack([x[:, :, i : last + i : stride] for i in range(taps)], -1)
    return stacked.permute(0, 2, 1, 3).flatten(2)


def _patches(x: Tensor, kernel_size: Sequence[int]) -> Tensor:
    n = len(kernel_size)
    split: list[int] = []
    for i, taps in enumerate(kernel_size):
        count = x.shape[2 + i] // taps
        x = x.narrow(2 + i, 0, count * taps)
        split += [count, taps]
    x = x.reshape(*x.shape[:2], *split)
    return x.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)).flatten(n + 1)


# What nn.Module keeps of hooks; the handles that register_forward_hook gave go on removing them.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def take_place(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give a quantized module the hooks and the mode of the module whose place it takes."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new.train(old.training)


def tell_shared(module: nn.Module, *names: str) -> None:
    """Say that packed buffers of a module are another module's, too: save_pretrained of transformers wants to know."""
    known = getattr(module, "_tied_weights_keys", None) or {}
    module._tied_weights_keys = {**known, **dict.fromkeys(names, "")}  # type: ignore[assignment]


def without_fast_paths(model: nn.Module) -> None:
    """Let nn.TransformerEncoderLayer call its sub-modules: its fused kernel would read their weights past them.

    nn.TransformerEncoder then makes no nested tensors of padded texts, which its layers without the kernel do not take:
    it gives padded positions what it gives them in train mode, not zeros.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and (quantized_parts(module) or prepared_parts(module)):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and (quantized_parts(module) or prepared_parts(module)):
            module.use_nested_tensor = False


def quantized_parts(model: nn.Module) -> list[str]:
    """Names of the modules and parameters that hold packed weights, and of attention with formats."""
    named = list(model.named_modules())
    modules = [fqn or type(m).__name__ for fqn, m in named if isinstance(m, PackedModule)]
    modules += [f"{fqn}.{name}".lstrip(".") for fqn, m in named for name in getattr(m, "qfx_packed", {})]
    return modules + [m.__dict__["qfx_attention"]["name"] for _, m in named if "qfx_attention" in m.__dict__]


PREPARED = "qfx_prepared_class"  # on the classes of modules that `qfx.prepare_qat` changed: what they were before


def prepared_parts(model: nn.Module) -> list[str]:
    """Names of the modules that train with fake quantization."""
    return [fqn or type(m).__name__ for fqn, m in model.named_modules() if hasattr(type(m), PREPARED)]
