"""A graph as it goes to a file, run by ONNX Runtime: its numbers and the kernels of every branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, fx

from qfx.backends.onnx import lowering
from qfx.backends.onnx.branch import every_node
from qfx.backends.onnx.graph import made
from qfx.backends.onnx.session import DISABLED, _wrap, options


class File:
    """The model that `lowering.build` makes of a graph. kinds: how often each operator stands in it."""

    def __init__(self, gm: fx.GraphModule, **given: Any) -> None:
        self.builder, self.stage = lowering.build(gm, **given)
        self.weights = {name: made(weight) for name, weight in self.builder.external.items()}
        self.kinds = Counter(node.op_type for node in every_node(self.stage.model.graph.node))
        chosen = options(1)
        if self.weights:
            chosen.add_external_initializers(list(self.weights), [_wrap(w) for w in self.weights.values()])
        self.session = ort.InferenceSession(
            self.stage.model.SerializeToString(),
            chosen,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=DISABLED[:1],
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs."""
        names = {i.name for i in self.session.get_inputs()}
        feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
        return [torch.from_numpy(value) for value in self.session.run(None, feeds)]
