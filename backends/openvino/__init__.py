"""OpenVINO on the CPU: the graph as one model of standard operators, whose quantize steps become integer kernels."""

from qfx.backends.openvino.lowering import OpenVinoLowered, lower

__all__ = ["OpenVinoLowered", "lower"]
