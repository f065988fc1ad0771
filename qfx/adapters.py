"""QLoRA: adapters of peft above a packed model, and merging them into it.

    model = qfx.quantize(model, "nf4")                              # packed and frozen
    model = qfx.add_adapters(model, LoraConfig(task_type="CAUSAL_LM"))
    ...                                                             # Trainer, accelerate or a loop of your own
    model.save_pretrained(folder)                                   # the adapters alone
    model = qfx.load_adapters(packed_model, folder)
    merged = qfx.merge_adapters(model, data)                        # merged.model, and what rounding again loses

Dettmers et al. 2023, "QLoRA". peft is imported where it is used; nothing of it is changed: qfx's layer stands in the
LoraConfig of the one model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from qfx.compare import Accuracy, accuracy
from qfx.data import Call, calls
from qfx.errors import explain, warn
from qfx.measure import decibel, energies
from qfx.mixed import QuantMixed
from qfx.modules import PackedModule, QuantConv, QuantLinear
from qfx.quantize import evaluating
from qfx.requantize import Change, beside, rounded_again, with_buffers

if TYPE_CHECKING:
    from qfx.lora import PackedLoraLinear

Into = Literal["weight", "low-rank"]
Rounding = Literal["rtn", "mse", "hqq"]
_ALL = "all-linear"  # peft's word
_HALF = 0.5


@dataclass(frozen=True)
class MergedLinear:
    """What merging did to one linear. moved, lost: the norms of the adapters' change and of what rounding loses of the
    merged weight, both as shares of the merged weight's norm. sqnr_db: of the merged weight. The last two are of the
    linear's output on data, the shares of its energy as norms: what the adapters change, and what is lost.
    """

    node: str
    formats: str
    moved: float
    lost: float
    output_moved: float | None = None
    output_lost: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to noise of the merged weight, in dB; inf where nothing is lost."""
        return decibel(1.0, self.lost**2)

    @property
    def output_sqnr_db(self) -> float | None:
        """Signal to noise of the output on data, in dB; None without data."""
        return None if self.output_lost is None else decibel(1.0, self.output_lost**2)

    @property
    def worse(self) -> bool:
        """Whether more than half of what the adapters changed is lost: of the output with data, else of the weight."""
        if self.output_lost is not None and self.output_moved is not None:
            return self.output_lost > _HALF * self.output_moved
        return self.lost > _HALF * self.moved


@dataclass(frozen=True)
class Merged:
    """The merged model, a row for each packed linear that had adapters, and its output beside that of the model with
    adapters (None without data)."""

    model: nn.Module
    rows: tuple[MergedLinear, ...]
    output: Accuracy | None = None

    def show(self, console: Console | None = None) -> None:
        """Print the rows as a table."""
        (console or Console()).print(_table(self))


def add_adapters(model: nn.Module, config: Any, name: str = "default") -> Any:
    """peft's model, adapters as `config` (a LoraConfig) says: `model` itself, its linears wrapped, packed as before.

    What `peft.get_peft_model` gives, with qfx's layer on packed linears. Everything but the adapters is frozen.
    Raises ValueError for a model that holds nothing packed, for adapters on packed tables and the like, and for modules
    to be trained whole (`modules_to_save`) that are packed; ImportError without peft.
    """
    peft = _peft()
    return peft.get_peft_model(model, lora_config(model, config), adapter_name=name)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Any:
    """Adapters that peft's `save_pretrained` wrote, on a packed model. trainable: to train them on. Raises as above."""
    peft = _peft()
    config = lora_config(model, peft.PeftConfig.from_pretrained(os.fspath(folder)))
    return peft.PeftModel.from_pretrained(model, os.fspath(folder), config=config, is_trainable=trainable)


def lora_config(model: nn.Module, config: Any) -> Any:
    """`config` for code that calls peft itself: qfx's layer is registered in it, and "all-linear" means packed linears,
    too (as in peft, without the output head). Changes and returns `config`. Raises ValueError as `add_adapters` does.
    """
    _peft()
    from peft import LoraConfig

    from qfx.lora import PackedLoraLinear, Refused

    if not isinstance(config, LoraConfig):
        raise ValueError(
            explain("adapters on packed linears are LoRA", expected="a LoraConfig", found=type(config).__name__)
        )
    packed = {fqn: m for fqn, m in model.named_modules() if isinstance(m, PackedModule) or hasattr(m, "qfx_packed")}
    if not packed:
        step = "qfx.quantize(model, 'nf4') first; peft.get_peft_model takes float and prepared models"
        raise ValueError(explain("the model holds nothing packed", next_step=step))
    _check_whole(config, packed)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL:
        config.target_modules = _linears(model)
    refused: dict[type, type] = {type(m): Refused for m in packed.values() if not _takes_adapter(m)}
    config._register_custom_module({**refused, QuantLinear: PackedLoraLinear, QuantMixed: PackedLoraLinear})
    return config


