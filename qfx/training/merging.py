"""`qfx.merge_adapters`: LoRA adapters into the packed weights below them, and what that costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from qfx.calibration.padding import Attended, attended_by, of_view, without
from qfx.data import Call, calls
from qfx.errors import check_flags, explain, listed, warn
from qfx.live.modules import QuantLinear
from qfx.measuring.compare import Accuracy, accuracy
from qfx.measuring.measure import bounded, decibel, energies
from qfx.passes._hessian import Hessian
from qfx.quantize import evaluating
from qfx.training.requantize import Change, beside, read_by, rounded_again, with_buffers

if TYPE_CHECKING:
    from qfx.training.lora import PackedLoraLinear

Into = Literal["weight", "low-rank"]
Rounding = Literal["rtn", "mse", "hqq", "gptq"]
_HALF = 0.5
_Look = Callable[[Tensor, Tensor, Attended], None]  # input, output, positions that count


@dataclass(frozen=True)
class MergedLinear:
    """What merging did to one linear. moved, lost: the norms of the adapters' change and of what rounding loses of the
    merged weight, both as shares of the merged weight's norm. sqnr_db: of the merged weight. The last two are of the
    linear's output on data, the shares of its energy as norms: what the adapters change, and what is lost; None without
    data that reaches the linear.
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
        """Signal to noise of the output on data, in dB, at most 200; None without data that reaches the linear."""
        return None if self.output_lost is None else bounded(decibel(1.0, self.output_lost**2))

    @property
    def worse(self) -> bool:
        """Whether more than half of what the adapters changed is lost: of the output with data, else of the weight."""
        _, moved, lost = self.judged
        return lost > _HALF * moved

    @property
    def judged(self) -> tuple[str, float, float]:
        """("output", moved, lost) where data reaches the linear, else ("weight", moved, lost)."""
        if self.output_lost is None or self.output_moved is None:
            return "weight", self.moved, self.lost
        return "output", self.output_moved, self.output_lost


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


def merge_adapters(
    model: Any, data: Iterable[Any] | None = None, *, into: Into = "weight", rounding: Rounding | None = None,
    strict: bool = False,
) -> Merged:  # fmt: skip
    """Merge the active adapters of a model of `add_adapters` into its packed weights, and say what it costs.

    into: "weight" rounds W + s B A again in the formats that W has, by `rounding` ("rtn", "mse", "hqq", or "gptq" for
    what each linear reads of the data; None: "gptq" with data, else "mse") or with the scales of W, whichever loses
    less. "low-rank" keeps s B A beside the codes, as two float factors of r (K + N) numbers (Recipe.low_rank): nothing
    is lost. data: batches, on which outputs are compared, too. Linears that lose more than half of what the adapters
    changed are a QfxWarning, with `strict` a ValueError.
    Adapters on float modules are merged as peft does. Raises ValueError, before anything is changed, for a model
    without adapters of qfx, merged already, or with NaN or Inf in them.
    """
    check_flags(strict=strict)
    layers = _layers(model)
    given = None if data is None else calls(model.get_base_model(), data)
    rounding = rounding or ("mse" if given is None else "gptq")
    _check_options(layers, into, rounding, given)
    with evaluating(model):
        seen = _seen(model, layers, given) if given is not None and rounding == "gptq" and into == "weight" else {}
        changes = {fqn: _change(fqn, layer, into, rounding, seen.get(fqn)) for fqn, layer in layers.items()}
        rows = {fqn: _row(fqn, layer, changes[fqn]) for fqn, layer in layers.items()}
        output = None
        if given is not None:
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
    ends = (base.get_input_embeddings(), base.get_output_embeddings()) if tied else ()
    if config is not None and ends and None not in ends:
        held = [end._buffers.get("w_codes", end._parameters.get("weight")) for end in ends]
        config.tie_word_embeddings = held[0] is held[1]
    return merged


def _change(fqn: str, layer: PackedLoraLinear, into: Into, rounding: Rounding, seen: Hessian | None) -> Change:
    base = layer.base
    if into == "weight":
        return rounded_again(base, layer.delta(), rounding, name=f"{fqn} with its adapters", seen=seen)
    if not isinstance(base, QuantLinear):
        step = "into='weight', or a recipe with one format for the whole weight"
        raise ValueError(explain("a weight of several formats has no factors beside it", node=fqn, next_step=step))
    names = layer.active()
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
    """The rows with what each linear gives on what it reads in the model with adapters: before, after, without them,
    at positions that are no padding. Those that read nothing stay as they are."""
    sums = {fqn: [0.0, 0.0, 0.0] for fqn in layers}  # signal, moved, noise

    def look(fqn: str) -> _Look:
        base, total = layers[fqn].base, sums[fqn]
        after, bias = with_buffers(base, changes[fqn].buffers), layers[fqn].bias_delta()

        def compare(x: Tensor, y: Tensor, kept: Attended) -> None:
            shape = of_view(x, kept).shape[:-1]
            adapted, merged, alone = (without(v.reshape(*shape, -1), kept) for v in (y, after(x) + bias, base(x)))
            signal, noise = energies(adapted, merged)
            total[:] = total[0] + signal, total[1] + energies(adapted, alone)[1], total[2] + noise

        return compare

    _run(model, layers, given, look)
    found = dict(rows)
    for fqn, row in rows.items():
        signal, moved, noise = (math.sqrt(value) for value in sums[fqn])
        if signal:
            found[fqn] = replace(row, output_moved=moved / signal, output_lost=noise / signal)
    return found


