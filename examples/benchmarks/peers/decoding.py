"""What every decoder peer is given: one checkpoint, a prompt, and how prefill and decode are timed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from examples.benchmarks.peers.worker import Built
from qfx.data import read_texts

ASSETS = Path(__file__).resolve().parents[3] / "tests" / "assets"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
    "llama-0.1b": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 8192,
    },
}
MODELS = (*SHAPES, "tiny_lm")
WARM = 32  # tokens that are read before the time counts


class Decoder(Protocol):
    """A language model with a cache of its own, batch 1."""

    def reset(self) -> None:
        """Forget all tokens."""

    def step(self, ids: list[int]) -> np.ndarray:
        """Take these tokens in; the logits [vocabulary] of what follows the last."""


@dataclass(frozen=True)
class DecoderJob:
    """The model, the tokens of a prompt and of an answer, those that it is judged on, threads, a folder for files."""

    model: str
    prompt: int
    generate: int
    judged: int
    threads: int
    folder: str

    @property
    def path(self) -> Path:
        """A folder for files of this model."""
        path = Path(self.folder) / self.model
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def context(self) -> int:
        """Tokens that a cache must hold."""
        return max(self.prompt + self.generate, self.judged)

    def checkpoint(self) -> Path:
        """The model as transformers saves it, in float16, with a tokenizer. All peers start from these numbers."""
        path, real = self.path / "checkpoint", ASSETS / "tiny_lm"
        if self.model == "tiny_lm":
            return real
        if (path / "config.json").exists():
            return path
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        settings: dict[str, Any] = {"vocab_size": 32000, "tie_word_embeddings": self.model != "llama-1b"}
        config = LlamaConfig(**{**settings, **SHAPES[self.model]}, max_position_embeddings=2048)
        with made(path) as folder:
            LlamaForCausalLM(config).half().save_pretrained(folder)
            for file in real.glob("tokenizer*"):
                shutil.copy(file, folder)
        return path

    def module(self) -> nn.Module:
        """The float32 model in eval mode."""
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        found: nn.Module = AutoModelForCausalLM.from_pretrained(self.checkpoint(), dtype=torch.float32).eval()
        return found

    def tokens(self, count: int) -> list[int]:
        """Held-out text for the model that has learned some, random tokens for the others."""
        if self.model == "tiny_lm":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint())
            text = "\n".join(read_texts(ASSETS / "eval.txt"))[: count * 16]
            return list(tokenizer(text, verbose=False)["input_ids"][:count])
        high = SHAPES[self.model].get("vocab_size", 32000)
        return torch.randint(high, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@contextmanager
def made(path: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all of it is there."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(path)


def built(job: DecoderJob, decoder: Decoder, size: int, version: str, **facts: Any) -> Built:
    """Prefill is the whole prompt in one step; decode is greedy, token by token.

    It is judged by the logits after half of the judged tokens, read at once, and after each of the others, one by one.
    Before a turn that counts it reads a short prompt and writes two tokens.
    """
    prompt, judged = job.tokens(job.prompt), job.tokens(job.judged)

    def timed() -> dict[str, float]:
        decoder.reset()
        started = time.perf_counter()
        token = int(decoder.step(prompt).argmax())
        middle = time.perf_counter()
        for _ in range(job.generate):
            token = int(decoder.step([token]).argmax())
        return {"prefill": middle - started, "decode": time.perf_counter() - middle}

    def warm() -> None:
        decoder.reset()
        for part in (prompt[:WARM], prompt[:1], prompt[:1]):
            decoder.step(part)

    def outputs() -> list[np.ndarray]:
        decoder.reset()
        half = len(judged) // 2
        parts = [judged[:half], *([token] for token in judged[half:])]
        return [np.stack([np.array(decoder.step(part), dtype=np.float32) for part in parts])]

    return Built(timed, outputs, size, version, facts, warm)


def bytes_below(folder: Path, *patterns: str) -> int:
    """Bytes of the files in a folder that match."""
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
