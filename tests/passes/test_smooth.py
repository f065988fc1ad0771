"""qfx.passes.smooth: exact smoothing, its factors, the search, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.calibration.observers import MinMax
from qfx.calibration.sample import Sample
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.passes import smooth
from qfx.passes._sites import Norm, Weight, is_linear, weight_of
from qfx.passes.calibrate import calibrate
from qfx.passes.observe import insert_observers, remove_observers
from qfx.passes.smooth import Site
from tests.graphs import Function, capture, text
from tests.rewriting import Case, check, cleaned, positive, zoo

GOLDEN = """\
%inputs_0: f32[2,4] = input
%layer_norm: f32[2,4] = aten.layer_norm(%inputs_0, [4], @norm.weight, @norm.bias)
%linear: f32[2,6] = aten.linear(%layer_norm, @up.weight, @up.bias)  # x=u8 w=i8/ch
%gelu: f32[2,6] = aten.gelu(%linear)
%div: f32[2,6] = aten.div.Tensor(%gelu, @down.input_smooth)
%linear_1: f32[2,4] = aten.linear(%div, @down.weight, @down.bias)  # x=u8 w=i8/ch
%add: f32[2,4] = aten.add.Tensor(%linear_1, %inputs_0)
return [%add]
"""


def annotated(gm: fx.GraphModule, x: str = "u8", w: str = "i8/ch") -> fx.GraphModule:
    for node in gm.graph.nodes:
        if graph.op_name(node) == "linear":
            annotation.set(node, "x", Format.parse(x))
            annotation.set(node, "w", Format.parse(w))
    return gm


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias)
    layers = {"norm": norm, "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
    return Function(lambda own, x: own.down(nn.functional.gelu(own.up(own.norm(x)))) + x, **layers).to(dtype)


def factor(site: Site) -> Tensor:
    return positive(site.channels)


def watched(gm: fx.GraphModule, batches: list[Any]) -> dict[str, Sample]:
    observers = insert_observers(gm, smooth.watch)
    calibrate(gm, batches, observers)
    remove_observers(gm)
    return {fqn: o for (fqn, _), o in observers.items() if isinstance(o, Sample)}


@pytest.mark.parametrize(
    ("name", "folded", "divided"),
    [("bert", 0, 9), ("gpt2", 5, 4), ("llama", 5, 4), ("gemma3", 5, 4), ("t5", 10, 12), ("mixtral", 5, 2)],
)
def test_exact(name: str, folded: int, divided: int) -> None:
    sites, _ = check(zoo(name), smooth, factor, untied=True)
    assert [sum(not s.explicit for s in sites), sum(s.explicit for s in sites)] == [folded, divided]


def test_exact_in_double_precision() -> None:
    case = Case(mlp(torch.float64), (torch.randn(2, 4, dtype=torch.float64),), {})
    check(case, smooth, factor, limit=1e-14)


def test_golden_text() -> None:
    gm = annotated(cleaned(mlp(), torch.randn(2, 4)))
    sites, refusals = smooth.find(gm)
    assert refusals == []
    for site in sites:
        smooth.apply(gm, site, factor(site))
    gm.graph.lint()
    assert text(gm) == GOLDEN
    assert sites[1].to_record() == {
        "name": "smooth",
        "norm": None,
        "linears": ({"name": "down", "weight": "down.weight", "bias": "down.bias", "inp": 1, "out": 0},),
        "channels": 6,
    }
    assert smooth.explicit_factors(sites[0], factor(sites[0])) == {}
    assert list(smooth.explicit_factors(sites[1], factor(sites[1]))) == ["down"]


def test_one_division_serves_all_readers() -> None:
    model = Function(lambda own, x: own.a(x.tanh()) + own.b(x.tanh()), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    case = Case(model, (torch.randn(2, 4),), {})
    sites, _ = check(case, smooth, factor)
    assert len(sites) == 1
    gm, _ = case.copies()
    smooth.apply(gm, sites[0], factor(sites[0]))
    assert text(gm).count("aten.div") == 1


def test_half_precision_keeps_its_dtype() -> None:
    gm = capture(mlp(torch.bfloat16), torch.randn(2, 4, dtype=torch.bfloat16))
    for site in smooth.find(gm)[0]:
        smooth.apply(gm, site, factor(site))
    gm.recompile()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    (found,) = gm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, mlp(torch.bfloat16)(x), rtol=5e-2, atol=5e-2)


def test_negative_control_a_factor_that_is_not_shared() -> None:
    case = zoo("llama")
    gm, _ = case.copies()
    site = smooth.find(gm)[0][0]
    assert [w.name.rpartition(".")[2] for w in site.linears] == ["q_proj", "k_proj", "v_proj"]
    smooth.apply(gm, Site(site.norm, site.linears[1:], site.channels), factor(site))
    assert case.error(gm) > 0.1


def test_negative_control_a_norm_that_others_read() -> None:
    case = Case(Function(lambda own, x: own.norm(x) + own.fc(own.norm(x)), norm=nn.LayerNorm(4), fc=nn.Linear(4, 4)),
                (torch.randn(2, 4),), {})  # fmt: skip
    gm, _ = case.copies()
    site = smooth.find(gm)[0][0]
    assert site.explicit
    forced = Site(Norm("norm.weight", "norm.bias"), site.linears, site.channels)
    smooth.apply(gm, forced, factor(site))
    assert case.error(gm) > 0.1


def test_factors_against_numpy() -> None:
    x, w = positive(50, seed=1), positive(50, seed=2)
    x[3], w[7] = 0.0, 0.0
    for alpha in (0.0, 0.3, 1.0):
        with np.errstate(divide="ignore"):
            expected = x.numpy() ** alpha / w.numpy() ** (1 - alpha)
        expected[[3, 7]] = 1.0
        np.testing.assert_allclose(smooth.factors(x, w, alpha).numpy(), expected, rtol=1e-6)
    extreme = smooth.factors(torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30]), 0.5)
    assert extreme.tolist() == pytest.approx([1e4, 1e-4])


def outlying(scale: float = 50.0) -> tuple[nn.Module, Tensor]:
    """Channel 2 of the input is large, and the weights there are small."""
    torch.manual_seed(0)
    model = Function(lambda own, x: own.fc(x), fc=nn.Linear(32, 16))
    x = torch.randn(256, 32)
    x[:, 2] *= scale
    with torch.no_grad():
        model.fc.weight[:, 2] /= scale  # type: ignore[union-attr, index, operator]
    return model, x


@torch.no_grad()
def quantized_error(gm: fx.GraphModule, x: Tensor) -> float:
    """Of the one linear of a graph under its annotation, scales from the data."""
    linear = next(n for n in gm.graph.nodes if graph.op_name(n) == "linear")
    held = MinMax()
    weight, bias = graph.get_tensor(gm, "fc.weight"), graph.get_tensor(gm, "fc.bias")
    value = x / graph.get_tensor(gm, "fc.input_smooth") if graph.op_name(linear.args[0]) == "div" else x
    held.update(value)
    scale, zero = held.qparams(Format("u8"))
    rounded = fake_quantize(value, Format("u8"), scale, zero)
    y = rounded @ fake_quantize(weight, Format.parse("i8/ch")).T + bias
    exact = value @ weight.T + bias
    return float((y - exact).norm() / exact.norm())


def by(alpha: Any, observer: str = "minmax") -> Any:
    return functools.partial(smooth.choose, alpha=alpha, observer=observer)


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothing_lowers_the_error(alpha: Any) -> None:
    model, x = outlying()
    gm = annotated(capture(model, x))
    before = quantized_error(gm, x)
    chosen, notes = smooth.smooth(gm, watched(gm, [[x]]), chooser=by(alpha))
    assert notes == [] and [site.linears[0].name for site, _ in chosen] == ["fc"]
    smooth.apply(gm, *chosen[0])
    assert quantized_error(gm, x) < before / 3


def test_the_search_is_near_the_best_alpha() -> None:
    """Near, since it judges each alpha on data that the factors were not made from."""
    model, x = outlying(8.0)
    errors: dict[Any, float] = {}
    for alpha in ("search", 0.0, 0.2, 0.5, 0.8, 1.0, None):
        gm = annotated(capture(model, x))
        chosen = smooth.smooth(gm, watched(gm, [[x]]), chooser=by(alpha))[0] if alpha is not None else []
        for site, values in chosen:
            smooth.apply(gm, site, values)
        errors[alpha] = quantized_error(gm, x)
    assert errors["search"] <= min(errors.values()) * 1.3
    assert errors["search"] < errors[None] / 3


@pytest.mark.parametrize("observer", ["mse", "percentile", "entropy"])
@pytest.mark.parametrize("fmt", ["u8", "i8/tok", "f8e4m3/tok", "bf16"])
def test_the_search_takes_every_observer_and_format(observer: str, fmt: str) -> None:
    model, x = outlying()
    gm = annotated(capture(model, x), fmt, "i8/ch")
    chosen, _ = smooth.smooth(gm, watched(gm, [[x]]), chooser=by("search", observer))
    assert len(chosen) <= 1


def test_no_smoothing_where_it_does_not_help() -> None:
    model = Function(lambda own, x: own.fc(x), fc=nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(4))  # type: ignore[union-attr, operator]
    x = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]])
    gm = annotated(capture(model, x), "i8", "i8/ch")
    assert smooth.smooth(gm, watched(gm, [[x]]), chooser=by("search")) == ([], [])


def test_what_is_left_alone() -> None:
    model, x = outlying()
    gm = annotated(capture(model, x))
    stats = watched(gm, [[x]])
    assert smooth.smooth(gm, {}) == ([], [])
    assert smooth.smooth(gm, stats, skip=["fc"]) == ([], [])
    assert smooth.smooth(gm, stats, fold_only=["fc"]) == ([], [])
    assert smooth.smooth(gm, {"fc": Sample()}) == ([], [])
    gm = annotated(capture(mlp(), torch.randn(8, 4)))
    chosen, _ = smooth.smooth(gm, watched(gm, [[torch.randn(8, 4)]]), fold_only=["up", "down"])
    assert [site.linears[0].name for site, _ in chosen] == ["up"]


def test_refusals() -> None:
    model = Function(lambda own, x: own.fc(own.fc(x)), fc=nn.Linear(4, 4))
    sites, refusals = smooth.find(capture(model, torch.randn(2, 4)))
    assert sites == [] and "is also used by" in refusals[0].reason
    _, refusals = smooth.find(zoo("mixtral").copies()[0])
    assert len(refusals) == 2 and "experts" in refusals[0].reason
    gm = capture(mlp(), torch.randn(2, 4))
    site = smooth.find(gm)[0][0]
    for bad in (torch.ones(5), torch.zeros(4), torch.full((4,), float("nan"))):
        with pytest.raises(ValueError, match="expected 4 positive factors for 'up'"):
            smooth.apply(gm, site, bad)


def test_refused_experts_are_told_where_they_were_watched() -> None:
    case = zoo("mixtral")
    gm, _ = case.copies()
    for node in gm.graph.nodes:
        if is_linear(node):
            annotation.set(node, "x", Format("u8"))
    stats = watched(gm, [case.flat])
    chosen, notes = smooth.smooth(gm, stats)
    assert len(notes) == 2 and all("down_proj" in note.node for note in notes)
    grouped = [w.name for site, _ in chosen for w in site.linears if "experts" in w.name]
    assert grouped == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj"]


def test_the_search_takes_the_coarsest_of_several_formats() -> None:
    """Which is the format under which it chooses the exponent that all of the weight gets."""
    gm = capture(nn.Linear(32, 8), torch.randn(4, 32))
    (node,) = (n for n in gm.graph.nodes if graph.schema_name(n) == "aten::linear")
    weight = weight_of(node)
    assert isinstance(weight, Weight)
    formats = (Format.parse("i8/ch"), Format.parse("i3/ch"))
    for asked in (formats, annotation.Columns(formats)):
        annotation.set(node, "w", asked)
        assert smooth.Layer.of(gm, node, weight, "minmax", 99.9).w == Format.parse("i3/ch")


@pytest.mark.parametrize(("channels", "rows"), [(1, 8), (24, 512), (512, 512), (1000, 512), (4096, 512)])
def test_of_many_channels_some_are_looked_at_evenly(channels: int, rows: int) -> None:
    found = smooth._some(torch.arange(channels)[:, None], rows)[:, 0]
    assert min(channels, rows) / 2 < len(found) <= max(rows, 1)
    assert found[0] == 0 and len(found.diff().unique()) <= 1


@pytest.mark.parametrize(
    ("experts", "channels"), [(1, 64), (4, 16), (8, 512), (64, 512), (64, 511), (128, 1536), (200, 3)]
)
def test_of_experts_each_gives_some_channels_and_together_not_many(experts: int, channels: int) -> None:
    value = torch.arange(experts)[:, None] * channels + torch.arange(channels)[None]
    found = smooth._some(value[..., None], 512)[..., 0]
    assert torch.equal(found // channels, torch.arange(experts)[:, None].expand_as(found)), "each of its own expert"
    assert all(len(own.unique()) == len(own) for own in found)
    assert min(channels, 8) <= found.shape[1] and found.numel() <= max(512, 8 * experts)


def test_few_channels_of_experts_are_all_taken_where_they_lie() -> None:
    """Turned by a row for each expert, formats of blocks would be judged by blocks that no weight has."""
    value = torch.randn(4, 16, 32)
    assert smooth._some(value, 64) is value
    assert smooth._some(value, 63).shape == (4, 8, 32), "one channel less than all asks for every second"


def test_parts_of_experts_that_lie_by_turns_are_all_seen() -> None:
    """Of gate and up rows one after the other a fixed even step would see the gates alone."""
    found = smooth._some(torch.arange(512).expand(16, 512)[..., None], 512)[..., 0]
    assert 0.4 < float((found % 2).float().mean()) < 0.6


@pytest.mark.parametrize(
    ("x", "shape"), [(None, (16, 32)), ("u8", (16, 32)), (None, (4, 16, 32)), ("i8/tok", (4, 16, 32))]
)
def test_the_error_is_that_of_the_result(x: str | None, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, fmt = torch.randn(shape, generator=generator), Format.parse("u4/g16")
    rows, factor = torch.randn(24, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    layer = smooth.Layer(w, None if x is None else Format.parse(x), fmt, "minmax", 100.0)
    ends = rows.amin(0), rows.amax(0)
    inputs = layer._rounded(rows / factor, *(end / factor for end in ends))
    exact = rows.double() @ w.double().mT
    wrong = (inputs.double() @ fake_quantize(w * factor, fmt).double().mT - exact).square().sum()
    energy = layer.energy(rows)
    assert energy == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert layer.error(rows, *ends, factor, energy) == pytest.approx(float(wrong) / energy, rel=1e-3)
    assert layer.error(rows, *ends, factor, 0.0) > 1, "no result: no division by zero"


def test_a_weight_that_is_not_rounded_has_no_error() -> None:
    rows, w = torch.randn(8, 16), torch.randn(4, 16)
    layer = smooth.Layer(w, None, None, "minmax", 100.0)
    assert layer.error(rows, rows.amin(0), rows.amax(0), torch.rand(16) + 0.5, layer.energy(rows)) < 1e-9
