"""QLoRA: adapters of peft above a packed model.

    model = qfx.quantize(model, "nf4")                              # packed and frozen
    model = qfx.add_adapters(model, LoraConfig(task_type="CAUSAL_LM"))
    ...                                                             # Trainer, accelerate or a loop of your own
    model.save_pretrained(folder)                                   # the adapters alone
    model = qfx.load_adapters(packed_model, folder)
    merged = qfx.merge_adapters(model, data)                        # merged.model, and what rounding again loses

On a model of `qfx.prepare_qat` adapters train inside the fake quantization: `qfx.convert(model.merge_and_unload())` is
what was trained.

Dettmers et al. 2023, "QLoRA". peft is imported where it is used; nothing of it is changed: qfx's layer stands in the
LoraConfig of the one model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qfx.errors import check_flags, explain
from qfx.live.mixed import QuantMixed
from qfx.live.modules import PREPARED, PackedModule, QuantConv, QuantLinear
from qfx.training.fake_modules import is_read

_ALL = "all-linear"  # peft's word
_HEADED = ("SEQ_CLS", "TOKEN_CLS")


def add_adapters(model: nn.Module, config: Any, name: str = "default") -> Any:
    """peft's model: adapters as `config` (a LoraConfig) says, on a packed or prepared `model`; linears are wrapped.

    What `peft.get_peft_model` gives, with qfx's layers on quantized linears. Everything but the adapters is frozen.
    Raises ValueError for a float model, for adapters on quantized tables and the like and on a prepared linear whose
    weight another module has, too, and for modules to be trained whole (`modules_to_save`) that are packed; ImportError
    without peft.
    """
    peft = _peft()
    return peft.get_peft_model(model, lora_config(model, config), adapter_name=name)


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> Any:
    """Adapters that peft's `save_pretrained` wrote, on a quantized model. trainable: to go on training them. Raises
    ValueError as `add_adapters` does."""
    check_flags(trainable=trainable)
    peft = _peft()
    config = lora_config(model, peft.PeftConfig.from_pretrained(os.fspath(folder)))
    return peft.PeftModel.from_pretrained(model, os.fspath(folder), config=config, is_trainable=trainable)


def lora_config(model: nn.Module, config: Any) -> Any:
    """`config` for code that calls peft itself: qfx's layer is registered in it, and "all-linear" means packed linears,
    too (as in peft, without the output head). Changes and returns `config`. Raises ValueError as `add_adapters` does.
    """
    _peft()
    from peft import LoraConfig

    from qfx.training.lora import FakeLoraLinear, PackedLoraLinear, Refused

    if not isinstance(config, LoraConfig):
        raise ValueError(
            explain("adapters on packed linears are LoRA", expected="a LoraConfig", found=type(config).__name__)
        )
    packed = {fqn: m for fqn, m in model.named_modules() if isinstance(m, PackedModule) or hasattr(m, "qfx_packed")}
    shared = _shared(model)
    fake: dict[type, Any] = {
        type(m): functools.partial(FakeLoraLinear, shared=shared) if _is_linear(m) else Refused
        for m in model.modules()
        if _is_fake(m)
    }
    if not packed and not fake:
        step = (
            "qfx.quantize(model, 'nf4') or qfx.prepare_qat(model, recipe) first; peft.get_peft_model takes float models"
        )
        raise ValueError(explain("nothing in the model is quantized", next_step=step))
    _check_whole(config, packed, [fqn for fqn, m in model.named_modules() if _is_fake(m)])
    if packed and isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL:
        config.target_modules = _linears(model)
    refused: dict[type, type] = {type(m): Refused for m in packed.values() if not _takes_adapter(m)}
    config._register_custom_module({**fake, **refused, QuantLinear: PackedLoraLinear, QuantMixed: PackedLoraLinear})
    return config


def _check_whole(config: Any, packed: Iterable[str], fake: Iterable[str]) -> None:
    """What peft would train or change in the weight itself must not be packed, and tables of which it trains single
    rows must not be prepared. packed, fake: names of modules."""
    asked = [*(config.modules_to_save or ()), *(config.target_parameters or ())]
    if str(getattr(config.task_type, "value", config.task_type)) in _HEADED:
        asked += ["classifier", "score"]  # peft trains them whole without being asked
    indices = config.trainable_token_indices
    tokens = list(indices) if isinstance(indices, Mapping) else ["embed_tokens"] if indices else []
    asked += tokens
    for name in asked:
        for fqn in packed:
            if _is_called(fqn, name) or _is_called(fqn, name.rpartition(".")[0]):
                step = f"quantize with ignore=[{name!r}], or leave it out of the LoraConfig"
                raise ValueError(explain(f"{name!r} should learn, but its weight is packed", node=fqn, next_step=step))
    for name in tokens:
        for fqn in fake:
            if _is_called(fqn, name):
                what = f"single rows of {name!r} should learn, which peft reads as they are, without fake quantization"
                step = f"modules_to_save=[{name!r}] trains the whole table"
                raise ValueError(explain(what, node=fqn, next_step=step))


def _is_called(fqn: str, name: str) -> bool:
    return bool(name) and (fqn == name or fqn.endswith(f".{name}"))


def _is_fake(module: nn.Module) -> bool:
    """Whether adapters beside a prepared module would be lost or would not be rounded: all but attention alone."""
    kind = type(module)
    return hasattr(kind, PREPARED) and (hasattr(kind, "qfx_fake_names") or "fake_quant" in module._modules)


def _shared(model: nn.Module) -> dict[str, str]:
    """Name of each module whose weight another one has or reads, too -> what else merged adapters would change."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    read = {name: "what another forward reads" for name, module in model.named_modules() if is_read(module)}
    return read | {
        name: repr(next(n for n in names if n != name)) for names in owners.values() if len(names) > 1 for name in names
    }


def _is_linear(module: nn.Module) -> bool:
    return (
        "fake_quant" in module._modules and not isinstance(module, nn.Embedding) and not hasattr(module, "kernel_size")
    )


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
