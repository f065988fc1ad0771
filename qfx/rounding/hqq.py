"""HQQ: half-quadratic quantization of a weight, without data (Badri & Shaji 2023).

    min over scale s, zero point z of  sum |w - s (q - z)|^p,  q = round(w / s) + z,  p < 1

A norm with p < 1 lets a few values be far off where the many get nearer. It is split by an auxiliary error e,

    e <- shrink(w - s (q - z), beta)            sign(x) max(|x| - |x|^(p - 1) / beta, 0), x in units of the scale
    z <- mean(q - (w - e) / s)                  affine types
    s <- <w - e, q - z> / <q - z, q - z>
    beta <- kappa beta

HQQ itself keeps s and a float z. Here zero points are integers that take as many bits as codes: z is rounded in each
step, and s, which is refitted to it, takes up what the rounding leaves. Symmetric types have the step of s alone, and
start with the sign that turns their longer side to the greatest magnitude. The start is that of nearest rounding; of
more than 4 bits, whose integer zero points leave no choice between codes, it is the best of the shares of the extremes
that `qfx.rounding.scales` tries. For each scale the parameters of least mean |w - s (q - z)| that were met are taken,
as HQQ stops by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import QParams, effective_scale, join, quantize, split, spread
from qfx.rounding.scales import explore, refit_scale, refit_zero, rounded, shares_of

NORM = 0.7  # p; this, beta, kappa and the number of steps are the paper's
_BETA, _KAPPA, _STEPS = 10.0, 1.01, 20
_LEAST = 1e-6
_FEW = 4  # bits


def half_quadratic(full: Tensor, fmt: Format) -> QParams:
    """Scales and zero points for a weight, f32 [.., N, K]."""
    few = (1.0,) if fmt.has_zero else (1.0, -fmt.qmax / fmt.qmin)
    best = explore(full, fmt, torch.abs, few if fmt.bits <= _FEW or fmt.is_float else shares_of(fmt))
    beta = _BETA
    params = best.params
    for _ in range(_STEPS):
        scale = spread(effective_scale(params.scale, params.zero, fmt), fmt).abs()
        steps = split(full - rounded(full, fmt, params), fmt) / scale
        target = full - join(_shrink(steps, beta) * scale, fmt, full.shape)
        codes = quantize(full, fmt, *params)
        if fmt.has_zero:
            params = refit_zero(target, fmt, codes, params)
        params = refit_scale(target, fmt, codes, params)
        best.offer(params)
        beta *= _KAPPA
    return best.params


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal operator of |x|^p, generalised soft thresholding (Chartrand 2012)."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=_LEAST).pow(NORM - 1) / beta).clamp(min=0)
