"""Write a quantized model in a layout: safetensors in shards, config.json, tokenizer; whole or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import Note, explain, listed
from qfx.format import Format, dtype_name
from qfx.interop.checkpoint import CONFIG, INDEX, SINGLE
from qfx.interop.experts import PARTS
from qfx.interop.linear import Layout, Linear, Loss, float_weight, is_transposed, of_module
from qfx.interop.write_experts import Naming, routers, taken_apart
from qfx.kv.files import left_out
from qfx.live.mixed import QuantMixed
from qfx.live.modules import PackedModule, QuantConv, QuantEmbedding, QuantLinear, quantized_parts
from qfx.pipeline import told
from qfx.storage.files import staged_folder, write_safetensors, write_text
from qfx.storage.skeleton import GENERATION

SHARD_BYTES = 5_000_000_000
_SHOWN = 3


def write(
    model: nn.Module, folder: str | os.PathLike[str], layout: Layout, *, tokenizer: Any, strict: bool, shard_bytes: int
) -> None:
    """Write `model` in `layout`. What it cannot hold is written in float, told as a QfxWarning (an error if strict).

    Raises ValueError for a model that qfx did not quantize, that is no model of transformers, or of which the layout
    holds nothing; OSError where the disk does not take it.
    """
    if shard_bytes < 1:
        raise ValueError(f"a file of weights has 1 byte or more, found shard_bytes={shard_bytes}")
    model = getattr(model, "_orig_mod", model)
    _check(model)
    plain = _float_twin(model)
    naming = Naming.of(plain) if layout.experts else None
    experts = taken_apart(model, naming) if naming else {}
    linears = [*_linears(model, plain), *(part for parts in experts.values() for part in parts)]
    refused = _refused(layout, linears)
    held = {linear.fqn: linear for linear in linears if linear.fqn not in refused}
    if not held:
        raise _nothing(layout, refused, linears)
    apart = {fqn for fqn, parts in experts.items() if any(part.fqn in held for part in parts)}
    source = _Source(model, plain, layout, held, naming if apart else None, apart)
    source.check()
    notes = _notes(layout, list(held.values()), refused)
    notes += _other_notes(model, {linear.fqn for linear in linears}, layout, set(experts))
    notes += source.without_place()
    told([*notes, *left_out(model), *(_told_apart(fqn, layout, experts[fqn]) for fqn in sorted(apart))], strict=strict)
    floats = [name for name, module in plain.named_modules() if _is_linear(module) and name not in held]
    floats = [source.named(name) for name in [*floats, *routers(plain, sorted(apart))]]
    floats += [
        fqn for owner in sorted(apart) for leaf in PARTS for *_, fqn in source.parts(owner, leaf) if fqn not in held
    ]
    fields = _config_fields(model, plain, source.untied)
    fields["quantization_config"] = layout.config(list(held.values()), floats)
    with staged_folder(folder, last=CONFIG) as stage:
        _write_shards(stage, source.tensors(), shard_bytes)
        _refuse_leftovers(Path(folder), stage)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            write_text(stage / GENERATION, generation.to_json_string(use_diff=True))
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_text(stage / CONFIG, json.dumps(fields, indent=2) + "\n")


@dataclass
class _Source:
    """The tensors of a checkpoint, made one after the other. apart: modules of experts that it holds one by one."""

    model: nn.Module
    plain: nn.Module
    layout: Layout
    held: Mapping[str, Linear]
    naming: Naming | None
    apart: set[str]
    untied: bool = False
    _seen: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.names = {name: id(t) for name, t in self.plain.state_dict(keep_vars=True).items()}
        self.untied = any(len(names) > 1 and not self._one(names) for names in self._ties().values())

    def check(self) -> None:
        """Every tensor of the float class has its place in the model, and the other way round."""
        own = self.model.state_dict(keep_vars=True)
        quantized = {name for name, module in self.modules.items() if isinstance(module, PackedModule)}
        packed = {f"{n}.{leaf}".lstrip(".") for n, m in self.modules.items() for leaf in getattr(m, "qfx_packed", {})}
        buffers = tuple(f"{name}_w_" for name in packed)
        for name in own:
            owner = name.rpartition(".")[0]
            if owner in quantized or name in self.names or (buffers and name.startswith(buffers)):
                continue
            raise ValueError(
                explain(
                    f"the model holds {name!r}, which no float {type(self.plain).__name__} has",
                    expected="a model whose quantization adds nothing to its class",
                    next_step="quantize with a recipe without online rotations or modules of their own",
                )
            )
        for name in self.names:
            if name not in own and name not in packed and name.rpartition(".")[0] not in quantized:
                raise ValueError(
                    explain(f"the model lacks {name!r}, which every float {type(self.plain).__name__} has")
                )

    def without_place(self) -> list[Note]:
        """Biases that quantization made, which the float class does not read."""
        reason = f"it has a bias, and the layer of {type(self.plain).__name__} has none: the bias is left out"
        step = "quantize without bias_correction and without rewrites that make biases, or qfx.save(model, folder)"
        owners = (name for name, module in self.modules.items() if isinstance(module, PackedModule))
        made = (o for o in owners if self.modules[o]._parameters.get("bias") is not None)
        return [Note(owner, reason, step) for owner in made if f"{owner}.bias" not in self.names]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the order of the float model; a tie is written once."""
        written: set[int] = set()
        for name, key in self.names.items():
            if key in written and not self.untied:
                continue
            written.add(key)
            owner, _, leaf = name.rpartition(".")
            linear = self.held.get(owner)
            if linear is not None and leaf == "weight":
                yield from self._encoded(linear)
            elif owner in self.apart and leaf in PARTS:
                yield from self._experts(owner, leaf)
            else:
                yield self.named(name), self._tensor(name)

    def named(self, name: str) -> str:
        """What the checkpoint calls a module or tensor of the float model."""
        layers = tuple(f"{fqn.rpartition('.')[0]}." for fqn in self.apart)
        return self.naming.layer(name) if self.naming and name.startswith(layers) else name

    def _encoded(self, linear: Linear) -> Iterator[tuple[str, Tensor]]:
        return ((f"{linear.fqn}.{part}", tensor) for part, tensor in self.layout.encode(linear).items())

    def _experts(self, owner: str, leaf: str) -> Iterator[tuple[str, Tensor]]:
        """The parts of the experts of a module, those in float which the layout does not hold."""
        value: Tensor | None = None
        for number, i, fqn in self.parts(owner, leaf):
            if fqn in self.held:
                yield from self._encoded(self.held[fqn])
                continue
            value = self._tensor(f"{owner}.{leaf}") if value is None else value
            yield f"{fqn}.weight", value[number].chunk(len(PARTS[leaf]))[i]

    def parts(self, owner: str, leaf: str) -> Iterator[tuple[int, int, str]]:
        """(expert, number of the part, name in the checkpoint) of a parameter of experts."""
        stacked = self.plain.get_submodule(owner)._parameters[leaf]
        assert self.naming is not None and stacked is not None
        for number in range(len(stacked)):
            for i, kind in enumerate(PARTS[leaf]):
                yield number, i, self.naming.fqn(owner, number, kind)

    def _tensor(self, name: str) -> Tensor:
        """A parameter or buffer in float, shaped as the float class has it."""
        owner, _, leaf = name.rpartition(".")
        module = self.modules[owner]
        is_linear = leaf == "weight" and isinstance(module, QuantLinear | QuantMixed)
        value = float_weight(module) if is_linear and not isinstance(module, QuantConv) else getattr(module, leaf)
        assert isinstance(value, Tensor), name
        value = value.detach()
        if not is_linear:
            return value
        return value.t() if is_transposed(self.plain.get_submodule(owner)) else value

    def _ties(self) -> dict[int, list[str]]:
        ties: dict[int, list[str]] = {}
        for name, key in self.names.items():
            ties.setdefault(key, []).append(name)
        return ties

    def _one(self, names: list[str]) -> bool:
        """Whether what the class ties is one weight in the model too."""
        found = set()
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.modules[owner]
            if owner in self.held or "gain" in module._buffers:  # of a rotated table the output is another weight
                return False
            codes = module._buffers.get("w_codes", module._buffers.get(f"{leaf}_w_codes"))
            held = module._parameters.get(leaf) if codes is None else codes
            found.add(None if held is None else held.data_ptr())
        return len(found) == 1


