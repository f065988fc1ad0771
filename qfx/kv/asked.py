"""What rules of a recipe ask of caches: which ones, and their formats as texts."""

from __future__ import annotations

from typing import Any

from qfx.format import Format
from qfx.kv.formats import SHORT, CacheFormat

_KIND = "cache"
_PREFIX = "cache:"


def is_cache(target: str) -> bool:
    """Whether a target names caches: "cache", or "cache:<name, glob or re:regex of attentions>"."""
    return target == _KIND or target.startswith(_PREFIX)


def names_of(target: str) -> str:
    """The names behind "cache:"."""
    return target.removeprefix(_PREFIX)


def cache_texts(role: str, value: Any) -> Any:
    """The full texts of what a rule gives a role ("k" or "v"): "i4" is u4/g32/f16, which other roles call so, too.

    A text, a list of texts (one for each head), "none" or None. Raises ValueError for formats that no cache can have.
    """
    if isinstance(value, list | tuple):
        return tuple(cache_texts(role, one) for one in value)
    if value is None or value == "none" or not isinstance(value, str | Format):
        return value
    fmt = value if isinstance(value, Format) else Format.parse(SHORT.get(value, value))
    plain = (Format("f16"),)
    CacheFormat((fmt,), plain) if role == "k" else CacheFormat(plain, (fmt,))
    return str(fmt)
