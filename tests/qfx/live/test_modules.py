"""qfx.live.modules: quantized modules alone, cast and moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.format import Format
from qfx.live.modules import (
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    take_place,
    tell_shared,
    without_fast_paths,
)
from qfx.measuring.measure import sqnr_db
from qfx.packing import Packed, pack_weight
from tests.seeded import randn

CASTS = [(nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16), (nn.Module.double, torch.float64)]


def packed(*shape: int, fmt: str = "i8/ch") -> Packed:
    return pack_weight(randn(*shape, seed=1), Format.parse(fmt))


@pytest.mark.parametrize("fmt", ["i8/ch", "i4/g4", "u4/g4", "nf4/g8", "f16"])
@pytest.mark.parametrize("x_format", ["", "i8/tok"])
def test_linear(fmt: str, x_format: str) -> None:
    weight = packed(5, 8, fmt=fmt)
    module = QuantLinear(weight, randn(5), x_format=x_format)
    x = randn(2, 3, 8)
    wanted = F.linear(x, weight.dequantize(), randn(5))
    assert sqnr_db(wanted, module(x)) > (35 if x_format else 100)
    assert torch.equal(module.weight, weight.dequantize())
    assert module.w_format == fmt and module.x_format == x_format
    assert (module.in_features, module.out_features, module.nf) == (8, 5, 5)
    assert f"w={fmt}" in repr(module) and (f"x={x_format}" in repr(module)) == bool(x_format)
    assert [p.requires_grad for p in module.parameters()] == [False]
    row = module.qfx_row("layer")
    assert (row.node, row.op, row.elements, row.bytes_before) == ("layer", "linear", 40, 160)
    assert row.asked == (f"x={x_format} w={fmt}" if x_format else f"w={fmt}")


def test_static_linear_divides_by_smooth() -> None:
    x, factor = randn(4, 8), torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.5
    scale = (x / factor).abs().max() / 127
    module = QuantLinear(packed(5, 8), None, x_format="i8", x_scale=scale, smooth=factor)
    assert module.bias is None and "bias=False" in repr(module)
    assert sqnr_db(F.linear(x / factor, module.weight), module(x)) > 35
    assert {name for name, _ in module.named_buffers()} == {"w_codes", "w_scale", "x_scale", "smooth"}


def test_embedding() -> None:
    table = packed(12, 8)
    module = QuantEmbedding(table, 0)
    ids = torch.tensor([[1, 2], [11, 0]], dtype=torch.int32)
    assert torch.equal(module(ids), table.dequantize()[ids.long()])
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (12, 8, 0)
    assert repr(module) == "QuantEmbedding(12, 8, w=i8/ch)" and module.qfx_row("e").op == "embedding"


@pytest.mark.parametrize(("fn", "dtype"), CASTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_casts_change_what_goes_through_and_no_scale(fn: Any, dtype: torch.dtype) -> None:
    linear = QuantLinear(packed(5, 8), randn(5), x_format="u8", x_scale=torch.tensor(0.05), x_zero=torch.tensor(128))
    table = QuantEmbedding(packed(12, 8, fmt="u4/g4"), None)
    model = nn.Sequential(table, linear)
    wanted = model(torch.arange(6))
    cast = fn(copy.deepcopy(model))
    assert cast(torch.arange(6)).dtype == dtype
    assert sqnr_db(wanted, cast(torch.arange(6)).float()) > 30
    for name, buffer in model.named_buffers():
        assert cast.get_buffer(name).dtype == buffer.dtype and torch.equal(cast.get_buffer(name), buffer)
    assert cast[1].bias.dtype == dtype and cast[0].weight.dtype == dtype and cast[1].weight.dtype == dtype
    back = cast.float()
    assert torch.equal(back[0](torch.arange(6)), model[0](torch.arange(6)))
    assert model(torch.arange(6)).dtype == torch.float32, "the copy has its own dtype"


def test_moves_of_device_reach_the_packed_tensors() -> None:
    model = nn.Sequential(QuantEmbedding(packed(12, 8), None), QuantLinear(packed(5, 8), randn(5))).to("meta")
    assert {t.device.type for t in (*model.buffers(), *model.parameters())} == {"meta"}


def test_take_place_hands_over_hooks_and_mode() -> None:
    old = nn.Linear(8, 5).train()
    seen: list[int] = []
    handle = old.register_forward_hook(lambda *_: seen.append(1))
    new = take_place(QuantLinear(packed(5, 8), None), old)
    assert new.training
    new(randn(2, 8))
    handle.remove()
    new(randn(2, 8))
    assert seen == [1]


def test_conv_over_windows() -> None:
    conv = nn.Conv2d(3, 5, 2, stride=2)
    weight = pack_weight(conv.weight.flatten(1), Format.parse("i8/ch"))
    module = QuantConv(weight, conv, x_format="")
    x = randn(2, 3, 7, 6)
    assert sqnr_db(F.conv2d(x, module.weight, conv.bias, stride=2), module(x)) > 100
    assert module.weight.shape == conv.weight.shape and module.out_channels == 5


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 5, (2, 3), stride=(2, 3)), nn.Conv1d(3, 5, 4, stride=2, padding=1)])
def test_conv_tells_what_the_float_one_tells(conv: Any) -> None:
    """Forwards that pad by themselves ask the convolution for its settings (MobileNet)."""
    module = QuantConv(pack_weight(conv.weight.flatten(1), Format.parse("i8/ch")), conv, x_format="")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(module, name) == getattr(conv, name), name
    assert (module.padding_mode, module.transposed) == (conv.padding_mode, conv.transposed)


def test_shared_buffers_are_told_beside_what_was_told_before() -> None:
    module = nn.Linear(2, 2)
    module._tied_weights_keys = {"bias": "other.bias"}  # type: ignore[assignment]
    tell_shared(module, "w_codes")
    assert list(module._tied_weights_keys) == ["bias", "w_codes"]  # type: ignore[arg-type]


def test_only_quantized_transformer_layers_lose_their_fused_kernel() -> None:
    plain, changed = (nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    changed.linear1 = QuantLinear(packed(16, 8), None)  # type: ignore[assignment]
    model = nn.ModuleList([plain, changed])
    without_fast_paths(model)
    assert plain.activation_relu_or_gelu and not changed.activation_relu_or_gelu


def _linear(fmt: str, rotation: tuple[int, int] | None = None, *, gain: bool = False, seed: int = 2) -> QuantLinear:
    weight = pack_weight(randn(8, 64, seed=seed), Format.parse(fmt))
    return QuantLinear(weight, None, rotation=rotation, gain=torch.ones(64) if gain else None)


def test_a_state_dict_of_the_same_format_is_taken() -> None:
    own, other = _linear("i4/g32/f16", (64, 0)), _linear("i4/g32/f16", (64, 0), seed=3)
    assert not torch.equal(own.weight, other.weight)
    own.load_state_dict(other.state_dict())
    assert torch.equal(own.weight, other.weight)
    again = copy.deepcopy(other.state_dict())
    assert nn.Sequential(own).load_state_dict({f"0.{key}": value for key, value in again.items()}).missing_keys == []


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (("i4/g32/f16", None), ("nf4/g32/f16", None)),
        (("f8e4m3/ch", None), ("i8/ch", None)),
        (("i8/ch", (64, 0)), ("i8/ch", None)),
        (("i8/ch", None), ("i8/ch", (64, 0))),
        (("i8/ch", (64, 0)), ("i8/ch", (64, 1))),
        (("i8/ch", (64, 0)), ("i8/ch", (32, 0))),
    ],
    ids=str,
)
def test_a_state_dict_whose_codes_mean_something_else_is_refused(own: Any, other: Any) -> None:
    layer = _linear(*own)
    model, state = nn.Sequential(layer), nn.Sequential(_linear(*other, seed=3)).state_dict()
    before = layer.weight
    with pytest.raises(RuntimeError, match=r"the weight of 0 is stored in another way\n  expected: .*\n  found: "):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="next step: quantize the model by the recipe of the one that was saved"):
        model.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, before)


def test_tables_of_other_formats_are_refused() -> None:
    own, other = (QuantEmbedding(packed(6, 64, fmt=fmt), None) for fmt in ("i4/g32", "f4e2m1/g32"))
    with pytest.raises(RuntimeError, match=r"of QuantEmbedding is stored[\s\S]*expected: i4/g32\n  found: f4e2m1/g32"):
        own.load_state_dict(other.state_dict())


def test_tensors_alone_are_taken_as_they_are() -> None:
    """Of a file of safetensors nothing else is known; the folders of qfx.save say formats beside it."""
    own, other = _linear("i8/ch"), _linear("i8/ch", seed=3)
    own.load_state_dict(dict(other.state_dict()))
    assert torch.equal(own.weight, other.weight)


def test_the_report_counts_the_gain() -> None:
    plain, gained = (_linear("i8/ch", (64, 0), gain=gain).qfx_row("layer").bytes_after for gain in (False, True))
    assert gained == plain + 64 * 4
