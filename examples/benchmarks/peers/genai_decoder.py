"""onnxruntime-genai: its model builder's graph, and its own generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from examples.benchmarks.peers.decoding import DecoderJob, built, bytes_below, made
from examples.benchmarks.peers.worker import Built


class Genai:
    """A generator, made anew by `reset`."""

    def __init__(self, model: Any, context: int) -> None:
        self._model, self._context = model, context
        self._generator: Any = None

    def reset(self) -> None:
        """Forget all tokens."""
        settings = og.GeneratorParams(self._model)
        settings.set_search_options(do_sample=False, max_length=self._context + 1, min_length=0)
        self._generator = og.Generator(self._model, settings)

    def step(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after these tokens."""
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return np.asarray(self._generator.get_logits()).reshape(-1)


def build(job: DecoderJob, option: str) -> Built:
    """option: precision, and block size if it is not 32: int4/128."""
    precision, _, block = option.partition("/")
    path = job.path / f"genai_{precision}_{block}"
    if not path.exists():
        with made(path) as folder:
            _write(job.checkpoint(), folder, precision, block)
    return opened(job, path)


def opened(job: DecoderJob, path: Path) -> Built:
    """A folder with genai_config.json, whoever wrote it."""
    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}))
    model = og.Model(config)
    return built(job, Genai(model, job.context), bytes_below(path, "*.onnx", "*.onnx.data"), og.__version__)


def _write(checkpoint: Path, folder: Path, precision: str, block: str) -> None:
    """The builder is a script with modules beside it, not part of the package that can be imported."""
    script = Path(og.__file__).parent / "models" / "builder.py"
    options = [f"block_size={block}"] if block else []
    command = [sys.executable, str(script), "-i", str(checkpoint), "-o", str(folder), "-p", precision, "-e", "cpu"]
    command += ["-c", str(folder / "cache"), *(["--extra_options", *options] if options else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the model builder failed: {done.stderr.strip().splitlines()[-1]}")
