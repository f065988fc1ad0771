"""`qfx.export_gguf`: a transformers model as a GGUF file for llama.cpp.

Weights that qfx packed in a format that a block type holds are written as they are; all others are rounded anew into
the asked mix. One weight at a time is in memory beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qfx.data import check_iterable
from qfx.errors import Note, check_flags, explain, nearest
from qfx.hf.hub import load_tokenizer
from qfx.interop import gguf_tokenizer
from qfx.interop.gguf_arch import Architecture, architecture_of, rope_factors, rows_of_pairs, settings
from qfx.interop.gguf_blocks import BLOCK_TYPES
from qfx.interop.gguf_encode import encode
from qfx.interop.gguf_energy import input_energy
from qfx.interop.gguf_exact import Exact
from qfx.interop.gguf_source import Source, sources_of
from qfx.interop.gguf_types import MIXES, Facts, fallback_notes, fitting, mix_named, type_of
from qfx.kv.files import left_out
from qfx.numerics import require_finite
from qfx.pipeline import told
from qfx.storage.files import path_of, staged

ROUNDINGS = ("mse", "gptq", "learned")


@dataclass(frozen=True)
class ExportedGguf:
    """What was written: the file, its bytes, the type of each tensor by its name in the file, and the notes."""

    path: Path
    nbytes: int
    types: dict[str, str]
    notes: tuple[str, ...]


@dataclass
class _Job:
    """What is known before the first byte is written."""

    model: nn.Module
    arch: Architecture
    mix: str
    sources: dict[str, Source]
    types: dict[str, str] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    energy: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Tensor] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    type: str = "Q4_K_M",  # noqa: A002  (GGUF's own word)
    *,
    tokenizer: Any = None,
    data: Iterable[Any] | None = None,
    rounding: str = "mse",
    strict: bool = False,
    name: str | None = None,
) -> ExportedGguf:
    """Write a Llama, Mistral, Qwen2, Qwen3 or BERT model of transformers to `path`, whole or not at all.

    type: a mix that llama.cpp's users know (Q8_0, Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q3_K_M, Q2_K, MXFP4, F16, ...). What qfx
    quantized in a format that a block type holds exactly keeps its values, whatever the type. tokenizer: a fast one of
    transformers; None: that of the folder from which the model was loaded; False: none, tokens are numbers. data:
    batches; errors are then weighted by the mean square of each layer's inputs. rounding: "mse", the least error of
    each weight; with data also "gptq", of what each float linear computes behind those that are rounded, or "learned",
    of what each layer of the model gives (AutoRound's manner): both take more time, and memory for the blocks of the
    file. name: what programs show; None: the last part of the model's own name. What differs from what was asked is
    a warning, under strict an UnsupportedError.

    Raises UnsupportedError for other architectures and tokenizers and, with "gptq" and "learned", for what torch.export
    does not take, ValueError for unknown types, weights that are not finite and bad data, ImportError without the gguf
    package. The model is not changed.
    """
    check_flags(strict=strict)
    if (target := path_of(path)).is_dir():
        raise ValueError(explain("no path of a .gguf file", found=f"the folder {target}"))
    mix = mix_named(type)
    _check_rounding(rounding, data)
    gguf = need_gguf()
    job = _planned(model, mix, weighted=data is not None)
    fields = _metadata(job, tokenizer, name)
    if data is not None:
        check_iterable(data)
        data = list(data)
        if rounding != "mse":
            job.rounded = _by_data(job, rounding, data)
        linears = [s.fqn for n, s in job.sources.items() if s.is_linear and n not in job.exact]
        linears = [fqn for fqn in linears if fqn not in job.rounded]
        job.energy = input_energy(model, linears, data) if linears else {}
        job.notes += _unreached(job, linears)
    job.notes += left_out(model)
    told(job.notes, strict=strict)
    with torch.no_grad(), staged(target.parent) as stage:
        _write(gguf, stage(target.name), fields, job)
    return ExportedGguf(target, target.stat().st_size, job.types, tuple(map(str, job.notes)))


def need_gguf() -> Any:
    """The gguf package. Raises ImportError with the next step where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package; next step: pip install 'qfx[interop]'") from error
    return gguf


def _check_rounding(rounding: str, data: object) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}: {nearest(str(rounding), ROUNDINGS)}")
    if rounding != "mse" and data is None:
        raise ValueError(
            explain(f"rounding={rounding!r} needs data", next_step="pass data=batches, about 128 samples of its text")
        )


