"""GPTQ's layout (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits, one number of bits and one group size for the checkpoint.

qweight int32 [K*b/32, N]   codes along K, the lowest bits first
qzeros  int32 [G, N*b/32]   zero points along N; "gptq" holds z - 1, "gptq_v2" z
scales  float16 [G, N]      w = scale * (code - z)
g_idx   int32 [K]           the group of each column; with activation order they are in no order
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qfx.errors import check_flags, explain
from qfx.interop.linear import (
    Decoder,
    Dequantized,
    Layout,
    Linear,
    Loss,
    from_unsigned,
    half_scale,
    half_scale_loss,
    in_order,
    input_loss,
    misfit,
    need,
    sorted_groups,
    unsigned,
)
from qfx.interop.words import less_one, pack_words, plus_one, unpack_words, width
from qfx.interop.write import SHARD_BYTES, write

NAME = "GPTQ"
BITS = (2, 3, 4, 8)
Version = Literal["gptq", "gptq_v2"]


def export_gptq(
    model: nn.Module, folder: str | os.PathLike[str], *, version: Version = "gptq", tokenizer: Any = None,
    strict: bool = False, shard_bytes: int = SHARD_BYTES, experts: bool = True,
) -> None:  # fmt: skip
    """Write a quantized model of transformers as a GPTQ checkpoint, codes as they are, scales in float16.

    version: "gptq" is read by all, "gptq_v2" holds zero points of 0 too. The bits and the group size of most linears
    are those of the checkpoint. What the layout cannot hold (other formats, the head, smoothing factors, embeddings,
    formats of inputs) is written in float, each a QfxWarning; an UnsupportedError if strict. experts: packed ones are
    written one by one, as vLLM and GPTQModel read them; False: in float, as transformers' own loader does. tokenizer,
    shard_bytes: as for `qfx.save`. Raises ValueError for other models and where nothing can be held, OSError where the
    disk does not take it.
    """
    check_flags(strict=strict, experts=experts)
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"unknown version {version!r} of GPTQ's layout\n  expected: 'gptq' or 'gptq_v2'")
    layout = Layout(
        NAME,
        functools.partial(_refused, version=version),
        _lost,
        functools.partial(_encode, version=version),
        functools.partial(_config, version=version),
        experts=experts,
        without=lambda held: "transformers' own loader takes them together only",
    )
    write(model, folder, layout, tokenizer=tokenizer, strict=strict, shard_bytes=shard_bytes)


def _refused(linears: Sequence[Linear], version: str) -> dict[str, Loss]:
    found = {linear.fqn: loss for linear in linears if (loss := _refusal(linear, version)) is not None}
    kinds = Counter(_kind(linear) for linear in linears if linear.fqn not in found)
    if not kinds:
        return found
    (bits, group), _ = kinds.most_common(1)[0]
    for linear in linears:
        if linear.fqn not in found and _kind(linear) != (bits, group):
            reason = f"a {NAME} checkpoint has one format, here {bits} bits in groups of {group}: written in float"
            found[linear.fqn] = (reason, "quantize all linears alike, or export_compressed_tensors")
    return found


def _kind(linear: Linear) -> tuple[int, int]:
    """Bits and group size, -1 for a scale for each row."""
    return linear.format.bits, linear.format.group or -1


def _refusal(linear: Linear, version: str) -> Loss | None:
    fmt, (n, _) = linear.format, linear.packed.shape
    if not fmt.is_integer or fmt.bits not in BITS or linear.group is None:
        return f"{NAME} has no layout for w={fmt}: written in float", "use i4/g128, u4/g128, i8/ch, ..."
    if linear.head:
        return f"{NAME} checkpoints keep the head in float", "a recipe that leaves it in float"
    if n % 32 or linear.packed.shape[1] % 32:
        return f"{NAME} packs 32 rows and columns at a time: [{n}, {linear.packed.shape[1]}] is written in float", (
            "nothing, or export_compressed_tensors"
        )
    if half_scale(linear.packed.scale)[1] == float("inf"):
        return "its scales are beyond float16: written in float", "export_compressed_tensors, with float32 scales"
    zero = linear.packed.params().zero
    if version == "gptq" and zero is not None and bool((zero == 0).any()):
        return "zero points of 0 have no form in version 'gptq': written in float", "version='gptq_v2'"
    return None


def _lost(linear: Linear) -> list[Loss]:
    return half_scale_loss(linear) + input_loss(linear)


def _encode(linear: Linear, version: str) -> dict[str, Tensor]:
    codes, zero, scale = unsigned(linear.packed)
    bits, k, group = linear.format.bits, codes.shape[1], linear.group
    assert group is not None
    groups = torch.arange(k, dtype=torch.int32) // group
    if linear.columns is not None:  # stored sorted by group; the file has the columns in their own order
        back = torch.argsort(linear.columns)
        codes, groups = codes[:, back], groups[back.cpu()]
    zero = less_one(zero) if version == "gptq" else zero
    return {
        "qweight": pack_words(codes, bits).t().contiguous(),
        "qzeros": pack_words(zero.t().contiguous(), bits),
        "scales": half_scale(scale)[0].t().contiguous(),
        "g_idx": groups,
    }


def _config(held: Sequence[Linear], floats: Sequence[str], version: str) -> dict[str, Any]:
    bits, group = _kind(held[0])
    outside = [name for name in floats if _block(name)]
    fields: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group,
        "sym": all(linear.format.symmetric for linear in held), "desc_act": any(x.columns is not None for x in held),
        "format": version, "checkpoint_format": version, "pack_dtype": "int32", "lm_head": False,
        "meta": {"quantizer": ["qfx"]},
    }  # fmt: skip
    if outside:  # linears of the blocks that stay float, each for the library that reads it
        fields["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in outside}
        inside = dict.fromkeys(_block(linear.fqn) for linear in held)
        fields["modules_in_block_to_quantize"] = [[name] for name in inside if name]
    return fields


def _block(name: str) -> str:
    """The name within the outermost numbered block; "" outside of any."""
    found = re.match(r"(?:.*?\.)?\d+\.(.+)$", name)
    return found[1] if found else ""


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Reads checkpoints with this `quantization_config`. Raises ValueError for versions that are not known."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(explain(f"unknown version {version!r} of GPTQ's layout", expected="'gptq' or 'gptq_v2'"))
    asked = config.get("group_size", -1)
    if not isinstance(asked, int) or config.get("pack_dtype", "int32") != "int32":
        raise ValueError(
            explain("this GPTQ checkpoint is not read", expected="an integer group_size, pack_dtype 'int32'")
        )
    decode = functools.partial(_decode, version=version, asked=functools.partial(_asked, config))
    return Decoder(NAME, frozenset({"qweight", "qzeros", "scales", "g_idx"}), decode)


def _asked(config: Mapping[str, Any], fqn: str) -> int:
    """The group size of a linear: GPTQModel's `dynamic` has expressions for linears that differ from the rest."""
    found: int = config.get("group_size", -1)
    for pattern, fields in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), fqn):
            return int(fields.get("group_size", found))
    return found


