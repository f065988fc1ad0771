"""Calls of an op whose inputs look like those of earlier calls repeat what these did.

What an op of this backend launches follows from what its inputs look like (dtypes, sizes, strides, alignment) and from
its other arguments, never from numbers in tensors. To find it out, with all checks and with Triton's look at every
argument of a launch, takes the host longer than a GPU needs for a product of decoding. So the second such call is
written down, as the memory that it takes and the kernels that it starts, and later ones do just that. (To write down
takes time, too, which prompts of ever other lengths would spend in vain.)

Only a call that does nothing else is written down: none in which torch computes something or anything fails, and none
whose kernels read what is neither an input from its beginning nor memory of the call (a part of an input, a tensor
descriptor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MOST = 4096  # calls that are remembered; a size that changes makes one for each value
_ALIGNMENT = 16  # bytes: what Triton and the ops ask of addresses
_ATEN = torch.ops.aten
_EMPTY = (
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
)

_Room = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # size and strides of a tensor


@dataclass(frozen=True)
class _Start:
    """The start of a kernel. places: which arguments are tensors, and their numbers among inputs and own memory."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Call:
    """What a call does.

    device: of a GPU its number. own: the memory that it takes; results: which of it it gives; kind: of that, a tuple, a
    list or a Tensor.
    """

    device: torch.device | int
    own: tuple[_Room, ...]
    starts: tuple[_Start, ...]
    results: tuple[int, ...]
    kind: type

    def again(self, inputs: list[Tensor]) -> Any:
        """The same on other inputs."""
        device = self.device
        with torch.cuda.device(device) if isinstance(device, int) else nullcontext():
            own = [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.own]
            tensors = inputs + own
            for start in self.starts:
                arguments = list(start.arguments)
                for at, number in start.places:
                    arguments[at] = tensors[number]
                start.run(*arguments)
        if self.kind is Tensor:
            return own[self.results[0]] if self.results else None
        return self.kind(own[i] for i in self.results)


@dataclass
class Notes:
    """A call while it is written down.

    number: of the tensors that it may hand to kernels, by id: inputs, own memory, and views that begin where one of
    these does. complete: whether all that it does is known. starting: a kernel is being started.
    """

    inputs: list[Tensor]
    own: list[Tensor] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)  # held, so that no id comes twice
    starts: list[_Start] = field(default_factory=list)
    number: dict[int, int] = field(default_factory=dict)
    complete: bool = True
    starting: bool = False

    def __post_init__(self) -> None:
        self.number.update((id(x), i) for i, x in enumerate(self.inputs))
        self.complete = len(self.number) == len(self.inputs)  # of one given twice nobody knows which is meant

    def take(self, x: Tensor) -> None:
        """Memory was taken."""
        self.number[id(x)] = len(self.inputs) + len(self.own)
        self.own.append(x)

    def see(self, source: Tensor, views: Sequence[Tensor]) -> None:
        """Views were made."""
        for view in views:
            if id(source) in self.number and view.data_ptr() == source.data_ptr():
                self.number[id(view)] = self.number[id(source)]
            self.views.append(view)

    def start(
        self, run: Callable[..., Any], arguments: Sequence[Any], constants: Sequence[Any] = (), *, exact: bool = False
    ) -> None:
        """run(*arguments, *constants) was started. exact: it asks tensors for their dtypes."""
        kept, places = list(arguments), []
        for at, a in enumerate(arguments):
            if isinstance(a, Tensor) and (number := self.number.get(id(a))) is not None:
                kept[at] = None
                places.append((at, number))
                self.complete &= not exact or (self.inputs + self.own)[number].dtype == a.dtype
            elif a is not None and not isinstance(a, int | float):
                self.complete = False
        self.starts.append(_Start(run, (*kept, *constants), tuple(places)))

    def call(self, result: Any) -> _Call | None:
        """What gives such a result again, or None where that is not known."""
        many = isinstance(result, list | tuple)
        results: Sequence[Tensor] = result if many else () if result is None else (result,)
        own, numbers = [_room(x) for x in self.own], []
        for x in results:
            number = self.number.get(id(x), -1) - len(self.inputs)
            if number < 0 or number in numbers or not _whole(x, self.own[number]):
                return None
            own[number] = _room(x)
            numbers.append(number)
        place = next(x.device for x in (*self.inputs, *self.own))
        if not self.complete or any(x.device != place for x in self.own):
            return None
        device = place if place.index is None else place.index
        return _Call(device, tuple(own), tuple(self.starts), tuple(numbers), type(result) if many else Tensor)


