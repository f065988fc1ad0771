"""Kernels that are launched before the kernel before them has ended: programmatic dependent launch, from sm_90 on."""

import triton
import triton.language as tl


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Behind it there is all that earlier kernels wrote; then the next one may be launched, which waits in turn.

    In this order, and before any access of memory: only the kernel right before is waited for, so each has to wait
    itself before it ends. Kernels of others, which may not, are launched as ever (see `lowering`).
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
