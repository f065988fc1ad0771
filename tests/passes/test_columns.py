"""Columns rounded one after the other: against the formula as it is published, and some rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import choose_qparams, dequantize, quantize
from qfx.packing import Packed
from qfx.passes import _columns
from qfx.passes.gptq import round_by
from tests.passes.test_gptq import as_published, data, seen, weight


def published(w: Tensor, x: Tensor, fmt: Format, *, act_order: bool, wanted: Tensor | None = None) -> Tensor:
    """Codes [N, K] in f64 by the inverse Hessian: algorithm 1 of Frantar et al. 2022, and of Li et al. 2025."""
    w, x = w.double().clone(), x.double()
    h = x.T @ x
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(h))
    h = h[order][:, order] + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.linalg.inv(h)).mH.contiguous()  # lower, its transpose is upper
    assert torch.allclose(u.T @ u, torch.linalg.inv(h))
    p = torch.zeros_like(u)
    if wanted is not None:
        d = ((wanted.double() - x).T @ x)[order][:, order]
        p = (d @ u.T).triu(1) @ u
    scale, zero = choose_qparams(w.float(), fmt)
    column = Format(fmt.type, "ch")
    codes = torch.empty(w.shape, dtype=fmt.code_dtype)
    width = fmt.group or w.shape[1]
    w = w[:, order]
    for j, at in enumerate(order.tolist()):
        if not act_order and fmt.group and j % width == 0:
            scale[:, j // width : j // width + 1], found = choose_qparams(w[:, j : j + width].float(), column)
            if zero is not None and found is not None:
                zero[:, j // width : j // width + 1] = found
        s = scale[:, at // width, None]
        z = None if zero is None else zero[:, at // width, None]
        codes[:, at] = quantize(w[:, j, None].float(), column, s, z)[:, 0]
        q = dequantize(codes[:, at, None], column, s, z)[:, 0].double()
        error, reached = (w[:, j] - q) / u[j, j], w[:, j].clone()
        w[:, j:] += -error.outer(u[j, j:]) + reached.outer(p[j, j:])
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", ["u4/g16", "i4/ch", "i3/g48", "u2/g64", "u3/g10"])
def test_agrees_with_the_published_form(text: str, act_order: bool) -> None:
    """More columns than are passed on at once; groups within, across and beyond them; a last one that is shorter."""
    w, x, fmt = weight(12, 300), data(900, 300), Format.parse(text)
    packed, _ = round_by(w, [seen(x)], fmt, as_published(act_order=act_order), name="fc")
    wanted = published(w, x, fmt, act_order=act_order)
    same = (packed.codes() == wanted).double().mean()
    assert same > 0.99, "all but values that lie between two codes in f32"


@pytest.mark.parametrize("act_order", [True, False])
def test_asymmetric_agrees_with_the_published_form(act_order: bool) -> None:
    w, fmt = weight(12, 200), Format.parse("i4/ch")
    x = data(900, 200)
    wanted = x + 0.3 * data(900, 200, seed=3)
    options = as_published(act_order=act_order, asymmetric=True)
    packed, _ = round_by(w, [seen(x, wanted)], fmt, options, name="fc")
    assert (packed.codes() == published(w, x, fmt, act_order=act_order, wanted=wanted)).double().mean() > 0.99
    plain, _ = round_by(w, [seen(x)], fmt, as_published(act_order=act_order), name="fc")

    def missed(p: Packed) -> float:
        return float((p.dequantize() @ x.T - w @ wanted.T).square().sum())

    assert missed(packed) < missed(plain)


def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(50, 40), data(200, 40)
    each = [("u4/g16", options) for options in (as_published(), as_published(act_order=False))]
    for text, options in (*each, ("u4/g16", as_published(asymmetric=True)), ("i4", as_published())):
        fmt, wanted = Format.parse(text), x + 0.3 * data(200, 40, seed=3) if options.asymmetric else None
        whole, told = round_by(w, [seen(x, wanted)], fmt, options, name="fc")
        monkeypatch.setattr(_columns, "_ELEMENTS", 7 * 40)
        monkeypatch.setattr(_columns, "_ROWS", 3)
        parts, again = round_by(w, [seen(x, wanted)], fmt, options, name="fc")
        monkeypatch.undo()
        assert (whole.codes() == parts.codes()).double().mean() > 0.99, "all but ties in f32"
        assert torch.allclose(whole.scale, parts.scale, rtol=1e-5)
        assert told["error_after"] == pytest.approx(again["error_after"], rel=0.05)