class _Watch(TorchDispatchMode):
    """Sees what torch does in a call."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self.notes.complete = False  # who goes on does so for want of memory, and not the next time
            raise
        if self.notes.starting:
            return result  # Triton's interpreter copies tensors
        if func in _EMPTY:
            self.notes.take(result)
        elif func.is_view:
            self.notes.see(args[0], result if isinstance(result, list | tuple) else (result,))
        else:
            self.notes.complete = False
        return result


class _Plain(Enum):
    """Why a call is not repeated: it came once as yet, or it does more than can be written down."""

    ONCE = 1
    ALWAYS = 2


_NOTES: ContextVar[Notes | None] = ContextVar("qfx_triton_notes", default=None)
_KNOWN: dict[tuple[Any, ...], _Call | _Plain] = {}


@contextmanager
def starting() -> Iterator[Notes | None]:
    """A kernel is started within it. Gives who is to be told of it, if anybody is."""
    notes = _NOTES.get()
    if notes is None:
        yield None
        return
    notes.starting = True
    try:
        yield notes
    except Exception:
        notes.complete = False
        raise
    finally:
        notes.starting = False


def called(kernel: Callable[..., Any], given: Sequence[Any], *settings: Any) -> Any:
    """kernel(*given). settings: what decides, beside what `given` looks like, what it does; as all of it, hashable."""
    inputs: list[Tensor] = []
    key = (kernel, settings, _looks(given, inputs))
    known = _KNOWN.get(key)
    if isinstance(known, _Call):
        return known.again(inputs)
    if known is _Plain.ALWAYS:
        return kernel(*given)
    if known is _Plain.ONCE:
        result, _KNOWN[key] = _written_down(kernel, given, inputs)
        return result
    result = kernel(*given)
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    _KNOWN[key] = _Plain.ONCE
    return result


def _written_down(kernel: Callable[..., Any], given: Sequence[Any], inputs: list[Tensor]) -> tuple[Any, _Call | _Plain]:
    """kernel(*given), and what that did."""
    notes = Notes(inputs)
    token = _NOTES.set(notes)
    try:
        with _Watch(notes):
            result = kernel(*given)
    finally:
        _NOTES.reset(token)
    return result, notes.call(result) or _Plain.ALWAYS


def forget() -> None:
    """What calls do is found out anew."""
    _KNOWN.clear()


def _looks(given: Sequence[Any], inputs: list[Tensor]) -> tuple[Any, ...]:
    """What of arguments decides what a call does; their tensors are added to `inputs`."""
    found: list[Any] = []
    for a in given:
        if isinstance(a, Tensor):
            inputs.append(a)
            found.append((a.dtype, a.shape, a.stride(), a.get_device(), a.data_ptr() % _ALIGNMENT))
        else:
            found.append(_looks(a, inputs) if isinstance(a, list | tuple) else a)
    return tuple(found)


def _room(x: Tensor) -> _Room:
    return tuple(x.shape), x.stride(), x.dtype


def _whole(x: Tensor, own: Tensor) -> bool:
    """Whether x is all of `own`, with other sizes at most."""
    dense = x.is_contiguous() and own.is_contiguous() and (x.dtype, x.numel()) == (own.dtype, own.numel())
    return dense or _room(x) == _room(own)
