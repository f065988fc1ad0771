"""Decoders with a cache as one graph: the same file reads a prompt and writes token after token."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.capture import Captured, capture_export
from qfx.errors import Note, UnsupportedError, explain
from qfx.format import Format
from qfx.passes.kv_cache import kv_cache, shared
from qfx.passes.kv_quantize import kv_quantize

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
_BATCH, _NEW, _OLD = 2, 3, 5  # sizes of the example: different ones, none of them 1


class Part(nn.Module):
    """Another forward of a model, or of a part of it. Its parameters have the model's own names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._call = [model]  # in a list: it is no sub-module
        self.training = model.training


class _Cached(Part):
    """A causal model whose cache is an argument and a result.

    widths: (heads, elements of a head) of each tensor of the cache.
    """

    def __init__(self, model: nn.Module, widths: Mapping[str, tuple[int, int]], *, last_only: bool) -> None:
        super().__init__(model)
        self._widths = widths
        accepted = inspect.signature(model.forward).parameters
        self._positions = POSITIONS in accepted
        self._last = {"logits_to_keep": 1} if last_only and "logits_to_keep" in accepted else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: dict[str, Tensor], position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        from transformers import DynamicCache

        if past:
            self._check(input_ids, attention_mask, past)
        cache = DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[f"{i}_key"], past[f"{i}_value"], i)
        given: dict[str, Any] = {MASK: attention_mask, **self._last}
        if self._positions:
            given[POSITIONS] = position_ids
        found = self._call[0].forward(input_ids=input_ids, past_key_values=cache, use_cache=True, **given)
        results = {"logits": found.logits}
        for i, layer in enumerate(found.past_key_values.layers):
            results |= {PRESENT.format(i, "key"): layer.keys, PRESENT.format(i, "value"): layer.values}
        return results

    def _check(self, ids: Tensor, mask: Tensor, past: Mapping[str, Tensor]) -> None:
        """What is so in every call, said before torch finds it out layer by layer, which takes it a quarter longer: the
        mask covers cached and new tokens, and all caches are as long."""
        rows, length = ids.shape[0], past["0_key"].shape[2]
        torch._check(mask.shape[0] == rows)
        torch._check(mask.shape[1] == length + ids.shape[1])
        for name, tensor in past.items():
            heads, width = self._widths[name]
            for size, wanted in zip(tensor.shape, (rows, heads, length, width), strict=True):
                torch._check(size == wanted)


def capture_decoder(model: nn.Module, *, last_only: bool) -> tuple[Captured, dict[str, str]]:
    """The model's graph with its cache as inputs and outputs, and the names that its inputs have in a file.

    Raises UnsupportedError for a model that keeps no plain cache of keys and values.
    """
    layers = _layers(model)
    example: dict[str, Any] = {
        IDS: torch.arange(_BATCH * _NEW).reshape(_BATCH, _NEW) + 3,
        MASK: torch.ones(_BATCH, _OLD + _NEW, dtype=torch.int64),
    }
    past, names = dict[str, Tensor](), {}
    for i, layer in enumerate(layers):
        for what, held in zip(("key", "value"), layer, strict=True):
            past[f"{i}_{what}"] = held.new_zeros(_BATCH, held.shape[1], _OLD, held.shape[3])
            names[f"past_{i}_{what}"] = PAST.format(i, what)
    wrapped = _Cached(model, {name: (t.shape[1], t.shape[3]) for name, t in past.items()}, last_only=last_only)
    if wrapped._positions:
        example[POSITIONS] = torch.arange(_OLD, _OLD + _NEW).expand(_BATCH, -1).contiguous()
    example["past"] = past
    return of_any_length(capture_export(wrapped, (), example), model), names


def of_any_length(captured: Captured, model: nn.Module) -> Captured:
    """A decoder's graph. Raises UnsupportedError where it would hold for one number of tokens alone."""
    if captured.fixed:
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} cannot be traced for any number of tokens: {captured.fixed}",
                expected="a decoder that reads any number of tokens",
                next_step="export it without a cache: give a path that ends in .onnx",
            )
        )
    return captured


