"""Observed ranges of a prepared model leave padding out, as calibration does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.backends.qat.quantizers import InputQuantizer
from qfx.qat import quantizers
from qfx.training.padding import HELD
from tests.qat_nets import prepared

WIDTH, HEADS = 16, 2


class Padded(nn.Module):
    """Reads positions, rows of positions and heads; a token of padding (0) is ten times as large as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, WIDTH)
        self.qkv, self.rows = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = None if attention_mask is None else (attention_mask[:, None, None] > 0)
        y = x + F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        found: Tensor = self.rows(y.view(-1, WIDTH)).view_as(x)
        return found


def padded(tokens: int = 5, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Two samples of so many tokens, and padding up to `width`."""
    ids = torch.randint(1, 12, (2, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    return {name: F.pad(t, (0, width - tokens)) for name, t in (("input_ids", ids), ("attention_mask", mask))}


def observed(x: str = "u8", heads: Any = "i8/head") -> Any:
    torch.manual_seed(0)
    model = Padded().eval()
    with torch.no_grad():
        model.table.weight[0] *= 10
    rules = [{"target": "linear", "x": x, "w": "i8/ch"}, {"target": "attention", "q": heads, "v": heads}]
    return prepared(model, {"rules": rules}, [padded()], scales="observed")


def ranges(model: nn.Module) -> dict[str, Tensor]:
    found = {n: torch.stack((q.low, q.high)) for n, q in quantizers(model).items() if isinstance(q, InputQuantizer)}
    assert len(found) in (4, 6)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(t, b[n], rtol=1e-4, atol=1e-6) for n, t in a.items())


@pytest.mark.parametrize("formats", [("u8", "i8/head"), ("i8", "u8"), ("i8", ["i8/head", "u8/head"])])
def test_ranges_are_those_without_padding(formats: tuple[str, Any]) -> None:
    found, model = [], nn.Module()
    for width in (5, 8, 11):
        model = observed(*formats).train()
        for seed in (1, 2):
            model(**padded(width=width, seed=seed))
        found.append(ranges(model))
    assert same(found[0], found[1]) and same(found[0], found[2])
    model(**padded() | {"attention_mask": torch.ones(2, 8, dtype=torch.long)})
    assert not same(found[0], ranges(model)), "the tokens of padding are larger than the others"


def test_a_part_that_is_called_alone_counts_all() -> None:
    model = observed().train()
    model(**padded())
    before = float(model.qkv.fake_quant.inputs.high)
    model.qkv(torch.full((2, 8, WIDTH), 1e3))
    assert float(model.qkv.fake_quant.inputs.high) > before + 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, on any such function
def test_compiled_it_is_one_graph_for_all_lengths(fresh_dynamo: None) -> None:
    found = []
    for compiled in (False, True):
        model = observed().train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for width in (8, 9, 12, 14):
            run(**padded(width=width, seed=width)).sum().backward()
        found.append(ranges(model))
    assert same(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_masks_of_its_own(copied: Any) -> None:
    model = observed().train()
    other = copied(model)
    model(**padded(width=11))
    assert other.qkv.fake_quant.inputs.counted.__self__ is not model.qkv.fake_quant.inputs.counted.__self__
    other(**padded(width=11))
    assert same(ranges(model), ranges(other))


def test_a_converted_model_has_its_own_forward() -> None:
    model = observed()
    assert model.forward.__func__ is not Padded.forward and type(model).__name__.endswith("Padded")
    converted = qfx.convert(model)
    assert converted(**padded()).shape == (2, 8, WIDTH) and HELD not in converted.__dict__


def test_only_observed_inputs_watch() -> None:
    rules = [{"target": "linear", "x": "i8", "w": "i8/ch"}]
    learned, watching = (
        prepared(Padded().eval(), {"rules": rules}, [padded()], scales=scales) for scales in ("learned", "observed")
    )
    assert type(learned) is Padded and type(watching) is not Padded
    assert type(qfx.convert(watching)) is Padded
