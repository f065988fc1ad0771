"""Checkpoints of other libraries: compressed-tensors, GPTQ, AWQ, bitsandbytes. One file per layout."""

from __future__ import annotations

from qfx.interop.awq import export_awq
from qfx.interop.bnb import export_bnb
from qfx.interop.compressed_tensors import export_compressed_tensors
from qfx.interop.gptq import export_gptq
from qfx.interop.read import import_checkpoint

__all__ = ["export_awq", "export_bnb", "export_compressed_tensors", "export_gptq", "import_checkpoint"]
