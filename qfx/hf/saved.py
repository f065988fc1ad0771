"""A saved quantized model in transformers' loader: the quantized modules, still empty, in the places of the float ones.

A model may be loaded into another class than the saved one, as with float models: AutoModel takes the base model out of
a causal language model, and a class with a head takes a base model. Names then gain or lose `base_model_prefix`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qfx.errors import Note, explain
from qfx.format import dtype_name
from qfx.kv.plans import Caches
from qfx.live.attending import Spec
from qfx.live.modules import PackedModule, tell_shared, without_fast_paths
from qfx.live.parameters import LOADING
from qfx.reporting.told import read
from qfx.storage.describe import Record, float_class
from qfx.storage.rebuild import Saved, other_shape, put

_PACKED = re.compile(r"_w_(codes|scale|zero)$")


@dataclass
class Placed:
    """What is left to do once the tensors are loaded.

    ties: name -> the name whose tensor it shares, its place empty until then. modules: the same for whole modules.
    dtypes: the dtype of each packed buffer. buffers: the dtype of those that are not saved. caches: those of the plan.
    attention: what `qfx.live.attending.attend` takes. notes: what was warned of when the model was quantized. untied:
    what is to be said of weights that a float model would tie.
    """

    ties: dict[str, str]
    modules: dict[str, str]
    dtypes: dict[str, torch.dtype]
    buffers: dict[str, torch.dtype]
    caches: Caches = field(default_factory=dict)
    attention: dict[str, Spec] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    untied: tuple[Note, ...] = ()

    @classmethod
    def into(cls, model: nn.Module, record: Record, headers: Mapping[str, Tensor], dtype: torch.dtype | None) -> Placed:
        """Put the quantized modules of a record into a model on the meta device.

        headers: what the files hold, on the meta device. dtype: of the model to be. Raises ValueError where the record
        does not fit the model.
        """
        local = _Names(model, record)
        saved_dtype: torch.dtype = getattr(torch, record["dtype"])
        asked = dtype or saved_dtype
        tensors = {name: _cast(t, name, saved_dtype, asked) for name, t in headers.items()}
        tensors |= {name: tensors[source] for name, source in record["tied"].items() if source in tensors}
        saved = Saved(
            modules=local.records(record["modules"], saved_dtype, asked),
            parameters=local.records(record["parameters"], saved_dtype, asked),
            buffers={},
            tied={},
            tensors={found: tensor for name, tensor in tensors.items() if (found := local.name(name))},
            centred=tuple(found for name in record["centred"] if (found := local.name(name))),
        )
        local.check(saved)
        put(model, saved)
        shield(model, on=True)
        made = cls({}, {}, {}, {})
        made._empty_ties(model, {local.name(a): local.name(b) for a, b in record["tied"].items()}, saved)
        made.dtypes = {n: b.dtype for n, b in model.named_buffers() if _is_packed(model, n)}
        if asked == saved_dtype:
            named = {local.name(n): getattr(torch, text) for n, text in record["buffers"].items()}
            made.buffers = {name: own for name, own in named.items() if name}
        made.caches = {local.name(name) or name: one for name, one in record["caches"].items()}
        for name, spec in record["attention"].items():
            if owner := local.name(name):
                made.attention[owner] = {**spec, "name": f"{owner}.{spec['name'].rpartition('.')[2]}"}
        made.notes, made.untied = read(record["notes"]), _untied(model, saved)
        keep_float_ties(model)
        return made

    def finish(self, model: nn.Module) -> None:
        """Tie what is tied, and bring what transformers cast back to its dtype."""
        for path, source in self.modules.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_submodule(source))
        for name, dtype in self.dtypes.items():
            owner, leaf = _split(model, name)
            buffer = owner._buffers[leaf]
            assert buffer is not None and not buffer.is_meta, name
            owner._buffers[leaf] = buffer.to(dtype)
        for name, source in self.ties.items():
            owner, leaf = _split(model, name)
            other, first = _split(model, source)
            if first in other._parameters:
                owner._parameters[leaf] = other._parameters[first]
            else:
                owner._buffers[leaf] = other._buffers[first]
                tell_shared(owner, leaf)
        for name, dtype in self.buffers.items():
            owner, leaf = _split(model, name)
            buffer = owner._buffers.get(leaf)
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(dtype)
        shield(model, on=False)
        without_fast_paths(model)

    def _empty_ties(self, model: nn.Module, tied: Mapping[str, str], saved: Saved) -> None:
        """Leave the places of tied tensors empty, since files hold each once and transformers would fill the others."""
        aliases = {n: str(r["same"]) for n, r in saved.modules.items() if "same" in r}
        for path, source in aliases.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Module())
            self.modules[path] = source
        known = getattr(model, "all_tied_weights_keys", {})
        for name, source in tied.items():
            if not name or not source or name.rpartition(".")[0] in aliases:
                continue
            owner, leaf = _split(model, name)
            if leaf in owner._parameters:
                if name in known or source in known:
                    continue  # transformers ties them
                owner._parameters[leaf] = None
            else:
                owner._buffers[leaf] = None
            self.ties[name] = source


class _Names:
    """The names of a record as the model has them."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model, self.record = model, record
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        self.known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self.known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def name(self, saved: str) -> str:
        """The name in the model of a module, parameter, buffer or stored tensor; "" where it has none."""
        owner, _, leaf = saved.rpartition(".")
        if owner in self.record["modules"]:
            return f"{fit}.{leaf}" if (fit := self._fit(owner)) else ""
        if (packed := _PACKED.search(leaf)) and saved[: -len(packed[0])] in self.record["parameters"]:
            return f"{fit}{packed[0]}" if (fit := self._fit(saved[: -len(packed[0])])) else ""
        return self._fit(saved)

    def _fit(self, saved: str) -> str:
        """What the model has: the name itself, or the name with or without `base_model_prefix`."""
        for candidate in (saved, saved.removeprefix(f"{self.prefix}."), f"{self.prefix}.{saved}"):
            if candidate in self.known:
                return candidate
        return ""

    def records(self, named: Mapping[str, Record], saved: torch.dtype, asked: torch.dtype) -> dict[str, Record]:
        """Records by the model's names, with the dtype that is asked for; those of other parts are left out."""
        found: dict[str, Record] = {}
        for name, record in named.items():
            local = self._fit(name)
            if not local:
                continue
            if "same" in record:
                found[local] = {"same": self._fit(record["same"])}
                continue
            own = dtype_name(asked) if record["dtype"] == dtype_name(saved) else record["dtype"]
            found[local] = {**record, "dtype": own}
        return found

    def check(self, saved: Saved) -> None:
        """Raise ValueError where the model is not one that the record is of."""
        wanted = [*self.record["modules"], *self.record["parameters"]]
        missing = [name for name in wanted if not self._fit(name)]
        own = float_class(self.model).__name__
        if missing and (own == self.record["class"] or not (saved.modules or saved.parameters)):
            raise self._misfit(f"none of the name {missing[0]!r}", own)
        for name, record in (*saved.modules.items(), *saved.parameters.items()):
            if (shape := other_shape(self.model, name, record)) is not None:
                raise self._misfit(f"{name!r} of shape {list(shape)}, not {record['shape']}", own)

    def _misfit(self, found: str, own: str) -> ValueError:
        return ValueError(
            explain(
                f"the saved model does not fit {own}",
                expected=f"a {self.record['class']}, or a class that shares its modules",
                found=found,
                next_step=f"load it by {self.record['class']}.from_pretrained, with the config.json beside the weights",
            )
        )


