"""torchao's export quantization for x86, by Inductor with frozen weights."""

from __future__ import annotations

from typing import Any

import torch
import torchao
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from examples.benchmarks.peers.encoding import EncoderJob, Inputs, built
from examples.benchmarks.peers.inductor import freeze
from examples.benchmarks.peers.worker import Built


class _States(nn.Module):
    """Tensors in, hidden states out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[batch, length] each -> [batch, length, hidden]."""
        states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs["input_ids"], inputs["attention_mask"]


def build(job: EncoderJob, option: str) -> Built:
    """option: static or dynamic."""
    freeze()
    batches = job.calibration()
    with torch.no_grad():
        exported: Any = torch.export.export(_States(job.module()), _arguments(batches[0])).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=option == "dynamic"))
        prepared = prepare_pt2e(exported, quantizer)
        for batch in batches:
            prepared(*_arguments(batch))
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        compiled: Any = torch.compile(converted)
    return built(job, lambda inputs: compiled(*_arguments(inputs)), _size(converted), torchao.__version__)


def _size(gm: Any) -> int:
    """Bytes of what the graph reads: the float weights stay in the module without being used."""
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    return sum(tensor.nbytes for name, tensor in gm.state_dict().items() if name in used)
