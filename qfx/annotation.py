"""The precision asked for on a node: role -> Format, kept as JSON-able texts in `node.meta["custom"]["qfx"]`.

A role may have several formats: a tuple, one for each head or for equal parts of a weight's output rows, or `Columns`,
for equal parts of a weight's input columns, or `Outliers`, for some columns and the rest. As JSON they are a list,
{"columns": a list} and {"outliers": numbers, "kept": a format, "rest": a format}.

No other file reads or writes that entry. Writes replace the dictionaries instead of changing them, since `fx` copies
`node.meta` shallowly and copied nodes would otherwise share their annotation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qfx.errors import explain, nearest
from qfx.format import Format

ROLES: dict[str, tuple[str, ...]] = {  # op kind: the roles it has
    "linear": ("x", "w", "y"),
    "embedding": ("w",),
    "attention": ("q", "k", "v", "p"),
    "experts": ("x", "w"),
    "conv": ("x", "w"),
    "cache": ("k", "v"),  # what is stored of each token's keys and values
    "tied": ("w",),  # an embedding and the linears that read its table (lm_head): a rule gives both one format
}
ALL_ROLES: tuple[str, ...] = ("x", "w", "y", "q", "k", "v", "p")

PerHead = tuple[Format, ...]


@dataclass(frozen=True)
class Columns:
    """One format for each of several equal parts of a weight's input columns. ValueError where there is none."""

    formats: PerHead

    def __post_init__(self) -> None:
        if not self.formats:
            raise ValueError("columns take at least one format")

    def __str__(self) -> str:
        return f"columns[{','.join(map(str, self.formats))}]"


@dataclass(frozen=True)
class Outliers:
    """Some input columns of a weight apart: `kept`, a plain format whose inputs stay float, the others in `rest`.

    columns: their numbers, ascending; empty where there are none. ValueError for anything else.
    """

    rest: Format
    kept: Format
    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kept.is_plain:
            raise ValueError(f"outliers are kept in f16, bf16 or f32, found {str(self.kept)!r}")
        if list(self.columns) != sorted({int(c) for c in self.columns}) or any(c < 0 for c in self.columns):
            raise ValueError(f"columns of outliers are ascending numbers from 0 on, found {self.columns}")

    def __str__(self) -> str:
        return f"outliers[{self.kept}:{len(self.columns)},{self.rest}]"


Formats = Format | PerHead | Columns | Outliers


def each(formats: Formats) -> PerHead:
    """One format, or the several, as a tuple."""
    if isinstance(formats, Outliers):
        return (formats.rest, formats.kept)
    return (formats,) if isinstance(formats, Format) else formats.formats if isinstance(formats, Columns) else formats


def get(node: Node) -> dict[str, Formats]:
    """The formats of a node by role, in the order of ALL_ROLES; a tuple or `Columns` where a role has several.

    A new dictionary on every call. Raises ValueError where the stored entry is not one that `set` writes.
    """
    stored = _stored(node)
    _check_roles(stored, node)
    return {role: _parse(stored[role], role, node) for role in ALL_ROLES if role in stored}


def set(node: Node, role: str, fmt: Format | Sequence[Format] | Columns | Outliers) -> None:  # noqa: A001
    """Write the format of one role, or its several formats. Other roles stay; other nodes never see the change.

    Raises ValueError for an unknown role, for what is no Format and for an empty list of heads.
    """
    _check_roles([role], node)
    _write(node, {**_stored(node), role: _to_json(fmt, role, node)})


def clear(node: Node, role: str | None = None) -> None:
    """Remove one role, or the whole annotation. Nothing happens where there is none. ValueError: unknown role."""
    if role is None:
        _write(node, {})
        return
    _check_roles([role], node)
    _write(node, {name: value for name, value in _stored(node).items() if name != role})


