"""compressed-tensors (llm-compressor, vLLM): a scheme for each group of linears, weights and inputs.

    pack-quantized        weight_packed int32 [N, ceil(K*b/32)], weight_scale [N, G] (or [1]), weight_shape int64 [2],
                          weight_zero_point packed along N; the stored code is q + 2^(b-1)
    int-quantized         weight int8 [N, K], weight_scale, weight_zero_point int8; input_scale, input_zero_point
    float-quantized       weight float8_e4m3fn [N, K], weight_scale; input_scale
    nvfp4-pack-quantized  weight_packed uint8 [N, K/2], low nibble first, weight_scale e4m3 [N, K/16],
                          weight_global_scale [1]: the scale is weight_scale / weight_global_scale
    mxfp4-pack-quantized  weight_packed as above, weight_scale uint8 [N, K/32]: exponents + 127

Linears with an input format and 8-bit integer weights are int-quantized, other integers packed.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import check_flags, explain
from qfx.format import Format, dtype_name
from qfx.interop.linear import Decoder, Layout, Linear, Loss, in_order, misfit, need, sorted_groups
from qfx.interop.schemes import Schemes, input_format, weight_format
from qfx.interop.words import WORD, pack_words, unpack_padded_words, unpack_words, width
from qfx.interop.write import SHARD_BYTES, write
from qfx.packing import Packed, pack_bits, unpack_bits

NAME = "compressed-tensors"
VERSION = "0.17.0"  # the first with the dense bit stream that is written here
_STEP = "quantize these linears with i2..i8 or u2..u8, f8e4m3, f4e2m1/g16/e4m3 or f4e2m1/g32/e8m0"


def export_compressed_tensors(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, strict: bool = False,
    shard_bytes: int = SHARD_BYTES, experts: bool = True,
) -> None:  # fmt: skip
    """Write a quantized model of transformers as a compressed-tensors checkpoint, codes and scales as they are.

    tokenizer, shard_bytes: as for `qfx.save`. What the layout cannot hold (other formats, smoothing factors, weights of
    several formats, embeddings) is written in float, each a QfxWarning; an UnsupportedError if strict. experts: packed
    ones are written one by one, as vLLM reads them, and transformers with CompressedTensorsConfig(dequantize=True);
    False: in float. Raises ValueError for other models and where nothing can be held, OSError where the disk does not
    take it.
    """
    check_flags(strict=strict, experts=experts)
    layout = Layout(NAME, _refused, _lost, _encode, _config, experts=experts, without=_without)
    write(model, folder, layout, tokenizer=tokenizer, strict=strict, shard_bytes=shard_bytes)


def kind_of(fmt: Format, x: str) -> str | None:
    """The compression format of a weight format with this input; None where there is none."""
    if fmt.is_integer:
        if fmt.scale_type not in ("f32", "f16", "bf16") or (fmt.granularity not in ("", "ch") and not fmt.group):
            return None
        return "int-quantized" if fmt.bits == 8 and _input_args(x) else "pack-quantized"
    if fmt.type == "f8e4m3" and fmt.scale_type in ("f32", "f16", "bf16"):
        return "float-quantized"
    kinds = {"f4e2m1/g16/e4m3": "nvfp4-pack-quantized", "f4e2m1/g32/e8m0": "mxfp4-pack-quantized"}
    return kinds.get(str(fmt))


def _refused(linears: Sequence[Linear]) -> dict[str, Loss]:
    found = {}
    for linear in linears:
        fmt, k = linear.format, linear.packed.shape[1]
        if kind_of(fmt, linear.x) is None:
            found[linear.fqn] = (f"{NAME} has no layout for w={fmt}: written in float", _STEP)
        elif fmt.padded(k) != k:
            reason = f"{NAME} needs whole groups, and {k} columns are none of {fmt.granularity}: written in float"
            found[linear.fqn] = (reason, f"choose a group size that divides {k}, or one scale per channel (/ch)")
        elif linear.transposed:
            reason = f"{NAME} holds nn.Linear, not transformers' Conv1D: written in float"
            found[linear.fqn] = (reason, "export_gptq or export_bnb, which hold Conv1D")
        elif linear.columns is not None:
            reason = f"{NAME} has no order of columns of its own any more: written in float"
            found[linear.fqn] = (reason, "export_gptq, which holds g_idx")
    return found


def _lost(linear: Linear) -> list[Loss]:
    if not linear.x or _input_args(linear.x) is not None:
        return []
    return [(f"{NAME} has no scheme for the input x={linear.x}: it stays float", "use i8/tok, i8, u8 or f8e4m3/tok")]


def _without(held: Sequence[Linear]) -> str:
    """Who does not read these experts. What transformers puts together is codes and scales of one scheme, without zero
    points, scales above the scales, and blocks (5.23)."""
    formats = {_scheme_of(linear.format) for linear in held}
    if len(formats) == 1 and all(
        x.format.symmetric and not x.format.has_global_scale and not x.format.block for x in held
    ):
        return "transformers without CompressedTensorsConfig(dequantize=True) takes them together only"
    return f"transformers reads no experts of {', '.join(sorted(formats))}, or makes wrong numbers of them"


def _encode(linear: Linear) -> dict[str, Tensor]:
    packed, kind, zero = linear.packed, kind_of(linear.format, linear.x), linear.packed.params().zero
    fmt, shape = packed.format, torch.tensor(packed.shape, dtype=torch.int64)
    if kind == "pack-quantized":
        half = 1 << (fmt.bits - 1)
        codes = packed.codes() if fmt.has_zero else (packed.codes().to(torch.int16) + half).to(torch.uint8)
        found = {"weight_packed": pack_words(codes, fmt.bits), "weight_scale": _scale(packed.scale)}
        found["weight_shape"] = shape
        if zero is not None:
            zero = zero.reshape(-1, 1) if zero.dim() == 0 else zero
            found["weight_zero_point"] = (
                pack_words(zero.t().contiguous(), fmt.bits).t().contiguous() if fmt.granularity else _signed(zero)
            )
    elif kind == "int-quantized":
        codes = _signed(packed.codes()) if fmt.has_zero else packed.codes()
        found = {"weight": codes, "weight_scale": _scale(packed.scale)}
        if zero is not None:
            found["weight_zero_point"] = _scale(_signed(zero))
    elif kind == "float-quantized":
        found = {"weight": packed.codes(), "weight_scale": _scale(packed.scale)}
    else:
        found = {"weight_packed": pack_bits(packed.codes(), 4)}
        if kind == "nvfp4-pack-quantized":
            assert zero is not None
            found |= {"weight_scale": packed.scale, "weight_global_scale": zero.reciprocal().reshape(1)}
        else:
            found["weight_scale"] = packed.scale.view(torch.uint8)
    return found | _encode_input(linear)


def _encode_input(linear: Linear) -> dict[str, Tensor]:
    args = _input_args(linear.x)
    if args is None or args["dynamic"]:
        return {}
    assert linear.x_scale is not None
    found = {"input_scale": linear.x_scale.reshape(1).to(torch.float32)}
    if linear.x_zero is not None:
        found["input_zero_point"] = _signed(linear.x_zero).reshape(1)
    return found


def _scale(scale: Tensor) -> Tensor:
    return scale.reshape(1) if scale.dim() == 0 else scale


def _signed(codes: Tensor) -> Tensor:
    """uint8 codes of 8 bits as int8, 128 less."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _weight_args(fmt: Format) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": fmt.bits, "type": "int" if fmt.is_integer else "float", "symmetric": fmt.symmetric,
        "dynamic": False, "strategy": "tensor", "group_size": None, "block_structure": None, "actorder": None,
        "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    if fmt.has_global_scale:
        args |= {"strategy": "tensor_group", "group_size": fmt.group, "scale_dtype": "torch.float8_e4m3fn"}
    elif fmt.group:
        args |= {"strategy": "group", "group_size": fmt.group}
    elif fmt.block:
        args |= {"strategy": "block", "block_structure": list(fmt.block)}
    elif fmt.granularity == "ch":
        args["strategy"] = "channel"
    if fmt.scale_type == "e8m0":
        args["scale_dtype"] = "torch.uint8"
    return args


