"""A graph of Dynamo's in normal form, apart from its weights: one graph serves every set of weights that it is called
with (layers that share their forward, deep copies, swapped parameters).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.capture import Captured, capture_dynamo, static_names
from qfx.errors import Note
from qfx.names import Translation
from qfx.pipeline import prepare

_VERSION = attrgetter("_version")
_PACKED = {"qfx::linear", "qfx::embedding", "qfx::dequantize", "qfx::grouped_linear_quant"}
_VIEWS = {"t", "transpose", "permute", "reshape"}

Picker = Callable[[Sequence[Any]], Sequence[Any]]
Key = tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What tells that tensors changed: their versions (0 where one counts none) and their places in memory."""

    versions: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> State:
        """The state of the tensors now. Inference tensors count no versions: changing them in place goes unseen."""
        try:
            versions = tuple(map(_VERSION, tensors))
        except RuntimeError:
            versions = tuple(0 if t.is_inference() else int(t._version) for t in tensors)
        return cls(versions, tuple(map(Tensor.data_ptr, tensors)))


@dataclass(frozen=True)
class _Entry:
    """What was made for one set of weights, and the state they were in."""

    made: Any
    state: State
    weights: tuple[weakref.ref[Tensor], ...]


@dataclass(frozen=True, eq=False)
class Template:
    """captured: the prepared graph, whose weights have no content. notes: what preparing had to say. watched: indices
    of all weights among the caller's arguments. live: indices of buffers that are inputs, since their values change.
    """

    captured: Captured
    notes: tuple[Note, ...]
    watched: tuple[int, ...]
    live: frozenset[int]
    weights: Picker = field(repr=False)
    _entries: dict[Key, _Entry] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, gm: fx.GraphModule, args: Sequence[Any], live: Collection[int] = ()) -> Template:
        """Capture and prepare a graph of Dynamo's. Raises what capture and the passes raise."""
        captured = capture_dynamo(gm, args, live)
        notes = prepare(captured.gm)
        for fqn, i in captured.params.items():
            graph.set_tensor(captured.gm, fqn, torch.empty(args[i].shape, dtype=args[i].dtype, device="meta"))
        changing = {*captured.mutations.values(), *live}
        watched = tuple(i for i in static_names(gm, args) if i not in changing)
        return cls(captured, tuple(notes), watched, frozenset(live), _picker(watched))

    def find(self, args: Sequence[Any]) -> Any:
        """What was kept for the weights among these arguments, None where there is nothing or they changed since."""
        tensors = self.weights(args)
        entry = self._entries.get(tuple(map(id, tensors)))
        return entry.made if entry is not None and entry.state == State.of(tensors) else None

    def keep(self, args: Sequence[Any], state: State, made: Any) -> None:
        """Keep what was made for the weights among these arguments, in this state, as long as they live."""
        tensors = self.weights(args)
        key = tuple(map(id, tensors))
        own = weakref.ref(self)

        def forget(_: object) -> None:
            template = own()
            if template is not None:
                template._entries.pop(key, None)

        self._entries.pop(key, None)
        self._entries[key] = _Entry(made, state, tuple(weakref.ref(t, forget) for t in tensors))

    def inputs(self, args: Sequence[Any]) -> list[Any]:
        """The graph's inputs, in the order of its placeholders."""
        return [args[i] for i in self.captured.inputs]

    def with_weights(self, args: Sequence[Any], translation: Translation) -> fx.GraphModule:
        """The graph with its own nodes, holding the caller's weights under translated names (no copies)."""
        gm = graph.copy(self.captured.gm)
        for node in gm.graph.nodes:
            node.meta["qfx_module"] = translation(str(node.meta.get("qfx_module", "")))
            index = self.captured.params.get(str(node.target)) if node.op == "get_attr" else None
            if index is not None:
                node.target = translation(str(node.target))
                graph.set_tensor(gm, node.target, args[index])
        gm.recompile()
        return gm

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether weights that shared memory when they were captured still do."""
        shared = self.captured.tied.items()
        return all(args[i].data_ptr() == args[self.captured.params[fqn]].data_ptr() for i, fqn in shared)

    def newly_live(self, args: Sequence[Any]) -> set[int]:
        """Buffers that alone changed since the last time and that could be inputs as well; else nothing."""
        if not self._entries:
            return set()
        entry = next(reversed(self._entries.values()))
        before = zip(entry.weights, entry.state.versions, entry.state.places, strict=True)
        now = State.of(self.weights(args))
        changed = {
            i
            for i, (ref, *old), *new in zip(self.watched, before, now.versions, now.places, strict=True)
            if ref() is not args[i] or old != new
        }
        return changed if changed <= self._plain_buffers(args) else set()

    def _plain_buffers(self, args: Sequence[Any]) -> set[int]:
        """Indices of buffers that no linear-like node reads as its weight."""
        names = {**{i: fqn for fqn, i in self.captured.params.items()}, **self.captured.tied}
        nodes = {str(n.target): n for n in self.captured.gm.graph.nodes if n.op == "get_attr"}
        plain = {i for i in self.watched if not isinstance(args[i], nn.Parameter) and names.get(i) in nodes}
        return {i for i in plain if not _is_weight(nodes[names[i]])}


def _picker(indices: Sequence[int]) -> Picker:
    """A fast function that takes the items at `indices` out of a sequence."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: [values[i] for i in indices]


def _is_weight(node: fx.Node) -> bool:
    users = list(node.users)
    while users:
        user = users.pop()
        if graph.weight_of(user) is node or (user.op == "call_function" and graph.schema_name(user) in _PACKED):
            return True
        users += user.users if user.op == "call_function" and graph.op_name(user) in _VIEWS else ()
    return False
