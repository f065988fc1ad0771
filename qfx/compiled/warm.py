"""Warm starts: what compiling a graph of Dynamo's makes, kept on disk and found again before anything is captured.

    key of the graph -> folder with ONNX Runtime's optimized models, their packed weights, and entry.json:
    how the graph is fed, notes, rows of the report, guards on sizes

A warm start has the same outputs bit by bit, the same report and the same warnings as the cold one.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qfx.capture import example_of
from qfx.compiled.cache_key import NoKeyError, key_of
from qfx.compiled.template import Interface
from qfx.errors import Note, UnsupportedError, warn
from qfx.names import Translation
from qfx.options import CacheAt, Options
from qfx.reporting.rows import Row
from qfx.sources import source_of
from qfx.storage.folders import default_folder

if TYPE_CHECKING:
    from qfx.backends.onnx.cache import Cache

_LOG = logging.getLogger("qfx.cache")
_BOOL, _NUMBER = (ast.BoolOp, ast.Compare, ast.UnaryOp), (ast.BinOp, ast.Constant, ast.Subscript, ast.Call)
_CALLS = {"max", "min", "abs"}


@dataclass(frozen=True)
class Entry:
    """What is kept of a compiled graph besides its models. program: what `stored.Stored` runs."""

    interface: Interface
    notes: tuple[Note, ...]
    rows: tuple[Row, ...]
    program: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """An entry and the folder of its models."""

    entry: Entry
    folder: Path


def _unused(what: str, error: Exception) -> None:
    step = "report it as a bug; options={'cache': False} turns the cache off"
    warn(f"{what}: {type(error).__name__}: {error}; next step: {step}", stacklevel=2)


class Warm:
    """The cache of one compiled graph. `key` is None where there can be none: then nothing is looked up or kept."""

    def __init__(self, gm: fx.GraphModule, options: Options, statics: Mapping[int, str]) -> None:
        self._gm = gm
        self._options = options
        self._statics = statics
        self._cache = cache_of(options)

    def key(self, args: Sequence[Any], live: Collection[int], translation: Translation, *, packed: bool) -> str | None:
        """The key for these arguments; None where the cache is off or no key can cover the graph."""
        if self._cache is None:
            return None
        try:
            return key_of(
                self._gm,
                args,
                self._options,
                statics=self._statics,
                live=live,
                translation=translation,
                packed=packed,
                example=example_of,
                source=source_of,
            )
        except NoKeyError as error:
            _LOG.info("the compiled graph is not cached: it has %s", error)
        except UnsupportedError:
            pass  # capturing the graph says the same
        except Exception as error:  # noqa: BLE001  (the graph runs all the same)
            _unused("the cache is not used for this graph, its key cannot be made", error)
        return None

    def find(self, key: str | None) -> Found | None:
        """What is kept under the key, its guards on sizes set; None where there is nothing."""
        if key is None or self._cache is None:
            return None
        entry = self._cache.get(key, torch.get_num_threads())
        if entry is None:
            return None
        folder, fields = entry
        guards = fields["guards"]
        if guards is not None and not (_is_plain(guards) and self._holds(guards)):
            return None
        _LOG.info("warm start from %s", folder)
        return Found(_entry(fields), folder)

    def reopen(self, found: Found) -> Any:
        """The models of an entry, ready to run; None where ONNX Runtime cannot read them: then the entry goes."""
        from qfx.backends.onnx.session import SessionError
        from qfx.backends.onnx.stored import Stored

        try:
            return Stored(found.folder, found.entry.program)
        except SessionError as error:
            _LOG.info("the entry %s is removed: %s", found.folder, error)
            if self._cache is not None:
                self._cache.remove(found.folder)
            return None

    @contextmanager
    def storing(self, key: str | None) -> Iterator[Storing | None]:
        """Where to save what is being made; None where it is not to be kept."""
        if key is None or self._cache is None:
            yield None
            return
        with self._cache.writing(torch.get_num_threads()) as writer:
            yield None if writer is None else Storing(writer.folder, lambda f: writer.commit(key, f), self._cache)

    def kept(self, entry: Entry, storing: Storing) -> Found | None:
        """The entry, visible to all; None where it cannot be kept."""
        try:
            guards = self._guards()
        except Exception as error:  # noqa: BLE001  (the graph runs all the same)
            _unused("the compiled graph is not cached, its guards cannot be written", error)
            return None
        if guards is not None and not _is_plain(guards):
            _LOG.info("the compiled graph is not cached: its guards are no plain comparison: %s", guards)
            return None
        folder = storing.commit({**_fields(entry), "guards": guards})
        return None if folder is None else Found(entry, folder)

    def _guards(self) -> str | None:
        """All guards on the sizes of Dynamo's graph, with those that capturing it has added.

        Those on what the graph does not get, such as a number that the code around it took out of a tensor, are
        Dynamo's, which sets them itself before it asks for the graph.
        """
        env, sizes = self._sizes()
        if not sizes:
            return None
        known = {symbol for value in self._values() for symbol in _symbols(value)}
        guards = [guard for guard in env.guards if env.replace(guard.expr).free_symbols <= known]
        expression: str | None = env.produce_guards_expression(sizes, guards=guards)
        return expression

    def _holds(self, guards: str) -> bool:
        """Whether the guards hold; evaluating them lets Dynamo check them from now on."""
        env, sizes = self._sizes()
        return bool(env.evaluate_guards_expression(guards, sizes))

    def _sizes(self) -> tuple[Any, list[Any]]:
        sizes = [v for v in self._values() if isinstance(v, torch.SymInt)]
        return (sizes[0].node.shape_env if sizes else None), sizes

    def _values(self) -> list[Any]:
        return [example_of(n) for n in self._gm.graph.nodes if n.op == "placeholder"]


@dataclass(frozen=True)
class Storing:
    """folder: where the lowering saves its models. commit: makes the entry visible, gives its folder or None."""

    folder: Path
    commit: Callable[[Any], Path | None]
    cache: Cache


def cache_of(options: Options) -> Cache | None:
    """The cache that the options ask for; None where it is off, and for backends without sessions."""
    from qfx.backends.onnx.cache import MOST_BYTES, Cache

    asked = options.cache
    if asked is False or options.backend in ("reference", "triton"):
        return None
    at = asked if isinstance(asked, CacheAt) else CacheAt()
    folder = at.folder or default_folder()
    return None if folder is None else Cache(folder, at.max_bytes or MOST_BYTES)


def _fields(entry: Entry) -> dict[str, Any]:
    """What `_entry` reads, as JSON."""
    interface = entry.interface
    return {
        "interface": {
            **{k: sorted(getattr(interface, k).items()) for k in ("params", "tied", "scalars", "mutations")},
            **{k: sorted(getattr(interface, k)) for k in ("inputs", "watched", "plain")},
        },
        "notes": [asdict(note) for note in entry.notes],
        "rows": [asdict(row) for row in entry.rows],
        "program": entry.program,
    }


def _entry(fields: Mapping[str, Any]) -> Entry:
    told = fields["interface"]
    interface = Interface(
        inputs=tuple(told["inputs"]),
        params=dict(told["params"]),
        tied={int(i): str(fqn) for i, fqn in told["tied"]},
        scalars={int(i): float(value) for i, value in told["scalars"]},
        mutations={int(o): int(i) for o, i in told["mutations"]},
        watched=tuple(told["watched"]),
        plain=frozenset(told["plain"]),
    )
    return Entry(
        interface=interface,
        notes=tuple(Note(**note) for note in fields["notes"]),
        rows=tuple(Row(**row) for row in fields["rows"]),
        program=fields["program"],
    )


def _symbols(value: Any) -> set[Any]:
    """The symbols of a graph's input."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    found = (size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt | torch.SymFloat))
    return set().union(*found)


def _is_plain(guards: str) -> bool:
    """Whether a text is nothing but comparisons of integer expressions of the sizes L['t0'], L['t1'], ..."""
    try:
        tree = ast.parse(guards, mode="eval")
    except SyntaxError:
        return False
    return all(map(_is_plain_node, ast.walk(tree)))


def _is_plain_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "L" or node.id in _CALLS
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords
    kinds = (ast.Expression, *_BOOL, *_NUMBER, ast.operator, ast.cmpop, ast.boolop, ast.unaryop, ast.expr_context)
    return isinstance(node, kinds)
