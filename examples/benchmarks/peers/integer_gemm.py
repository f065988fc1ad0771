"""The floor: nothing but the model's integer matrix products, MatMulInteger u8 x s8 in ONNX Runtime, layer by layer."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from examples.benchmarks.peers.encoding import EncoderJob
from examples.benchmarks.peers.worker import Built


def shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of every linear layer, and how many layers have it."""
    return Counter((m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))


def build(job: EncoderJob, option: str) -> Built:
    """No option. Query, key and value count as three products, as the model has them."""
    rows, rng = job.batch * job.length, np.random.default_rng(0)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = job.threads
    found = shapes(job.module())
    nodes, weights, inputs, outputs, feed = [], [], [], [], {}
    for number, ((k, n), count) in enumerate(found.items()):
        name = f"x{number}"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [rows, k]))
        feed[name] = rng.integers(0, 255, (rows, k), np.uint8)
        for copy in range(count):
            weight, result = f"w{number}_{copy}", f"y{number}_{copy}"
            weights.append(numpy_helper.from_array(rng.integers(-127, 127, (k, n), np.int8), weight))
            nodes.append(helper.make_node("MatMulInteger", [name, weight, "zero"], [result]))
            outputs.append(helper.make_tensor_value_info(result, TensorProto.INT32, [rows, n]))
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    graph = helper.make_graph(nodes, "floor", inputs, outputs, [*weights, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding: Any = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    for value in outputs:
        binding.bind_output(value.name)  # allocated at the first call, then kept

    def timed() -> dict[str, float]:
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        return {"call": time.perf_counter() - started}

    operations = 2 * rows * sum(k * n * count for (k, n), count in found.items())
    timed()
    size = sum(k * n * count for (k, n), count in found.items())
    return Built(timed, None, size, onnxruntime.__version__, {"operations": operations})
