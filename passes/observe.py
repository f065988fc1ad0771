"""Observers in the graph: a node without users beside each value to be watched, and its removal.

    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=u8 w=i8/ch
    ->
    %observe: NoneType = qfx_observers.0(%x)
    %linear: f32[2,3] = aten.linear(%x, @fc.weight, @fc.bias)  # x=u8 w=i8/ch

`remove_observers` gives the former text back. Readers of one value (q, k, v) share one observer, and so do the inputs
of all calls of one shared layer, since a layer has one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.calibration.observers import Observer
from qfx.calibration.padding import Attended, in_positions, with_heads
from qfx.calibration.positions import rows_of
from qfx.errors import Note

Key = tuple[str, str]
Make = Callable[[fx.Node, str], Observer | None]
Roles = Callable[[fx.Node], Iterable[str]]

_HOLDER = "qfx_observers"
_HEADS = ("q", "k", "v")  # [B, H, T, D]
_OPERAND = {"x": 0, "w": 0, "q": 0, "k": 1, "v": 2}  # role -> position of the value among the node's arguments


@dataclass(eq=False)
class Observers(Mapping[Key, Observer]):
    """(FQN of a node, role) -> its observer; several keys may have the same one. batch: number of the running batch.

    attended: positions of the running batch that are no padding (see `qfx.calibration.padding`)."""

    found: dict[Key, Observer] = field(default_factory=dict)
    batch: int | None = None
    attended: Attended = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Observer:
        return self.found[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def notes(self) -> list[Note]:
        """One for each key that saw no data."""
        return [
            Note(fqn, f"no calibration data reached its {role!r}", "give data that reaches it, or a dynamic format")
            for (fqn, role), observer in self.found.items()
            if observer.seen == 0
        ]


class _Observe(nn.Module):
    _is_impure = True  # so that clean-up keeps a call that nobody reads

    def __init__(self, observer: Observer, observers: Observers, *, heads: bool) -> None:
        super().__init__()
        self.observer, self.observers, self.heads = observer, observers, heads

    def forward(self, x: Tensor, like: Tensor | None = None, *picks: Tensor) -> None:
        """like, picks: where the rows x are positions, the `Rows` of them. An interpreter would keep a result."""
        kept = self.observers.attended
        if self.heads:
            kept = with_heads(kept, x)
        elif like is not None:
            x, kept = in_positions(x, kept, tuple(like.shape[:2]), picks)
        self.observer.update(x, self.observers.batch, kept)


def insert_observers(
    gm: fx.GraphModule, make: Make, roles: Roles = annotation.get, *, alike: Callable[[str], str] = str
) -> Observers:
    """Watch the value of every (node, role) for which `make` gives an observer.

    Roles: x (input), w (what the weight multiplies: the input, too), q, k, v (inputs of attention), y (result), as far
    as `roles` names them for the node: left out, those that it is annotated with. `make` may be asked for several keys
    of one value: of observers with equal settings the first is used for all. alike: FQN -> what nodes that must have
    one observer have in common, such as the first name of a module under several names.
    """
    assert not hasattr(gm, _HOLDER), "the graph has observers already; remove them first"
    observers = Observers()
    shared = _Shared()
    wanted: list[tuple[fx.Node, Key, Observer]] = []
    for node in gm.graph.nodes:
        for role in roles(node) if node.op == "call_function" else ():
            value = _value(node, role)
            observer = make(node, role) if value is not None else None
            if value is not None and observer is not None:
                key = (graph.fqn_of(node), role)
                shared.join(value.name, f"{alike(key[0])}/{role}")
                wanted.append((value, key, observer))
    used: dict[tuple[str, object], Observer] = {}
    placed: set[tuple[str, int]] = set()
    for value, key, candidate in wanted:
        observer = used.setdefault((shared.root(value.name), candidate.config), candidate)
        if observer is candidate:
            observer.name = " ".join(key)
        observers.found.setdefault(key, observer)
        if (value.name, id(observer)) not in placed:
            placed.add((value.name, id(observer)))
            _place(gm, value, _Observe(observer, observers, heads=key[1] in _HEADS), len(placed) - 1)
    return observers


def remove_observers(gm: fx.GraphModule) -> bool:
    """Take every observer out again. Says whether there were any."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_module" and str(n.target).startswith(f"{_HOLDER}.")]
    for node in nodes:
        gm.graph.erase_node(node)
    if hasattr(gm, _HOLDER):
        delattr(gm, _HOLDER)
    if nodes:
        gm.recompile()
    return bool(nodes)


def _value(node: fx.Node, role: str) -> fx.Node | None:
    """The node whose value the role is about; None where there is none to watch (weights, softmax inside attention)."""
    if role == "y":
        return node
    at = _OPERAND.get(role)
    value = node.args[at] if at is not None and at < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


def _place(gm: fx.GraphModule, value: fx.Node, module: _Observe, number: int) -> None:
    rows = None if module.heads else rows_of(value)
    given = () if rows is None else (rows.like, *rows.picks)
    gm.add_submodule(f"{_HOLDER}.{number}", module)
    before = value.next
    while before.op == "placeholder":
        before = before.next
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("call_module", f"{_HOLDER}.{number}", (value, *given), name="observe")
    node.meta["val"] = None


class _Shared:
    """Values and keys that must have one observer, as a union-find."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (up := self.parent.setdefault(name, name)) != name:
            name = up
        return name

    def join(self, one: str, other: str) -> None:
        self.parent[self.root(one)] = self.root(other)
