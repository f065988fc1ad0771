"""Names in the user's model, from the expressions by which Dynamo found what a graph reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from qfx.sources import input_name, keep_sources, module_path, source_of, static_names, statics, unsliced


class Source:
    """What Dynamo hangs on a graph input; its name is a text, or a method in some releases of torch."""

    def __init__(self, name: Any) -> None:
        self.source = type("At", (), {"name": name})()


def placeholders(*sources: str) -> fx.GraphModule:
    """A graph that reads what these expressions say."""
    found = fx.Graph()
    for i, source in enumerate(sources):
        found.placeholder(f"x{i}").meta["grapharg"] = Source(source)
    found.output(())
    return fx.GraphModule(nn.Module(), found)


MODULE = "L['self']._modules['layers']._modules['0']"


@pytest.mark.parametrize("name", [f"{MODULE}._parameters['weight']", lambda _: f"{MODULE}._parameters['weight']"])
def test_a_source_stays_after_dynamo_takes_its_own_away(name: Any) -> None:
    gm = placeholders(name)
    (node,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    keep_sources(gm)
    del node.meta["grapharg"]
    assert source_of(node) == f"{MODULE}._parameters['weight']"
    node.meta.clear()
    assert source_of(node) == ""


def test_what_getattr_reads_is_named_as_what_is_read() -> None:
    gm = placeholders("L['self'].__dict__['_modules']['fc'].__dict__['_parameters']['bias']")
    assert statics(gm, [nn.Parameter(torch.ones(1))]) == ({0: "fc.bias"}, "L['self']")


def test_names_start_at_the_module_that_holds_all() -> None:
    gm = placeholders(f"{MODULE}._parameters['weight']", "L['x']", "L['self']._buffers['mask']")
    assert statics(gm, [torch.ones(1)] * 3) == ({0: "layers.0.weight", 2: "mask"}, "L['self']")


def test_names_of_two_models_keep_their_variables() -> None:
    gm = placeholders("L['one']._modules['fc']._parameters['weight']", "G['two']._parameters['weight']")
    assert static_names(gm, [torch.ones(1)] * 2) == {0: "one.fc.weight", 1: "two.weight"}
    assert statics(gm, [torch.ones(1)] * 2)[1] == ""


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['input_ids']", "input_ids"),
        ("L['args'][0]", "args_0"),
        ("L['kwargs']['mask']", "mask"),
        ("L['batch']['a-b'][1].x", "batch_a_b_1_x"),
        ("", "arg0_1"),
    ],
)
def test_names_of_inputs(source: str, name: str) -> None:
    assert input_name(source, "arg0_1") == name


@pytest.mark.parametrize(
    ("source", "base", "names", "path"),
    [
        ("L['self'].layers[3].fc", "L['self']", [], "layers.3.fc"),
        ("L['self'].layers[3].__dict__['_modules']['fc'].inner", "L['self']", [], "layers.3.fc.inner"),
        ("L['self']", "L['self']", [], ""),
        ("L['one'].fc", "", ["one.fc.weight"], "one.fc"),
        ("L['one'].fc", "", ["fc.weight"], "fc"),
    ],
)
def test_paths_of_modules(source: str, base: str, names: list[str], path: str) -> None:
    node = fx.Graph().placeholder("x")
    assert module_path(node, names, base) == ""
    node.meta["nn_module_stack"] = {"outer": ("L['self']", nn.Module), "inner": (source, nn.Module)}
    assert module_path(node, names, base) == path


def test_paths_through_parts_of_lists() -> None:
    model = nn.Module()
    model.net = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU()) for _ in range(4))
    for path, wanted in {
        "net.slice(2, None, None).0.1": "net.2.1",
        "net.slice(-2, None, None).1": "net.3",
        "net.slice(None, None, -2).1.slice(1, None, None).2": "net.1.2",
        "net.slice(1, None, None).slice(1, 2, None).0.slice(None, 1, None)": "net.2",
        "net.3.relu": "net.3.relu",
        "": "",
    }.items():
        assert unsliced(model, path) == wanted
