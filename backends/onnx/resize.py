"""Resampling of images and sound to another size, and of images at points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.values import Value


def _resized(b: Builder, x: Value, factors: Sequence[Any] | None, mode: str, place: str, **attrs: Any) -> Value:
    """x in the size that torch found. Where a factor leaves a fraction of a pixel, it is not the ratio of the sizes."""
    rest = x.dims[2:]
    for factor, size in zip(factors or [], rest, strict=False):
        whole = isinstance(factor, int | float) and float(factor).is_integer()
        if factor is not None and not whole and not (isinstance(size, int) and float(size * factor).is_integer()):
            raise NotImplementedError("resizing by a factor that leaves a fraction of a pixel")
    sizes = b.shape(b.out_dims)
    value = b.cast(x, torch.float32)
    result = b.op("Resize", value, None, None, sizes, mode=mode, coordinate_transformation_mode=place, **attrs)
    return b.cast(result, x.dtype)


def nearest(b: Builder, x: Value, _: Any, *scales: Any) -> Value:
    """The pixel whose left edge is nearest below."""
    return _resized(b, x, _factors(scales), "nearest", "asymmetric", nearest_mode="floor")


def nearest_exact(b: Builder, x: Value, _: Any, *scales: Any) -> Value:
    """The pixel whose centre is nearest."""
    return _resized(b, x, _factors(scales), "nearest", "half_pixel", nearest_mode="round_prefer_ceil")


def linear(b: Builder, x: Value, _: Any, align_corners: bool, *scales: Any) -> Value:
    """Linear, bilinear or trilinear."""
    return _resized(b, x, _factors(scales), "linear", "align_corners" if align_corners else "half_pixel")


def cubic(b: Builder, x: Value, _: Any, align_corners: bool, *scales: Any) -> Value:
    """Bicubic with a = -0.75."""
    place = "align_corners" if align_corners else "half_pixel"
    return _resized(b, x, _factors(scales), "cubic", place, cubic_coeff_a=-0.75)


def linear_smooth(b: Builder, x: Value, _: Any, align_corners: bool, *scales: Any) -> Value:
    """Bilinear over all pixels that one of the result covers."""
    return _smooth(b, x, align_corners, scales, "linear")


def cubic_smooth(b: Builder, x: Value, _: Any, align_corners: bool, *scales: Any) -> Value:
    """Bicubic with a = -0.5 over all pixels that one of the result covers."""
    return _smooth(b, x, align_corners, scales, "cubic", cubic_coeff_a=-0.5)


def _smooth(b: Builder, x: Value, align_corners: bool, scales: Sequence[Any], mode: str, **attrs: Any) -> Value:
    if align_corners:
        raise NotImplementedError("resizing without aliasing from corner to corner")
    return _resized(b, x, _factors(scales), mode, "half_pixel", antialias=1, exclude_outside=1, **attrs)


def grid_sampler(b: Builder, x: Value, grid: Value, mode: int, padding: int, align_corners: bool) -> Value:
    """Images at the points of a grid (deformable attention). "linear" is called "bilinear" before opset 20, where it is
    what is taken if nothing is said, as it is afterwards."""
    if len(x.dims) != 4 or mode not in (0, 1):
        raise NotImplementedError("a grid in a volume, or a cubic one")
    attrs: dict[str, Any] = {"mode": "nearest"} if mode else {}
    attrs |= {"padding_mode": ("zeros", "border", "reflection")[padding], "align_corners": int(align_corners)}
    result = b.op("GridSample", b.cast(x, torch.float32), b.cast(grid, torch.float32), **attrs)
    return b.cast(result, x.dtype)


def _factors(scales: Sequence[Any]) -> Sequence[Any] | None:
    """The factors given: as one list (the overload `vec`) or one by one."""
    if len(scales) == 1 and (scales[0] is None or isinstance(scales[0], list | tuple)):
        return scales[0]
    return scales


def _all(names: Sequence[str], emit: Emit) -> dict[str, Emit]:
    return {f"aten.{name}.{overload}": emit for name in names for overload in ("default", "vec")}


EMIT: dict[str, Emit] = {
    **_all([f"upsample_nearest{n}d" for n in (1, 2, 3)], nearest),
    **_all([f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)], nearest_exact),
    **_all(["upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"], linear),
    **_all(["upsample_bicubic2d"], cubic),
    **_all(["_upsample_bilinear2d_aa"], linear_smooth),
    **_all(["_upsample_bicubic2d_aa"], cubic_smooth),
    **{f"aten.{name}.default": grid_sampler for name in ("grid_sampler", "grid_sampler_2d")},
}
