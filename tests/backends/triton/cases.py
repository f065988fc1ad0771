"""What the tests of kernels share: the device, and variants that are compiled ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and not os.environ.get("QFX_TEST_PTX")  # else compiled code runs
BF16_STEP = 2.0**-8  # the interpreter truncates f32 to bf16


@dataclass(frozen=True)
class Case:
    """Calls of ops with meta tensors. expect: capability -> kernel name -> a regular expression that its PTX must hold.

    A kernel without an entry only has to compile, without spills.
    """

    name: str
    run: Callable[[], object]
    expect: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")
