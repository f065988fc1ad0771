"""Fixtures of the tests of torch.compile(backend="qfx")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import qfx.compile


@dataclass
class Counts:
    """graphs: CompiledGraph objects, one each time that Dynamo compiled. lowered: graphs lowered for some weights."""

    graphs: int = 0
    lowered: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Counts:
    """Counts what is compiled during the test."""
    found = Counts()
    init, lower = qfx.compile.CompiledGraph.__init__, qfx.compile.lower

    def counted_init(self: Any, *args: Any) -> None:
        found.graphs += 1
        init(self, *args)

    def counted_lower(*args: Any, **kwargs: Any) -> Any:
        found.lowered += 1
        return lower(*args, **kwargs)

    monkeypatch.setattr(qfx.compile.CompiledGraph, "__init__", counted_init)
    monkeypatch.setattr(qfx.compile, "lower", counted_lower)
    return found