def text(node: Node) -> str:
    """The annotation for dumps: `x=i8/tok w=i4/g128`, `k=[i8,i4] v=i8`, `w=columns[i8/ch,i4/g128]`; else empty."""
    return " ".join(f"{role}={show(value)}" for role, value in get(node).items())


def show(value: Formats) -> str:
    """`i8`, `[i8,i4]` or `columns[i8,i4]`."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def to_json(value: Formats) -> Any:
    """A format's text, a list of texts, {"columns": a list of texts}, or {"outliers": numbers, "kept", "rest"}."""
    if isinstance(value, Outliers):
        return {"outliers": list(value.columns), "kept": str(value.kept), "rest": str(value.rest)}
    if isinstance(value, Columns):
        return {"columns": [str(one) for one in value.formats]}
    return str(value) if isinstance(value, Format) else [str(one) for one in value]


def from_json(value: Any) -> Formats:
    """What `to_json` wrote. Raises ValueError for anything else."""
    if isinstance(value, list) and value:
        return tuple(Format.parse(one) for one in value)
    if isinstance(value, Mapping) and list(value) == ["columns"] and isinstance(value["columns"], list):
        return Columns(tuple(Format.parse(one) for one in value["columns"]))
    if isinstance(value, Mapping) and sorted(value) == ["kept", "outliers", "rest"]:
        if not isinstance(value["outliers"], list) or not all(type(c) is int for c in value["outliers"]):
            raise ValueError(f"columns of outliers are a list of numbers, found {value['outliers']!r}")
        return Outliers(Format.parse(value["rest"]), Format.parse(value["kept"]), tuple(value["outliers"]))
    if isinstance(value, str):
        return Format.parse(value)
    raise ValueError(f'a format text, a list of them or {{"columns": a list}} is expected, found {value!r}')


def _stored(node: Node) -> Mapping[str, object]:
    custom = node.meta.get("custom")
    stored = custom.get("qfx") if isinstance(custom, Mapping) else None
    if stored is None:
        return {}
    if isinstance(stored, Mapping):
        return stored
    raise ValueError(_message("the annotation is no dictionary", node, "role -> format text", repr(stored)))


def _write(node: Node, stored: Mapping[str, object]) -> None:
    """Give the node fresh dictionaries that hold `stored`; empty ones are removed."""
    custom = {key: value for key, value in (node.meta.get("custom") or {}).items() if key != "qfx"}
    if stored:
        custom["qfx"] = copy.deepcopy(dict(stored))
    if custom:
        node.meta["custom"] = custom
    else:
        node.meta.pop("custom", None)


def _check_roles(roles: Mapping[str, object] | Sequence[str], node: Node) -> None:
    for role in roles:
        if role not in ALL_ROLES:
            found = f"{role!r}, {nearest(str(role), ALL_ROLES)}"
            raise ValueError(_message("unknown role", node, f"one of {', '.join(ALL_ROLES)}", found))


def _to_json(fmt: Format | Sequence[Format] | Columns | Outliers, role: str, node: Node) -> Any:
    if isinstance(fmt, Format):
        return str(fmt)
    if isinstance(fmt, Columns | Outliers):
        if role == "w":
            return to_json(fmt)
        raise ValueError(_message(f"role {role!r} has no input columns", node, "Format(s)", str(fmt)))
    heads = list(fmt) if isinstance(fmt, Sequence) and not isinstance(fmt, str) else []
    if not heads or not all(isinstance(head, Format) for head in heads):
        raise ValueError(_message(f"role {role!r} takes a Format or one per head", node, "Format(s)", repr(fmt)))
    return [str(head) for head in heads]


def _parse(value: object, role: str, node: Node) -> Formats:
    try:
        return from_json(value)
    except ValueError as error:
        what = f"the format of role {role!r} cannot be read"
        raise ValueError(_message(what, node, "a format text", error)) from error


def _message(what: str, node: Node, expected: str, found: object) -> str:
    return explain(
        what, expected=expected, found=found, node=node, next_step="write annotations with qfx.annotation.set"
    )