def _seen(model: Any, layers: Mapping[str, PackedLoraLinear], given: Sequence[Call]) -> dict[str, Hessian]:
    """What each packed weight is multiplied with, in the model with adapters, at positions that are no padding."""
    found = {fqn: Hessian(layer.base.in_features) for fqn, layer in layers.items()}

    def look(fqn: str) -> _Look:
        base, seen = layers[fqn].base, found[fqn]
        return lambda x, _, kept: seen.add(read_by(base, without(of_view(x, kept), kept)))

    _run(model, layers, given, look)
    return found


def _run(
    model: Any, layers: Mapping[str, PackedLoraLinear], given: Sequence[Call], look: Callable[[str], _Look]
) -> None:
    """The calls; input and output of each layer, with the call's positions that count, to what `look` gives for it."""
    kept: Attended = {}

    def hook(seen: _Look) -> Any:
        return lambda _, args, y: seen(args[0], y, kept)

    handles = [layer.register_forward_hook(hook(look(fqn))) for fqn, layer in layers.items()]
    try:
        for args, kwargs in given:
            kept = attended_by(model.get_base_model(), args, kwargs)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


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
    worse = sorted((row for row in rows if row.worse), key=lambda row: row.judged[1] / row.judged[2])
    if into != "weight" or not worse:
        return
    what = (
        f"{len(worse)} of {len(rows)} merged weights lose more than half of the adapters' change by being rounded "
        f"again: {listed([_lost(row) for row in worse])}"
    )
    step = "into='low-rank' keeps the adapters in float beside the packed weights; or a base of more bits"
    if strict:
        raise ValueError(explain(what, next_step=step))
    warn(explain(what, next_step=step), stacklevel=3)


def _lost(row: MergedLinear) -> str:
    """`up (w=u4/g16: lost 3.10%, adapters 4.00% of the output)`."""
    of, moved, lost = row.judged
    return f"{row.node} ({row.formats}: lost {lost:.2%}, adapters {moved:.2%} of the {of})"


def _layers(model: Any) -> dict[str, PackedLoraLinear]:
    """The active adapters on packed linears, by the name of the linear."""
    if not hasattr(model, "merge_and_unload"):
        step = "merge what qfx.add_adapters, qfx.load_adapters or peft.get_peft_model returned"
        raise ValueError(explain("a model of peft is needed", found=type(model).__name__, next_step=step))
    from qfx.training.lora import PackedLoraLinear

    base = model.get_base_model()
    every = {fqn: m for fqn, m in base.named_modules() if isinstance(m, PackedLoraLinear)}
    if not every:
        raise ValueError(explain("no packed linear has adapters", next_step="model.merge_and_unload() of peft"))
    found = {fqn: m for fqn, m in every.items() if m.active()}
    if not found:
        raise ValueError(explain("no packed linear has an active adapter", next_step="model.set_adapter(name)"))
    return found


def _check_options(
    layers: Mapping[str, PackedLoraLinear], into: object, rounding: object, given: Sequence[Call] | None
) -> None:
    for name, value, known in (("into", into, get_args(Into)), ("rounding", rounding, get_args(Rounding))):
        if value not in known:
            raise ValueError(f"{name} is {' or '.join(map(repr, known))}, found {value!r}")
    if rounding == "gptq" and given is None:
        raise ValueError("rounding='gptq' needs data; next step: data=batches, or rounding='mse'")
    for fqn, layer in layers.items():
        if layer.merged:
            step = "model.unmerge_adapter(), then qfx.merge_adapters"
            raise ValueError(explain("the adapters are merged already", node=fqn, next_step=step))
        if not bool(torch.isfinite(layer.delta()).all()):
            step = "load the last good checkpoint of the adapters, and train at a lower rate"
            raise ValueError(explain("an adapter holds NaN or Inf: the training went wrong", node=fqn, next_step=step))
        layer.check_bias(layer.active(), fqn)


def _table(merged: Merged) -> Table:
    table = Table(title="merged adapters", title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0))
    measured = merged.output is not None
    for name in ("linear", "formats", "moved", "lost", "SQNR", *(["moved out", "lost out", "SQNR out"] * measured)):
        table.add_column(name, justify="left" if name in ("linear", "formats") else "right")
    for row in merged.rows:
        cells = [escape(row.node), row.formats, f"{row.moved:.2%}", f"{row.lost:.2%}", f"{row.sqnr_db:.1f}"]
        if measured and row.output_moved is not None:
            cells += [f"{row.output_moved:.2%}", f"{row.output_lost:.2%}", f"{row.output_sqnr_db:.1f}"]
        table.add_row(*cells, style="yellow" if row.worse else None)
    if merged.output is not None:
        table.caption = f"{merged.output.output} of the merged model: SQNR {merged.output.sqnr_db:.1f} dB"
    return table
