"""AWQ's "gemm" layout (AutoAWQ): 4 bits with zero points, one group size for the checkpoint.

qweight int32 [K, N/8]   a word holds 8 columns of N; its nibble i is column ORDER[i]
qzeros  int32 [G, N/8]   zero points in the same order
scales  float16 [G, N]   w = scale * (code - z)
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qfx.errors import check_flags, explain
from qfx.interop.linear import (
    Decoder,
    Layout,
    Linear,
    Loss,
    from_unsigned,
    half_scale,
    half_scale_loss,
    input_loss,
    misfit,
    need,
    unsigned,
)
from qfx.interop.words import pack_words, unpack_words
from qfx.interop.write import SHARD_BYTES, write

NAME = "AWQ"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def export_awq(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, strict: bool = False,
    shard_bytes: int = SHARD_BYTES, experts: bool = True,
) -> None:  # fmt: skip
    """Write a quantized model of transformers as an AWQ checkpoint ("gemm"), codes as they are, scales in float16.

    Integer weights of 4 bits are held; the group size of most linears is that of the checkpoint. The rest, the head,
    smoothing factors, embeddings and formats of inputs are written in float, each a QfxWarning; an UnsupportedError if
    strict. experts, tokenizer, shard_bytes: as for `export_gptq`. Raises ValueError for other models and where
    nothing can be held, OSError where the disk does not take it.
    """
    check_flags(strict=strict, experts=experts)
    layout = Layout(
        NAME,
        _refused,
        _lost,
        _encode,
        _config,
        experts=experts,
        without=lambda held: "transformers' own loader takes them together only",
    )
    write(model, folder, layout, tokenizer=tokenizer, strict=strict, shard_bytes=shard_bytes)


def interleaved(values: Tensor) -> Tensor:
    """[.., N] with each 8 columns in the order of a word's nibbles."""
    found: Tensor = values.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2)
    return found


def straight(values: Tensor) -> Tensor:
    """The inverse of `interleaved`."""
    back = [ORDER.index(i) for i in range(8)]
    found: Tensor = values.unflatten(-1, (-1, 8))[..., back].flatten(-2)
    return found


def _refused(linears: Sequence[Linear]) -> dict[str, Loss]:
    found = {linear.fqn: loss for linear in linears if (loss := _refusal(linear)) is not None}
    groups = Counter(linear.format.group or -1 for linear in linears if linear.fqn not in found)
    if groups:
        group = groups.most_common(1)[0][0]
        for linear in linears:
            if linear.fqn not in found and (linear.format.group or -1) != group:
                reason = f"an {NAME} checkpoint has one group size, here {group}: written in float"
                found[linear.fqn] = (reason, "quantize all linears alike, or export_compressed_tensors")
    return found


def _refusal(linear: Linear) -> Loss | None:
    fmt, (n, k) = linear.format, linear.packed.shape
    if not fmt.is_integer or fmt.bits != 4 or linear.group is None:
        return f"{NAME} has no layout for w={fmt}: written in float", "use u4/g128, i4/g128, i4/ch, ..."
    if linear.head:
        return f"{NAME} checkpoints keep the head in float", "a recipe that leaves it in float"
    if linear.transposed or linear.columns is not None:
        return f"{NAME} holds nn.Linear in its own order of columns alone: written in float", "export_gptq"
    if n % 8 or fmt.padded(k) != k:
        reason = f"{NAME} needs whole words of 8 rows and whole groups: [{n}, {k}] is written in float"
        return reason, "choose a group size that divides the columns"
    if half_scale(linear.packed.scale)[1] == float("inf"):
        return "its scales are beyond float16: written in float", "export_compressed_tensors, with float32 scales"
    return None


def _lost(linear: Linear) -> list[Loss]:
    return half_scale_loss(linear) + input_loss(linear)


def _encode(linear: Linear) -> dict[str, Tensor]:
    codes, zero, scale = unsigned(linear.packed)
    return {
        "qweight": pack_words(interleaved(codes.t()), 4),
        "qzeros": pack_words(interleaved(zero.t()), 4),
        "scales": half_scale(scale)[0].t().contiguous(),
    }


def _config(held: Sequence[Linear], floats: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": held[0].format.group or -1, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": list(floats),
    }  # fmt: skip


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Reads checkpoints with this `quantization_config`. Raises ValueError for versions that are not known."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise ValueError(
            explain(
                "this AWQ checkpoint is not read", expected="version 'gemm' of 4 bits", found=f"{version!r}, {bits}"
            )
        )
    group = config.get("group_size", config.get("q_group_size", 128))
    return Decoder(NAME, frozenset({"qweight", "qzeros", "scales"}), functools.partial(_decode, group_size=int(group)))


def _decode(
    fqn: str, kinds: tuple[str, ...], tensors: Mapping[str, Tensor], shape: tuple[int, int], *, group_size: int
) -> Linear | None:
    del kinds
    if "qweight" not in tensors:
        return None
    qweight, qzeros, scales = need(tensors, fqn, "qweight", "qzeros", "scales")
    n, k = shape
    group = group_size if group_size > 0 else k
    if n % 8 or tuple(qweight.shape) != (k, n // 8):
        raise misfit(f"{fqn}.qweight", f"int32, [{k}, {n} / 8]", qweight)
    if tuple(scales.shape) != (-(-k // group), n) or tuple(qzeros.shape) != (scales.shape[0], n // 8):
        raise misfit(f"{fqn}.scales", f"[{-(-k // group)}, {n}]", scales)
    codes = straight(unpack_words(qweight, 4, n, f"{fqn}.qweight"))
    zero = straight(unpack_words(qzeros, 4, n, f"{fqn}.qzeros"))
    packed = from_unsigned(codes.t().contiguous(), zero.t().contiguous(), scales.t().contiguous(), 4, group)
    return Linear(fqn, packed)
