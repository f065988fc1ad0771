"""Checkpoints of other libraries, written and read: compressed-tensors, GPTQ, AWQ, bitsandbytes, GGUF."""

from __future__ import annotations

from qfx.interop.awq import export_awq
from qfx.interop.bnb import export_bnb
from qfx.interop.compressed_tensors import export_compressed_tensors
from qfx.interop.gguf_export import export_gguf
from qfx.interop.gguf_import import import_gguf
from qfx.interop.gptq import export_gptq
from qfx.interop.read import import_checkpoint

__all__ = [
    "export_awq",
    "export_bnb",
    "export_compressed_tensors",
    "export_gguf",
    "export_gptq",
    "import_checkpoint",
    "import_gguf",
]
