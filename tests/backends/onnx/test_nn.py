"""Linear layers, norms, convolutions and pools against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.backends.onnx import lower
from qfx.capture import capture_export
from tests.backends.onnx.checks import Case, check, floats, same


def xw(n: int) -> list[Tensor]:
    return [floats(n, 5, 8), floats(6, 8, seed=2), floats(6, seed=3)]


def norm(n: int) -> list[Tensor]:
    return [floats(n, 5, 8) * 3 + 1, floats(8, seed=2), floats(8, seed=3)]


def image(n: int) -> list[Tensor]:
    return [floats(n, 4, 9, 7), floats(8, 4, 3, 3, seed=2), floats(8, seed=3)]


def sound(n: int) -> list[Tensor]:
    return [floats(n, 4, 12), floats(8, 4, 3, seed=2), floats(8, seed=3)]


def _points(x: Tensor, **how: Any) -> Tensor:
    """x at points that depend on it, within the image and beside it."""
    places = torch.tanh(x[:, :2].flatten(2).transpose(1, 2)[:, :6]) * 1.3
    return F.grid_sample(x, places.unflatten(1, (2, 3)), **{"align_corners": False, **how})


CASES: list[Case] = [
    ("linear", lambda x, w, c: (F.linear(x, w, c), F.linear(x, w), F.linear(x[0], w, c), F.linear(x[0, 0], w, c)), xw),
    ("linear of a transposed weight", lambda x, w, c: F.linear(x[..., :6], w.t(), None), xw),
    ("matmul", lambda x, w, c: (x @ w.t(), w @ x[0].t(), x[0, 0] @ w.t(), x @ w[0], w[0] @ w[1]), xw),
    ("bmm", lambda x, w, c: (torch.bmm(x, x.mT), torch.baddbmm(x[:, :, :5], x, x.mT, beta=0.5, alpha=2)), xw),
    ("addmm", lambda x, w, c: (torch.addmm(c, x[0], w.t()), torch.addmm(c, x[0], w.t(), beta=0, alpha=3)), xw),
    ("mv", lambda x, w, c: (torch.mv(w, x[0, 0]), torch.addmv(c, w, x[0, 0])), xw),
    ("integer matmul", lambda x, w, c: (x * 9).long() @ (w.t() * 9).long(), xw),
    (
        "layer_norm",
        lambda x, w, c: (F.layer_norm(x, (8,), w, c), F.layer_norm(x, (8,), w), F.layer_norm(x, (8,))),
        norm,
    ),
    ("layer_norm eps", lambda x, w, c: F.layer_norm(x * 1e-3, (5, 8), None, None, 1e-2), norm),
    ("rms_norm", lambda x, w, c: (F.rms_norm(x, (8,), w), F.rms_norm(x, (8,)), F.rms_norm(x, (8,), w, 1e-2)), norm),
    (
        "group_norm",
        lambda x, w, c: (F.group_norm(x.mT, 2, w, c), F.group_norm(x.mT, 4), F.group_norm(x.mT[..., 0], 2)),
        norm,
    ),
    ("norms of sizes that vary", lambda x, w, c: (F.layer_norm(x, x.shape), F.rms_norm(x, x.shape)), norm),
    ("instance_norm of channels that vary", lambda x, w, c: F.instance_norm(x.transpose(0, 1)), norm),
    ("batch_norm", lambda x, w, c: F.batch_norm(x.mT, c, w.abs() + 0.1, w, c), norm),
    ("instance_norm", lambda x, w, c: F.instance_norm(x.mT), norm),
    ("conv2d", lambda x, w, c: (F.conv2d(x, w, c), F.conv2d(x, w, None, 2, 1), F.conv2d(x, w, c, 1, (2, 1), 2)), image),
    ("conv2d groups", lambda x, w, c: F.conv2d(x, w[:, :2], c, groups=2), image),
    (
        "conv2d same",
        lambda x, w, c: (F.conv2d(x, w, c, padding="same"), F.conv2d(x, w[..., :2], c, padding="valid")),
        image,
    ),
    ("conv1d", lambda x, w, c: (F.conv1d(x, w, c, stride=2, padding=1), F.conv1d(x, w)), sound),
    ("conv1d causal", lambda x, w, c: F.conv1d(F.pad(x, (2, 0)), w[:4, :1], groups=4), sound),
    ("conv_transpose", lambda x, w, c: F.conv_transpose1d(x, w.transpose(0, 1), c, stride=2, output_padding=1), sound),
    ("max_pool", lambda x, w, c: (F.max_pool2d(x, 3), F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, (2, 3))), image),
    (
        "avg_pool",
        lambda x, w, c: (F.avg_pool2d(x, 3), F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 1, 1, False, False)),
        image,
    ),
    ("avg_pool ceil", lambda x, w, c: F.avg_pool2d(x, 2, ceil_mode=True), image),
    ("max_pool ceil", lambda x, w, c: F.max_pool2d(x, 2, ceil_mode=True), image),
    (
        "pools without a batch",
        lambda x, w, c: (F.max_pool2d(x[0], 3, 2, 1), F.avg_pool2d(x[0], (3, 2)), F.max_pool1d(x[0, 0], 3)),
        image,
    ),
    ("resize nearest", lambda x, w, c: (F.interpolate(x, (12, 5)), F.interpolate(x, scale_factor=2)), image),
    ("resize nearest exact", lambda x, w, c: F.interpolate(x, (12, 5), mode="nearest-exact"), image),
    (
        "resize linear",
        lambda x, w, c: (F.interpolate(x, (12, 5), mode="bilinear"), F.interpolate(x, 4, mode="bilinear")),
        image,
    ),
    ("resize aligned", lambda x, w, c: F.interpolate(x, (12, 5), mode="bilinear", align_corners=True), image),
    ("resize cubic", lambda x, w, c: F.interpolate(x, (12, 10), mode="bicubic"), image),
    (
        "points of an image",
        lambda x, w, c: [_points(x, padding_mode=p) for p in ("zeros", "border", "reflection")],
        image,
    ),
    ("points, corners aligned", lambda x, w, c: _points(x, align_corners=True), image),
    ("nearest points", lambda x, w, c: _points(x, mode="nearest"), image),
    (
        "resize without aliasing",
        lambda x, w, c: tuple(
            F.interpolate(x, size, mode=mode, antialias=True)
            for mode in ("bilinear", "bicubic")
            for size in ((3, 4), (12, 5), (20, 20))
        ),
        image,
    ),
    ("resize sound", lambda x, w, c: F.interpolate(x, 20, mode="linear"), sound),
    ("adaptive_avg_pool", lambda x, w, c: F.adaptive_avg_pool2d(x, 1), image),
    ("max_pool1d", lambda x, w, c: F.max_pool1d(x, 3, 2), sound),
    ("dropout in eval", lambda x, w, c: F.dropout(x, 0.5, training=False), xw),
    ("embedding", lambda x, w, c: F.embedding((x[..., 0].abs() * 2).long() % 6, w), xw),
    ("cosine_similarity", lambda x, w, c: F.cosine_similarity(x, x.flip(1), dim=-1), xw),
    (
        "cosine_similarity of other shapes",
        lambda x, w, c: [F.cosine_similarity(x[:, :1], y, dim=d) for y in (x, x[0], x[0, 0]) for d in (0, 1, -1)],
        xw,
    ),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic, tolerance=5e-6)


class _Conv1D(nn.Module):
    """GPT-2's linear: the weight lies as [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(floats(8, 6))
        self.bias = nn.Parameter(floats(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


def test_linear_reads_a_transposed_parameter_where_it_lies() -> None:
    captured = capture_export(_Conv1D(), (floats(2, 8),))
    lowered = lower(captured.gm, strict=True)
    same(lowered(floats(3, 8))[0], _Conv1D()(floats(3, 8)).detach())
    (model,) = lowered.models
    assert "Transpose" not in {n.op_type for n in model.model.graph.node}
    assert set(model.weights) | {t.name for t in model.model.graph.initializer} >= {"weight", "bias"}