def _by_data(job: _Job, rounding: str, data: list[Any]) -> dict[str, Tensor]:
    """FQN -> the bytes of each weight that is rounded by what it reads: of float linears; by GPTQ of a table that is
    the output's, too."""
    from qfx.interop.gguf_rounding import round_blocks

    whole = rounding == "gptq" and "output.weight" not in job.sources
    table, tied = job.sources["token_embd.weight"].fqn, job.arch.top.get("output", "") if whole else ""
    kinds = {
        source.fqn: job.types[name]
        for name, source in job.sources.items()
        if job.types[name] in BLOCK_TYPES
        and source.exact() is None
        and (isinstance(source.module, nn.Linear) or (tied and source.fqn == table))
    }
    if not kinds:
        reason = f"{rounding!r} rounds float linears into blocks, of which this file in {job.mix} has none"
        job.notes.append(Note("rounding", reason, "none, or a type with blocks (Q4_K_M, Q4_0, ...)", minor=True))
        return {}
    readers = {tied: kinds[table]} if table in kinds else {}
    found, notes = round_blocks(job.model, kinds | readers, data, rounding=rounding)
    if tied in found:
        found.setdefault(table, found[tied])  # data that goes round the table (inputs_embeds)
    job.notes += [note for note in notes if note.node != table]  # which the file has but once
    reason = f"the model's graph has no weight of this name, so not {rounding!r} rounds it but 'mse'"
    job.notes += [Note(fqn, reason, "nothing, or data that uses it") for fqn in kinds if fqn not in found]
    return found


def _planned(model: nn.Module, mix: str, *, weighted: bool) -> _Job:
    """Architecture, sources and the type of each tensor."""
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        found = builtins_type(model)
        raise ValueError(explain("a model of transformers is needed", expected="a module with a config", found=found))
    arch = architecture_of(config)
    sources, notes = sources_of(model, arch)
    job = _Job(model, arch, mix, sources, notes=notes)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    gqa = config.num_attention_heads // heads
    facts = Facts(arch.name, config.num_hidden_layers, gqa, "output.weight" not in sources, weighted)
    changed: dict[str, tuple[str, str, int]] = {}
    rounded: list[tuple[str, Exact]] = []
    for name, source in sources.items():
        held = source.exact()
        if isinstance(held, Exact):
            job.types[name] = held.kind
            job.exact.add(name)
            if held.scale_error:
                rounded.append((source.fqn, held))
            continue
        wanted = type_of(name, source.shape, mix, facts)
        used = fitting(wanted, source.shape[-1])
        if used != wanted:
            changed[name] = (wanted, used, source.shape[-1])
        job.types[name] = used
        if held is not None and wanted != "F32":
            reason = f"{held}: its values are rounded anew to {used}"
            job.notes.append(Note(source.fqn, reason, "for the same values quantize with i4/g32/f16 or i8/g32/f16"))
    job.notes += [*_scales_rounded(rounded), *fallback_notes(changed), *_config_notes(config)]
    return job


def builtins_type(value: object) -> str:
    """The name of a value's class, where `type` is another word."""
    return value.__class__.__name__


def _scales_rounded(rounded: list[tuple[str, Exact]]) -> list[Note]:
    """Notes of weights whose scales change, by name; with one figure for all, so that they are told as one."""
    most = max((held.scale_error for _, held in rounded), default=0.0)
    step = "a format with /f16 (i4/g32/f16) keeps its values"
    what = f"its scales are rounded to float16 (by {most:.1e} at most)"
    return [Note(fqn, f"its codes are kept in {held.kind}, {what}", step, minor=True) for fqn, held in rounded]


def _config_notes(config: Any) -> list[Note]:
    window = getattr(config, "sliding_window", None)
    limited = getattr(config, "use_sliding_window", True) and config.model_type != "bert"
    if not window or not limited or window >= config.max_position_embeddings:
        return []
    reason = f"attention over the last {window} tokens has no place in GGUF: llama.cpp attends to all"
    return [Note("config.sliding_window", reason, f"keep texts below {window} tokens")]


