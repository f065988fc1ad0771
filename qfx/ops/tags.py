"""Tags of operators, by which Inductor knows how they may run."""

from __future__ import annotations

import torch

# Reference kernels ask the device for values, or bring tables to it: a CUDA graph can record neither. Inductor runs
# such operators between the graphs.
UNSAFE = (torch.Tag.cudagraph_unsafe,)
