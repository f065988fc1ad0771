"""Scales and zero points that data gave, by the names under which a plan holds them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from qfx.annotation import Formats, each, show
from qfx.errors import UnsupportedError, explain


def calibrated(
    tensors: Mapping[str, Tensor],
    fqn: str,
    role: str,
    formats: Formats,
    node: fx.Node | None,
    *,
    what: str,
    instead: str,
) -> tuple[Tensor, Tensor | None]:
    """ "<fqn>/<role>_scale" and, of formats with a zero point, "<fqn>/<role>_zero" (else None).

    Raises UnsupportedError where one is missing: `what` needs it, and without data one can use `instead`.
    """
    scale, zero = (tensors.get(f"{fqn}/{role}_{leaf}") for leaf in ("scale", "zero"))
    has_zero = any(fmt.has_zero for fmt in each(formats))
    if scale is None or (has_zero and zero is None):
        raise UnsupportedError(
            explain(
                f"{what} needs a calibrated scale",
                expected=f"{role}_{'scale' if scale is None else 'zero'} of {fqn!r} for format '{show(formats)}'",
                found="none",
                node=node,
                next_step=f"calibrate with qfx.quantize(model, recipe, data=...){instead}",
            )
        )
    return scale, zero if has_zero else None
