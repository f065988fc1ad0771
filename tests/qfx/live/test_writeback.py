"""Write-back: what stands in the live model afterwards, under every name, with nothing of the float model kept."""

from __future__ import annotations

import gc
import warnings
import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import QfxWarning, Recipe, Rule, UnsupportedError
from qfx.live.modules import QuantConv, QuantEmbedding, QuantLinear
from qfx.measuring.measure import sqnr_db
from tests.graphs import Function
from tests.seeded import randn
from tests.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:.*weight-only, not x=:qfx.QfxWarning")


@torch.no_grad()
def quantized(model: nn.Module, *inputs: Tensor, recipe: Any = "w8a8", decibel: float = 25) -> Any:
    """The model quantized on these inputs; its output is near that of the float one."""
    model.eval()
    wanted = model(*inputs)
    found: Any = qfx.quantize(model, recipe, [inputs])
    assert sqnr_db(wanted, found(*inputs)) >= decibel
    return found


def test_a_bare_linear_is_replaced() -> None:
    found = quantized(nn.Linear(8, 4), randn(3, 8))
    assert isinstance(found, QuantLinear) and found.x_format == "i8/tok" and found.sqnr_db is not None


def test_a_module_under_two_names_stays_one() -> None:
    layer = nn.Linear(8, 8)
    found = quantized(nn.Sequential(layer, nn.ReLU(), layer), randn(3, 8))
    assert isinstance(found[0], QuantLinear) and found[0] is found[2]
    shared: nn.Module = Function(lambda own, x: own.b(torch.relu(own.a(x))), a=layer, b=layer)
    found = quantized(shared, randn(3, 8))
    assert found.a is found.b and isinstance(found.a, QuantLinear)


class TiedHead(nn.Module):
    """Embedding and head share a table; `twin` shares it, too, and is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.twin = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), nn.Embedding(12, 8)
        self.free = nn.Linear(8, 12, bias=False)
        self.head.weight = self.twin.weight = self.free.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids))
        return found


def test_tied_weights_are_packed_once_also_where_nobody_reads_them() -> None:
    found = quantized(TiedHead(), torch.arange(12).reshape(2, 6))
    assert isinstance(found, TiedHead)
    assert isinstance(found.table, QuantEmbedding) and isinstance(found.twin, QuantEmbedding)
    assert isinstance(found.head, QuantLinear)
    codes = {found.table.w_codes.data_ptr(), found.twin.w_codes.data_ptr(), found.head.w_codes.data_ptr()}
    assert len(codes) == 1
    assert {p.data_ptr() for p in found.parameters()} == set()
    assert (
        torch.equal(found.free.weight, found.table.weight)
        and found.free.get_buffer("weight_w_codes").data_ptr() in codes
    )
    assert type(found.free).__name__ == "PackedLinear"


def test_conflicting_formats_of_a_tied_weight_are_told_and_stored_twice() -> None:
    recipe = Recipe(name="two", rules=(Rule(target="linear", w="i4/g4"), Rule(target="embedding", w="i8/ch")))
    ids = torch.arange(12).reshape(2, 6)
    with pytest.warns(QfxWarning, match=r"head: its weight is tied to 'table' \(w=i8/ch\), and w=i4/g4 was asked"):
        found = quantized(TiedHead(), ids, recipe=recipe, decibel=15)
    assert isinstance(found, TiedHead)
    assert found.table.w_format == "i8/ch" and found.head.w_format == "i4/g4"


@pytest.mark.parametrize(("asked", "drawn"), [("linear", "table"), ("embedding", "head")])
def test_a_tie_of_which_one_reader_is_asked_for_is_told(asked: str, drawn: str) -> None:
    recipe = Recipe(name="one", rules=(Rule(target=asked, w="i8/ch"),))
    ids = torch.arange(12).reshape(2, 6)
    with pytest.warns(QfxWarning, match=rf"{drawn}.*: its weight is tied to '\w+' \(w=i8/ch\), and is rounded with it"):
        found = quantized(TiedHead(), ids, recipe=recipe)
    assert isinstance(found, TiedHead)
    assert torch.equal(found.table.weight, found.head.weight) and not list(found.parameters())
    with pytest.raises(UnsupportedError, match="is rounded with it, though not asked"):
        qfx.quantize(TiedHead().eval(), recipe, [ids], strict=True)


def test_hooks_go_on_and_their_handles_remove_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    seen: list[str] = []
    after = model[0].register_forward_hook(lambda *_: seen.append("after"))
    before = model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda _m, _a, out: out + 1)
    wanted = model(randn(3, 8))
    found = quantized(model, randn(3, 8))
    assert sqnr_db(wanted, found(randn(3, 8))) > 25
    seen.clear()
    found(randn(3, 8))
    assert seen == ["before", "after"]
    after.remove()
    before.remove()
    found(randn(3, 8))
    assert seen == ["before", "after"]


def test_modes_are_those_of_the_modules_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    model.train()
    model[0].eval()
    found: Any = qfx.quantize(model, "w8a8", [randn(3, 8)])
    assert [m.training for m in found.modules()] == [True, False, True, True, True]
    found.eval()
    assert not any(m.training for m in found.modules())


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_keeps_the_float_weights(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    nbytes = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(import_module("qfx.quantize"), "COLLECTED_BYTES", nbytes if at_once else nbytes + 1)
    held = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("weight")]
    gc.disable()
    try:
        found = quantized(model, randn(3, 64))
        assert [ref() is None for ref in held] == [at_once, at_once]
    finally:
        gc.enable()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert sum(p.numel() for p in found.parameters()) == 72


class Conv1D(nn.Module):
    """GPT-2's own linear: the weight [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(k, n)), nn.Parameter(randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


