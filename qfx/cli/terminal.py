"""What the user sees: short errors and warnings, steps with their seconds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.text import Text


@contextmanager
def guarded(debug: bool) -> Iterator[Console]:
    """Run a command: yields the console to print on; errors become short messages on stderr.

    Exit code 2 is for what the user can mend (ValueError, UnsupportedError, OSError), 1 for a fault of qfx. With
    `debug` errors go through with their traceback. Warnings of qfx are shown in one colour and once each.
    """
    stderr = Console(stderr=True)
    with warnings.catch_warnings():
        _show_warnings(stderr)
        try:
            yield Console()
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            raise typer.Exit(_say(stderr, error)) from None


@contextmanager
def step(console: Console, what: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
    """Show `what` with a spinner while the block runs, and how long it took when it is done.

    Yields a function that changes the text beside the spinner. Without `spinner` the block may show a progress bar of
    its own: rich before 14.1 refuses a second thing that moves.
    """
    started = time.perf_counter()
    with console.status(what) if spinner else nullcontext() as status:
        yield status.update if status is not None else lambda text: None
    seconds = f"  {time.perf_counter() - started:.1f} s"
    console.print(Text.assemble(("done ", "green"), what, (seconds, "dim")), soft_wrap=True)


def megabytes(count: float | None) -> str:
    """A number of bytes for people, in powers of ten."""
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def _say(stderr: Console, error: Exception) -> int:
    """Print an error without its traceback; the exit code."""
    from qfx.errors import UnsupportedError

    expected = isinstance(error, ValueError | UnsupportedError | OSError)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    _line(stderr, "error", "bold red", message)
    for note in getattr(error, "__notes__", ()):
        stderr.print(Text(f"  {note}"), soft_wrap=True)
    if not expected:
        stderr.print("  this is a fault of qfx; --debug shows where it happened", style="dim")
    return 2 if expected else 1


def _show_warnings(stderr: Console) -> None:
    from qfx.errors import QfxWarning

    others = warnings.showwarning
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, QfxWarning):
            others(message, category, *where, **more)
        elif str(message) not in seen:
            seen.add(str(message))
            _line(stderr, "warning", "yellow", str(message))

    warnings.showwarning = show  # catch_warnings of the caller puts it back
    warnings.filterwarnings("always", category=QfxWarning)


def _line(stderr: Console, word: str, style: str, message: str) -> None:
    stderr.print(Text.assemble((f"{word}: ", style), message), soft_wrap=True)
