"""ONNX Runtime on the CPU: a graph in normal form becomes an ONNX model, node by node, and runs on torch's memory."""

from qfx.backends.onnx.lowering import OnnxLowered, lower, supports

__all__ = ["OnnxLowered", "lower", "supports"]