class Spelled(nn.Linear):
    """A linear with a forward of its own (Falcon's)."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Gated(nn.Linear):
    """No linear: its forward does more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


@pytest.mark.parametrize("layer", [Conv1D(8, 6), Conv1D(8, 8), Spelled(8, 6), Spelled(8, 8)], ids=repr)
def test_a_module_that_computes_a_linear_is_replaced_whatever_its_class(layer: nn.Module) -> None:
    found = quantized(nn.Sequential(layer, nn.ReLU()), randn(2, 3, 8))
    assert isinstance(found[0], QuantLinear) and found[0].x_format == "i8/tok"


def test_a_module_that_computes_more_keeps_its_forward_and_that_is_told() -> None:
    model = nn.Sequential(Gated(8, 6), nn.Identity()).eval()
    wanted = model(randn(2, 8))
    with pytest.warns(QfxWarning, match="Gated's weight is read by a forward of its own: weight-only, not x=i8/tok"):
        found: Any = qfx.quantize(model, "w8a8", [randn(2, 8)])
    assert type(found[0]).__name__ == "PackedGated" and isinstance(found[0], Gated)
    assert sqnr_db(wanted, found(randn(2, 8))) > 30
    assert found[0].bias is not None and set(found[0]._parameters) == {"bias"}


def test_a_forward_on_the_instance_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 3
    found: Any = qfx.quantize(model.eval(), "w8a16", [randn(2, 8)])
    assert "forward" in found[0].__dict__ and type(found[0]).__name__ == "PackedLinear"


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 4, stride=4),
        nn.Conv2d(3, 8, 4, stride=4, bias=False),
        nn.Conv3d(3, 8, 2, stride=2),
        nn.Conv1d(3, 8, 3, padding=1),
        nn.Conv1d(3, 8, 4, stride=4),
        nn.Conv1d(3, 8, 3, stride=2, padding=2),
    ],
    ids=str,
)
def test_convolutions_that_are_linears_over_windows(conv: nn.Module) -> None:
    x = randn(2, 3, *[8] * (conv.get_parameter("weight").dim() - 2))
    found = quantized(nn.Sequential(conv, nn.ReLU()), x)
    assert isinstance(found[0], QuantConv)
    assert found[0].weight.shape == conv.weight.shape
    longer = randn(2, 3, *[11] * (x.dim() - 2))
    assert sqnr_db(torch.relu(conv(longer)), found(longer)) > 25


def test_other_padding_than_zeros_keeps_the_convolutions_own_forward() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU())
    found = quantized(model, randn(2, 3, 9))
    assert type(found[0]).__name__ == "PackedConv1d"
    assert found[0].weight.shape == (8, 3, 3)


def test_overlapping_windows_stay_in_float_and_that_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.warns(QfxWarning, match="0: .*a convolution whose windows overlap"):
        found = quantized(model, randn(2, 3, 6, 6))
    assert type(found[0]) is nn.Conv2d and isinstance(found[2], QuantLinear)


