"""Which attentions see only what came before, over the models of the zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qfx.allocation.causal import is_causal
from qfx.allocation.sizes import Sizes
from qfx.capture import capture_export
from qfx.errors import Note
from qfx.inputs import without_cache
from qfx.pipeline import prepare
from tests.zoo import ZOO

ATTENTION = ("aten::scaled_dot_product_attention", "qfx::attention")


_MORE = [("llama", True), ("mistral", True), ("opt", True), ("bloom", True), ("vit", False)]


def _told(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[bool], list[Note]]:
    from qfx import graph

    gm = capture_export(model, (), without_cache(model, inputs)).gm
    prepare(gm)
    notes: list[Note] = []
    sizes = Sizes(gm)
    return [is_causal(n, sizes, notes) for n in gm.graph.nodes if graph.schema_name(n) in ATTENTION], notes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt2", True),
        ("bert", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in _MORE),
    ],
)
def test_models(name: str, wanted: bool) -> None:
    found, notes = _told(*ZOO[name]())
    assert found == [wanted] * 2
    assert notes == []


class _Masked(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.kind = mask
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unsqueeze(1)
        t = x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        masks = {
            "flag": None,
            "tril": causal,
            "band": causal.triu(-1),
            "ahead": torch.ones(t, t, dtype=torch.bool).tril(1),
            "without self": torch.ones(t, t, dtype=torch.bool).tril(-1),
            "added": torch.zeros(t, t).masked_fill(~causal, float("-inf")),
            "bias": torch.zeros(t, t).masked_fill(~causal, -1.0),
        }
        mask = (q @ q.transpose(-1, -2)) if self.kind == "data" else masks[self.kind]
        return functional.scaled_dot_product_attention(q, q, q, mask, is_causal=self.kind == "flag")


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        ("flag", True), ("tril", True), ("band", True), ("added", True),
        ("ahead", False), ("without self", False), ("bias", False),
    ],
)  # fmt: skip
def test_masks(mask: str, wanted: bool) -> None:
    assert _told(_Masked(mask), {"x": torch.randn(2, 5, 8)}) == ([wanted], [])


def test_a_mask_that_depends_on_the_data_is_told() -> None:
    found, notes = _told(_Masked("data"), {"x": torch.randn(2, 5, 8)})
    assert found == [False]
    assert [note.reason for note in notes] == [
        "whether its mask is causal cannot be told: it depends on %linear; it is counted as without a cache"
    ]
