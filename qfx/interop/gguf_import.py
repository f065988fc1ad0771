"""`qfx.import_gguf`: a GGUF file as a model of transformers, its weights packed where a format holds them exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qfx.errors import Note, check_flags, explain, listed, reading
from qfx.format import Format
from qfx.interop.gguf_arch import Architecture, architecture_named, head_dim_of, rows_of_pairs
from qfx.interop.gguf_blocks import BLOCK_TYPES, block_type, unpack
from qfx.interop.gguf_config import config_of
from qfx.interop.gguf_exact import as_packed
from qfx.interop.gguf_file import PLAIN, GgufFile, read_gguf
from qfx.live.modules import QuantEmbedding, QuantLinear, take_place, tell_shared
from qfx.packing import Packed
from qfx.pipeline import told

_FACTORS = "rope_freqs.weight"


def import_gguf(
    path: str | os.PathLike[str], *, packed: bool = True, dtype: torch.dtype = torch.float32, strict: bool = False
) -> nn.Module:
    """The model of a Llama, Mistral, Qwen2, Qwen3 or BERT file, in eval mode. Of a model in parts
    (`m-00001-of-00003.gguf`) give one, the others lie beside it.

    packed: weights whose blocks a format of qfx holds exactly stay packed (Q8_0, Q4_0, Q5_0, MXFP4, Q6_K, Q3_K; Q4_1
    and Q5_1 where their offsets are whole steps); others become float, with a warning, under strict an
    UnsupportedError. packed=False makes all of them float. dtype: of float weights and activations. The tokenizer:
    transformers' AutoTokenizer.from_pretrained(folder, gguf_file=name).

    Raises FileNotFoundError, also for missing parts, ValueError for a file that is none, is cut short or lacks tensors
    or metadata, UnsupportedError for other architectures and types, ImportError without gguf or transformers.
    """
    check_flags(packed=packed, strict=strict)
    with reading(path):
        return _model(read_gguf(path), packed=packed, dtype=dtype, strict=strict)


def _model(file: GgufFile, *, packed: bool, dtype: torch.dtype, strict: bool) -> nn.Module:
    arch = architecture_named(str(file.fields.get("general.architecture")))
    shapes = {name: _shape(tensor) for name, tensor in file.tensors.items()}
    factors = file.tensors.get(_FACTORS)
    config = config_of(file.fields, arch, shapes, None if factors is None else torch.from_numpy(np.array(factors.data)))
    _check_sizes(file, shapes, config)
    model = _empty(arch, config, dtype)
    names = _placed(file, model, arch, config)
    notes = []
    with torch.no_grad():
        for name, fqn in names.items():
            notes += _fill(model, file, name, fqn, arch, packed=packed, dtype=dtype)
        _tie(model)
    told(notes, strict=strict)
    return model.eval()


def _check_sizes(file: GgufFile, shapes: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Raises ValueError where the metadata speaks of more than the tensors hold, before a model of it is made."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if len(layers) != config.num_hidden_layers:
        raise _misfit(file, f"{config.num_hidden_layers} layers", f"tensors of {len(layers)}")
    heads, width = config.num_attention_heads, head_dim_of(config)
    kv = getattr(config, "num_key_value_heads", None) or heads
    rows = {"token_embd": config.vocab_size, "blk.0.ffn_up": config.intermediate_size, "blk.0.attn_q": heads * width,
            "blk.0.attn_k": kv * width}  # fmt: skip
    for name, wanted in ((f"{stem}.weight", (count, config.hidden_size)) for stem, count in rows.items()):
        if shapes.get(name, wanted) != wanted:
            raise _misfit(file, f"{name!r} of shape {list(wanted)}", str(list(shapes[name])))


def _empty(arch: Architecture, config: Any, dtype: torch.dtype) -> nn.Module:
    """The float model without content."""
    import transformers
    from transformers.initialization import no_init_weights

    kind = getattr(transformers, config.architectures[0])
    options: dict[str, Any] = {"add_pooling_layer": False} if arch.name == "bert" else {}
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: nn.Module = kind(config, **options)
    return model.to(dtype)


def _placed(file: GgufFile, model: nn.Module, arch: Architecture, config: Any) -> dict[str, str]:
    """GGUF name -> name of the parameter, of every tensor. Raises ValueError where the file lacks or exceeds them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted: dict[str, str] = {}
    for stem, fqn in arch.modules(config.num_hidden_layers).items():
        wanted |= {f"{stem}.{leaf}": f"{fqn}.{leaf}" for leaf in ("weight", "bias") if f"{fqn}.{leaf}" in parameters}
        if f"{stem}.bias" in file.tensors and stem.rpartition(".")[2] in arch.biased:  # also those that few models have
            wanted[f"{stem}.bias"] = f"{fqn}.bias"
    if "output.weight" not in file.tensors:
        wanted.pop("output.weight", None)
    rest = [name for name in file.tensors if name not in wanted and name != _FACTORS]
    for name in (n for n in wanted if n not in file.tensors):
        raise _misfit(file, f"tensor {name!r}, for {wanted[name]!r}", "the file has none")
    if rest:
        found = listed(rest)
        raise _misfit(file, f"tensors of {arch.kind} only", f"also {found}")
    for name, fqn in wanted.items():
        own, shape = _own_shape(model, fqn), _shape(file.tensors[name])
        if own != shape:
            raise _misfit(file, f"{name!r} of shape {list(own)}", str(list(shape)))
    return wanted


