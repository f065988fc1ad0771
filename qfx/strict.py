"""The base of what users write as settings: frozen, checked, with plain errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qfx.errors import nearest


class Strict(BaseModel):
    """Frozen, without unknown keys, and with plain ValueErrors that name the nearest valid key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic gives

        def __init__(self, /, **fields: Any) -> None:
            kind = type(self).__name__
            for key in fields:
                if key not in type(self).model_fields:
                    raise ValueError(f"unknown key {key!r} in {kind}, {nearest(key, type(self).model_fields)}")
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise ValueError(_plain(kind, error)) from None


def _plain(kind: str, error: ValidationError) -> str:
    """One line per mistake: where it is, what was wrong, what was found."""
    lines = []
    for mistake in error.errors(include_url=False):
        where = ".".join(str(part) for part in mistake["loc"])
        message = mistake["msg"].removeprefix("Value error, ")
        found = "" if mistake["type"] in ("value_error", "missing") else f", found {mistake['input']!r}"
        lines.append(f"{kind}{'.' if where else ''}{where}: {message}{found}")
    return "\n".join(lines)