def _write_shards(stage: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One file, or shards of at most `shard_bytes` (a larger tensor has its own) and their index."""
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        write_safetensors(stage / f"{len(shards)}.safetensors", batch, {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        batch[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (stage / "0.safetensors").rename(stage / SINGLE)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (stage / f"{number}.safetensors").rename(stage / file)
        index |= dict.fromkeys(names, file)
    fields = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    write_text(stage / INDEX, json.dumps(fields, indent=2) + "\n")


def _refuse_leftovers(folder: Path, stage: Path) -> None:
    """Weights of another checkpoint beside the new ones would be taken for theirs."""
    new = {path.name for path in stage.iterdir()}
    patterns = ("*.safetensors", "*.safetensors.index.json", "qfx.json", "pytorch_model*")
    old = sorted({path.name for pattern in patterns for path in folder.glob(pattern)} - new)
    if old:
        raise ValueError(
            explain(
                f"{folder} holds the weights of another checkpoint",
                found=listed(old),
                next_step="give an empty folder",
            )
        )


def _check(model: object) -> None:
    if not isinstance(model, nn.Module) or not quantized_parts(model):
        raise ValueError(
            explain("the model holds nothing that qfx quantized", next_step="call qfx.quantize(model, ...) first")
        )
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise ValueError(
            explain(
                f"{type(model).__name__} has no config of transformers, which a checkpoint of this kind needs",
                expected="a model of transformers",
                next_step="qfx.save(model, folder) keeps any model",
            )
        )


def _float_twin(model: nn.Module) -> nn.Module:
    """A model of the same class and config without content: the names, shapes and ties that a loader expects."""
    kind: Any = getattr(type(model), "qfx_float_class", type(model))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        made: nn.Module = kind._from_config(config) if hasattr(kind, "_from_config") else kind(config)
    made.tie_weights()  # type: ignore[operator]
    return made


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _linears(model: nn.Module, plain: nn.Module) -> list[Linear]:
    """The quantized linears that are linears in the float class too; one under several names is taken once."""
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None  # type: ignore[operator]
    found = []
    for fqn, module in model.named_modules():
        try:
            twin = plain.get_submodule(fqn)
        except AttributeError:
            continue  # told by _Source.check
        linear = of_module(fqn, module, twin, head=twin is head)
        if linear is not None and _is_linear(twin) and not linear.format.is_plain:
            found.append(linear)
    tied = _shared_codes(model)
    return [linear for linear in found if linear.packed.data.data_ptr() not in tied]


def _shared_codes(model: nn.Module) -> set[int]:
    """Codes that an embedding holds: they go with it."""
    codes = {m.w_codes.data_ptr() for m in model.modules() if isinstance(m, QuantEmbedding)}
    return codes | {
        m._buffers["weight_w_codes"].data_ptr()  # type: ignore[union-attr]
        for m in model.modules()
        if isinstance(m, nn.Embedding) and "weight" in getattr(m, "qfx_packed", {})
    }


def _refused(layout: Layout, linears: list[Linear]) -> dict[str, Loss]:
    more = {linear.fqn: linear.more for linear in linears if linear.more is not None}
    return layout.refused([linear for linear in linears if linear.fqn not in more]) | more


def _notes(layout: Layout, held: list[Linear], refused: Mapping[str, Loss]) -> list[Note]:
    lost = [(linear.fqn, loss) for linear in held for loss in layout.lost(linear)]
    return [Note(fqn, *loss) for fqn, loss in [*refused.items(), *lost]]


def _other_notes(model: nn.Module, linears: set[str], layout: Layout, experts: set[str]) -> list[Note]:
    """Packed weights that are no linears of one format: embeddings, several formats, convolutions, and experts other
    than those that are taken apart."""
    notes = []
    tables = _shared_codes(model)
    step = "nothing, or a recipe that leaves it in float, so that what was measured is what is written"

    def note(fqn: str, kind: str) -> None:
        notes.append(Note(fqn, f"{layout.name} checkpoints do not hold {kind}: written in float", step))

    for fqn, module in model.named_modules():
        if isinstance(module, PackedModule) and fqn not in linears and not _is_plain(module):
            note(fqn, _what(module, tables))
        for name in getattr(module, "qfx_packed", {}) if fqn not in experts else ():
            kind = "an embedding" if isinstance(module, nn.Embedding) else "a parameter that its module reads itself"
            note(f"{fqn}.{name}".lstrip("."), kind)
    return notes


def _told_apart(fqn: str, layout: Layout, parts: Sequence[Linear]) -> Note:
    reason = f"{layout.name} checkpoints hold experts one by one, and {layout.without(parts)}"
    return Note(fqn, reason, "experts=False, which writes them in float, for that reader", minor=True)


def _is_plain(module: PackedModule) -> bool:
    return "w_format" in module.__dict__ and Format.parse(str(module.w_format)).is_plain


def _what(module: PackedModule, tables: set[int]) -> str:
    if isinstance(module, QuantEmbedding):
        return "a quantized embedding"
    codes = module._buffers.get("w_codes")
    if codes is not None and codes.data_ptr() in tables:
        return "a linear that shares the table of an embedding"
    kinds = {"QuantMixed": "a weight of several formats", "QuantConv": "a quantized convolution"}
    return kinds.get(type(module).__name__, f"a {type(module).__name__}")


def _nothing(layout: Layout, refused: Mapping[str, Loss], linears: list[Linear]) -> ValueError:
    reasons = list(dict.fromkeys(refused.values()))[:_SHOWN]
    return ValueError(
        explain(
            f"checkpoints of {layout.name} can hold none of the {len(linears)} quantized linears",
            found="\n    ".join(f"{reason}; next step: {step}" for reason, step in reasons) or "no quantized linears",
            next_step="quantize with a format that it holds, or qfx.save(model, folder)",
        )
    )


def _config_fields(model: nn.Module, plain: nn.Module, untied: bool) -> dict[str, Any]:
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    fields["architectures"] = [type(plain).__name__]
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtypes += [m.dtype for m in model.modules() if isinstance(m, PackedModule)]
    fields["dtype"] = dtype_name(dtypes[0])
    if untied:
        fields["tie_word_embeddings"] = False
    return fields
