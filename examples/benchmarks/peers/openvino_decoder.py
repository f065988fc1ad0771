"""OpenVINO with its cache inside the graph, weights compressed by NNCF."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn

from examples.benchmarks.peers.decoding import DecoderJob, built
from examples.benchmarks.peers.encoding import bytes_in
from examples.benchmarks.peers.worker import Built


class _WithPast(nn.Module):
    """Tokens, positions, mask and the cache's tensors in; logits of the last token and the new tensors out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, beam: Tensor, past: tuple[tuple[Tensor, Tensor], ...]
    ) -> tuple[Tensor, ...]:
        """ids, positions [1, S], mask f32 [1, 1, S, P + S], beam [1], past k, v [1, heads, P, dim] per layer."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for k, v in past:
            layer = DynamicLayer()
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k.index_select(0, beam), v.index_select(0, beam)
            cache.layers.append(layer)
        out = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class OpenVino:
    """An infer request whose state is the cache."""

    def __init__(self, request: Any) -> None:
        self._request, self._past = request, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._past = 0

    def step(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after these tokens."""
        new, past = len(ids), self._past
        positions = np.arange(past, past + new)
        mask = np.where(np.arange(past + new) <= positions[:, None], 0, np.finfo(np.float32).min)
        inputs = {
            "ids": np.array([ids], dtype=np.int64),
            "positions": positions[None].astype(np.int64),
            "mask": mask[None, None].astype(np.float32),
            "beam": np.zeros(1, np.int32),
        }
        self._past += new
        logits: np.ndarray = self._request.infer(inputs, share_inputs=True)[0][0, -1]
        return logits


def build(job: DecoderJob, option: str) -> Built:
    """option: int4/128, int8, and so on."""
    path = job.path / f"openvino_{option.replace('/', '_')}.xml"
    if not path.exists():
        _write(job, option, path)
    core = ov.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    size = bytes_in(path, path.with_suffix(".bin"))
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    cache = compiled.get_property("KV_CACHE_PRECISION").to_string()
    return built(job, OpenVino(compiled.create_infer_request()), size, ov.__version__, computes_in=precision, kv=cache)


def _write(job: DecoderJob, option: str, path: Path) -> None:
    import nncf

    model: Any = job.module()
    config = model.config
    shape = (1, config.num_key_value_heads, 3, config.head_dim)
    past = tuple((torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers))
    example = {
        "ids": torch.zeros(1, 2, dtype=torch.int64),
        "positions": torch.tensor([[3, 4]]),
        "mask": torch.zeros(1, 1, 2, 5),
        "beam": torch.zeros(1, dtype=torch.int32),
        "past": past,
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(_WithPast(model), example_input=example)
    _make_stateful(converted, shape)
    kind, _, group = option.partition("/")
    mode = {"int4": nncf.CompressWeightsMode.INT4_SYM, "int8": nncf.CompressWeightsMode.INT8_SYM}[kind]
    settings: dict[str, Any] = {}
    if group:  # layers whose width the group does not divide take the largest that does
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        settings = {"group_size": int(group), "ratio": 1.0, "advanced_parameters": fallback}
    ov.save_model(nncf.compress_weights(converted, mode=mode, **settings), path, compress_to_fp16=False)


def _make_stateful(model: Any, shape: tuple[int, ...]) -> None:
    """The cache's inputs and outputs become variables of the graph."""
    names = {}
    for number, (past, present) in enumerate(zip(model.inputs[4:], model.outputs[1:], strict=True)):
        past.get_tensor().set_names({f"past.{number}"})
        present.get_tensor().set_names({f"present.{number}"})
        past.get_node().set_partial_shape(ov.PartialShape([1, shape[1], -1, shape[3]]))
        names[f"past.{number}"] = f"present.{number}"
    for value, dims in zip(model.inputs[:4], ([1, -1], [1, -1], [1, 1, -1, -1], [1]), strict=True):
        value.get_node().set_partial_shape(ov.PartialShape(dims))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, names)
    empty = np.zeros((1, shape[1], 0, shape[3]), np.float32)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.constant(empty)])  # what the cache holds after a reset
    model.validate_nodes_and_infer_types()