class Scaled(nn.Embedding):
    """Gemma's: a forward of its own around nn.Embedding's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


def test_an_embedding_with_its_own_forward_reads_only_the_rows_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quantized(nn.Sequential(Scaled(12, 8), nn.Linear(8, 3)), torch.arange(6))
    table = found[0]
    assert isinstance(table, Scaled) and type(table).__name__ == "PackedScaled"
    wanted = table(torch.arange(6))
    assert torch.equal(wanted, table.weight[:6] * 3.0)
    monkeypatch.setattr(type(table), "weight", property(lambda _: pytest.fail("the whole table was dequantized")))
    assert torch.equal(table(torch.arange(6)), wanted)


def test_an_embedding_that_changes_its_table_stays_in_float() -> None:
    model = nn.Sequential(nn.Embedding(12, 8, max_norm=0.5), nn.Linear(8, 3))
    with pytest.warns(QfxWarning, match="its weight is computed in the graph"):
        found = quantized(model, torch.arange(6), recipe="w8a16")
    assert type(found[0]) is nn.Embedding and isinstance(found[1], QuantLinear)


def test_padding_rows_are_kept() -> None:
    found = quantized(nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 3)), torch.arange(6))
    table = found[0]
    assert isinstance(table, QuantEmbedding) and table.padding_idx == 0 and not table(torch.tensor([0])).any()


def test_attention_that_reads_weights_itself_is_weight_only_and_that_is_told() -> None:
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), randn(2, 5, 16)
    wanted = model(x, x, x)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: Any = qfx.quantize(model, "w8a8", [(x, x, x)])
    told = "\n".join(str(w.message) for w in caught)
    assert "in_proj_weight: MultiheadAttention's weight" in told and "out_proj: NonDynamicallyQuantizable" in told
    assert isinstance(found.out_proj, QuantLinear) and found.out_proj.x_format == ""
    assert sqnr_db(wanted, found(x, x, x)[0]) > 35


def test_a_transformer_layer_calls_its_quantized_layers() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    found = quantized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), randn(2, 5, 16))
    called: list[int] = []
    first = found.layers[0].linear1
    assert isinstance(first, QuantLinear)
    first.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():  # the fused kernel would read first.weight
        found(randn(2, 5, 16))
    assert called == [1]


@pytest.mark.parametrize("strict", [False, True])
def test_weights_that_are_no_parameters_or_are_reshaped_stay_in_float(strict: bool) -> None:
    def forward(own: Any, x: Tensor) -> Any:
        x = F.linear(x, own.square.reshape(8, 8)) + F.linear(x, own.held)
        return own.fc(x)

    model = Function(forward, square=randn(4, 16), fc=nn.Linear(8, 8)).eval()
    model.register_buffer("held", randn(8, 8))
    if strict:
        with pytest.raises(qfx.UnsupportedError, match=r"square: its weight is reshaped(.|\n)*held: .*no parameter"):
            qfx.quantize(model, "w8a8", [randn(3, 8)], strict=True)
        return
    with pytest.warns(QfxWarning, match="is no parameter"), pytest.warns(QfxWarning, match="is reshaped"):
        found = quantized(model, randn(3, 8))
    assert isinstance(found.fc, QuantLinear) and isinstance(found.square, nn.Parameter)
    assert found.get_buffer("held").dtype == torch.float32


def test_a_plain_tensor_as_weight_stays_in_float() -> None:
    model = Function(lambda own, x: own.fc(F.linear(x, own.plain)), fc=nn.Linear(8, 8)).eval()
    model.plain = randn(8, 8)
    with pytest.warns(QfxWarning, match=r"in float"):
        found = quantized(model, randn(3, 8))
    assert isinstance(found.fc, QuantLinear)


def test_a_parameter_of_the_model_itself() -> None:
    model = Function(lambda own, x: F.linear(x, own.w), w=randn(4, 8)).eval()
    found = quantized(model, randn(3, 8))
    assert found is model and type(found).__name__ == "PackedFunction"
    assert found.w.shape == (4, 8) and not list(found.parameters())


@pytest.mark.parametrize(
    "recipe",
    [
        *("w8a8", "w8a8-smooth", "w4a16"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("w8a8-static", "nf4", "mxfp4")),
    ],
)
def test_odd_shapes_and_zeros(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 7), nn.Linear(7, 5)).eval()
    quantized(model, randn(4, 3), recipe=recipe, decibel=10)
    first, x = nn.Linear(8, 8), randn(5, 8)
    model = nn.Sequential(first, nn.Linear(8, 4)).eval()
    with torch.no_grad():
        first.weight[2], first.weight[:, 3], x[:, 1], x[2] = 0, 0, 0, 0
    found = quantized(model, x, recipe=recipe, decibel=10)
    assert bool(found(x).isfinite().all())


def test_experts_keep_their_forward() -> None:
    model, inputs = ZOO["mixtral"]()
    found: Any = qfx.quantize(model)
    experts = found.get_submodule("model.layers.0.mlp.experts")
    assert type(experts).__name__ == "PackedMixtralExperts" and experts.gate_up_proj.dim() == 3
    assert {n for n, _ in experts.named_buffers()} >= {"gate_up_proj_w_codes", "down_proj_w_scale"}
    assert bool(torch.isfinite(found(**inputs).logits).all())
