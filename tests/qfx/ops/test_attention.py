"""qfx.ops.attention: what attention between rounded operands computes, its error, its gradient, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.numerics import choose_qparams, fake_quantize, range_qparams
from qfx.ops.attention import centre, needs_scale, reason_against
from tests.seeded import randn

ops = torch.ops.qfx


def attend(q: Tensor, k: Tensor, v: Tensor, *, formats: str = "", steps: Any = None, **how: Any) -> Tensor:
    """The operator; formats: "k=i8/tok v=i8"; steps: role -> (scales, zero points)."""
    given = dict(word.split("=") for word in formats.split())
    how = {"mask": None, "sinks": None, "scale": 0.3, "causal": False, "softcap": 0.0, **how}
    scales = [part for role in "qkv" for part in (steps or {}).get(role, ([], []))]
    texts = [given.get(role, "") for role in "qkvp"]
    y: Tensor = ops.quantized_attention(
        q, k, v, how["mask"], how["sinks"], *scales, how["scale"], how["causal"], how["softcap"], *texts
    )
    return y


def plain(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    how = {"mask": None, "sinks": None, "scale": 0.3, "causal": False, "softcap": 0.0, **how}
    y: Tensor = ops.attention(q, k, v, *how.values())
    return y


def qkv(new: int = 5, old: int = 7, *, heads: int = 4, own: int = 2, width: int = 8, wide: int = 6) -> list[Tensor]:
    sizes = ((2, heads, new, width), (2, own, old, width), (2, own, old, wide))
    return [randn(*size, seed=i) for i, size in enumerate(sizes)]


KEEP = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
WINDOW = torch.ones(5, 7, dtype=torch.bool).tril(2).triu(0)
ALIBI = -torch.arange(7.0).flip(0) * torch.tensor([0.5, 0.25, 0.125, 0.06]).reshape(1, 4, 1, 1)
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"mask": KEEP},
    "float mask": {"mask": randn(2, 4, 5, 7, seed=4)},
    "causal": {"causal": True},
    "causal with a mask": {"causal": True, "mask": KEEP},
    "sliding window": {"mask": WINDOW},
    "ALiBi": {"mask": ALIBI},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "everything": {"mask": KEEP, "sinks": SINKS, "softcap": 2.0, "causal": True},
}
INTEGERS = "q=i8/tok k=i8/tok v=i8/head/dyn p=u8/tok"


@pytest.mark.parametrize("own", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
def test_without_formats_it_is_float_attention(how: str, own: int) -> None:
    given = qkv(own=own)
    assert torch.allclose(attend(*given, **HOW[how]), plain(*given, **HOW[how]), atol=1e-6)


@pytest.mark.parametrize("own", [1, 2, 4])
@pytest.mark.parametrize("how", HOW)
def test_eight_bits_are_near_float_attention(how: str, own: int) -> None:
    given = qkv(own=own)
    assert sqnr_db(plain(*given, **HOW[how]), attend(*given, formats=INTEGERS, **HOW[how])) > 32


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("formats", ["k=i8", "k=i8/head", "k=f8e4m3/tok"])
def test_centred_keys_do_what_keys_do(formats: str, how: str) -> None:
    """A key format so fine that only the centring is left of it: the same function, capped or with sinks too."""
    q, k, v = qkv()
    k = k + 3 * randn(1, 2, 1, 8, seed=9)
    without, mean = centre(k)
    fmt = Format.parse("f32")
    assert torch.allclose(without + mean, k, atol=1e-6)
    shifted = plain(q, without, v, **HOW[how])
    exact = HOW[how].get("softcap") is None and HOW[how].get("sinks") is None
    assert torch.allclose(shifted, plain(q, k, v, **HOW[how]), atol=1e-5) == exact  # negative control: capped, sinks
    steps: dict[str, Any] = {"k": ([0.04] * (2 if "head" in formats else 1), [])}
    found = attend(q, k, v, formats=formats, steps=steps, **HOW[how])
    assert sqnr_db(plain(q, k, v, **HOW[how]), found) > 15
    assert torch.allclose(attend(q, k, v, formats=f"k={fmt}", **HOW[how]), plain(q, k, v, **HOW[how]), atol=1e-6)


def test_a_channel_with_a_great_mean_costs_nothing() -> None:
    """One channel of K 50 from zero, as in trained models: rounded as it is, the others vanish in its step."""
    q, k, v = qkv(32, 64, width=32, wide=32)
    k[..., 3] += 50.0
    exact = plain(q, k, v)
    rounded = fake_quantize(k, Format.parse("i8/tok"))
    as_it_is = sqnr_db(exact, plain(q, rounded, v))
    assert sqnr_db(exact, attend(q, k, v, formats="k=i8/tok")) > as_it_is + 20


def test_rows_that_see_nothing_are_zero() -> None:
    mask = KEEP.clone()
    mask[0, :, 1] = False
    y = attend(*qkv(), formats=INTEGERS, mask=mask)
    assert y[0, :, 1].eq(0).all()
    assert y[0, :, 0].ne(0).any()


def test_a_window_of_no_keys_gives_zeros() -> None:
    assert attend(*qkv(old=0), formats="v=i8/tok p=u8/tok").eq(0).all()
    assert attend(*qkv(new=0), formats=INTEGERS).shape == (2, 4, 0, 6)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9), share=st.integers(1, 3), width=st.sampled_from([1, 8, 33]), seed=st.integers(0, 99),
    q_format=st.sampled_from(["i8/tok", "i8/dyn", "i4/tok", "u8/tok", "f8e4m3/tok", "i8/head/dyn"]),
    k_format=st.sampled_from(["i8/tok", "i8/dyn", "u8/dyn", "f8e5m2/tok", "i8/head/dyn"]),
    v_format=st.sampled_from(["i8/tok", "i8/dyn", "u4/tok", "f8e4m3/head/dyn"]),
    p_format=st.sampled_from(["", "u8", "u8/tok", "i8", "f8e4m3", "f8e4m3/tok", "bf16"]),
)  # fmt: skip
def test_it_is_float_attention_of_the_rounded_operands(
    tokens: int, share: int, width: int, seed: int, q_format: str, k_format: str, v_format: str, p_format: str
) -> None:
    q, k, v = (randn(2, h, tokens, width, seed=seed + i) for i, h in enumerate((2 * share, 2, 2)))
    found = attend(q, k, v, formats=f"q={q_format} k={k_format} v={v_format} {p_format and 'p=' + p_format}")
    rounded = [
        fake_quantize(x, Format.parse(text), activation=True)
        for x, text in ((q, q_format), (centre(k)[0], k_format), (v, v_format))
    ]
    keys, values = (x.repeat_interleave(share, 1).double() for x in rounded[1:])
    weights = (rounded[0].double() @ keys.mT * 0.3).softmax(-1)
    if p_format:
        fmt = Format.parse(p_format)
        fixed = () if fmt.is_plain or fmt.dynamic else range_qparams(torch.tensor(0.0), torch.tensor(1.0), fmt)
        near = fake_quantize(weights.float(), fmt, *fixed, activation=True).double()
    else:
        near = weights
    step = 0.0 if not p_format else 1 / 127 if p_format[0] in "ui" else 2**-3  # of a weight that lies on a tie
    assert (found - near @ values).abs().max() <= 1e-4 + step * values.abs().max() * (0.05 if p_format else 0)


def test_sums_of_integers_are_exact() -> None:
    """4,096 tokens of 127 x 255 sum up to 2^27, which f32 alone would round."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4096, 4)
    v = torch.full((1, 1, 4096, 1), 127.0)
    v[:, :, ::2] = -126.0
    mask = torch.zeros(1, 1, 1, 4096)
    steps: dict[str, Any] = {"v": ([1.0], [])}
    y = attend(q, k, v, formats="v=i8 p=u8/tok", steps=steps, mask=mask)
    assert y.item() == pytest.approx(0.5, abs=1e-7)


