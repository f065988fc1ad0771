"""The precision asked for on a node: role -> Format, kept as JSON-able texts in `node.meta["custom"]["qfx"]`.

No other file reads or writes that entry. Writes replace the dictionaries instead of changing them, since `fx` copies
`node.meta` shallowly and copied nodes would otherwise share their annotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from qfx.errors import explain, nearest
from qfx.format import Format

ROLES: dict[str, tuple[str, ...]] = {  # op kind: the roles it has
    "linear": ("x", "w", "y"),
    "embedding": ("w",),
    "attention": ("q", "k", "v", "p"),
    "experts": ("x", "w"),
    "conv": ("x", "w"),
    "tied": ("w",),  # an embedding and the linears that read its table (lm_head): a rule gives both one format
}
ALL_ROLES: tuple[str, ...] = ("x", "w", "y", "q", "k", "v", "p")

PerHead = tuple[Format, ...]


def get(node: Node) -> dict[str, Format | PerHead]:
    """The formats of a node by role, in the order of ALL_ROLES; a tuple where a role has one format per head.

    A new dictionary on every call. Raises ValueError where the stored entry is not one that `set` writes.
    """
    stored = _stored(node)
    _check_roles(stored, node)
    return {role: _parse(stored[role], role, node) for role in ALL_ROLES if role in stored}


def set(node: Node, role: str, fmt: Format | Sequence[Format]) -> None:  # noqa: A001
    """Write the format of one role, or one format per head. Other roles stay; other nodes never see the change.

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
    """The annotation for dumps: `x=i8/tok w=i4/g128`, `k=[i8,i4] v=i8`; empty where there is none."""
    return " ".join(f"{role}={_show(value)}" for role, value in get(node).items())


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
        custom["qfx"] = {role: list(v) if isinstance(v, list) else v for role, v in stored.items()}
    if custom:
        node.meta["custom"] = custom
    else:
        node.meta.pop("custom", None)


def _check_roles(roles: Mapping[str, object] | Sequence[str], node: Node) -> None:
    for role in roles:
        if role not in ALL_ROLES:
            found = f"{role!r}, {nearest(str(role), ALL_ROLES)}"
            raise ValueError(_message("unknown role", node, f"one of {', '.join(ALL_ROLES)}", found))


def _to_json(fmt: Format | Sequence[Format], role: str, node: Node) -> str | list[str]:
    if isinstance(fmt, Format):
        return str(fmt)
    heads = list(fmt) if isinstance(fmt, Sequence) and not isinstance(fmt, str) else []
    if not heads or not all(isinstance(head, Format) for head in heads):
        raise ValueError(_message(f"role {role!r} takes a Format or one per head", node, "Format(s)", repr(fmt)))
    return [str(head) for head in heads]


def _parse(value: object, role: str, node: Node) -> Format | PerHead:
    try:
        if isinstance(value, str):
            return Format.parse(value)
        if isinstance(value, list) and value:
            return tuple(Format.parse(head) for head in value)
    except ValueError as error:
        raise ValueError(
            _message(f"the format of role {role!r} cannot be read", node, "a format text", error)
        ) from error
    raise ValueError(_message(f"the format of role {role!r} cannot be read", node, "a format text", repr(value)))


def _show(value: Format | PerHead) -> str:
    return str(value) if isinstance(value, Format) else f"[{','.join(map(str, value))}]"


def _message(what: str, node: Node, expected: str, found: object) -> str:
    return explain(
        what, expected=expected, found=found, node=node, next_step="write annotations with qfx.annotation.set"
    )