def merge_adapters(
    model: Any, data: Iterable[Any] | None = None, *, into: Into = "weight", rounding: Rounding = "mse",
    strict: bool = False,
) -> Merged:  # fmt: skip
    """Merge the active adapters of a model of `add_adapters` into its packed weights, and say what it costs.

    into: "weight" rounds W + s B A again in the formats that W has, by `rounding` ("rtn", "mse", "hqq") or with the
    scales of W, whichever loses less. "low-rank" keeps s B A beside the codes, as two float factors (Recipe.low_rank):
    nothing is lost, of r (K + N) numbers. data: batches, on which outputs are compared, too. Linears that lose more
    than half of what the adapters changed are a QfxWarning, with `strict` a ValueError.
    Adapters on float modules are merged as peft does. Raises ValueError, before anything is changed, for a model
    without adapters of qfx, merged already, or with NaN or Inf in them.
    """
    layers = _layers(model)
    _check_options(layers, into, rounding)
    base = model.get_base_model()
    with evaluating(model):
        changes = {fqn: _change(fqn, layer, into, rounding) for fqn, layer in layers.items()}
        rows = {fqn: _row(fqn, layer, changes[fqn]) for fqn, layer in layers.items()}
        output = None
        if data is not None:
            given = calls(base, data)
            rows = _measured(model, layers, changes, rows, given)
            output = accuracy(model, _Swapped(model, layers, changes), given)
        _tell(list(rows.values()), into, strict=strict)
        for fqn, layer in layers.items():
            layer.change = changes[fqn]
        merged = _unloaded(model)
    for fqn, layer in layers.items():
        layer.base.sqnr_db = rows[fqn].output_sqnr_db
    return Merged(merged, tuple(rows.values()), output)


def _unloaded(model: Any) -> nn.Module:
    """The base model with everything merged. peft takes packed tables for untied, since each reads its weight anew."""
    base = model.get_base_model()
    config = getattr(base, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*embeddings are no longer tied after merging", UserWarning)
        merged: nn.Module = model.merge_and_unload()
    if tied and config is not None:
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        held = [end._buffers.get("w_codes", end._parameters.get("weight")) for end in ends]
        config.tie_word_embeddings = held[0] is held[1]
    return merged


def _change(fqn: str, layer: PackedLoraLinear, into: Into, rounding: Rounding) -> Change:
    base = layer.base
    if into == "weight":
        return rounded_again(base, layer.delta(), rounding, name=f"{fqn} with its adapters")
    if not isinstance(base, QuantLinear):
        step = "into='weight', or a recipe with one format for the whole weight"
        raise ValueError(explain("a weight of several formats has no factors beside it", node=fqn, next_step=step))
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    a = torch.cat([layer.lora_A[name].weight.float() for name in names])
    b = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.float() for name in names], 1)
    return beside(base, a, b)


def _row(fqn: str, layer: PackedLoraLinear, change: Change) -> MergedLinear:
    formats = layer.base.qfx_row(fqn).asked
    size = math.sqrt(change.signal) or 1.0
    return MergedLinear(fqn, formats, math.sqrt(change.moved) / size, math.sqrt(change.noise) / size)