def test_static_scales_are_taken_as_given() -> None:
    q, k, v = qkv()
    steps: dict[str, Any] = {}
    for role, x, text in (("q", q, "i8/head"), ("k", centre(k)[0], "i8"), ("v", v, "u8")):
        found = choose_qparams(x, Format.parse(text))
        zeros = [] if found.zero is None else found.zero.reshape(-1).tolist()
        steps[role] = (found.scale.reshape(-1).tolist(), zeros)
    static = attend(q, k, v, formats="q=i8/head k=i8 v=u8 p=u8", steps=steps)
    dynamic = attend(q, k, v, formats="q=i8/head/dyn k=i8/dyn v=u8/dyn p=u8")
    assert torch.equal(static, dynamic)
    steps["q"] = ([2 * s for s in steps["q"][0]], [])
    assert not torch.equal(attend(q, k, v, formats="q=i8/head k=i8 v=u8 p=u8", steps=steps), dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_come_back_in_their_type(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in qkv()]
    y = attend(*given, formats=INTEGERS)
    assert y.dtype == dtype
    assert sqnr_db(plain(*[x.float() for x in given]), y.float()) > 32


def test_gradients_go_straight_through_the_rounding() -> None:
    given = [x.requires_grad_() for x in qkv()]
    weight = randn(2, 4, 5, 6, seed=8)
    how: dict[str, Any] = {"mask": KEEP, "softcap": 2.0}
    found = torch.autograd.grad((attend(*given, formats=INTEGERS, **how) * weight).sum(), given)
    wanted = torch.autograd.grad((plain(*given, **how) * weight).sum(), given)
    for one, other in zip(found, wanted, strict=True):
        assert sqnr_db(other, one) > 25
    assert attend(given[0], given[1], given[2].detach(), formats="v=i2/dyn").requires_grad


OPCHECK = ("test_schema", "test_faketensor", "test_autograd_registration")


def test_torch_approves_of_the_operator() -> None:
    q, k, v = qkv()
    args: Any = (q, k, v, KEEP, None, [], [], [0.05], [], [0.05], [128], 0.3, False, 0.0, "i8/tok", "i8", "u8", "u8")
    torch.library.opcheck(ops.quantized_attention.default, args, test_utils=OPCHECK)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups": ("k=i8/g4/dyn", {}, "scales of groups stand inside the sums"),
    "channels": ("v=i8/ch", {}, "scales of channels stand inside the sums"),
    "a table": ("q=nf4/tok", {}, "integers or 8-bit floats, not nf4"),
    "short scales": ("q=i8/tok/f16", {}, "scales in f32, not f16"),
    "weights by head": ("p=u8/head", {}, "one fixed scale"),
    "weights at run time": ("p=u8/dyn", {}, "one fixed scale"),
    "no scale": ("k=i8", {}, "k=i8 has not the scales that it needs"),
    "too few scales": ("k=i8/head", {"k": ([1.0], [])}, r"expected: 2 scale\(s\)"),
    "no zero point": ("v=u8", {"v": ([1.0], [])}, "zero points"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_formats_are_refused(name: str) -> None:
    formats, steps, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        attend(*qkv(), formats=formats, steps=steps)


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="H a multiple of G"):
        attend(q[:, :3], k, v)
    with pytest.raises(ValueError, match="floats q"):
        attend(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="int64"):
        attend(q, k.long(), v)


def test_what_a_format_needs() -> None:
    assert reason_against("p", Format.parse("u8")) is None
    assert reason_against("k", Format.parse("f16")) is None
    assert needs_scale("k", Format.parse("i8"))
    assert not needs_scale("p", Format.parse("u8"))
    assert not needs_scale("v", Format.parse("i8/tok"))
    assert not needs_scale("v", Format.parse("bf16"))
