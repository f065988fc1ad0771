"""What every peer that rounds weights is given: model, texts, linear layers, and how its result is judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.benchmarks.peers.worker import Built
from qfx import data

ASSETS = Path(__file__).resolve().parents[3] / "tests" / "assets"
LENGTH, WINDOWS, ITERS = 512, 8, 200


@dataclass(frozen=True)
class RoundingJob:
    """A causal language model (`tiny_lm`, or a folder), calibration samples of 512 tokens, threads, a folder.

    windows: of 512 tokens, that it is judged on. iters: steps of methods that learn.
    """

    model: str
    samples: int
    threads: int
    folder: str
    windows: int = WINDOWS
    iters: int = ITERS

    @property
    def path(self) -> Path:
        """A folder for files of this model."""
        path = Path(self.folder) / Path(self.model).name
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def source(self) -> str:
        """The folder of the float model."""
        return str(ASSETS / "tiny_lm") if self.model == "tiny_lm" else self.model

    def module(self) -> Any:
        """The float32 model in eval mode."""
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source, model_max_length=10**9)

    def calibration(self, batch: int = 8) -> list[dict[str, Tensor]]:
        """Batches of Python's help topics, [batch, 512] tokens."""
        made = data.text_batches(
            self.tokenizer(), data.python_help(), seq_len=LENGTH, batch_size=batch, samples=self.samples
        )
        return [{name: rows[name] for name in ("input_ids", "attention_mask")} for rows in made]

    def evaluation(self) -> Tensor:
        """Token ids [windows, 512] of text that no method has seen."""
        text = data.read_texts(ASSETS / "eval.txt")[0]
        ids: Tensor = self.tokenizer()(text, return_tensors="pt").input_ids[0]
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[: self.windows]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that every method rounds, by name: all but the output, which stays in float with the embedding."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: m for name, m in found.items() if not name.endswith("lm_head")}


def judged(job: RoundingJob, model: Any, size: int, version: str, seconds: float, **facts: Any) -> Built:
    """The peer that has made `model`, whose rounded layers take `size` bytes, scales and zero points included."""

    def outputs() -> list[np.ndarray]:
        with torch.no_grad():
            return [model(input_ids=ids[None], use_cache=False).logits[0].float().numpy() for ids in job.evaluation()]

    return Built(dict, outputs, size, version, {"seconds": seconds, **facts})


def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The float model with other values in its layers: what a method's codes stand for."""
    held = linears(model)
    assert set(weights) == set(held), sorted(set(weights) ^ set(held))
    with torch.no_grad():
        for name, weight in weights.items():
            held[name].weight.copy_(weight)
    return model


def group_bytes(shapes: Iterable[tuple[int, ...]], bits: int, group: int, *, scale: int = 2, zero: float = 0.0) -> int:
    """Bytes of codes and groups for weights [N, K]. scale, zero: bytes of each group's scale and zero point."""
    total = 0.0
    for n, k in shapes:
        groups = n * -(-k // group)
        total += -(-n * k * bits // 8) + groups * (scale + zero)
    return int(total)