def _own_shape(model: nn.Module, fqn: str) -> tuple[int, ...]:
    """Of a parameter; a bias that the module does not have yet is as long as its weight has rows."""
    owner, _, leaf = fqn.rpartition(".")
    parameters = model.get_submodule(owner)._parameters
    held = parameters.get(leaf)
    if held is not None:
        return tuple(held.shape)
    weight = parameters["weight"]
    assert weight is not None and leaf == "bias"
    return (weight.shape[0],)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape.tolist()))


def _fill(
    model: nn.Module, file: GgufFile, name: str, fqn: str, arch: Architecture, *, packed: bool, dtype: torch.dtype
) -> list[Note]:
    """Give one parameter its value; the notes say where a packed weight became float."""
    tensor = file.tensors[name]
    kind, shape = tensor.tensor_type.name, _shape(tensor)
    data = torch.from_numpy(np.array(tensor.data))  # a copy, so that the file may go
    heads = arch.heads(name.rpartition(".")[0], model.config)
    if heads:
        data = data[torch.argsort(rows_of_pairs(len(data), heads))]
    owner, _, leaf = fqn.rpartition(".")
    module = model.get_submodule(owner)
    if kind in PLAIN:
        _set(module, leaf, _plain(data, kind).reshape(shape).to(dtype))
        return []
    reason: str | None = None
    if packed and leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding):
        held = as_packed(data, kind, (shape[0], shape[1]))
        if isinstance(held, Packed):
            _replace(model, owner, module, held, dtype)
            return []
        reason = held
    blocks = unpack(data.reshape(-1, BLOCK_TYPES[kind].nbytes), block_type(kind))
    _set(module, leaf, blocks.values().reshape(shape).to(dtype))
    step = "none for the same results in more memory; qfx.quantize packs it, rounded once more"
    return [] if reason is None else [Note(fqn, f"{reason}: it is float", step)]


def _plain(data: Tensor, kind: str) -> Tensor:
    return data.contiguous().view(torch.bfloat16) if kind == "BF16" else data


def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
    module._parameters[leaf] = nn.Parameter(value.contiguous())


def _replace(model: nn.Module, fqn: str, old: nn.Module, packed: Packed, dtype: torch.dtype) -> None:
    parent, _, leaf = fqn.rpartition(".")
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = QuantEmbedding(packed, old.padding_idx, dtype=dtype)
    else:
        new = QuantLinear(packed, old._parameters.get("bias"), dtype=dtype)
    setattr(model.get_submodule(parent), leaf, take_place(new, old))


def _tie(model: nn.Module) -> None:
    """Let the output read the input's table where the file has one table for both."""
    config: Any = model.config
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "lm_head"):
        return
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(table, QuantEmbedding):
        packed = Packed(table.w_codes, table.w_scale, table.w_zero, _format(table), table.shape)
        _replace(model, "lm_head", model.lm_head, packed, table.dtype)  # type: ignore[arg-type]
        held = ("w_codes", "w_scale") if table.w_zero is None else ("w_codes", "w_scale", "w_zero")
        tell_shared(model.get_submodule("lm_head"), *held)
    else:
        model.lm_head.weight = table.weight  # type: ignore[union-attr]


def _format(table: QuantEmbedding) -> Format:
    return Format.parse(table.w_format)


def _misfit(file: GgufFile, expected: str, found: str) -> ValueError:
    return ValueError(
        explain(
            f"{file.path} does not hold the model that its metadata describes",
            expected=expected,
            found=found,
            next_step="copy the file again, or convert the model again",
        )
    )
