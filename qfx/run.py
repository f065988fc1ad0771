"""The runner: passes over one graph, in order, each followed by clean-up, lint and verification; recompiled at the end.

A pass says whether it changed the graph, and the runner checks that. The runner, not the pass, removes dead code,
lints, verifies, recompiles, keeps the text of every stage that changed something and adds "in pass 'x' (3 of 9; ran:
...)" to an error.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from qfx import graph, text
from qfx.verify import verify

Pass = Callable[[fx.GraphModule], object]

_log = logging.getLogger("qfx.run")


@dataclass(frozen=True)
class Stage:
    """What one pass did: its name, whether it changed the graph, operator counts gained and lost, the text after it."""

    name: str
    changed: bool
    delta: dict[str, int] = field(default_factory=dict)
    text: str = ""


def name_of(pass_: Pass) -> str:
    """The name of a pass; functools.partial is looked through."""
    while isinstance(pass_, functools.partial):
        pass_ = pass_.func
    return getattr(pass_, "__name__", type(pass_).__name__)


def run(gm: fx.GraphModule, passes: Sequence[Pass], *, keep_text: bool = False) -> list[Stage]:
    """Run `passes` over `gm` in place. Errors of a pass keep their type and gain a note that names the pass.

    keep_text: keep the text of the graph after each pass that changed it (for documentation and golden tests).
    """
    stages: list[Stage] = []
    for number, pass_ in enumerate(passes, 1):
        before = _counts(gm)
        try:
            changed = bool(pass_(gm))
            after = _counts(gm)
            assert changed or before == after, f"it says that it changed nothing: {_difference(before, after)}"
            changed |= _tidy(gm)
        except Exception as error:
            ran = ", ".join(stage.name for stage in stages) or "none"
            error.add_note(f"in pass {name_of(pass_)!r} ({number} of {len(passes)}; ran: {ran})")
            raise
        delta = _difference(before, _counts(gm))
        if delta and _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", name_of(pass_), delta)
        stages.append(Stage(name_of(pass_), changed, delta, text.dump(gm) if keep_text and changed else ""))
    gm.recompile()
    return stages


def settle(gm: fx.GraphModule) -> bool:
    """Dead code out, lint, verify, recompile. Says whether dead code was found."""
    changed = _tidy(gm)
    gm.recompile()
    return changed


def _tidy(gm: fx.GraphModule) -> bool:
    changed = graph.clean(gm)
    verify(gm)
    return changed


def _counts(gm: fx.GraphModule) -> Counter[str]:
    return Counter(graph.op_name(n) for n in gm.graph.nodes if n.op == "call_function")


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    names: Iterable[str] = sorted({*before, *after})
    return {n: after[n] - before[n] for n in names if after[n] != before[n]}
