"""Stages: which nodes run in ONNX Runtime together and which run in torch between them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx


@dataclass
class Stage:
    """What one engine runs in one go. `inputs` come from before it, `outputs` are needed after it."""

    eager: bool
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def stages_of(gm: fx.GraphModule, eager: set[fx.Node]) -> list[Stage]:
    """Alternate ONNX and eager stages, as few as the dependencies allow.

    Every node goes to the first stage of its kind that does not come before what it uses. Parameters (get_attr) belong
    to every stage that uses them.
    """
    level: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and node.args[0] in level:
            level[node] = level[node.args[0]]  # a tuple never crosses a stage
            continue
        least = max((level[a] for a in node.all_input_nodes if a in level), default=0)
        level[node] = least if least % 2 == (node in eager) else least + 1
    stages = [Stage(eager=bool(i % 2)) for i in range(max(level.values(), default=0) + 1)]
    for node, at in level.items():
        stages[at].nodes.append(node)
    for stage in stages:
        _connect(stage)
    return [s for s in stages if s.nodes]


def _connect(stage: Stage) -> None:
    own = set(stage.nodes)
    used = {a: None for n in stage.nodes for a in n.all_input_nodes if a not in own and a.op != "get_attr"}
    stage.inputs = list(used)
    stage.outputs = [n for n in stage.nodes if any(u not in own for u in n.users)]
