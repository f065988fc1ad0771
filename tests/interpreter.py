"""Triton's interpreter without what it does again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def language_patched_once() -> Iterator[None]:
    """A launch puts the interpreter's functions in place of those of `triton.language`; so does each call of a device
    function, in place of the same ones, which is up to half the time of a kernel. Here that is left to the launch.

    A device function that sees other modules of the language than the kernel is patched as ever. A Triton whose
    interpreter is made in another way is left alone.
    """
    from triton.runtime import interpreter

    patch, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    nothing = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or executor is None or nothing is None:
        yield
        return
    call, running, known = executor.__call__, list[frozenset[str]](), dict[tuple[int, int], frozenset[str]]()

    def modules(fn: Any) -> frozenset[str]:
        """The names by which a function sees modules of the language."""
        names = fn.__globals__
        key = id(names), len(names)  # the interpreter adds to them
        if key not in known:
            found = (getattr(value, "__name__", "") for value in list(names.values()))
            known[key] = frozenset({"triton.language", "triton.language.core"}.intersection(map(str, found)))
        return known[key]

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(frozenset())
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    def patch_once(fn: Any) -> Any:
        if running and modules(fn) <= running[-1]:
            return nothing()
        if running:
            running[-1] |= modules(fn)
        return patch(fn)

    executor.__call__, interpreter._patch_lang = launch, patch_once
    try:
        yield
    finally:
        executor.__call__, interpreter._patch_lang = call, patch
