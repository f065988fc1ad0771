"""A weight to blocks of GGUF: scales by search, K types on two levels, errors weighted by the energy of the inputs.

A K type first finds the best scale (and offset) of each part, see `qfx.interop.gguf_search`. Then the scales become
integers times a float16 for the block, and three things are repeated while the error falls: each part takes, among its
own and neighbouring integers, those of least error with codes rounded for them; the block's float16 factors are solved
again by least squares; the codes are rounded again. What has the least error of all rounds is kept.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.interop.gguf_blocks import Blocks, BlockType, block_type, exponent_scale, pack
from qfx.interop.gguf_search import divide, fit_affine, fit_scale, nearest, nearest_index
from qfx.numerics import require_finite

_CHUNK = 1 << 18  # values searched at once
_ROUNDS = 3
_F16_MAX = 65504.0


def encode(weight: Tensor, name: str, energy: Tensor | None = None, *, tensor: str = "weight") -> Tensor:
    """A weight [N, K] as rows of blocks of type `name`: uint8 [N, row bytes], on the CPU.

    energy: [K], how much an error in each column counts (mean square of the layer's inputs); None: all columns alike.
    Raises ValueError naming `tensor` for NaN, Inf, values that no float16 scale reaches, K that the block does not
    divide.
    """
    kind = block_type(name)
    rows, columns = weight.shape
    if columns % kind.size:
        raise ValueError(f"{tensor}: {columns} columns are no whole number of {name} blocks of {kind.size}")
    check_values(weight, kind, tensor)
    energy = torch.ones(columns) if energy is None else energy.cpu()
    assert energy.shape == (columns,), (energy.shape, columns)
    w = column_weights(energy).reshape(-1, kind.parts, kind.size // kind.parts)
    step = max(1, _CHUNK // columns)
    parts = [
        pack(fit_blocks(weight[i : i + step].detach().to("cpu", torch.float32).reshape(-1, *w.shape), w, kind))
        for i in range(0, rows, step)
    ]
    return torch.cat(parts).reshape(rows, kind.row_bytes(columns))


def check_values(weight: Tensor, kind: BlockType, tensor: str) -> None:
    """Raises ValueError, naming the tensor, for NaN, Inf and values that no factor of such blocks reaches."""
    require_finite(weight, tensor)
    factors = [abs(v) for v in kind.table or (kind.low, kind.high)]
    reach = _F16_MAX * (1 if kind.affine and kind.parts == 1 else max(factors) * max(1, -kind.scale_low))
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if kind.name != "MXFP4" and largest > reach:
        raise ValueError(
            explain(
                f"{tensor} holds values that {kind.name} cannot",
                expected=f"at most {reach:g}",
                found=f"{largest:g}",
                next_step="look for a failed load, or scale the weight",
            )
        )


def column_weights(energy: Tensor) -> Tensor:
    """How much an error in each column [K] counts, f32, 1 in the mean."""
    energy = energy.detach().to(torch.float32)
    mean = energy.mean()
    # A column without any energy still shall not take any value: it may be seen later.
    return (energy / mean).clamp_min(1e-4) if float(mean) > 0 else torch.ones_like(energy)


def fit_blocks(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    """Blocks of little error for x f32 [rows, blocks, parts, n]; w: how much an error counts, [.., parts, n]."""
    if kind.name == "MXFP4":
        return _power_of_two(x, w, kind)
    if kind.parts > 1:
        return _two_affine(x, w, kind) if kind.affine else _two_scales(x, w, kind)
    one = _one_affine if kind.affine else _one_scale
    return one(x.squeeze(-2), w.squeeze(-2), kind)


def fit_part(x: Tensor, w: Tensor, d: Tensor, m: Tensor | None, kind: BlockType) -> tuple[Tensor, Tensor | None]:
    """Integer scales and mins [rows] of one part x f32 [rows, n] of blocks of a K type whose factors d, m f32 [rows]
    stand. w: [n]."""
    x = x[:, None]
    if m is None:
        s = _integers(fit_scale(x, w, kind), d, kind)
        return _best_scales(x, w, d, s, kind)[0].squeeze(1), None
    found = fit_affine(x, w, kind, below=True)
    s, t = _integers(found.scale, d, kind), _integers(-found.offset, m, kind)
    s, t, _ = _best_pairs(x, w, (d, m), (s, t), kind)
    return s.squeeze(1), t.squeeze(1)


def _integers(wanted: Tensor, factor: Tensor, kind: BlockType) -> Tensor:
    """The integers nearest to scales (or mins) [.., parts] over the factor [..] of their block."""
    return divide(wanted, factor).round().clamp(kind.scale_low, kind.scale_high)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_F16_MAX, _F16_MAX).to(torch.float16)


def _factor(x: Tensor) -> Tensor:
    """A factor of integer scales as float16 holds it, f32: not 0 where x is not, as smaller integers do as well."""
    least = torch.where(x == 0, 0.0, torch.copysign(torch.full_like(x, 2.0**-24), x))
    return torch.where(x.abs() < 2.0**-24, least, _half(x).float())


def _codes(steps: Tensor, kind: BlockType) -> Tensor:
    flat = steps.flatten(0, 1)
    if kind.table is not None:
        return nearest_index(flat, kind.table).to(torch.uint8)
    return flat.round().clamp(kind.low, kind.high).to(torch.int8 if kind.low < 0 else torch.uint8)


def _one_scale(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    d = _half(fit_scale(x, w, kind))
    return Blocks(kind, _codes(divide(x, d.float()), kind), d.flatten())


def _one_affine(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    found = fit_affine(x, w, kind, below=False)
    d, m = _half(found.scale), _half(found.offset)
    steps = divide(x - m.float()[..., None], d.float())
    return Blocks(kind, _codes(steps, kind), d.flatten(), m.flatten())


def _power_of_two(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    """The exponent with the least error of the three about that of the extreme value."""
    x, w = x.squeeze(-2), w.squeeze(-2)
    top = x.abs().amax(-1)
    first = torch.frexp(top.clamp_min(1e-38))[1] - 3 + 127  # floor(log2) - 2: 4 to 8 steps of 1/2 hold the extreme
    best, least = None, None
    for shift in (0, 1, -1):
        e = (first + shift).clamp(0, 254).to(torch.uint8)
        scale = exponent_scale(e)
        error = (w * (nearest(divide(x, scale), kind) * scale[..., None] - x).square()).sum(-1)
        if best is None or least is None:
            best, least = e, error
        else:
            best, least = torch.where(error < least, e, best), torch.minimum(error, least)
    assert best is not None
    return Blocks(kind, _codes(divide(x, exponent_scale(best)), kind), best.flatten())


# ------------------------------------------------------------------------------------------------ two levels


def _two_scales(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    """Q3_K, Q6_K: x = d s q."""
    wanted = fit_scale(x, w, kind)  # [rows, blocks, parts]
    extreme = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_d = best_s = least = None
    for end in (kind.scale_low, kind.scale_high):
        d = _factor(extreme / end)
        s = _integers(wanted, d, kind)
        for _ in range(_ROUNDS):
            s, error = _best_scales(x, w, d, s, kind)
            total = error.sum(-1)
            if best_d is None or best_s is None or least is None:
                best_d, best_s, least = d, s, total
            else:
                better = total < least
                best_d, best_s = torch.where(better, d, best_d), torch.where(better[..., None], s, best_s)
                least = torch.minimum(total, least)
            d = _refit(x, w, d, s, kind)
    assert best_d is not None and best_s is not None
    codes = _codes(divide(x, best_d[..., None] * best_s), kind).flatten(1)
    return Blocks(kind, codes, _half(best_d).flatten(), scales=best_s.flatten(0, 1).to(torch.int16))


def _best_scales(x: Tensor, w: Tensor, d: Tensor, s: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """The integer scales of least error among s - 1, s, s + 1, and that error for each part."""
    best, least = s, None
    for shift in (0.0, 1.0, -1.0):
        tried = (s + shift).clamp(kind.scale_low, kind.scale_high)
        scale = d[..., None] * tried
        q = nearest(divide(x, scale), kind)
        error = (w * (q * scale[..., None] - x).square()).sum(-1)
        if least is None:
            least = error
        else:
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    assert least is not None
    return best, least


def _refit(x: Tensor, w: Tensor, d: Tensor, s: Tensor, kind: BlockType) -> Tensor:
    """The block's factor by least squares for the codes of d and s, as a float16 holds it."""
    q = nearest(divide(x, d[..., None] * s), kind) * s[..., None]
    num, den = (w * q * x).sum((-2, -1)), (w * q * q).sum((-2, -1))
    return _half(torch.where(den > 0, num / den.clamp_min(1e-38), d)).float()


def _two_affine(x: Tensor, w: Tensor, kind: BlockType) -> Blocks:
    """Q2_K, Q4_K, Q5_K: x = d s q - m t."""
    found = fit_affine(x, w, kind, below=True)
    top = kind.scale_high
    d, m = _factor(found.scale.amax(-1) / top), _factor((-found.offset).amax(-1) / top)
    s, t = _integers(found.scale, d, kind), _integers(-found.offset, m, kind)
    best: tuple[Tensor, ...] = ()
    least = torch.zeros(())
    for _ in range(_ROUNDS):
        s, t, error = _best_pairs(x, w, (d, m), (s, t), kind)
        total = error.sum(-1)
        if not best:
            best, least = (d, m, s, t), total
        else:
            better = total < least
            best = tuple(
                torch.where(better.reshape(*better.shape, *[1] * (new.dim() - better.dim())), new, old)
                for new, old in zip((d, m, s, t), best, strict=True)
            )
            least = torch.minimum(total, least)
        d, m = _refit_both(x, w, (d, m), (s, t), kind)
    d, m, s, t = best
    codes = _codes(divide(x + (m[..., None] * t)[..., None], d[..., None] * s), kind).flatten(1)
    integers = [v.flatten(0, 1).to(torch.int16) for v in (s, t)]
    return Blocks(kind, codes, _half(d).flatten(), _half(m).flatten(), *integers)


def _best_pairs(
    x: Tensor, w: Tensor, factors: tuple[Tensor, Tensor], integers: tuple[Tensor, Tensor], kind: BlockType
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of integers of least error among the nine neighbours, and that error for each part."""
    (d, m), (s, t) = factors, integers
    best_s, best_t, least = s, t, None
    for up, over in itertools.product((0.0, 1.0, -1.0), repeat=2):
        a, b = (s + up).clamp(0, kind.scale_high), (t + over).clamp(0, kind.scale_high)
        scale, offset = d[..., None] * a, m[..., None] * b
        shifted = x + offset[..., None]
        q = divide(shifted, scale).round_().clamp_(0, kind.high)
        error = (w * (q * scale[..., None] - shifted).square()).sum(-1)
        if least is None:
            least = error
            continue
        better = error < least
        best_s, best_t = torch.where(better, a, best_s), torch.where(better, b, best_t)
        least = torch.minimum(error, least)
    assert least is not None
    return best_s, best_t, least


def _refit_both(
    x: Tensor, w: Tensor, factors: tuple[Tensor, Tensor], integers: tuple[Tensor, Tensor], kind: BlockType
) -> tuple[Tensor, Tensor]:
    """The block's two factors by least squares; as they were where the equations say nothing or a factor below 0."""
    (d, m), (s, t) = factors, integers
    steps = divide(x + (m[..., None] * t)[..., None], d[..., None] * s).round_().clamp_(0, kind.high)
    q, u = steps * s[..., None], -t[..., None].expand_as(x)
    whole = (-2, -1)
    qq, qu, uu = (w * q * q).sum(whole), (w * q * u).sum(whole), (w * u * u).sum(whole)
    qx, ux = (w * q * x).sum(whole), (w * u * x).sum(whole)
    determinant = qq * uu - qu * qu
    usable = determinant > 1e-6 * qq * uu
    safe = torch.where(usable, determinant, 1.0)
    new_d, new_m = (uu * qx - qu * ux) / safe, (qq * ux - qu * qx) / safe
    alone = torch.where(qq > 0, qx / qq.clamp_min(1e-38), d)  # where no part has an offset
    usable = usable & (new_d > 0) & (new_m > 0)
    new_d = torch.where(usable, new_d, torch.where(uu > 0, d, alone))
    return _half(new_d).float(), _half(torch.where(usable, new_m, m)).float()
