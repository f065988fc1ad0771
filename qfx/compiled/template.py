"""A graph of Dynamo's in normal form, apart from its weights: one graph serves every set of weights that it is called
with (layers that share their forward, deep copies, swapped parameters).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.capture import Captured, capture_dynamo
from qfx.names import Translation
from qfx.pipeline import prepare
from qfx.sources import static_names

_VERSION = attrgetter("_version")
_PLACE = Tensor.data_ptr
_VALUE = attrgetter("value")
_LOOKS = 3  # words of each tensor that are compared
_NOWHERE = ctypes.c_int64(0)
_INTEGERS = (ctypes.c_int64, ctypes.c_int32, ctypes.c_int16, ctypes.c_int8)
_PACKED = {"qfx::linear", "qfx::embedding", "qfx::dequantize", "qfx::grouped_linear_quant"}
_VIEWS = {"t", "transpose", "permute", "reshape"}

Picker = Callable[[Sequence[Any]], Sequence[Any]]
Key = tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What tells that tensors changed: their versions (0 where one counts none), their places in memory, and a few
    words of each that lies on the CPU: its first, middle and last eight bytes. Those alone tell of a change in place
    through `.data` (merged adapters of peft, moving averages) and of inference tensors, which count no versions.
    """

    versions: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[int, ...]
    cells: tuple[Any, ...] = field(repr=False, compare=False)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> State:
        """The state of the tensors now."""
        try:
            versions = tuple(map(_VERSION, tensors))
        except RuntimeError:
            versions = tuple(0 if t.is_inference() else int(t._version) for t in tensors)
        cells = tuple(cell for tensor in tensors for cell in _cells(tensor))
        if all(cell is _NOWHERE for cell in cells):  # on a GPU: nothing is looked at in a call
            cells = ()
        return cls(versions, tuple(map(_PLACE, tensors)), tuple(map(_VALUE, cells)), cells)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are in this state now: `self == State.of(tensors)`, which every call asks."""
        try:
            if self.versions != tuple(map(_VERSION, tensors)):
                return False
        except RuntimeError:  # inference tensors
            return self == State.of(tensors)
        # words are looked at where the tensors still lie
        return self.places == tuple(map(_PLACE, tensors)) and self.words == tuple(map(_VALUE, self.cells))

    def each(self) -> list[tuple[Any, ...]]:
        """The state of each tensor alone."""
        words = [self.words[_LOOKS * i : _LOOKS * (i + 1)] for i in range(len(self.versions))]
        return list(zip(self.versions, self.places, words, strict=True))


def _cells(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor is looked into, `_LOOKS` of ctypes' integers in its own memory. Of one that is not in one piece
    the first element is."""
    place = tensor.data_ptr() if tensor.layout == torch.strided and tensor.device.type == "cpu" else 0
    size = (tensor.numel() if tensor.is_contiguous() else min(1, tensor.numel())) * tensor.element_size()
    if not place or not size:
        return (_NOWHERE,) * _LOOKS
    kind: Any = next(kind for kind in _INTEGERS if size >= ctypes.sizeof(kind))
    last = size - ctypes.sizeof(kind)
    return tuple(kind.from_address(place + at) for at in (0, last // 2 // 8 * 8, last))


@dataclass(frozen=True)
class _Entry:
    """What was made for one set of weights, and the state they were in."""

    made: Any
    state: State
    weights: tuple[weakref.ref[Tensor], ...]


@dataclass(frozen=True)
class Interface:
    """How a graph of Dynamo's is fed, apart from the graph itself: see `Captured` for all but the last two.

    watched: indices of all weights among the caller's arguments. plain: those of buffers that no linear-like node reads
    as its weight.
    """

    inputs: tuple[int, ...]
    params: Mapping[str, int]
    tied: Mapping[int, str]
    scalars: Mapping[int, float]
    mutations: Mapping[int, int]
    watched: tuple[int, ...]
    plain: frozenset[int]

    @classmethod
    def of(cls, captured: Captured, statics: Collection[int], args: Sequence[Any], live: Collection[int]) -> Interface:
        """That of a captured and prepared graph; statics: indices of all parameters and buffers."""
        changing = {*captured.mutations.values(), *live}
        watched = tuple(i for i in statics if i not in changing)
        feeds = {f.name: getattr(captured, f.name) for f in fields(cls) if hasattr(captured, f.name)}
        return cls(**feeds, watched=watched, plain=_plain_buffers(captured, watched, args))


@dataclass(frozen=True, eq=False)
class Template:
    """interface: how the graph is fed. live: indices of buffers that are inputs, since their values change. weights,
    inputs: out of the caller's arguments the weights, and the graph's inputs in the order of its placeholders. traced:
    the prepared graph, whose weights have no content, from the caller's arguments.
    """

    interface: Interface
    live: frozenset[int]
    weights: Picker = field(repr=False)
    inputs: Picker = field(repr=False)
    traced: Callable[[Sequence[Any]], fx.GraphModule] = field(repr=False)
    _entries: dict[Key, _Entry] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, gm: fx.GraphModule, args: Sequence[Any], live: Collection[int] = ()) -> Template:
        """Capture and prepare a graph of Dynamo's. Raises what capture and the passes raise."""
        captured = _captured(gm, args, live)
        interface = Interface.of(captured, static_names(gm, args), args, live)
        return cls._fed(interface, live, lambda _: captured.gm)

    @classmethod
    def known(cls, gm: fx.GraphModule, live: Collection[int], interface: Interface) -> Template:
        """What `of` gives, where the interface is known already: the graph is captured when it is needed."""
        found: list[fx.GraphModule] = []

        def traced(args: Sequence[Any]) -> fx.GraphModule:
            if not found:
                found.append(_captured(gm, args, live).gm)
            return found[0]

        return cls._fed(interface, live, traced)

    @classmethod
    def _fed(cls, interface: Interface, live: Collection[int], traced: Any) -> Template:
        return cls(interface, frozenset(live), _picker(interface.watched), _picker(interface.inputs), traced)

    def find(self, args: Sequence[Any]) -> Any:
        """What was kept for the weights among these arguments, None where there is nothing or they changed since."""
        tensors = self.weights(args)
        entry = self._entries.get(tuple(map(id, tensors)))
        return entry.made if entry is not None and entry.state.holds(tensors) else None

    def knows(self, args: Sequence[Any]) -> bool:
        """Whether something was kept for the tensors among these arguments, in whatever state they were."""
        return tuple(map(id, self.weights(args))) in self._entries

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

    def with_weights(self, args: Sequence[Any], translation: Translation) -> fx.GraphModule:
        """The graph with its own nodes, holding the caller's weights under translated names (no copies)."""
        gm = graph.copy(self.traced(args))
        for node in gm.graph.nodes:
            node.meta["qfx_module"] = translation(str(node.meta.get("qfx_module", "")))
            index = self.interface.params.get(str(node.target)) if node.op == "get_attr" else None
            if index is not None:
                node.target = translation(str(node.target))
                graph.set_tensor(gm, node.target, args[index])
        gm.recompile()
        return gm

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether weights that shared memory when they were captured still do."""
        shared, params = self.interface.tied.items(), self.interface.params
        return all(args[i].data_ptr() == args[params[fqn]].data_ptr() for i, fqn in shared)

    def newly_live(self, args: Sequence[Any]) -> set[int]:
        """Buffers that alone changed since the last time and that could be inputs as well; else nothing."""
        if not self._entries:
            return set()
        entry = next(reversed(self._entries.values()))
        before, now = entry.state.each(), State.of(self.weights(args)).each()
        changed = {
            i
            for i, ref, old, new in zip(self.interface.watched, entry.weights, before, now, strict=True)
            if ref() is not args[i] or old != new
        }
        return changed if changed <= self.interface.plain else set()


def _captured(gm: fx.GraphModule, args: Sequence[Any], live: Collection[int]) -> Captured:
    """The graph in normal form, its weights without content."""
    captured = capture_dynamo(gm, args, live)
    prepare(captured.gm)
    for fqn, i in captured.params.items():
        graph.set_tensor(captured.gm, fqn, torch.empty(args[i].shape, dtype=args[i].dtype, device="meta"))
    return captured


def _plain_buffers(captured: Captured, watched: Sequence[int], args: Sequence[Any]) -> frozenset[int]:
    """Indices of buffers that no linear-like node reads as its weight."""
    names = {**{i: fqn for fqn, i in captured.params.items()}, **captured.tied}
    nodes = {str(n.target): n for n in captured.gm.graph.nodes if n.op == "get_attr"}
    plain = {i for i in watched if not isinstance(args[i], nn.Parameter) and names.get(i) in nodes}
    return frozenset(i for i in plain if not _is_weight(nodes[names[i]]))


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
