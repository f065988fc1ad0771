"""The GPU backend: quantized nodes as kernels in Triton, what stays in float as torch's own compiler has it."""
