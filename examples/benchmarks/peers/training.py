"""What every training peer is given: the model, the tokens, and how a step of it is timed and weighed."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmarks.memory import MODELS, grown, model_of
from examples.benchmarks.peers.worker import Built
from examples.lm_eval import next_token_loss

TINY_LM = Path(__file__).resolve().parents[3] / "tests" / "assets" / "tiny_lm"
# int8-dynamic-activation int4-weight: weights in groups of 32 without, activations per token with zero points. torchao
# divides ranges by 7.5 steps and clips; here training begins at scales of least squared error, not of extremes.
INT8_INT4 = {"name": "int8-int4", "rounding": "mse", "rules": [{"target": "linear", "x": "u8/tok", "w": "i4/g32"}]}


@dataclass(frozen=True)
class TrainJob:
    """The model (`tiny_lm`, or a random one of `memory.MODELS`), the shape of a batch, the threads of each peer."""

    model: str
    batch: int
    length: int
    threads: int

    def module(self) -> Any:
        """The float32 model in eval mode, the same each time."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        if self.model == "tiny_lm":
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32).eval()
        return model_of(self.model)

    def ids(self) -> Tensor:
        """Random token ids [B, T]."""
        rows = 2048 if self.model == "tiny_lm" else MODELS[self.model][-1]
        return torch.randint(0, rows, (self.batch, self.length), generator=torch.Generator().manual_seed(1))


def built(job: TrainJob, model: nn.Module, *, compiled: bool, version: str) -> Built:
    """The peer whose step is: loss, gradients and AdamW of `model`, whole (one graph) under torch.compile or eager.

    Facts: `peak_bytes`, all that stays (parameters, buffers, moments) and what a step needs beside it at its peak.
    """
    warnings.simplefilter("ignore")  # of Dynamo's own
    model.train()
    ids, optimizer = job.ids(), torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loss_of(ids: Tensor) -> Tensor:
        return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)

    run = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of

    def step() -> Tensor:
        loss: Tensor = run(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    started = time.perf_counter()
    loss = float(step())
    facts = {"loss": round(loss, 3), "first_step_s": round(time.perf_counter() - started, 1)}
    step()
    facts["peak_bytes"] = stays(model, optimizer) + grown(step)

    def timed() -> dict[str, float]:
        started, busy = time.perf_counter(), time.process_time()
        step()
        return {"step": time.perf_counter() - started, "processor": time.process_time() - busy}

    return Built(timed, None, stays(model), version, facts, warm=lambda: None)


def stays(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters and buffers, and of the optimizer's tensors, each once."""
    moments = [] if optimizer is None else [t for state in optimizer.state.values() for t in state.values()]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *moments) if isinstance(t, Tensor)}
    return sum(t.nbytes for t in tensors.values())
