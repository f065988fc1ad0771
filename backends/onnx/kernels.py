"""What ONNX Runtime really executes: its optimized graph read back, told per FX node."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime as ort

from qfx.backends.onnx.session import DISABLED, options

if TYPE_CHECKING:
    from qfx.backends.onnx.graph import StageModel

_GHOST = "weights"


def executed_kernels(built: StageModel, names: list[str]) -> dict[str, str]:
    """FX node name -> its kernels in the optimized graph, joined by '+'; 'none' where nothing is left to execute."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for node in optimized_graph(built).node:
        owner = node.name.split("/")[0]
        if owner in found:
            found[owner].append(node.op_type)
    return {name: "+".join(kernels) or "none" for name, kernels in found.items()}


def optimized_graph(built: StageModel) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a model.

    An empty sparse file stands in for large weights: kernels depend on their types and shapes only.
    """
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [t.numel() * t.element_size() for t in built.weights.values()]
        with (Path(folder) / _GHOST).open("wb") as ghost:
            ghost.truncate(max(sizes, default=0))
        chosen = options(1)
        path = Path(folder) / "optimized.onnx"
        chosen.optimized_model_filepath = str(path)
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        chosen.add_session_config_entry("session.disable_prepacking", "1")
        ort.InferenceSession(
            model.SerializeToString(), chosen, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
        )
        return onnx.load(str(path), load_external_data=False).graph
