"""torchao's quantize_ with 8-bit weights and 8-bit activations per token, by Inductor with frozen weights."""

from __future__ import annotations

import torch
import torchao
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from examples.benchmarks.peers.encoding import EncoderJob, built
from examples.benchmarks.peers.inductor import freeze
from examples.benchmarks.peers.worker import Built


def build(job: EncoderJob, option: str) -> Built:
    """Without data; no option."""
    freeze()
    model = job.module()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return built(job, lambda inputs: compiled(**inputs).last_hidden_state, _size(model), torchao.__version__)


def _size(model: torch.nn.Module) -> int:
    """Bytes of the parts of torchao's tensors."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        parts = [getattr(tensor, name) for name in names] or [tensor]
        total += sum(part.nbytes for part in parts)
    return total
