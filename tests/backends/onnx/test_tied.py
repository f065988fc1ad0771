"""A table that is an embedding and the last layer's weight lies in a model once."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning
from qfx.recipe import Recipe
from tests.backends.onnx.checks import sqnr

IDS = torch.randint(0, 90, (3, 5), generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """An embedding, a linear and the embedding again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(90, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 90, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.linear(self.embedding(ids)))
        return y


def tables(path: Path) -> int:
    """How many tensors of the table's size a file holds."""
    return sum(int(np.prod(t.dims)) >= 90 * 64 for t in onnx.load(str(path)).graph.initializer)


@pytest.mark.parametrize("width", [96, 128, 100])
@pytest.mark.parametrize("w", ["i8/ch", "u8/ch", "i8"])
def test_once_and_right(tmp_path: Path, w: str, width: int) -> None:
    rules = [{"target": target, "w": w} for target in ("linear", "embedding")]
    model = qfx.quantize(Tied(width).eval(), Recipe.parse({"name": "tied", "rules": rules}), data=[(IDS,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        path = qfx.export_onnx(model, (IDS,), tmp_path / "m.onnx").path
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert sqnr(model(IDS), torch.from_numpy(session.run(None, {"ids": IDS.numpy()})[0])) > 35
    assert tables(path) == 1 + (width >= 90)  # the linear's own weight is as large


def test_other_tables_stay_rows(tmp_path: Path) -> None:
    """With 8-bit activations the last layer reads columns, and rows are gathered as they are stored."""
    model = qfx.quantize(Tied(128).eval(), "w8a8", data=[(IDS,)])
    path = qfx.export_onnx(model, (IDS,), tmp_path / "m.onnx").path
    assert tables(path) == 3
