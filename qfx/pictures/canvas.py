"""Figures without pyplot: nothing global of matplotlib is read or changed, and nothing needs a display."""

from __future__ import annotations

import io
from typing import Any

from qfx.errors import explain

INK, FAINT, MISSING = "#1f2933", "#9aa5b1", "#f2f4f6"
DPI = 110


def figure(width: float, height: float) -> Any:
    """A matplotlib Figure of that many inches. Raises ValueError where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            explain("pictures need matplotlib", found="none", next_step="pip install 'qfx[pictures]'")
        ) from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def png(made: Any) -> bytes:
    """A figure as a PNG file, white behind."""
    target = io.BytesIO()
    made.savefig(target, format="png", dpi=DPI, facecolor="white")
    return target.getvalue()


def plain(axis: Any) -> None:
    """No frame above and at the right, faint lines."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=8)


def colours(name: str) -> Any:
    """A colour map of matplotlib by its name; what is missing is grey."""
    import matplotlib as mpl

    return mpl.colormaps[name].with_extremes(bad=MISSING)


def dark(rgba: tuple[float, ...]) -> bool:
    """Whether white text is read better on this colour than black."""
    red, green, blue = rgba[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
