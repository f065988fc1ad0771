"""One graph for all calls of some data, and their inputs of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.capture import Captured, capture_export
from qfx.common_sizes import OtherSize
from qfx.conditions import conditions, hold, sizes_of
from qfx.data import Call, roomiest
from qfx.errors import Note, explain
from qfx.filling import filled
from qfx.inputs import without_cache
from qfx.other_sizes import same_as
from qfx.traced_call import always_shared


def capture_calls(model: nn.Module, calls: Sequence[Call]) -> tuple[Captured, list[list[Any]], list[Note]]:
    """(graph, its flat inputs for each call, what users are to know), traced with the roomiest call.

    calls: what the model will see. Where the graph would not hold for the lengths of all texts, these are filled to one
    length (see `filling`), which is told. Raises UnsupportedError where torch.export does not take the model as one
    graph, ValueError where calls are not alike, or a graph cannot hold for all of them.
    """
    calls = [(args, without_cache(model, kwargs, args)) for args, kwargs in calls]
    shared = always_shared(calls)
    args, kwargs = roomiest(calls)
    try:
        captured = capture_export(model, args, kwargs, shared=shared, calls=calls)
        flat = _flat(captured, calls)
        if _unfit(captured, model, calls, flat) is None:
            return captured, flat, []
    except OtherSize:
        pass
    if found := _filled(model, calls):
        return found
    captured = capture_export(model, args, kwargs, shared=shared)
    flat = _flat(captured, calls)
    if (number := _unfit(captured, model, calls, flat)) is None:
        return captured, flat, []
    raise ValueError(
        explain(
            f"batch {number} of the data does not fit the graph, in which the model's forward fixed what it computes "
            "with a size (the steps of a loop over tokens)",
            expected=f"sizes like those of the largest batch, {_shapes_of((args, kwargs))}",
            found=f"{_shapes_of(calls[number - 1])}",
            next_step="cut the texts to one length, as qfx.data.text_batches does",
        )
    )


def _flat(captured: Captured, calls: Sequence[Call]) -> list[list[Any]]:
    return [captured.flatten(args, kwargs) for args, kwargs in calls]


def _filled(model: nn.Module, calls: Sequence[Call]) -> tuple[Captured, list[list[Any]], list[Note]] | None:
    """The same of texts that are filled to one length; None where that cannot be, or the graph reads no mask."""
    if (found := filled(model, calls)) is None:
        return None
    new, lengths = found
    captured = capture_export(model, *roomiest(new), calls=new)
    inputs = {n.meta["qfx_name"] for n in captured.gm.graph.find_nodes(op="placeholder")}
    if "attention_mask" not in inputs:
        return None
    reason = f"its forward computes with the number of tokens, which is {lengths[0]} to {lengths[-1]} in the data: "
    reason += f"texts were filled to {lengths[-1]} tokens, and no statistic counts what was filled in"
    step = "nothing, or cut texts to one length (qfx.data.text_batches does), which takes less time"
    return captured, _flat(captured, new), [Note(type(model).__name__, reason, step, minor=True)]


def _unfit(captured: Captured, model: nn.Module, calls: Sequence[Call], flat: Sequence[Sequence[Any]]) -> int | None:
    """The number of the first call that does not meet a condition of the trace, and for which the graph gives other
    results than the model."""
    environment, seen = captured.environment, set[tuple[int, ...]]()
    noted = conditions(environment) if environment is not None else []
    values = [n.meta["val"] for n in captured.gm.graph.find_nodes(op="placeholder")]
    for number, (call, inputs) in enumerate(zip(calls, flat, strict=True), 1):
        sizes = dict(_sizes(values, inputs))
        if tuple(sizes.values()) in seen:
            continue
        seen.add(tuple(sizes.values()))
        if not hold(noted, {**sizes_of(environment), **sizes}) and not same_as(captured, model, *call):
            return number
    return None


def _sizes(values: Sequence[Any], inputs: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """(symbol, its size in a call) of the graph's inputs."""
    for value, given in zip(values, inputs, strict=True):
        for size, own in zip(value.shape, given.shape, strict=True) if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                yield size.node.expr, own


def _shapes_of(call: Call) -> list[list[int]]:
    return [list(x.shape) for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
