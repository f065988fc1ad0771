"""Carries out compiled kernels without a GPU: the PTX that a GPU would be given, instruction by instruction, in numpy.

Triton's interpreter runs the Python of a kernel; what the compiler makes of it (layouts, inline assembly, swizzled
shared memory, tensor core operands, copies by descriptors) it never sees. Here the compiled code itself runs:

    QFX_TEST_PTX=90 python -m pytest tests/backends/triton/test_gemm8.py

Every access of global memory is checked, with its alignment, against the memory behind the launch's tensors. All
threads run in step, but races between warps and between programs are found all the same: each access is held against
earlier ones of the same bytes that no barrier, fence, wait or atomic operation orders before it (`shared_races`,
`global_races`), and what copies and products give is there at the wait and not before. Not seen: time, and what would
be ordered between the threads of a warp that have not parted.
Instructions after NVIDIA's "PTX ISA", https://docs.nvidia.com/cuda/parallel-thread-execution.
"""
