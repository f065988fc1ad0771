"""Heads of attention with formats of their own: which of them are computed together.

    q=[i8/tok,i8/tok,f16,f16] k=[i8,f16] v=i8/tok             4 query heads, 2 heads of keys and values
    ->
    heads 0, 1 over head 0: q=i8/tok k=i8/head v=i8/tok       heads 2, 3 over head 1: q=f16 k=f16 v=i8/tok

A list for k or v has one format for each head of keys and values. One for q or p has one for each query head, or one
for each head of keys, which all query heads that read it have. A scale of the whole tensor is, in a list, that of one
head. Its numbers (static formats) are one for each head of the operand, 1 and 0 where a head needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfx.annotation import Formats, PerHead
from qfx.errors import explain
from qfx.format import Format
from qfx.numerics import QParams, range_qparams

ROLES = ("q", "k", "v", "p")
Given = Format | PerHead | None  # of one operand; None: float


class Static(NamedTuple):
    """What stands in a call for one operand of heads whose formats are the same."""

    format: Format | None
    scale: Sequence[float] = ()
    zero: Sequence[int] = ()


@dataclass(frozen=True)
class Share:
    """Query heads with one choice of formats. own: the heads of keys and values that they read, in order: as many, or
    each for equally many query heads. formats: of q, k, v and p."""

    heads: tuple[int, ...]
    own: tuple[int, ...]
    formats: tuple[Format | None, ...]

    def of(self, role: str) -> list[int]:
        """The heads of an operand."""
        return list(self.own if role in "kv" else self.heads)

    def static(self, asked: Sequence[Given], numbers: Sequence[Sequence[Any]]) -> list[Static]:
        """What stands for these heads in a call for all; numbers: scales of q, its zero points, those of k and of v."""
        found = []
        for role, given, fmt, values in zip(ROLES, asked, self.formats, _pairs(numbers), strict=True):
            by_head = isinstance(given, tuple) or (given is not None and given.granularity == "head")
            scale, zero = ([v[i] for i in self.of(role)] if by_head and v else v for v in values)
            found.append(Static(fmt, scale, zero))
        return found


def read(text: str) -> Given:
    """What `annotation.show` wrote of an operand's formats; None for ""."""
    if not text.startswith("["):
        return Format.parse(text) if text else None
    return tuple(Format.parse(one) for one in text.strip("[]").split(","))


def check(formats: Mapping[str, Formats | None], heads: int, own: int, where: str) -> None:
    """Raises ValueError, naming `where`, for lists of other lengths than q (`heads`), k and v (`own`) have heads."""
    for role, given in formats.items():
        if not isinstance(given, tuple) or len(given) == own or (role in "qp" and len(given) == heads):
            continue
        expected = f"{own} formats, one for each head of keys and values"
        if role in "qp" and heads != own:
            expected = f"{heads} formats, one for each query head, or {own}, one for each head of keys and values"
        raise ValueError(
            explain(
                f"attention {where} has formats for other heads: {role}",
                expected=expected,
                found=f"{len(given)} formats",
                next_step="give a format for each head, one for all, or name the attention that has so many heads",
            )
        )


def reason_against(formats: Mapping[str, Formats | None]) -> str | None:
    """Why operands cannot have these formats beside each other, or None."""
    if not any(isinstance(given, tuple) for given in formats.values()):
        return None
    for role, given in formats.items():
        if role != "p" and isinstance(given, Format) and given.dynamic and not given.granularity:
            better = replace(given, granularity="head")
            return f"beside formats by heads {role}={given} would need all heads at once; write {role}={better}"
    return None


def whole(asked: Sequence[Given], numbers: Sequence[Sequence[Any]]) -> list[Static] | None:
    """`Share.static` of all heads; None where some of them have formats of their own."""
    found = []
    for given, values in zip(asked, _pairs(numbers), strict=True):
        if isinstance(given, tuple):
            return None
        found.append(Static(given, *values))
    return found


def _pairs(numbers: Sequence[Sequence[Any]]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    """(scales, zero points) of q, k, v and p."""
    return [*zip(numbers[::2], numbers[1::2], strict=True), ((), ())]


def shares(formats: Sequence[Given], heads: int, own: int) -> list[Share]:
    """The heads of q in groups of equal formats; formats: of q, k, v and p, lists as `check` lets them pass."""
    columns = [of_rows(role, given, heads) for role, given in zip(ROLES, formats, strict=True)]
    groups: dict[tuple[Format | None, ...], list[int]] = {}
    for head, chosen in enumerate(zip(*columns, strict=True)):
        groups.setdefault(chosen, []).append(head)
    found = []
    for chosen, members in groups.items():
        read_by = [head * own // heads for head in members]
        once = list(dict.fromkeys(read_by))
        regular = all(read_by.count(one) * len(once) == len(members) for one in once)
        found.append(Share(tuple(members), tuple(once if regular else read_by), chosen))
    return found


def qparams(role: str, given: PerHead, ends: Callable[[Format], tuple[Tensor, Tensor]]) -> QParams:
    """Scales f32 [H, 1, 1] and zero points (None where no format has one) of an operand with H heads.

    ends: least and greatest value of each head, [H, 1, 1] each, as they are for a format.
    """
    rows = ends(given[0])[0].shape[0]
    scale, zero = torch.ones(rows, 1, 1), torch.zeros(rows, 1, 1, dtype=torch.uint8)
    for head, fmt in enumerate(of_rows(role, given, rows)):
        if fmt is None or fmt.is_plain or fmt.dynamic:
            continue
        low, high = (end[head] for end in ends(fmt))
        found = range_qparams(low, high, fmt)
        scale[head] = found.scale.cpu()
        if found.zero is not None:
            zero[head] = found.zero.cpu()
    return QParams(scale, zero if any(fmt.has_zero for fmt in given) else None)


def of_rows(role: str, given: Given, rows: int) -> list[Format | None]:
    """The format of each of an operand's heads."""
    if not isinstance(given, tuple):
        return [given] * rows
    found = [alone(role, fmt) for fmt in given]
    return [found[row * len(found) // rows] for row in range(rows)]


def alone(role: str, fmt: Format) -> Format:
    """One head's format; a scale of the whole tensor is the head's own. Weights have a fixed one."""
    return fmt if fmt.granularity or fmt.is_plain or role == "p" else replace(fmt, granularity="head")
