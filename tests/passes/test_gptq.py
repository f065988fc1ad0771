"""GPTQ of one weight: every kind of format, experts, and bad statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.packing import Packed, pack_weight
from qfx.passes import gptq
from qfx.passes._hessian import Hessian
from qfx.passes.gptq import round_by
from qfx.presets import presets
from qfx.recipe import Recipe
from qfx.rounding.method_options import GptqOptions
from qfx.rounding.nearest import round_weight

INTEGERS = ["i2/ch", "i3/g8", "i4/ch", "i5/g16", "i8/ch", "u2/g8", "u3/ch", "u4/g16", "u7/g8", "u8/ch"]
OTHERS = ["nf4/g16", "f4e2m1/g16/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/ch", "f8e5m2/g8", "i4", "i4/b4x8", "u4/g8/f16"]


def data(count: int, channels: int, seed: int = 0, *, correlated: bool = True) -> Tensor:
    """Rows of an input, whose channels go with each other and differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator)
    if not correlated:
        return x
    mixed = x @ torch.randn(channels, channels, generator=generator) / channels**0.5
    found: Tensor = (0.4 * x + mixed) * torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=generator)]
    return found


def weight(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x: Tensor, wanted: Tensor | None = None) -> Hessian:
    found = Hessian(x.shape[-1], cross=wanted is not None)
    found.add(x, wanted)
    return found


def as_published(**fields: Any) -> GptqOptions:
    """GPTQ of Frantar et al. 2022: scales from the extremes, each column once."""
    return GptqOptions(**{"clip": False, "sweeps": 0, **fields})


def loss(w: Tensor, packed: Packed, x: Tensor) -> float:
    return loss_of(w, packed.dequantize(), x)


def loss_of(w: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((w - rounded) @ x.T).square().sum() / (w @ x.T).square().sum())