def _unreached(job: _Job, linears: list[str]) -> list[Note]:
    return [
        Note(name, "the data reaches it with no token: its columns count alike", "give data that uses it")
        for name in linears
        if name not in job.energy
    ]


def _metadata(job: _Job, tokenizer: Any, name: str | None) -> dict[str, Any]:
    config: Any = job.model.config
    own = str(getattr(job.model, "name_or_path", "") or "")
    fields: dict[str, Any] = {
        "general.name": name or Path(own).name or job.arch.name,
        "general.file_type": MIXES[job.mix][1],
        "general.quantization_version": 2,
    }
    fields |= settings(job.arch, config)
    if job.arch.name == "bert":
        fields |= _pooling(own)
    if tokenizer is None and Path(own).is_dir():
        tokenizer = load_tokenizer(Path(own))
    if tokenizer is None or tokenizer is False:
        if tokenizer is None:
            reason = "the model comes with no tokenizer: in llama.cpp tokens go in and come out as numbers"
            job.notes.append(Note("tokenizer", reason, "pass tokenizer=AutoTokenizer.from_pretrained(...)"))
        return fields | gguf_tokenizer.no_vocabulary()
    said, notes = gguf_tokenizer.fields_of(tokenizer, config.vocab_size)
    job.notes += notes
    return fields | said


def _pooling(own: str) -> dict[str, int]:
    """How a sentence-transformers folder joins the states of a text; nothing where it does not say."""
    import json

    file = Path(own) / "1_Pooling" / "config.json"
    if not own or not file.is_file():
        return {}
    said = json.loads(file.read_text(encoding="utf-8"))
    for key, number in (("pooling_mode_mean_tokens", 1), ("pooling_mode_cls_token", 2)):
        if said.get(key):
            return {"bert.pooling_type": number}
    return {}


def _write(gguf: Any, file: Path, fields: dict[str, Any], job: _Job) -> None:
    writer = gguf.GGUFWriter(str(file), job.arch.name)
    for key, value in fields.items():
        _add(writer, key, value)
    factors = rope_factors(job.model.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), 4 * len(factors))
    for name, source in job.sources.items():
        kind = job.types[name]
        shape, nbytes = source.shape, _nbytes(kind, source.shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            _put(writer, factors)
        for name, source in job.sources.items():
            _put(writer, _data(name, source, job))
    finally:
        writer.close()


def _put(writer: Any, data: Tensor) -> None:
    """As `writer.write_tensor_data`, which writes by numpy: that does not tell when a full disk takes no last bytes."""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.write(data.reshape(-1).view(torch.uint8).numpy().data)
    writer.write_padding(file, data.nbytes)


def _data(name: str, source: Source, job: _Job) -> Tensor:
    """The bytes of a tensor, rows in GGUF's order."""
    if name in job.exact:
        held = source.exact()
        assert isinstance(held, Exact)
        data = held.data
    else:
        data = _encoded(name, source, job)
    heads = job.arch.heads(name.rpartition(".")[0], job.model.config)
    data = data[rows_of_pairs(len(data), heads).to(data.device)] if heads else data
    return data.cpu().contiguous()


def _encoded(name: str, source: Source, job: _Job) -> Tensor:
    if source.leaf == "weight" and source.fqn in job.rounded:
        return job.rounded[source.fqn]
    kind, value = job.types[name], source.value()
    if kind in BLOCK_TYPES:
        return encode(value, kind, job.energy.get(source.fqn), tensor=name)
    require_finite(value, name)
    if kind == "BF16":
        return value.to(torch.bfloat16).contiguous().view(torch.uint8)
    if kind == "F16":
        half = value.to(torch.float16)
        require_finite(half, f"{name} in float16")
        return half
    return value.to(torch.float32)


def _nbytes(kind: str, shape: tuple[int, ...]) -> int:
    count = torch.Size(shape).numel()
    if kind in BLOCK_TYPES:
        return count // shape[-1] * BLOCK_TYPES[kind].row_bytes(shape[-1])
    return count * (4 if kind == "F32" else 2)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