def fuse_cache(captured: Captured, pasts: Collection[str], *, total: str = MASK, new: str = IDS) -> bool:
    """Attention over a cache becomes one operator; True where every cache may grow in its own memory.

    Names of inputs: pasts of the caches, total of the mask of all tokens, new of the ids.
    """
    kv_cache(captured.gm, pasts=list(pasts), total=total, new=new)
    return is_shared(captured, pasts)


def is_shared(captured: Captured, pasts: Collection[str]) -> bool:
    """May every cache grow in its own memory?"""
    return set(shared(captured.gm).get("names", ())) == set(pasts)


def quantize_cache(
    captured: Captured, names: Mapping[str, str], formats: Mapping[str, Format], scales: Sequence[Mapping[str, Tensor]]
) -> list[Note]:
    """Store the caches of fused attention in these formats of "k" and "v"; what stays in float is told.

    scales: of each layer's "key" and "value", f32 [G, D]. Raises ValueError for 4 bits and heads of odd size.
    """
    gm = captured.gm
    found = {f"past_{i}_{what}": scale for i, layer in enumerate(scales) for what, scale in layer.items()}
    odd = next((scale.shape[-1] for scale in found.values() if scale.shape[-1] % 2 and formats["k"].bits < 8), None)
    if odd is not None:
        raise ValueError(
            explain(
                "two codes of 4 bits lie in a byte", expected="heads of even size", found=str(odd), next_step="kv='i8'"
            )
        )
    kv_quantize(gm, formats=formats, scales=found)
    inputs = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    return [
        Note(name.removesuffix(".key"), "its cache stays in float: more than attention reads it", "leave kv= out")
        for past, name in names.items()
        if name.endswith(".key") and inputs[past].meta["val"].is_floating_point()
    ]


def stored_sizes(captured: Captured, names: Mapping[str, str]) -> list[tuple[int, int]]:
    """(key heads, elements in which a head is stored) of each layer's cache."""
    inputs = {n.name: n for n in captured.gm.graph.nodes if n.op == "placeholder"}
    keys = [inputs[past].meta["val"].shape for past in names if past.endswith("_key")]
    return [(int(shape[1]), int(shape[3])) for shape in keys]


def _layers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, H, 2, D] of each layer's cache after two tokens, in the dtype that the model gives them."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[3, 4]]), use_cache=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", None)
    held = [getattr(layer, what, None) for layer in layers or () for what in ("keys", "values")]
    plain = [x for x in held if isinstance(x, Tensor) and x.dim() == 4]
    if not held or len(plain) < len(held) or any(_has_more(layer) for layer in layers or ()):
        raise UnsupportedError(
            explain(
                f"{type(model).__name__} keeps no plain cache of keys and values",
                expected="past_key_values with keys and values [B, H, S, D], and nothing else, in every layer",
                found=_kinds(getattr(found, "past_key_values", None), layers or ()),
                next_step="export it without a cache: give a path that ends in .onnx",
            )
        )
    return list(zip(plain[::2], plain[1::2], strict=True))


def _has_more(layer: Any) -> bool:
    """Does a layer keep tensors beside keys and values, such as the state of a recurrence?"""
    known = [getattr(layer, what, None) for what in ("keys", "values")]
    tensors = [x for x in pytree.tree_leaves(vars(layer)) if isinstance(x, Tensor) and x.dim() > 0]
    return any(all(x is not k for k in known) for x in tensors)


def _kinds(cache: Any, layers: Iterable[Any]) -> str:
    """`DynamicCache of LinearAttentionLayer, DynamicLayer`."""
    kinds = list(dict.fromkeys(type(layer).__name__ for layer in layers))
    return type(cache).__name__ + (f" of {', '.join(kinds)}" if kinds else "")
