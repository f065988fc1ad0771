"""bitsandbytes: NF4 with and without double quantization; LLM.int8 and FP4 are read only.

    weight                               uint8 [N*K/2, 1], the even element in the high nibble
    weight.absmax                        float32 [blocks], blocks of 64 elements of the flat weight
    weight.quant_map                     float32 [16], the values of the codes
    weight.quant_state.bitsandbytes__nf4 uint8, JSON: quant_type, blocksize, dtype, shape, nested_*
    with double quantization (QLoRA, Dettmers et al. 2023, section 3): absmax uint8, weight.nested_absmax float32
    [blocks / 256], weight.nested_quant_map float32 [256];
    absmax = nested_quant_map[code] * nested_absmax + nested_offset: the formats nf4/gN/dq, see `qfx.rounding.nested`

LLM.int8: weight int8 [N, K], SCB float32 [N]; w = code * SCB / 127.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import check_flags, explain
from qfx.format import Format
from qfx.interop.linear import (
    Decoder,
    Dequantized,
    Layout,
    Linear,
    Loss,
    input_loss,
    misfit,
    need,
)
from qfx.interop.write import SHARD_BYTES, write
from qfx.numerics import NF4_VALUES
from qfx.packing import Packed
from qfx.rounding import nested

NAME = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def export_bnb(
    model: nn.Module, folder: str | os.PathLike[str], *, double_quant: bool = False, tokenizer: Any = None,
    strict: bool = False, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a quantized model of transformers as a bitsandbytes NF4 checkpoint, codes and scales as they are.

    Scales of nf4/gN/dq are stored in 8 bits, as they are too. double_quant: so are all others, which rounds them. What
    the layout cannot hold (formats other than nf4, smoothing factors, embeddings, formats of inputs) is written in
    float, each a QfxWarning; an UnsupportedError if strict. tokenizer, shard_bytes: as for `qfx.save`. Raises
    ValueError for other models and where nothing can be held, OSError where the disk is full.
    """
    check_flags(double_quant=double_quant, strict=strict)
    encode = functools.partial(_encode, double_quant=double_quant)
    config = functools.partial(_config, double_quant=double_quant)
    layout = Layout(NAME, _refused, input_loss, encode, config)
    write(model, folder, layout, tokenizer=tokenizer, strict=strict, shard_bytes=shard_bytes)


def _refused(linears: Sequence[Linear]) -> dict[str, Loss]:
    found = {}
    for linear in linears:
        fmt, k = linear.format, linear.packed.shape[1]
        if fmt.type != "nf4" or fmt.scale_type not in ("f32", "f16", "bf16", "dq") or linear.group not in BLOCKS:
            reason = f"{NAME} has no layout for w={fmt}: written in float"
            found[linear.fqn] = (reason, "quantize with nf4/g64 (groups of 32 to 4096, powers of two)")
        elif linear.derived:
            reason = f"{NAME} takes the place of nn.Linear itself, not of a class derived from it: written in float"
            found[linear.fqn] = (reason, "export_compressed_tensors or export_gptq")
        elif k % linear.group:
            reason = f"{NAME} cuts the flat weight into blocks, and {k} columns are no whole groups: written in float"
            found[linear.fqn] = (reason, f"choose a group size that divides {k}")
    return found


