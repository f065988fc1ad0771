"""qfx.encoder_layer: the fused layer of nn.TransformerEncoder, spelled out and quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.encoder_layer import encoder_layer
from qfx.measuring.measure import sqnr_db
from tests.graphs import Function

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 3 + [True] * 3, [False] * 6, [False] * 5 + [True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
BOTH = CAUSAL.expand(3, 2, 6, 6) + torch.zeros(3, 1, 1, 6).masked_fill(PADDED[:, None, None], -torch.inf)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options).eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)  # norms and biases all differ
    return made


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(**options), 2)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(x, src_key_padding_mask=padded)
        return y


@pytest.mark.parametrize(("mask", "mask_type"), [(None, None), (PADDED, 1), (CAUSAL, 0), (BOTH, 2)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_it_computes_what_the_fused_kernel_does(
    mask: Tensor | None, mask_type: int | None, activation: str, *, norm_first: bool
) -> None:
    one = layer(activation=activation, norm_first=norm_first)
    own, last = one.self_attn, (mask, mask_type)
    args: list[Any] = [
        X, 16, 2, own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias, activation == "gelu",
        norm_first, one.norm1.eps, one.norm1.weight, one.norm1.bias, one.norm2.weight, one.norm2.bias,
        one.linear1.weight, one.linear1.bias, one.linear2.weight, one.linear2.bias, *last,
    ]  # fmt: skip
    with torch.no_grad():
        wanted = torch.ops.aten._transformer_encoder_layer_fwd(*args)
        torch.testing.assert_close(encoder_layer(*args), wanted, rtol=1e-4, atol=1e-5)
        args[10] = one.norm1.weight + 1
        assert sqnr_db(wanted, encoder_layer(*args)) < 30  # the comparison sees a wrong argument


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", [(X,), (X, PADDED)])
def test_a_compiled_encoder_is_quantized_whole(given: tuple[Tensor, ...]) -> None:
    model = Encoder().eval()
    compiled: Any = torch.compile(model, backend="qfx", options={"cache": False, "strict": True})
    with torch.inference_mode():
        wanted, found = model(*given), compiled(*given)
        shown = ~PADDED if len(given) > 1 else torch.ones_like(PADDED)
        assert 30 < sqnr_db(wanted[shown], found[shown]) < 60
    totals = qfx.report(compiled).totals
    assert (totals["linear_quantized"], totals["linear"]) == (8, 8)


@pytest.mark.filterwarnings("ignore:.*read by a forward of its own", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", ["quantize", "qat"])
def test_a_quantized_encoder_takes_padded_texts_without_nested_tensors(way: str) -> None:
    plain = Encoder().eval()
    change = qfx.quantize if way == "quantize" else qfx.prepare_qat
    changed = change(Encoder().eval(), "w8a8", data=[(X, PADDED)]).eval()
    with torch.no_grad():
        wanted, found = plain(X, PADDED), changed(X, PADDED)
    assert wanted[PADDED].count_nonzero() == 0 and found[PADDED].count_nonzero() > 0
    assert 30 < sqnr_db(wanted[~PADDED], found[~PADDED]) < 60


@pytest.mark.parametrize(("causal", "asked"), [(True, True), (False, True), (None, False)])
def test_a_mask_goes_with_is_causal(causal: bool | None, asked: bool) -> None:
    """As README says: without it torch looks at the mask's values, and Dynamo gives up nn.TransformerEncoder."""

    def forward(own: Any, x: Tensor) -> Any:
        return own.part(own.fc(x), mask=CAUSAL, is_causal=causal)

    part = nn.TransformerEncoder(layer(), 1, enable_nested_tensor=False)
    compiled = torch.compile(
        Function(forward, fc=nn.Linear(16, 16), part=part).eval(), backend="qfx", options={"recipe": "w8a8"}
    )
    with torch.no_grad():
        compiled(X)
    row = next(row for row in qfx.report(compiled).rows if row.node == "part.layers.0.linear1")
    assert bool(row.asked) is asked and ("in no compiled graph" in row.reason) is not asked
