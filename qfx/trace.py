"""Retrace a graph of fake tensors into functional, pre-dispatch ATen: the one normal form behind both doors.

Composite operators (linear, layer_norm, scaled_dot_product_attention, ...) are kept, in-place operators become
functional ones, switches of grad mode disappear, higher-order wrappers around sub-graphs are inlined, and the fused
layer of nn.TransformerEncoder is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, PythonFunctionalizeAPI
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify

from qfx.encoder_layer import FUSED, encoder_layer
from qfx.errors import UnsupportedError
from qfx.vmaps import has_vmaps, levels_kept, without_vmaps

_DROPPED = {"_set_grad_enabled", "_log_api_usage_once", "_functorch_set_grad", "_exit_autocast"}
_DROPOUTS = {torch.ops.aten.dropout.default, torch.nn.functional.dropout, torch.dropout}
# name of the higher-order wrapper -> position of its sub-graph among the arguments
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0, "wrap": 0}


class _Inline(fx.Interpreter):
    """Runs a graph, inlining wrappers of sub-graphs and dropping grad-mode switches and known scalars."""

    def __init__(self, gm: fx.GraphModule, scalars: dict[str, float]) -> None:
        super().__init__(gm)
        self.scalars = scalars

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_method" and n.target == "item" and getattr(n.args[0], "name", "") in self.scalars:
            return self.scalars[getattr(n.args[0], "name", "")]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        if name in _DROPPED:
            return None
        if target in _DROPOUTS and not in_training(args, kwargs):
            # as eager gives it: the same tensor, which may change in place afterwards
            return args[0] if args else kwargs["input"]
        if target in FUSED:
            return encoder_layer(*args, **kwargs)
        if name == "_enter_autocast":
            _refuse_autocast(enabled=args[2] if len(args) > 2 else kwargs.get("enabled", True))
            return None
        if isinstance(target, torch._ops.HigherOrderOperator) and name in _WRAPPERS:
            at = _WRAPPERS[name]
            if name == "wrap_with_autocast":
                _refuse_autocast(enabled=args[2])
            return _Inline(args[at], {}).run(*args[at + 1 :])
        return super().call_function(target, args, kwargs)


def in_training(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of dropout is told of it: `training` of torch.nn.functional.dropout, `train` of torch.dropout."""
    return args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))


def _refuse_autocast(*, enabled: bool) -> None:
    if enabled:
        raise UnsupportedError(
            "expected a graph without autocast regions, found one that enables autocast; "
            "next step: cast the model with model.to(dtype) instead of torch.autocast"
        )


def retrace(
    gm: fx.GraphModule, fakes: Sequence[Any], scalars: dict[str, float] | None = None
) -> tuple[fx.GraphModule, list[int]]:
    """Trace `gm` over fake inputs (FakeTensor, SymInt or plain values) into functional pre-dispatch ATen.

    Returns the new GraphModule, whose output is `(new values of mutated inputs..., outputs...)`, flat, and the indices
    of the inputs that the graph mutates. Raises whatever torch raises where an operator cannot be traced.
    """
    mutated: list[int] = []
    if has_vmaps(gm):
        with _mode_of(fakes):
            gm = without_vmaps(gm, fakes)
    interpreter = _Inline(gm, scalars or {})

    def functional(*args: Any) -> tuple[Any, ...]:
        mode = FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=False)
        api = PythonFunctionalizeAPI(mode, pre_dispatch=True)
        wrapped = api.wrap_tensors(args)
        with mode, torch.fx.traceback.preserve_node_meta(), maybe_enable_thunkify():
            out = interpreter.run(*wrapped)
        mutated[:] = [i for i, value in enumerate(wrapped) if _was_mutated(value)]
        news = tuple(wrapped[i] for i in mutated)
        flat, _ = torch.utils._pytree.tree_flatten(out)
        return tuple(api.unwrap_tensors(value) for value in (*news, *flat))

    traced = _traced(functional, fakes)
    return traced, mutated


def _traced(function: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    with _mode_of(fakes), torch.no_grad(), levels_kept():
        return make_fx(function, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


def _mode_of(fakes: Sequence[Any]) -> FakeTensorMode:
    found = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
    return found or FakeTensorMode(allow_non_fake_inputs=True)


def _was_mutated(value: Any) -> bool:
    if not isinstance(value, FunctionalTensor):
        return False
    torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]
    return bool(torch._functionalize_has_data_mutation(value.elem))  # type: ignore[attr-defined]