def _untied(model: nn.Module, saved: Saved) -> tuple[Note, ...]:
    """Notes on weights of a head that the saved model had not, and whose table is packed."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    what = "is in no file, and the table that it would be tied to is packed: its values are new and random"
    step = f"quantize and save the {float_class(model).__name__} itself"
    return tuple(
        Note(name.removesuffix(".weight"), f"its {name.rpartition('.')[2]} {what}", step)
        for name, table in known.items()
        if name in names and table not in names and name not in saved.tensors
    )


def keep_float_ties(model: nn.Module) -> None:
    """Let transformers tie only what is a parameter still, also when `tie_weights` is called again; packed tables are
    tied by qfx."""
    for module in model.modules():
        known = getattr(module, "all_tied_weights_keys", None)
        if not known:
            continue
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        kept = {a: b for a, b in known.items() if a in names and b in names}
        if len(kept) < len(known):
            module.all_tied_weights_keys = kept  # type: ignore[assignment]
            module._tied_weights_keys = dict(kept)  # type: ignore[assignment]


def shield(model: nn.Module, *, on: bool) -> None:
    """Keep transformers, which gives first values to what no file held, from quantized weights: it would read them
    whole and draw random numbers. A module with packed parameters still gets its passing buffers."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._is_hf_initialized = True  # type: ignore[assignment]
        elif getattr(module, "qfx_packed", None):
            if on:
                module.__dict__[LOADING] = True
            else:
                module.__dict__.pop(LOADING, None)


def _is_packed(model: nn.Module, name: str) -> bool:
    owner, leaf = _split(model, name)
    packed = any(leaf.startswith(f"{key}_w_") for key in getattr(owner, "qfx_packed", {}))
    return packed or isinstance(owner, PackedModule)


def _cast(tensor: Tensor, name: str, saved: torch.dtype, asked: torch.dtype) -> Tensor:
    """Biases take the model's dtype; codes and scales keep theirs."""
    return tensor.to(asked) if name.rpartition(".")[2] == "bias" and tensor.dtype == saved else tensor


def _split(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
