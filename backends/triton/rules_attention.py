"""Rules of attention between rounded operands, and of caches that hold packed codes."""

from __future__ import annotations

import torch

import qfx.backends.triton.cache_append
import qfx.backends.triton.cache_attention
import qfx.backends.triton.cache_read  # noqa: F401  (each registers its op)
from qfx import graph
from qfx.backends.triton import cache_layout
from qfx.backends.triton import quantized_attention as rounded
from qfx.backends.triton.passes._nodes import are_alike
from qfx.backends.triton.row_codes import FLOATS as DTYPES
from qfx.backends.triton.site import Site, Taken

qfx_triton = torch.ops.qfx_triton


def quantized_attention(site: Site) -> Taken | str:
    """qfx::quantized_attention, in one pass over the keys (two where the weights have a format)."""
    q, v = graph.val(site.given["q"]), graph.val(site.given["v"])
    if reason := rounded.reason_against(q.shape[-1], v.shape[-1], q.dtype):
        return reason
    numbers = [value for name, value in site.given.items() if name[1:] in ("_scale", "_zero")]
    formats = [value for name, value in site.given.items() if name.endswith("_format")]
    heads, own = (graph.val(site.given[name]).shape[1] for name in "qk")
    rounded.prepare(numbers, formats, heads, own, q.device)
    return site.put(qfx_triton.quantized_attention.default, *site.given.values(), kernel="quantized_attention (Triton)")


def attention(site: Site) -> Taken | None:
    """qfx::attention, with a cap or sinks, in 16 bits: the same kernel, in which nothing is rounded.

    None, and the op's own definition is taken, for f32, which the kernel would multiply in tf32, and for other sizes.
    """
    q, k, v, mask = (graph.val(site.given[name]) for name in ("q", "k", "v", "mask"))
    halves = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    if not halves or not are_alike(q, k, v, mask) or rounded.reason_against(q.shape[-1], v.shape[-1], q.dtype):
        return None
    how = [site.given[name] for name in ("scale", "causal", "softcap")]
    operands = [site.given[name] for name in ("q", "k", "v", "mask", "sinks")]
    none: list[list[float]] = [[]] * 6  # scales and zero points of q, k and v
    op = qfx_triton.quantized_attention.default
    return site.put(op, *operands, *none, *how, "", "", "", "", kernel="attention (Triton)")


def cache_attention(site: Site) -> Taken | str:
    """qfx::cache_attention over the codes as they lie."""
    return _of_dtype(site, "q") or _of_memory(site, "cache_attention")


def cache_append(site: Site) -> Taken | str:
    """qfx::cache_append, in place (see `write_in_place`)."""
    return _of_dtype(site, "k") or _of_memory(site, "cache_append")


def cache_read(site: Site) -> Taken | str:
    """qfx::cache_read, floats of what is held before a prompt."""
    return _of_memory(site, "cache_read")


def _of_memory(site: Site, name: str) -> Taken | str:
    """The kernel of the op's name, with the same arguments, where it can read such a memory."""
    if reason := cache_layout.reason_against(site.given["spec"], site.device):
        return reason
    return site.put(getattr(qfx_triton, name).default, *site.given.values(), kernel=f"{name} (Triton)")


def _of_dtype(site: Site, name: str) -> str | None:
    dtype = graph.val(site.given[name]).dtype
    return None if dtype in DTYPES else f"operands in f16, bf16 or f32 have kernels, not in {dtype}"