def _encode(linear: Linear, double_quant: bool) -> dict[str, Tensor]:
    packed = linear.packed
    codes, scale, whole = packed.codes().reshape(-1, 2), packed.scale.reshape(-1), packed.zero
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": linear.group, "dtype": "float32", "shape": list(linear.packed.shape)
    }  # fmt: skip
    found = {"weight": (codes[:, 0] << 4 | codes[:, 1]).reshape(-1, 1).contiguous()}
    found["weight.quant_map"] = torch.tensor(NF4_VALUES, dtype=torch.float32)
    if whole is None:
        scale = scale.to(torch.float32)
        scale = scale.expand(packed.shape[0]) if linear.format.granularity == "" else scale
        if double_quant:
            whole = nested.above(scale)
            scale = nested.encode(scale, whole)
    found["weight.absmax"] = scale.contiguous()
    if whole is not None:
        found |= {"weight.nested_absmax": whole[1:].clone(), "weight.nested_quant_map": nested.dynamic_map()}
        state |= {"nested_blocksize": nested.SIZE, "nested_dtype": "float32", "nested_offset": float(whole[0])}
    text = json.dumps(state).encode()
    found[f"{_STATE}nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def unnested(codes: Tensor, scale: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """Scales f32 of codes under any table and blocks of any size, as bitsandbytes computes them."""
    spread = scale.repeat_interleave(block)[: codes.numel()]
    return table.index_select(0, codes.reshape(-1).to(torch.int64)) * spread + torch.tensor(offset, dtype=torch.float32)


def _config(held: Sequence[Linear], floats: Sequence[str], double_quant: bool) -> dict[str, Any]:
    double_quant = double_quant or any(linear.format.nested for linear in held)
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
        "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(floats), "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }  # fmt: skip


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Reads checkpoints with this `quantization_config`."""
    del config  # each weight tells its own type
    states = {f"{_STATE}{kind}" for kind in ("nf4", "fp4")}
    leaves = {"weight", "SCB", "weight_format", *states, *(f"weight.{leaf}" for leaf in _LEAVES)}
    return Decoder(NAME, frozenset(leaves), _decode)


def _decode(
    fqn: str, kinds: tuple[str, ...], tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> Linear | Dequantized | None:
    del kinds
    if "SCB" in tensors:
        return _decode_int8(fqn, tensors, shape)
    found = next((leaf for leaf in tensors if leaf.startswith(_STATE)), None)
    if found is None:
        return None
    weight, absmax, table = need(tensors, fqn, "weight", "weight.absmax", "weight.quant_map")
    state = _state(tensors[found], f"{fqn}.{found}")
    n, k = shape
    if list(state["shape"]) != [n, k]:
        raise misfit(f"{fqn}.weight", f"[{n}, {k}], as the quant_state tells [{state['shape']}]", weight)
    data = weight.contiguous().view(torch.uint8).reshape(-1)
    block = int(state["blocksize"])
    if data.numel() != -(-n * k // 2) or absmax.numel() != -(-n * k // block):
        raise misfit(f"{fqn}.weight", f"{-(-n * k // 2)} bytes, and {-(-n * k // block)} blocks of {block}", weight)
    codes = torch.stack((data >> 4, data & 15), -1).reshape(-1)[: n * k].reshape(n, k)
    is_nf4 = state["quant_type"] == "nf4" and torch.equal(table.float(), torch.tensor(NF4_VALUES))
    scale, whole, lost = _scales(fqn, tensors, state, double=is_nf4 and k % block == 0)
    if is_nf4 and k % block == 0:
        fmt = Format("nf4", f"g{block}", "f32" if whole is None else "dq")
        return Linear(fqn, Packed.from_codes(codes.contiguous(), fmt, scale.reshape(n, k // block), whole), lost=lost)
    why = f"blocks of {block} across its rows of {k}" if is_nf4 else f"its type is {state['quant_type']}"
    spread = scale.repeat_interleave(block)[: n * k].reshape(n, k)
    full = table.float().index_select(0, codes.reshape(-1).to(torch.int64)).reshape(n, k) * spread
    step = "quantize the float model with w=nf4/g64" if not is_nf4 else "nothing: the values are the same"
    return Dequantized(fqn, full, ((f"{why}, for which qfx has no format: dequantized", step),))


def _scales(
    fqn: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, double: bool
) -> tuple[Tensor, Tensor | None, tuple[Loss, ...]]:
    """The flat scales in float32, or where `double` allows it their codes and what stands above (`rounding.nested`)."""
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return absmax.to(torch.float32), None, ()
    inner, table = need(tensors, fqn, "weight.nested_absmax", "weight.nested_quant_map")
    if missing := [key for key in ("nested_offset", "nested_blocksize") if key not in state]:
        raise ValueError(explain(f"the quant_state of {fqn!r} lacks {missing[0]}", found=", ".join(sorted(state))))
    offset, block = float(state["nested_offset"]), int(state["nested_blocksize"])
    if absmax.dtype != torch.uint8 or block < 1 or inner.numel() != -(-absmax.numel() // block):
        what = f"{-(-absmax.numel() // max(1, block))} scales above the {absmax.numel()} of weight.absmax in uint8"
        raise misfit(f"{fqn}.weight.nested_absmax", what, inner)
    inner, table = inner.to(torch.float32).reshape(-1), table.to(torch.float32)
    known = block == nested.SIZE and torch.equal(table, nested.dynamic_map())
    if double and known:
        return absmax, torch.cat([torch.tensor([offset]), inner]), ()
    reason = f"its scales in 8 bits are in blocks of {block} or under a table of their own: held in float32"
    lost = (reason, "nothing: the values are the same")
    return unnested(absmax, inner, table, offset, block), None, () if known else (lost,)


def _decode_int8(fqn: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Linear:
    """The weight of LLM.int8; the outlier columns of its inputs, which are found at run time, are not in the file."""
    weight, scale = need(tensors, fqn, "weight", "SCB")
    n, k = shape
    if weight.dtype != torch.int8 or tuple(weight.shape) != (n, k) or scale.numel() != n:
        raise misfit(f"{fqn}.weight", f"int8, [{n}, {k}], and SCB [{n}]", weight)
    packed = Packed.from_codes(weight.contiguous(), Format("i8", "ch"), scale.float().reshape(n, 1) / 127.0)
    return Linear(fqn, packed)


def _state(packed: Tensor, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(packed.to(torch.uint8).tolist()))
        missing = {"quant_type", "blocksize", "shape"} - set(state)
    except (ValueError, TypeError) as error:
        raise ValueError(explain(f"{name!r} is no JSON: {error}", next_step="copy the file again")) from error
    if missing:
        raise ValueError(explain(f"{name!r} lacks {', '.join(sorted(missing))}", found=", ".join(sorted(state))))
    return dict(state)
