"""Rows of the report from a live module: what its modules tell, and what keeps float ones out of compiled graphs."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from qfx.annotation import each
from qfx.compiled.records import GraphRecord
from qfx.errors import Note
from qfx.format import Format
from qfx.live.attending import attention_rows
from qfx.recipe import Recipe
from qfx.reporting.rows import Row

_PACKED = re.compile(r"(^|[._])((w|rows\d+|columns\d+)_(codes|scale|zero)|low_[ab])$")  # what rows count
_ADDED = re.compile(r"(^|\.)(x_scale|x_zero|smooth)$")  # of packed modules, beside that


def live_rows(model: nn.Module, told: Collection[str]) -> Iterator[Row]:
    """Rows of the modules, packed parameters and float matrices of `model` that are not in `told`, the names of rows
    there are already.

    A float module whose weight is tied to that of a module in `told` is left out: the weight is told there. What two
    modules hold (a tied table, packed or not) counts at the first.
    """
    pointers = {found for fqn, m in model.named_modules() if fqn in told and (found := _pointer(m)) is not None}
    seen: set[int] = set()
    for fqn, module in model.named_modules():
        row = getattr(module, "qfx_row", None)
        if callable(row):
            codes = {b.data_ptr() for name, b in module._buffers.items() if b is not None and name.endswith("_codes")}
            assert codes, fqn
            yield replace(row(fqn), shared=codes <= seen)
            seen |= codes
            continue
        if getattr(module, "qfx_packed", None):
            yield from packed_rows(fqn, module, seen)
        elif _is_float(module) and (fqn in told or _pointer(module) not in pointers):
            weight = module._parameters["weight"]
            assert weight is not None
            at = weight.data_ptr() or id(weight)
            row = Row(fqn, _kind(module), "", "torch", "", weight.numel(), weight.nbytes, weight.nbytes)
            yield replace(row, shared=at in seen)
            seen.add(at)
        if not _is_float(module):
            yield from _float_matrices(fqn, module, told, pointers)
    yield from attention_rows(model)


def _float_matrices(fqn: str, module: nn.Module, told: Collection[str], pointers: set[int]) -> Iterator[Row]:
    """Rows of the float matrices that a module's own forward reads: experts, recurrent layers, tables of positions.

    pointers: of tensors that have a row; those that get one here are added.
    """
    for name, tensor in module._parameters.items():
        if tensor is None or not tensor.is_floating_point() or sum(size > 1 for size in tensor.shape) < 2:
            continue
        path = (f"{fqn}.{name}" if fqn else name).removesuffix(".weight")
        if path not in told and tensor.data_ptr() not in pointers:
            pointers.add(tensor.data_ptr())
            yield Row(path, "parameter", "", "torch", "", tensor.numel(), tensor.nbytes, tensor.nbytes)


def packed_rows(fqn: str, module: nn.Module, seen: set[int]) -> list[Row]:
    """Rows of the report for the packed parameters of a module. seen: of codes that have a row; these are added."""
    rows = []
    for name, spec in getattr(module, "qfx_packed", {}).items():
        elements = torch.Size(spec.shape).numel()
        path = (f"{fqn}.{name}" if fqn else name).removesuffix(".weight")
        before, after = elements * spec.dtype.itemsize, Format.parse(spec.format).nbytes(spec.shape)
        row = Row(path, "parameter", f"w={spec.format}", "qfx::dequantize, then torch", "", elements, before, after)
        codes = module.get_buffer(f"{name}_w_codes").data_ptr()
        rows.append(replace(row, shared=codes in seen))
        seen.add(codes)
    return rows


def why_not(model: nn.Module, fqn: str, failed: dict[str, str], records: Sequence[GraphRecord]) -> str:
    """Why a module, or a parameter of one, of a model that was compiled is not quantized all the same.

    failed: FQN -> reason, for modules whose graph could not be had. records: those of the model's compiled graphs.
    """
    if fqn in failed:
        return failed[fqn]
    if any(f"{fqn}.weight" == name for record in records for name, _ in record.weights):
        return "its result is not used, or the graph reads its weight as a plain tensor: stays float"
    parts = fqn.split(".")
    modules = dict(model.named_modules(remove_duplicate=False))
    for length in range(len(parts), -1, -1):
        path = ".".join(parts[:length])
        module = modules.get(path, model)
        if getattr(module.forward, "_torchdynamo_disable", False) or _is_disabled(module):
            return f"{path or 'the model'} is excluded from compilation (torch._dynamo.disable): runs in torch"
    limits = [note.reason for note in limit_notes(records)] + [reason for reason, _ in [recurrent(model)] if reason]
    return f"in no compiled graph: runs in torch; {limits[0]}" if limits else "in no compiled graph: runs in torch"


def recurrent(model: nn.Module) -> tuple[str, str]:
    """What keeps a model with recurrent layers out of compiled graphs, and the next step; both "" where nothing does.

    Dynamo leaves alone every function that calls one, says nothing, and asks no backend.
    """
    found = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.RNN | nn.GRU | nn.LSTM)), None)
    if found is None or torch._dynamo.config.allow_rnn:
        return "", ""
    kind, name = type(found[1]).__name__, f" ({found[0]})" if found[0] else ""
    reason = f"Dynamo compiles no function that calls nn.{kind}{name} unless torch._dynamo.config.allow_rnn is set"
    return reason, "set torch._dynamo.config.allow_rnn = True before the first call"


def why_float(model: nn.Module, row: Row, recipe: Recipe | None) -> str:
    """Why a row of a quantized model is in float, as far as it can be told: `recipe`, where it is known, says what was
    asked. "" where nothing was."""
    if recipe is not None and recipe.allocation is not None:  # which may give a weight floats
        return ""
    kinds = ("embedding", "linear", "experts") if row.op == "parameter" else (row.op,)
    asked = [] if recipe is None else [recipe.formats_for(kind, row.node).get("w", ()) for kind in kinds]
    if recipe is not None and all(fmt.is_plain for formats in asked for fmt in each(formats)):
        return ""
    if row.op == "parameter":
        modules = dict(model.named_modules())
        owner = modules.get(row.node) or modules.get(row.node.rpartition(".")[0], model)
        return f"a parameter that {type(owner).__name__} reads by itself: stays float"
    return "asked for, but its weight is read as a plain tensor, or computed: stays float" if recipe else ""


def why_weight_only(model: nn.Module, row: Row, recipe: Recipe | None) -> str:
    """Why the input of a packed parameter is float though `recipe` gives it a format; "" where it gives none."""
    module = dict(model.named_modules()).get(row.node)
    if recipe is None or row.op != "parameter" or isinstance(module, nn.Embedding):
        return ""
    kinds = ("conv",) if isinstance(module, nn.modules.conv._ConvNd) else ("linear", "experts")
    asked = [recipe.formats_for(kind, row.node).get("x", ()) for kind in kinds]
    found = next((fmt for formats in asked for fmt in each(formats) if not fmt.is_plain), None)
    return "" if found is None else f"weight-only, not x={found}: its weight is read by a forward of its own"


def limit_notes(records: Sequence[GraphRecord]) -> list[Note]:
    """A note for each function of which Dynamo compiles no more versions: other calls of it run in torch."""
    limit = int(torch._dynamo.config.recompile_limit)
    notes = {}
    for record in records:
        code = record.frame.code()
        if code is None or _versions(code) < limit:
            continue
        what = f"Dynamo compiled {code.co_name} {limit} times, its recompile limit"
        step = "see TORCH_LOGS=recompiles for what changes; torch._dynamo.config.recompile_limit raises the limit"
        notes[code] = Note("graph", f"{what}: calls that need one more version run in torch", step, record.frame.place)
    return list(notes.values())


def other_bytes(model: nn.Module, nodes: Collection[str]) -> tuple[int, int]:
    """Bytes of the parameters and buffers that no row counts: (norms, biases, tables; what quantizing added)."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensors.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    sizes = {"own": 0, "added": 0}
    for name, tensor in tensors.values():
        if not _PACKED.search(name) and name.removesuffix(".weight") not in nodes:
            path, _, _ = name.rpartition(".")
            added = _ADDED.search(name) and callable(getattr(model.get_submodule(path), "qfx_row", None))
            sizes["added" if added else "own"] += tensor.numel() * tensor.element_size()
    return sizes["own"], sizes["added"]


def _is_float(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, kinds) and module._parameters.get("weight") is not None


def _is_disabled(module: nn.Module) -> bool:
    context = getattr(module, "dynamo_ctx", None)
    return context is not None and getattr(context, "callback", 0) is None


def _versions(code: types.CodeType) -> int:
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        return len(_debug_get_cache_entry_list(code))
    except (ImportError, AttributeError, TypeError):
        return 0


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) else "embedding"


def _pointer(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    return weight.data_ptr() if weight is not None else None
