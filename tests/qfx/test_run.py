"""qfx.run: passes in order, clean-up and checks after each, errors that name the pass."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import fx, nn

from qfx import graph
from qfx.passes._build import call, replace
from qfx.run import Stage, name_of, run, settle
from tests.graphs import Function, capture, counts, node_of

aten = torch.ops.aten

GOLDEN = """\
%inputs_0: f32[2,4] = input
%silu_default: f32[2,4] = aten.silu(%inputs_0)
%linear: f32[2,3] = aten.linear(%silu_default, @fc.weight, @fc.bias)
return [%linear]
"""


def captured() -> fx.GraphModule:
    return capture(Function(lambda own, x: own.fc(torch.relu(x)), fc=nn.Linear(4, 3)), torch.randn(2, 4))


def silu(gm: fx.GraphModule, *, leave: bool = False) -> bool:
    """relu -> silu; with `leave` the relu is left behind as dead code."""
    found = [n for n in gm.graph.nodes if graph.is_call(n, aten.relu.default)]
    for node in found:
        new = call(gm, aten.silu.default, node.args[0], like=node)
        if leave:
            node.replace_all_uses_with(new)
        else:
            replace(node, new)
    return bool(found)


def nothing(gm: fx.GraphModule) -> bool:
    return False


def untold(gm: fx.GraphModule) -> bool:
    silu(gm)
    return False


def fails(gm: fx.GraphModule) -> bool:
    raise KeyError("missing")


def breaks(gm: fx.GraphModule) -> bool:
    del node_of(gm, "linear").meta["val"]
    return True


def test_stages_tell_what_changed() -> None:
    gm = captured()
    stages = run(gm, [nothing, silu, silu], keep_text=True)
    assert stages == [
        Stage("nothing", False),
        Stage("silu", True, {"relu": -1, "silu": 1}, GOLDEN),
        Stage("silu", False),
    ]
    assert run(gm, []) == []


def test_text_is_kept_on_request_only() -> None:
    assert [stage.text for stage in run(captured(), [silu])] == [""]


def test_dead_code_goes_and_the_code_is_compiled_anew() -> None:
    gm, x = captured(), torch.randn(2, 4)
    (stage,) = run(gm, [functools.partial(silu, leave=True)])
    assert stage == Stage("silu", True, {"relu": -1, "silu": 1})
    assert counts(gm) == {"silu": 1, "linear": 1}
    expected = nn.functional.linear(nn.functional.silu(x), gm.fc.weight, gm.fc.bias)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(gm(x)[0], expected)


def test_dead_code_counts_as_a_change() -> None:
    gm = captured()
    with gm.graph.inserting_before(node_of(gm, "linear")):
        dead = gm.graph.call_function(aten.neg.default, (next(iter(gm.graph.nodes)),))
    dead.meta["val"] = dead.args[0].meta["val"]  # type: ignore[union-attr]
    assert run(gm, [nothing]) == [Stage("nothing", True, {"neg": -1})]
    assert settle(gm) is False


def test_errors_keep_their_type_and_name_the_pass() -> None:
    with pytest.raises(KeyError, match="missing") as caught:
        run(captured(), [nothing, silu, fails, nothing])
    assert caught.value.__notes__ == ["in pass 'fails' (3 of 4; ran: nothing, silu)"]
    with pytest.raises(KeyError) as caught:
        run(captured(), [functools.partial(functools.partial(fails))])
    assert caught.value.__notes__ == ["in pass 'fails' (1 of 1; ran: none)"]


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(AssertionError, match="linear .* carries no value") as caught:
        run(captured(), [silu, breaks])
    assert caught.value.__notes__ == ["in pass 'breaks' (2 of 2; ran: silu)"]


def test_a_change_that_is_not_told_is_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"changed nothing: \{'relu': -1, 'silu': 1\}") as caught:
        run(captured(), [untold])
    assert caught.value.__notes__ == ["in pass 'untold' (1 of 1; ran: none)"]


def test_names_of_passes() -> None:
    class Pass:
        def __call__(self, gm: fx.GraphModule) -> bool:
            return False

    assert name_of(silu) == "silu"
    assert name_of(functools.partial(silu, leave=True)) == "silu"
    assert name_of(Pass()) == "Pass"


def test_changes_are_logged_at_debug_level_only(caplog: pytest.LogCaptureFixture) -> None:
    for level, expected in ((logging.INFO, []), (logging.DEBUG, ["silu: {'relu': -1, 'silu': 1}"])):
        gm = captured()
        caplog.clear()
        with caplog.at_level(level, logger="qfx.run"):
            run(gm, [nothing, silu])
        assert [r.getMessage() for r in caplog.records if r.name == "qfx.run"] == expected