def _input_args(x: str) -> dict[str, Any] | None:
    """The scheme of an input; None for float and for what has none."""
    if not x:
        return None
    fmt = Format.parse(x)
    if fmt.scale_type != "f32" or (not fmt.is_integer and fmt.type != "f8e4m3") or fmt.bits != 8:
        return None
    if fmt.granularity not in ("", "tok") or fmt.clip != 100:
        return None
    return {
        "num_bits": fmt.bits, "type": "int" if fmt.is_integer else "float", "symmetric": fmt.symmetric,
        "dynamic": fmt.dynamic, "strategy": "token" if fmt.granularity == "tok" else "tensor", "group_size": None,
        "block_structure": None, "actorder": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip


def _config(held: Sequence[Linear], floats: Sequence[str]) -> dict[str, Any]:
    """One group for each pair of formats. A single one targets every linear but `ignore`, several name theirs."""
    groups: dict[tuple[str, str], list[Linear]] = {}
    for linear in held:
        groups.setdefault((_scheme_of(linear.format), linear.x if _input_args(linear.x) else ""), []).append(linear)
    found: dict[str, Mapping[str, Any]] = {}
    for number, ((_, x), members) in enumerate(groups.items()):
        fmt = members[0].format
        found[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else [_target(linear) for linear in members],
            "weights": _weight_args(fmt), "input_activations": _input_args(x), "output_activations": None,
            "format": kind_of(fmt, x),
        }  # fmt: skip
    kinds = {str(group["format"]) for group in found.values()}
    return {
        "quant_method": NAME, "version": VERSION, "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": found, "ignore": list(floats), "kv_cache_scheme": None, "global_compression_ratio": None,
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def _target(linear: Linear) -> str:
    """What means this linear alone: of an expert an expression, by which transformers knows the experts' group."""
    return f"re:^{re.escape(linear.fqn)}$" if linear.expert else linear.fqn


def _scheme_of(fmt: Format) -> str:
    """Formats that differ in the type of their scales alone are one scheme."""
    plain = fmt.scale_type in ("f32", "f16", "bf16")
    return str(Format(fmt.type, fmt.granularity)) if plain else str(fmt)


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Reads checkpoints with this `quantization_config`. Raises ValueError for formats that are not known."""
    return Decoder(NAME, _LEAVES, functools.partial(_decode, schemes=Schemes(config)))


_LEAVES = frozenset(
    {
        "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale",
        "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    }
)  # fmt: skip


def _decode(
    fqn: str, kinds: tuple[str, ...], tensors: Mapping[str, Tensor], shape: tuple[int, int], *, schemes: Schemes
) -> Linear | None:
    if "weight_scale" not in tensors and "weight_packed" not in tensors:
        return None
    group = schemes.of(fqn, kinds)
    if group is None or not group.get("weights"):
        raise ValueError(
            explain(f"{fqn!r} has scales in the checkpoint and no scheme in quantization_config", found="no target")
        )
    args, stored = group["weights"], group["format"]
    (scale,) = need(tensors, fqn, "weight_scale")
    fmt = weight_format(args, scale, fqn)
    wanted = fmt.scale_shape(shape)
    if scale.numel() != torch.Size(wanted).numel():
        raise misfit(f"{fqn}.weight_scale", f"{list(wanted)}, for w={fmt} of [{shape[0]}, {shape[1]}]", scale)
    zero = None
    if stored in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        codes, scale, zero = _fp4_codes(fqn, tensors, shape, scale)
    elif stored == "pack-quantized":
        codes, zero = _packed_codes(fqn, tensors, shape, fmt, schemes)
    else:
        codes, zero = _plain_codes(fqn, tensors, shape, fmt)
    columns, lost = None, _not_read(tensors, group)
    if "weight_g_idx" in tensors and fmt.group:
        columns = _columns(fqn, tensors["weight_g_idx"], shape[1], fmt.group)
        codes = codes if columns is None else codes[:, columns].contiguous()
    zero = zero if zero is None or not fmt.has_zero else zero.reshape(wanted).contiguous()
    packed = Packed.from_codes(codes, fmt, scale.reshape(wanted).contiguous(), zero)
    return Linear(fqn, packed, columns=columns, lost=lost, **_inputs(tensors, group))


def _packed_codes(
    fqn: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], fmt: Format, schemes: Schemes
) -> tuple[Tensor, Tensor | None]:
    (words,) = need(tensors, fqn, "weight_packed")
    n, k = shape
    held = tensors.get("weight_shape")
    if held is not None and held.tolist() != [n, k]:
        raise misfit(f"{fqn}.weight_shape", f"[{n}, {k}]", held)
    name, padded = f"{fqn}.weight_packed", -(-k // (WORD // fmt.bits))
    if words.dim() != 2 or words.shape[0] != n or words.dtype != torch.int32:
        raise misfit(name, f"int32, [{n}, {width(k, fmt.bits)}]", words)
    old = words.shape[1] == padded and (padded != width(k, fmt.bits) or schemes.version < (0, 17))
    codes = unpack_padded_words(words, fmt.bits, k) if old else unpack_words(words, fmt.bits, k, name)
    if not fmt.has_zero:
        return (codes.to(torch.int16) - (1 << (fmt.bits - 1))).to(torch.int8), None
    (zeros,) = need(tensors, fqn, "weight_zero_point")
    if not fmt.granularity:
        return codes, _unsigned(zeros)
    rows = zeros.t().contiguous()
    if old:
        return codes, unpack_padded_words(rows, fmt.bits, n).t()
    return codes, unpack_words(rows, fmt.bits, n, f"{fqn}.weight_zero_point").t()


def _plain_codes(
    fqn: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], fmt: Format
) -> tuple[Tensor, Tensor | None]:
    (weight,) = need(tensors, fqn, "weight")
    dtype = torch.float8_e4m3fn if fmt.is_float else torch.int8
    if weight.dtype != dtype or tuple(weight.shape) != shape:
        raise misfit(f"{fqn}.weight", f"{dtype_name(dtype)}, [{shape[0]}, {shape[1]}]", weight)
    if not fmt.has_zero:
        return weight, None
    half = 1 << (fmt.bits - 1)
    (zeros,) = need(tensors, fqn, "weight_zero_point")
    return ((v.to(torch.int16) + half).to(torch.uint8) for v in (weight, zeros))  # type: ignore[return-value]


def _fp4_codes(
    fqn: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    (data,) = need(tensors, fqn, "weight_packed")
    if data.dtype != torch.uint8 or tuple(data.shape) != (shape[0], -(-shape[1] // 2)):
        raise misfit(f"{fqn}.weight_packed", f"uint8, [{shape[0]}, {shape[1]} / 2]", data)
    codes = unpack_bits(data, 4, shape[1])
    if scale.dtype == torch.uint8:
        return codes, scale.contiguous().view(torch.float8_e8m0fnu), None
    (total,) = need(tensors, fqn, "weight_global_scale")
    return codes, scale, total.to(torch.float32).reciprocal().reshape(())


def _columns(fqn: str, g_idx: Tensor, k: int, group: int) -> Tensor | None:
    """The order of columns that an activation order asks for; None where it asks for none."""
    if g_idx.numel() != k:
        raise misfit(f"{fqn}.weight_g_idx", f"int32, [{k}]", g_idx)
    if int(g_idx.min()) < 0:  # -1: not set
        return None
    columns = sorted_groups(g_idx, group)
    if columns is None:
        raise misfit(f"{fqn}.weight_g_idx", f"groups of {group} columns", g_idx)
    return None if in_order(columns) else columns


def _inputs(tensors: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
    x = input_format(group.get("input_activations"))
    if not x or Format.parse(x).dynamic:
        return {"x": x or ""}
    if "input_scale" not in tensors:
        return {"x": ""}
    found: dict[str, Any] = {"x": x, "x_scale": tensors["input_scale"].to(torch.float32).reshape(())}
    if Format.parse(x).has_zero:
        zero = tensors.get("input_zero_point", torch.zeros(1, dtype=torch.int8))
        found["x_zero"] = _unsigned(zero).reshape(())
    return found


def _not_read(tensors: Mapping[str, Tensor], group: Mapping[str, Any]) -> tuple[Loss, ...]:
    args, lost = group.get("input_activations"), []
    x = input_format(args)
    if x is None:
        shown = {key: (args or {}).get(key) for key in ("type", "num_bits", "strategy", "dynamic")}
        lost.append((f"qfx has no format for its input {shown}: it stays float", "nothing, or quantize with qfx"))
    elif x and not Format.parse(x).dynamic and "input_scale" not in tensors:
        lost.append((f"there is no scale for its static input x={x}: it stays float", "take a complete checkpoint"))
    if group.get("output_activations"):
        lost.append(("its output is quantized in the checkpoint, here it is float", "nothing"))
    return tuple(lost)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 codes of 8 bits as uint8, 128 more."""
    return (codes.to(torch.int16) + 128).to(torch.uint8)
