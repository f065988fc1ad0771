"""Texts of several lengths brought to one, for a forward that a trace can take for one length alone.

A loop over tokens (Mamba), or over chunks of them (Gated DeltaNet of Qwen3-Next and Qwen3.5, MiniMax), becomes as many
steps of the graph as the example has. Filled with padding that the attention mask leaves out, all batches fit one
graph, and no statistic counts what was filled in. Whether a model's tokens are the same with it is tried, not assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from qfx.data import Call

# What a batch of texts holds [B, T] -> the value that fills it.
_FILLED = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": -100}
_NEAR = 5e-2  # relative difference of a text's results: kernels for other lengths round otherwise, in bf16 above all


def filled(model: nn.Module, calls: Sequence[Call]) -> tuple[list[Call], range] | None:
    """The calls with all texts as long as the longest, with attention masks, and the lengths they had (from the
    shortest to the longest); None where they are not texts of several lengths, the forward takes no mask, or it
    computes other things for a text that is filled."""
    texts = [_text(model, call) for call in calls]
    if any(text is None for text in texts):
        return None
    known = [text for text in texts if text is not None]
    lengths = [text["input_ids"].shape[1] for text in known]
    longest, shortest = max(lengths), min(range(len(known)), key=lengths.__getitem__)
    found: list[Call] = [((), _to(text, longest)) for text in known]
    if longest == lengths[shortest] or not _alike(model, calls[shortest], found[shortest], lengths[shortest]):
        return None
    return found, range(lengths[shortest], longest + 1)


def _text(model: nn.Module, call: Call) -> dict[str, Any] | None:
    """The arguments by name, with an attention mask; None where there are other tensors than a text's [B, T]."""
    args, kwargs = call
    parameters = inspect.signature(model.forward).parameters
    named = {**dict(zip(parameters, args, strict=False)), **kwargs}
    ids = named.get("input_ids")
    if len(args) > len(parameters) or "attention_mask" not in parameters or not isinstance(ids, Tensor):
        return None
    tensors = {name: v for name, v in named.items() if any(isinstance(x, Tensor) for x in pytree.tree_leaves(v))}
    if any(name not in _FILLED or v.shape != ids.shape or v.dim() != 2 for name, v in tensors.items()):
        return None
    if not isinstance(named.get("attention_mask"), Tensor):
        named["attention_mask"] = torch.ones_like(ids)
    return named


def to_length(name: str, value: Tensor, length: int) -> Tensor:
    """What a batch of texts holds by this name, [B, T] -> [B, length]."""
    return pad(value, (0, length - value.shape[1]), value=_FILLED[name])


def _to(text: dict[str, Any], length: int) -> dict[str, Any]:
    return {name: to_length(name, v, length) if isinstance(v, Tensor) else v for name, v in text.items()}


def _alike(model: nn.Module, call: Call, new: Call, length: int) -> bool:
    """Whether the results of a text's tokens are the same beside what fills it."""
    try:
        with torch.no_grad():
            wanted, found = (_results(model(*args, **kwargs)) for args, kwargs in (call, new))
    except Exception:  # noqa: BLE001  (any model's own code; what it does not take is told where the graph runs)
        return False
    mask = new[1]["attention_mask"][:, :length].bool()
    pairs = [
        (a[mask], b[:, :length][mask]) if a.dim() > 1 and a.shape[1] == length else (a, b)
        for a, b in zip(wanted, found, strict=False)
    ]
    return bool(pairs) and len(wanted) == len(found) and all(_near(a, b) for a, b in pairs)


def _results(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _near(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape:
        return False
    wanted, found = wanted.double(), found.double()
    return float((found - wanted).norm()) <= _NEAR * float(wanted.norm())
