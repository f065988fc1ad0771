"""`qfx.onnx.load`: what `qfx.export_onnx` wrote, as an object to call; decoders have transformers' `generate()`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qfx.decoding.encoder_decoder import DOCUMENT
from qfx.storage.files import path_of

if TYPE_CHECKING:
    from qfx.decoding.generation import OnnxCausalLM
    from qfx.decoding.generation_seq2seq import OnnxSeq2SeqLM


class OnnxModel:
    """An exported model: call it with its inputs as keyword arguments; it returns its outputs by name."""

    def __init__(self, path: Path, threads: int | None = None, entries: Mapping[str, str] | None = None) -> None:
        from qfx.backends.onnx.runner import Runner

        self._runner = Runner(path, threads, entries)
        self.inputs, self.outputs = tuple(self._runner.inputs), tuple(self._runner.outputs)
        self.metadata = dict(self._runner.metadata)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run. Raises ValueError for inputs that do not fit."""
        return self._runner.run(inputs)


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, session_options: Mapping[str, str] | None = None
) -> OnnxModel | OnnxCausalLM | OnnxSeq2SeqLM:
    """Open a file (`OnnxModel`) or the folder of a decoder or encoder-decoder (a model with `generate()`).

    threads: None for `torch.get_num_threads()`. session_options: config entries of ONNX Runtime, such as
    {"session.intra_op.allow_spinning": "0"}. On x86 without VNNI integer products take an exact, slower path, which a
    warning says. Raises ValueError for session options that are unknown or wrong here and for files that are cut short
    or altered, FileNotFoundError where one is missing.
    """
    target = path_of(path)
    if not target.exists():
        raise FileNotFoundError(f"there is no {target}\n  expected: what qfx.export_onnx wrote")
    if (target / DOCUMENT).exists():
        from qfx.decoding import generation_seq2seq

        return generation_seq2seq.load(target, threads=threads, session_options=session_options)
    if target.is_dir():
        from qfx.decoding.generation import OnnxCausalLM

        return OnnxCausalLM(target, threads=threads, session_options=session_options)
    return OnnxModel(target, threads, session_options)


def check(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an exported file, once it is seen to be whole. Raises as `load` does."""
    from qfx.backends.onnx.export import verify

    return dict(verify(Path(path)))