@pytest.mark.parametrize("text", INTEGERS + OTHERS)
def test_without_correlation_it_is_rounding_to_nearest(text: str) -> None:
    """No channel can make good another's error; columns are 20, which no group divides."""
    w, fmt = weight(6, 20), Format.parse(text)
    for act_order in (True, False):
        packed, told = round_by(w, [seen(torch.eye(20))], fmt, as_published(act_order=act_order), name="fc")
        nearest = pack_weight(w, fmt)
        assert torch.equal(packed.dequantize(), nearest.dequantize())
        assert torch.equal(packed.scale.float(), nearest.scale.float())
        assert (packed.zero is None and nearest.zero is None) or torch.equal(packed.zero, nearest.zero)  # type: ignore[arg-type]
        assert told["error_after"] == pytest.approx(told["error_before"])
        assert told["dead"] == 0
        assert (told["clipped"] == 0) == (fmt.scale_type not in ("e8m0", "e4m3")), "those scales are rounded down"


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", INTEGERS + OTHERS)
def test_the_error_is_less_than_nearest(text: str, act_order: bool) -> None:
    w, x, fmt = weight(32, 72), data(600, 72), Format.parse(text)
    packed, told = round_by(w, [seen(x)], fmt, as_published(act_order=act_order), name="fc")
    before, after = loss(w, pack_weight(w, fmt), x), loss(w, packed, x)
    assert packed.shape == (32, 72) and packed.nbytes == fmt.nbytes((32, 72))
    assert after < 0.9 * before
    assert told["error_before"] == pytest.approx(before, rel=1e-3)
    assert told["error_after"] == pytest.approx(after, rel=1e-3)
    assert told["dampening"] == 0.01


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["i2/g8", "u3/g16", "i4/ch", "u4/g8", "u8/g16"]),
    rows=st.integers(1, 9),
    channels=st.integers(1, 40),
    tokens=st.integers(1, 60),
    options=st.builds(GptqOptions, act_order=st.booleans(), clip=st.booleans(), asymmetric=st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_shape(text: str, rows: int, channels: int, tokens: int, options: GptqOptions, seed: int) -> None:
    """Codes in range and finite scales, also of few tokens; the result is that of `Packed`'s own arithmetic."""
    w, x, fmt = weight(rows, channels, seed=seed), data(tokens, channels, seed), Format.parse(text)
    found = seen(x, x + 0.1 if options.asymmetric else None)
    packed, told = round_by(w, [found], fmt, options, name="fc")
    assert packed.format == fmt and packed.shape == (rows, channels)
    assert int(packed.codes().min()) >= fmt.qmin and int(packed.codes().max()) <= fmt.qmax
    assert torch.isfinite(packed.dequantize()).all()
    assert 0 <= told["clipped"] <= 1 and told["error_after"] >= 0


def test_clip_lowers_the_error_of_few_bits() -> None:
    w, x = weight(64, 128), data(1000, 128)
    w[:, 3] *= 8  # a few weights that would take the whole range
    for act_order in (True, False):
        plain, clipped = (
            round_by(w, [seen(x)], Format.parse("i3/ch"), as_published(act_order=act_order, clip=clip), name="fc")
            for clip in (False, True)
        )
        assert clipped[1]["clipped"] > plain[1]["clipped"]
        assert loss(w, clipped[0], x) < loss(w, plain[0], x)


@pytest.mark.parametrize("text", ["i4", "u4", "i4/b16x16", "f4e2m1/g16/e4m3", "nf4/g64/dq"])
def test_clip_searches_scales_that_rows_share(text: str) -> None:
    """Of a tensor, of a block, and those below a scale of the whole tensor."""
    w, x, fmt = weight(64, 128), data(1000, 128), Format.parse(text)
    w[:, 3] *= 8
    plain, clipped = (round_by(w, [seen(x)], fmt, as_published(clip=clip), name="fc") for clip in (False, True))
    assert clipped[0].format == fmt and clipped[0].nbytes == plain[0].nbytes
    assert loss(w, clipped[0], x) < 0.98 * loss(w, plain[0], x)


@pytest.mark.parametrize("text", ["i4", "i4/b16x16", "f4e2m1/g16/e4m3"])
def test_clip_searches_the_scales_of_experts_by_the_energy_of_each(text: str) -> None:
    w, fmt = weight(3, 32, 64), Format.parse(text)
    inputs = [data(400, 64, seed=i) for i in range(2)]
    found = [*map(seen, inputs), Hessian(64)]  # no token reached the last one
    plain, clipped = (round_by(w, found, fmt, as_published(clip=clip), name="e")[0] for clip in (False, True))
    lost = [sum(loss_of(w[i], one.dequantize()[i], x) for i, x in enumerate(inputs)) for one in (plain, clipped)]
    assert lost[1] < 0.98 * lost[0]
    assert (clipped.dequantize() - w)[2].square().mean() < 1.5 * (plain.dequantize() - w)[2].square().mean()


def test_experts_have_a_hessian_each() -> None:
    w, fmt = weight(3, 16, 24), Format.parse("u4/g8")
    inputs = [data(200, 24, seed=i) for i in range(3)]
    packed, told = round_by(w, [seen(x) for x in inputs], fmt, as_published(), name="experts")
    each = [round_by(w[i], [seen(inputs[i])], fmt, as_published(), name="e") for i in range(3)]
    assert torch.equal(packed.codes(), torch.stack([one.codes() for one, _ in each]))
    assert told["error_after"] == pytest.approx(sum(t["error_after"] for _, t in each) / 3)
    swapped, _ = round_by(w, [seen(x) for x in inputs[::-1]], fmt, as_published(), name="experts")
    assert not torch.equal(packed.codes(), swapped.codes())


def test_experts_of_few_tokens_are_filled_from_all() -> None:
    """What they have not seen themselves they read as the others do; of too little in all nothing is filled."""
    w, fmt = weight(3, 16, 24), Format.parse("u3/g8")
    every = data(460, 24) + 1
    inputs, unseen = [every[:200], every[200:205], every[:0]], every[205:]
    own, filled = [seen(x) for x in inputs], [seen(x) for x in inputs]
    assert gptq._filled(filled) and [one.rows for one in filled] == [200, 24, 24]
    assert torch.equal(filled[0].whole(), own[0].whole())
    mean = torch.cat(inputs).T @ torch.cat(inputs) / 205
    assert torch.allclose(filled[1].whole(), inputs[1].T @ inputs[1] + 19 * mean, rtol=1e-4, atol=1e-3)
    found = [round_by(w, given, fmt, as_published(), name="experts")[0].dequantize() for given in (own, filled)]
    assert torch.equal(found[0][0], found[1][0])
    for expert in (1, 2):
        assert loss_of(w[expert], found[1][expert], unseen) < 0.9 * loss_of(w[expert], found[0][expert], unseen)
    assert not gptq._filled([seen(every[:20]), seen(every[20:40]), Hessian(24)])


@pytest.mark.parametrize("text", ["i3/ch", "u4/g8", "f4e2m1/g16/e4m3", "i4"])
def test_an_expert_without_tokens_is_clipped_or_nearest(text: str) -> None:
    w, fmt = weight(2, 16, 24), Format.parse(text)
    packed, told = round_by(w, [seen(data(200, 24)), Hessian(24)], fmt, as_published(), name="experts")
    alone = round_weight(w[1], fmt, "mse", name="e").dequantize() if fmt.by_row else fake_quantize(w, fmt)[1]
    assert torch.equal(packed.dequantize()[1], alone)
    assert told["error_after"] < told["error_before"]
    nobody, nothing = round_by(w, [Hessian(24), Hessian(24)], fmt, as_published(), name="experts")
    assert nothing == {} and torch.isfinite(nobody.dequantize()).all()


def test_dead_channels_are_rounded_to_nearest() -> None:
    w, x, fmt = weight(8, 20), data(300, 20), Format.parse("i4/ch")
    x[:, [2, 11]] = 0
    packed, told = round_by(w, [seen(x)], fmt, as_published(), name="fc")
    assert told["dead"] == 0.1
    assert torch.equal(packed.codes()[:, [2, 11]], pack_weight(w, fmt).codes()[:, [2, 11]])
    assert loss(w, packed, x) < loss(w, pack_weight(w, fmt), x)


@pytest.mark.parametrize("case", ["constant inputs", "equal inputs", "constant weights", "one token", "zero weights"])
def test_degenerate_values(case: str) -> None:
    w, x = weight(8, 20), data(300, 20)
    if case == "constant inputs":
        x[:, 4:9] = 3.0
    elif case == "equal inputs":
        x[:, 5] = x[:, 6]
    elif case == "constant weights":
        w[:, 7] = 2.0
        w[3] = -1.0
    elif case == "one token":
        x = x[:1]
    else:
        w[:] = 0
    packed, told = round_by(w, [seen(x)], Format.parse("i4/ch"), as_published(), name="fc")
    assert torch.isfinite(packed.dequantize()).all()
    assert told["error_after"] <= told["error_before"]
    if case == "zero weights":
        assert not packed.dequantize().any()


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = weight(4, 8)
    w[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"cannot quantize 'layers\.0\.fc'"):
        round_by(w, [seen(data(30, 8))], Format.parse("i4/ch"), as_published(), name="layers.0.fc")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dampening": -1}, r"GptqOptions\.dampening: .*greater than or equal to 0, found -1"),
        ({"act_order": "yes"}, r"GptqOptions\.act_order: .*valid boolean, found 'yes'"),
        ({"damping": 0.1}, "unknown key 'damping' in GptqOptions, did you mean 'dampening'"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptqOptions(**given)


def test_options_travel_with_the_recipe() -> None:
    recipe = Recipe.parse("w4a16-gptq").override(gptq={"asymmetric": True})
    assert recipe.gptq == GptqOptions(asymmetric=True), "the others are those of the preset"
    assert Recipe.parse(recipe.to_dict()) == recipe
    assert gptq.method(recipe).needs_float
    assert not gptq.method(Recipe.parse("w4a16-gptq")).needs_float


@pytest.mark.parametrize(("text", "most"), [("i2/ch", 0.4), ("u3/g16", 0.95), ("i4/ch", 0.9), ("u4/g16", 0.97)])
def test_where_nothing_is_said_it_is_nearer_than_as_published(text: str, most: float) -> None:
    w, x, fmt = weight(32, 96), data(900, 96), Format.parse(text)
    ours, theirs = (loss(w, round_by(w, [seen(x)], fmt, o, name="fc")[0], x) for o in (GptqOptions(), as_published()))
    print(f"{text}: {ours:.5f}, as published {theirs:.5f}")
    assert ours < most * theirs
    assert all(recipe.gptq.clip for recipe in presets().values() if recipe.rounding == "gptq")
