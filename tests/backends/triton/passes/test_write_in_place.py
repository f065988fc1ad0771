"""Appends to packed caches: into the memory itself, or into a copy where something later reads it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.backends.triton.passes import write_in_place as module
from qfx.backends.triton.passes.write_in_place import write_in_place
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from tests.graphs import capture, counts


class Cached(nn.Module):
    """Attention of new tokens over a cache, after they were appended."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor, memory: list[Tensor]) -> Tensor:
        torch.ops.qfx.cache_append(memory, k, v, length, self.spec)
        y: Tensor = torch.ops.qfx.cache_attention(q, memory, length + k.shape[2], None, 0.3, True, self.spec)
        return y


def case() -> tuple[Cached, tuple[Any, ...]]:
    torch.manual_seed(0)
    like = torch.empty(1, 2, 0, 32)
    fmt = cache_formats("i4", 1)[0]
    q, k, v = (torch.randn(1, heads, 7, 32) for heads in (4, 2, 2))  # more than the sinks
    return Cached(spec_of(fmt, like, like, 50)), (q, k, v, torch.tensor(0), allocate(fmt, like, like, 50))


def copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    *others, memory = given
    return (*others, [part.clone() for part in memory])


def run(gm: fx.GraphModule, given: tuple[Any, ...]) -> Any:
    gm.graph.lint()
    gm.recompile()
    return gm(*given[:-1], *given[-1])


def newest(gm: fx.GraphModule) -> fx.Node:
    """The input that holds the newest keys."""
    (found,) = (n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "memory_3")
    assert isinstance(found, fx.Node)
    return found


def test_the_memory_itself_is_written() -> None:
    model, given = case()
    gm = capture(model, *copied(given))
    assert counts(gm)["auto_functionalized_v2"] == 1
    assert write_in_place(gm)
    assert set(counts(gm)) == {"cache_append", "add", "cache_attention"}, "nothing is copied"
    mine, theirs = copied(given), copied(given)
    *memory, y = run(gm, mine)
    assert torch.equal(y, model(*theirs)) and not torch.equal(theirs[-1][3], given[-1][3])
    for written, part, expected in zip(memory, mine[-1], theirs[-1], strict=True):
        assert written is part and torch.equal(part, expected)
    assert not write_in_place(gm), "there is nothing left"


@pytest.mark.parametrize("seen", [True, False])
def test_what_reads_the_memory_as_it_was_later_on(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: where such readers are not looked for, they read what was appended."""
    model, given = case()
    gm = capture(model, *copied(given))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        later = gm.graph.call_function(torch.ops.aten.neg.default, (newest(gm),))
    output.args = ([*output.args[0], later],)  # type: ignore[misc]
    if not seen:
        monkeypatch.setattr(module, "_is_read", lambda *_: False)
    assert write_in_place(gm)
    assert counts(gm).get("clone", 0) == seen
    *memory, _, found = run(gm, copied(given))
    _, _, _, _, before = given
    assert torch.equal(found, -before[3]) == seen
    theirs = copied(given)
    model(*theirs)
    assert torch.equal(memory[3], theirs[-1][3])


def test_other_operators_stay_as_they_are() -> None:
    if not hasattr(torch.ops.qfx_test_write, "touch"):
        torch.library.define("qfx_test_write::touch", "(Tensor(a!) x) -> ()")
        torch.library.impl("qfx_test_write::touch", "default", lambda x: x.add_(1) and None)
        torch.library.register_fake("qfx_test_write::touch", lambda x: None)

    class Touched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.ops.qfx_test_write.touch(x)
            return x * 2

    gm = capture(Touched(), torch.ones(3))
    before = counts(gm)
    assert before["auto_functionalized_v2"] == 1
    assert not write_in_place(gm) and counts(gm) == before


def test_what_reads_a_view_of_the_memory_later_on() -> None:
    model, given = case()
    gm = capture(model, *copied(given))
    output = gm.graph.output_node()
    with gm.graph.inserting_after(newest(gm)):
        view = gm.graph.call_function(torch.ops.aten.slice.Tensor, (newest(gm), 2, 0, 5))
    with gm.graph.inserting_before(output):
        later = gm.graph.call_function(torch.ops.aten.neg.default, (view,))
    output.args = ([*output.args[0], later],)  # type: ignore[misc]
    assert write_in_place(gm)
    assert counts(gm)["clone"] == 1
    *_, found = run(gm, copied(given))
    assert torch.equal(found, -given[-1][3][:, :, :5])
