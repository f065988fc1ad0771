"""Kernels that are launched before the kernel before them has ended: programmatic dependent launch, from sm_90 on."""

import triton
import triton.language as tl


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Behind it there is all that earlier kernels wrote; then the next one may be launched, which waits in turn.

    In this order, and before any access of memory: whoever was launched early then may read without waiting what was
    written two kernels before, as Inductor's kernels do.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
