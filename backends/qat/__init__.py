"""The training backend: float weights, and formats as fake quantization in the forward."""

from __future__ import annotations

from qfx.backends.qat.fake_quant import fake_quantize
from qfx.backends.qat.quantizers import InputQuantizer, Quantizer, RunTimeInput, Scales, WeightQuantizer

__all__ = ["InputQuantizer", "Quantizer", "RunTimeInput", "Scales", "WeightQuantizer", "fake_quantize"]
