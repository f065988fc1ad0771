"""bitsandbytes: NF4 with and without double quantization; LLM.int8 and FP4 are read only.

    weight                               uint8 [N*K/2, 1], the even element in the high nibble
    weight.absmax                        float32 [blocks], blocks of 64 elements of the flat weight
    weight.quant_map                     float32 [16], the values of the codes
    weight.quant_state.bitsandbytes__nf4 uint8, JSON: quant_type, blocksize, dtype, shape, nested_*
    with double quantization (QLoRA, Dettmers et al. 2023, section 3): absmax uint8, weight.nested_absmax float32
    [blocks / 256], weight.nested_quant_map float32 [256];
    absmax = nested_quant_map[code] * nested_absmax + nested_offset

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

from qfx.errors import explain
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
from qfx.nested import dynamic_map
from qfx.numerics import NF4_VALUES
from qfx.packing import Packed

NAME = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = 256
_STATE = "weight.quant_state.bitsandbytes__"
_LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def export_bnb(
    model: nn.Module, folder: str | os.PathLike[str], *, double_quant: bool = False, tokenizer: Any = None,
    strict: bool = False, max_shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a quantized model of transformers as a bitsandbytes NF4 checkpoint, codes and scales as they are.

    double_quant: the scales are stored in 8 bits, which rounds them. What the layout cannot hold (formats other than
    nf4, smoothing factors, embeddings, formats of inputs) is written in float, each a QfxWarning; an UnsupportedError
    if strict. Raises ValueError for other models and where nothing can be held, OSError where the disk is full.
    """
    encode = functools.partial(_encode, double_quant=double_quant)
    config = functools.partial(_config, double_quant=double_quant)
    layout = Layout(NAME, _refused, input_loss, encode, config)
    write(model, folder, layout, tokenizer=tokenizer, strict=strict, shard_bytes=max_shard_bytes)


def _refused(linears: Sequence[Linear]) -> dict[str, Loss]:
    found = {}
    for linear in linears:
        fmt, k = linear.format, linear.packed.shape[1]
        if fmt.type != "nf4" or fmt.scale_type not in ("f32", "f16", "bf16") or linear.group not in BLOCKS:
            reason = f"{NAME} has no layout for w={fmt}: written in float"
            found[linear.fqn] = (reason, "quantize with nf4/g64 (groups of 32 to 4096, powers of two)")
        elif k % linear.group:
            reason = f"{NAME} cuts the flat weight into blocks, and {k} columns are no whole groups: written in float"
            found[linear.fqn] = (reason, f"choose a group size that divides {k}")
    return found


def _encode(linear: Linear, double_quant: bool) -> dict[str, Tensor]:
    codes = linear.packed.codes().reshape(-1, 2)
    absmax = linear.packed.scale.to(torch.float32).reshape(-1)
    if linear.format.granularity == "":
        absmax = absmax.expand(linear.packed.shape[0])
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": linear.group, "dtype": "float32", "shape": list(linear.packed.shape)
    }  # fmt: skip
    found = {"weight": (codes[:, 0] << 4 | codes[:, 1]).reshape(-1, 1).contiguous()}
    found["weight.quant_map"] = torch.tensor(NF4_VALUES, dtype=torch.float32)
    if double_quant:
        offset = absmax.mean()
        code, scale, table = nested(absmax - offset)
        found |= {"weight.absmax": code, "weight.nested_absmax": scale, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": _NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        found["weight.absmax"] = absmax.contiguous()
    text = json.dumps(state).encode()
    found[f"{_STATE}nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def nested(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat float32 values in 8 bits: codes uint8, the greatest magnitude of each 256, and the table of values."""
    table = dynamic_map().to(values.device)
    blocks = nn.functional.pad(values, (0, -values.numel() % _NESTED)).reshape(-1, _NESTED)
    scale = blocks.abs().amax(1)
    steps = blocks / torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(steps.contiguous(), middles).to(torch.uint8)
    return codes.reshape(-1)[: values.numel()].contiguous(), scale, table


def unnested(codes: Tensor, scale: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """The inverse of `nested`, plus the offset: float32, as bitsandbytes computes it."""
    spread = scale.repeat_interleave(block)[: codes.numel()]
    return table.index_select(0, codes.reshape(-1).to(torch.int64)) * spread + torch.tensor(offset, dtype=torch.float32)


def _config(held: Sequence[Linear], floats: Sequence[str], double_quant: bool) -> dict[str, Any]:
    del held
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


def _decode(fqn: str, kind: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Linear | Dequantized | None:
    del kind
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
    scale = absmax.to(torch.float32)
    if "weight.nested_absmax" in tensors:
        inner, values = need(tensors, fqn, "weight.nested_absmax", "weight.nested_quant_map")
        scale = unnested(absmax, inner, values, float(state["nested_offset"]), int(state["nested_blocksize"]))
    is_nf4 = state["quant_type"] == "nf4" and torch.equal(table.float(), torch.tensor(NF4_VALUES))
    if is_nf4 and k % block == 0:
        packed = Packed.from_codes(codes.contiguous(), Format("nf4", f"g{block}"), scale.reshape(n, k // block))
        return Linear(fqn, packed)
    why = f"blocks of {block} across its rows of {k}" if is_nf4 else f"its type is {state['quant_type']}"
    spread = scale.repeat_interleave(block)[: n * k].reshape(n, k)
    full = table.float().index_select(0, codes.reshape(-1).to(torch.int64)).reshape(n, k) * spread
    step = "quantize the float model with w=nf4/g64" if not is_nf4 else "nothing: the values are the same"
    return Dequantized(fqn, full, ((f"{why}, for which qfx has no format: dequantized", step),))


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