def _group(k: int, count: int, asked: int, g_idx: Tensor | None) -> tuple[int | None, tuple[Loss, ...]]:
    """The columns of a group where `count` of them share k columns, and what is to be told; None where nothing tells
    them."""
    if count == 1:
        return k, ()
    if asked > 0 and -(-k // asked) == count:
        return asked, ()
    if g_idx is not None:  # every group but the last is whole, whatever their order
        return int(torch.bincount(g_idx.to(torch.int64)).max()), ()
    group = 1 << (-(-k // count) - 1).bit_length()  # no other power of two makes so many
    if -(-k // group) != count:
        return None, ()
    said = f"groups of {asked}" if asked > 0 else "no group size"
    reason = f"the config says {said}, the file has {count} for {k} columns: read as groups of {group}"
    return group, ((reason, f"check the model, or write group_size={group} into the config"),)


def _decode(
    fqn: str, kinds: tuple[str, ...], tensors: Mapping[str, Tensor], shape: tuple[int, int], *, version: str,
    asked: Callable[[str], int],
) -> Linear | Dequantized | None:  # fmt: skip
    """Bits come from the shapes, so that layers with bits of their own are read too."""
    del kinds
    if "qweight" not in tensors:
        return None
    qweight, qzeros, scales = need(tensors, fqn, "qweight", "qzeros", "scales")
    n, k = shape
    bits = next((b for b in BITS if tuple(qweight.shape) == (width(k, b), n)), None)
    if bits is None:
        raise misfit(f"{fqn}.qweight", f"int32, [{k} * bits / 32, {n}] with 2, 3, 4 or 8 bits", qweight)
    count, g_idx = scales.shape[0], tensors.get("g_idx")
    if g_idx is not None and g_idx.numel() == 0:
        g_idx = None
    if g_idx is not None and (g_idx.numel() != k or int(g_idx.min()) < 0 or int(g_idx.max()) >= count):
        raise misfit(f"{fqn}.g_idx", f"int32, [{k}], groups 0 to {count - 1}", g_idx)
    group, guessed = _group(k, count, asked(fqn), g_idx)
    if tuple(scales.shape) != (count, n) or group is None:
        raise misfit(
            f"{fqn}.scales", f"[groups, {n}], for {k} columns in groups of {asked(fqn)}, as the config says", scales
        )
    codes = unpack_words(qweight.t().contiguous(), bits, k, f"{fqn}.qweight")
    zero, lost = _zeros(qzeros, bits, n, f"{fqn}.qzeros", version)
    if tuple(zero.shape) != (count, n):
        raise misfit(f"{fqn}.qzeros", f"int32, [{count}, {n} * {bits} / 32]", qzeros)
    zero, scale = zero.t().contiguous(), scales.t().contiguous()
    lost += guessed
    if g_idx is None or g_idx.tolist() == [i // group for i in range(k)]:
        return Linear(fqn, from_unsigned(codes, zero, scale, bits, group), lost=lost)
    columns = sorted_groups(g_idx, group)
    if columns is None:
        index = g_idx.to(torch.int64)
        weight = (codes.to(torch.float32) - zero[:, index].to(torch.float32)) * scale[:, index].to(torch.float32)
        reason = f"its g_idx has groups of unequal size, not of {group} columns: dequantized"
        return Dequantized(fqn, weight, (*lost, (reason, "quantize it again with qfx")))
    assert not in_order(columns)
    packed = from_unsigned(codes[:, columns].contiguous(), zero, scale, bits, group)
    return Linear(fqn, packed, columns=columns, lost=lost)


def _zeros(qzeros: Tensor, bits: int, n: int, name: str, version: str) -> tuple[Tensor, tuple[Loss, ...]]:
    if version == "gptq_v2":
        return unpack_words(qzeros, bits, n, name), ()
    zero, unsure = plus_one(qzeros, bits, n, name)
    if not unsure:
        return zero, ()
    reason = "some of its zero points are 0, which libraries write in several ways in version 'gptq'"
    return zero, ((f"{reason}: read as GPTQModel does", "check the model, or take a checkpoint of version 'gptq_v2'"),)
