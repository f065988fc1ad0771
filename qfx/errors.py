"""What qfx raises and warns, and how the messages are put together.

`ValueError` is for the user's input, `UnsupportedError` for graphs that qfx cannot handle, `assert` for our own bugs.
"""

from __future__ import annotations

import difflib
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\s*\n\s*(?P<code>\S[^\n]*)')
_QFX_FRAME = re.compile(rf"^{re.escape(str(Path(__file__).parent))}[\\/]")
_LIBRARY_FRAME = re.compile(r"[\\/](site-packages|dist-packages|torch)[\\/]|^<")


class UnsupportedError(RuntimeError):
    """The graph holds something that qfx cannot handle as asked. Compose the message with `explain`."""


class QfxWarning(UserWarning):
    """Something was not done as asked; the message says what, why and the next step."""


def warn(message: str, where: str = "", *, stacklevel: int = 1) -> None:
    """A QfxWarning that points to `where` (as `source_line` gives it), or to the caller where that says nothing."""
    place = re.match(r"(?P<file>.+):(?P<line>\d+), in ", where)
    if place is None or _LIBRARY_FRAME.search(place["file"]):
        warnings.warn(message, QfxWarning, stacklevel=stacklevel + 1)
    else:
        warnings.warn_explicit(message, QfxWarning, place["file"], int(place["line"]))


def explain(
    what: str,
    *,
    expected: object = None,
    found: object = None,
    node: Node | str | None = None,
    source: str | None = None,
    next_step: str | None = None,
) -> str:
    """Compose a message: what is wrong, expected, found, the node, the user's source line, the next step.

    Parts that are None are left out. `source` is taken from the node where it is not given.
    """
    lines = [what]
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if found is not None:
        lines.append(f"  found: {found}")
    if node is not None:
        lines.append(f"  node: {node if isinstance(node, str) else _describe(node)}")
        if source is None and not isinstance(node, str):
            source = source_line(node)
    if source is not None:
        lines.append(f"  source: {source}")
    if next_step is not None:
        lines.append(f"  next step: {next_step}")
    return "\n".join(lines)


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Errors of the user's input in the block say in a note what was being read, where they do not name it."""
    try:
        yield
    except (ValueError, UnsupportedError) as error:
        if str(source) not in str(error):
            error.add_note(f"in {source}")
        raise


def source_line(node: Node) -> str | None:
    """`file:line, in function: code` of the innermost frame of the user's code that made the node, or None; of a
    library's where there is none of the user, of qfx's own where nothing else is known."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    frames = list(_FRAME.finditer(trace))
    frames = [frame for frame in frames if not _QFX_FRAME.match(frame["file"])] or frames
    if not frames:
        return None
    own = [frame for frame in frames if not _LIBRARY_FRAME.search(frame["file"])]
    frame = (own or frames)[-1]
    return f"{frame['file']}:{frame['line']}, in {frame['function']}: {frame['code'].strip()}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many there are beyond: `a, b, c and 4 more`."""
    beyond = len(names) - most
    return ", ".join(names[:most]) + (f" and {beyond} more" if beyond > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, and the next where that ends in a colon; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def raised_at(error: BaseException) -> str:
    """`file:line, in function: code` of the innermost frame of a model's code, not torch's or qfx's; "" without one."""
    skipped = re.compile(rf"{_QFX_FRAME.pattern}|^<|[\\/]torch[\\/]")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not skipped.search(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}" if frames else ""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?` for the valid name closest to `name`; where none is close, the list of valid names."""
    names = sorted(valid)
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    if close:
        return f"did you mean {by_lower[close[0]]!r}?"
    return f"valid: {', '.join(names)}" if names else "there are no valid names"


def check_flags(**given: object) -> None:
    """Raises ValueError for an option that is neither True nor False: Python takes "no" for true."""
    for name, value in given.items():
        if not isinstance(value, bool):
            step = "give one of these, or leave it out"
            raise ValueError(
                explain(f"{name!r} takes a bool", expected="True or False", found=repr(value), next_step=step)
            )


def _describe(node: Node) -> str:
    return f"%{node.name} = {node.op}[{node.target}]"


@dataclass(frozen=True)
class Note:
    """Who did not get what was asked: the node's FQN, the reason, what to do next, the user's source line.

    minor: formats and result are as asked, only their computation is not what one might expect; strict allows it.
    """

    node: str
    reason: str
    next_step: str
    where: str = ""
    minor: bool = False

    def __str__(self) -> str:
        place = f" (at {self.where})" if self.where else ""
        return f"{self.node}: {self.reason}{place}; next step: {self.next_step}"

    @classmethod
    def parse(cls, text: str) -> Note:
        """The note of its text, as plans keep it, which does not say whether it is minor."""
        node, _, rest = text.partition(": ")
        reason, _, step = rest.rpartition("; next step: ")
        if not reason:
            return cls(node, step, "")
        before, _, where = reason.rpartition(" (at ")
        return cls(node, before, step, where[:-1]) if before and where.endswith(")") else cls(node, reason, step)