def _measured(
    model: Any, layers: Mapping[str, PackedLoraLinear], changes: Mapping[str, Change],
    rows: Mapping[str, MergedLinear], given: Sequence[Call],
) -> dict[str, MergedLinear]:  # fmt: skip
    """The rows with what each linear gives on what it reads in the model with adapters: before, after, without them."""
    sums = {fqn: [0.0, 0.0, 0.0] for fqn in layers}  # signal, moved, noise

    def watch(fqn: str, layer: PackedLoraLinear) -> Any:
        after = with_buffers(layer.base, changes[fqn].buffers)

        def seen(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            signal, noise = energies(y, after(args[0]))
            total = sums[fqn]
            total[:] = total[0] + signal, total[1] + energies(y, layer.base(args[0]))[1], total[2] + noise

        return layer.register_forward_hook(seen)

    handles = [watch(fqn, layer) for fqn, layer in layers.items()]
    try:
        for args, kwargs in given:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for fqn, row in rows.items():
        signal, moved, noise = (math.sqrt(value) for value in sums[fqn])
        size = signal or 1.0
        found[fqn] = MergedLinear(row.node, row.formats, row.moved, row.lost, moved / size, noise / size)
    return found


class _Swapped:
    """The model as it is once the changes are in its packed weights; between calls it is as before."""

    def __init__(self, model: Any, layers: Mapping[str, PackedLoraLinear], changes: Mapping[str, Change]) -> None:
        self.model, self.layers, self.changes = model, layers, changes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for fqn, layer in self.layers.items():
            layer.change = self.changes[fqn]
            layer.merge()
        try:
            return self.model(*args, **kwargs)
        finally:
            for layer in self.layers.values():
                layer.unmerge()


def _tell(rows: Sequence[MergedLinear], into: Into, *, strict: bool) -> None:
    """One warning, or with strict the error, that names the linears that lose the most of what the adapters changed."""
    worse = sorted((row for row in rows if row.worse), key=lambda row: row.moved / (row.lost or 1.0))
    if into != "weight" or not worse:
        return
    named = [
        f"{row.node} ({row.formats}: lost {row.lost:.2%}, adapters {row.moved:.2%} of the weight)" for row in worse
    ]
    more = f", and {len(named) - 3} more" if len(named) > 3 else ""
    what = (
        f"{len(worse)} of {len(rows)} merged weights lose more than half of the adapters' change by being rounded "
        f"again: {', '.join(named[:3])}{more}"
    )
    step = "into='low-rank' keeps the adapters in float beside the packed weights; or a base of more bits"
    if strict:
        raise ValueError(explain(what, next_step=step))
    warn(explain(what, next_step=step), stacklevel=3)


def _layers(model: Any) -> dict[str, PackedLoraLinear]:
    """The adapters on packed linears, by the name of the linear."""
    if not hasattr(model, "merge_and_unload"):
        step = "merge what qfx.add_adapters, qfx.load_adapters or peft.get_peft_model returned"
        raise ValueError(explain("a model of peft is needed", found=type(model).__name__, next_step=step))
    from qfx.lora import PackedLoraLinear

    base = model.get_base_model()
    found = {fqn: m for fqn, m in base.named_modules() if isinstance(m, PackedLoraLinear)}
    if not found:
        raise ValueError(explain("no packed linear has adapters", next_step="model.merge_and_unload() of peft"))
    return found


def _check_options(layers: Mapping[str, PackedLoraLinear], into: object, rounding: object) -> None:
    for name, value, known in (("into", into, get_args(Into)), ("rounding", rounding, get_args(Rounding))):
        if value not in known:
            raise ValueError(f"{name} is {' or '.join(map(repr, known))}, found {value!r}")
    for fqn, layer in layers.items():
        if layer.merged:
            step = "model.unmerge_adapter(), then qfx.merge_adapters"
            raise ValueError(explain("the adapters are merged already", node=fqn, next_step=step))
        if not bool(torch.isfinite(layer.delta()).all()):
            step = "load the last good checkpoint of the adapters, and train at a lower rate"
            raise ValueError(explain("an adapter holds NaN or Inf: the training went wrong", node=fqn, next_step=step))


def _check_whole(config: Any, packed: Mapping[str, nn.Module]) -> None:
    """What peft would train or change in the weight itself has to be float."""
    asked = [*(config.modules_to_save or ()), *(config.target_parameters or ())]
    tokens = config.trainable_token_indices
    asked += list(tokens) if isinstance(tokens, Mapping) else ["embed_tokens"] if tokens else []
    for name in asked:
        owners = (name, name.rpartition(".")[0])
        for fqn in packed:
            if any(owner and (fqn == owner or fqn.endswith(f".{owner}")) for owner in owners):
                step = "quantize with a recipe that leaves it in float (ignore), or leave it out of the LoraConfig"
                raise ValueError(explain(f"{name!r} should learn, but its weight is packed", node=fqn, next_step=step))


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear | QuantMixed) and not isinstance(module, QuantConv)


def _linears(model: nn.Module) -> set[str]:
    """Names of all linears, packed or not, but the output head."""
    from transformers.pytorch_utils import Conv1D

    heads: Any = getattr(model, "get_output_embeddings", None)
    head = heads() if callable(heads) else None
    return {
        fqn
        for fqn, m in model.named_modules()
        if m is not head and (_takes_adapter(m) or isinstance(m, nn.Linear | Conv1D))
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("adapters are those of peft; next step: pip install peft") from None
    return peft


def _table(merged: Merged) -> Table:
    table = Table(title="merged adapters", title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    measured = merged.output is not None
    for name in ("linear", "formats", "moved", "lost", "SQNR", *(["moved out", "lost out", "SQNR out"] * measured)):
        table.add_column(name, justify="left" if name in ("linear", "formats") else "right")
    for row in merged.rows:
        cells = [escape(row.node), row.formats, f"{row.moved:.2%}", f"{row.lost:.2%}", f"{row.sqnr_db:.1f}"]
        if measured:
            cells += [f"{row.output_moved:.2%}", f"{row.output_lost:.2%}", f"{row.output_sqnr_db:.1f}"]
        table.add_row(*cells, style="yellow" if row.worse else None)
    if merged.output is not None:
        table.caption = f"{merged.output.output} of the merged model: SQNR {merged.output.sqnr_db:.1f} dB"
    return table


__all__ = ["Merged", "MergedLinear", "add_adapters", "load_adapters", "lora_config", "merge_adapters"]
