"""Carries out compiled kernels without a GPU: the PTX that a GPU would be given, instruction by instruction, in numpy.

Triton's interpreter runs the Python of a kernel; what the compiler makes of it (layouts, inline assembly, swizzled
shared memory, tensor core operands, copies by descriptors) it never sees. Here the compiled code itself runs:

    QFX_TEST_PTX=90 python -m pytest tests/backends/triton/test_gemm8.py

Every access of global memory is checked, with its alignment, against the memory behind the launch's tensors. Not seen:
time, races between warps (all threads run in step) and the order in which asynchronous copies and products end.
Instructions after NVIDIA's "PTX ISA", https://docs.nvidia.com/cuda/parallel-thread-execution.
"""
