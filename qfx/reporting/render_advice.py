"""Advice as people read it: the way of the decision, all candidates, what is proposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qfx.reporting.render import wide

if TYPE_CHECKING:
    from qfx.advise import Advice
    from qfx.allocation.candidates import Candidate

_WIDTH = 140  # columns that the table takes at least


def show(advice: Advice, console: Console | None = None) -> None:
    """Print it. What is measured, predicted, counted or given is said at each claim and in the head of each column."""
    out = console or Console()
    for claim in advice.claims:
        out.print(Text.assemble((f"{claim.basis:>9}  ", "dim"), claim.text), soft_wrap=True)
    if advice.candidates:
        wide(out, table(advice), _WIDTH)
    for one in advice.candidates:
        if one.misses:
            out.print(Text.assemble((f"not {one.recipe}: ", "yellow"), "; ".join(one.misses)), soft_wrap=True)
    for proposal in advice.proposals:
        words = " and ".join(proposal.why)
        out.print(Text.assemble((f"propose {proposal.candidate.recipe}: ", "bold green"), words), soft_wrap=True)


def table(advice: Advice) -> Table:
    """One row for each candidate."""
    shown = Table(title=f"on {advice.device}; loss: {advice.loss_of}", title_justify="left")
    shown.add_column("recipe", no_wrap=True)
    heads = ["size", "of 16 bits", "loss\n(measured)", "KLD\n(measured)", "prompt\n(predicted)", "gain"]
    heads += ["token\n(predicted)", "gain"] if any(c.decode is not None for c in advice.candidates) else []
    for head in [*heads, "memory\n(predicted)"]:
        shown.add_column(head, justify="right", no_wrap=True)
    for one in advice.candidates:
        shown.add_row(one.recipe, *_cells(one), style="dim" if one.misses else None)
    return shown


def _cells(one: Candidate) -> list[str]:
    cells = [f"{one.nbytes / 1e6:,.1f} MB", f"{one.ratio:.2f}x"]
    error = "" if one.loss_error is None else f" ± {one.loss_error:.2f}"
    cells += ["" if one.loss is None else f"{one.loss:+.2f}{error} %", "" if one.kld is None else f"{one.kld:.4f}"]
    cells += [f"{one.prefill * 1e3:.2f} ms", f"{one.gain_prefill:.2f}x"]
    if one.decode is not None:
        assert one.gain_decode is not None
        cells += [f"{one.decode * 1e3:.3f} ms", f"{one.gain_decode:.2f}x"]
    return [*cells, f"{one.memory / 1e6:,.1f} MB"]
