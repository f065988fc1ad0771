"""qfx_triton::quantized_attention: what the reference gives, for every format, mask and shape."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qfx
from qfx.backends.triton import lower
from qfx.backends.triton.attention_operands import indices, numbers
from qfx.backends.triton.device import A100, H200
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.quantized_attention import candidates, prepare, quantized_attention, reason_against
from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.numerics import fake_quantize
from qfx.pipeline import apply_plan
from qfx.pipeline import prepare as prepare_graph
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE, INTERPRETED
from tests.graphs import capture
from tests.qfx.live.test_attending import DYNAMIC, WEIGHTS, Net, X, recipe
from tests.qfx.test_capturable import through_host

NEAR = {torch.float32: 90, torch.float16: 55, torch.bfloat16: 40}  # dB; the interpreter truncates f32 to bf16
if not INTERPRETED:
    NEAR = {torch.float32: 55, torch.float16: 55, torch.bfloat16: 45}


def near(formats: str, dtype: torch.dtype = torch.float32) -> float:
    """dB to the reference. Weights on a tie may get the next code, more of them where scores of f32 are those of tf32.

    Sums of 8-bit floats have 14 bits on a GPU.
    """
    if DEVICE == "cuda" and "q=f8" in formats and "k=f8" in formats:
        return 35
    if not INTERPRETED and "p=" in formats and "q=" not in formats:
        return 40
    return min(NEAR[torch.float16 if "f16" in formats else dtype], 45 if "p=" in formats else 999)


TOKENS = "q=i8/tok k=i8/tok"


def seeded(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def operands(new: int = 37, old: int = 70, *, heads: int = 4, own: int = 2, width: int = 24, wide: int = 20,
             dtype: torch.dtype = torch.float32) -> list[Tensor]:  # fmt: skip
    q, k, v = (seeded(2, h, n, d, seed=n + d) for h, n, d in ((heads, new, width), (own, old, width), (own, old, wide)))
    return [x.to(dtype) for x in (q, k + 2 * seeded(1, own, 1, width), v)]


def both(given_: Sequence[Tensor], formats: str, *, steps: Any = None, **how: Any) -> tuple[Tensor, Tensor]:
    """What the reference gives, and the kernels. formats: "k=i8/tok v=i8"; steps: role -> (scales, zero points)."""
    texts = dict(word.split("=") for word in formats.split())
    how = {"mask": None, "sinks": None, "scale": 0.3, "causal": False, "softcap": 0.0, **how}
    scales = [part for role in "qkv" for part in (steps or {}).get(role, ([], []))]
    args: Any = (*given_, how["mask"], how["sinks"], *scales, how["scale"], how["causal"], how["softcap"],
                 *(texts.get(role, "") for role in "qkvp"))  # fmt: skip
    return torch.ops.qfx.quantized_attention(*args), torch.ops.qfx_triton.quantized_attention(*args)


KEEP = torch.rand(2, 1, 37, 70, generator=torch.Generator().manual_seed(3)) > 0.4
KEEP[0, :, 5] = False
KEEP = KEEP.to(DEVICE)
SINKS = seeded(4, seed=6)
LEAST = torch.finfo(torch.float32).min
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "bool mask": {"mask": KEEP},
    "row of a mask": {"mask": KEEP[0, 0, 7], "causal": True},
    "float mask": {"mask": seeded(2, 4, 37, 70, seed=4)},
    "infinite mask": {"mask": torch.where(KEEP, 0.5, -torch.inf)},
    "mask of the least number": {"mask": torch.where(KEEP, 0.0, LEAST).expand(-1, 4, -1, -1)},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "a mask of the past": {"mask": torch.ones(37, 70, dtype=torch.bool, device=DEVICE).tril(30)},
    "a window by heads": {
        "mask": torch.where(torch.ones(2, 4, 37, 70, device=DEVICE).tril(33).triu(25) > 0, 0.0, -torch.inf)
    },
    "everything": {"mask": KEEP, "sinks": SINKS, "softcap": 2.0, "causal": True},
    "negative scale": {"scale": -0.3, "mask": KEEP},
    "no scale": {"scale": 0.0, "causal": True},
}


ROUNDED = f"{TOKENS} v=i8/head/dyn p=u8/tok"
WITH_P = ("causal", "bool mask", "mask of the least number", "a window by heads", "everything", "negative scale")


SHARP = ("causal", "mask of the least number", "everything")
PAIRS = [
    *((TOKENS, how) for how in HOW),
    *(pytest.param(ROUNDED, how, marks=[] if how in SHARP else pytest.mark.slow) for how in WITH_P),
]


@pytest.mark.parametrize(("formats", "how"), PAIRS)
def test_it_is_the_reference(formats: str, how: str) -> None:
    wanted, found = both(operands(), formats, **HOW[how])
    assert torch.isfinite(found).all()
    assert sqnr_db(wanted, found) > near(formats)
    assert found.shape == wanted.shape and found.stride() == wanted.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "formats",
    [TOKENS, "k=i8/tok", "q=f8e4m3/tok k=f8e4m3/tok v=f8e4m3/tok p=f8e4m3", "q=i8/tok k=i8/dyn v=i8/tok p=u8"],
)
def test_halves(formats: str, dtype: torch.dtype) -> None:
    wanted, found = both(operands(dtype=dtype), formats, causal=True)
    assert found.dtype == dtype
    assert sqnr_db(wanted.float(), found.float()) > near(formats, dtype) - 5 * ("p=" in formats)


STEPS: dict[str, Any] = {"q": ([0.02, 0.03, 0.04, 0.05], []), "k": ([0.03], []), "v": ([0.02], [131])}


@pytest.mark.parametrize(
    "formats",
    [
        "q=u8/tok k=i4/tok/c90 v=u8/dyn p=u8", "q=f8e4m3/tok k=f8e4m3/dyn v=f8e4m3/tok p=f8e4m3/tok", "v=i8/tok p=i8",
        "q=i8/head k=i8 v=u8 p=u8/tok/c90", "q=f8e5m2/dyn k=i8/tok v=f8e5m2/tok p=f8e5m2", "k=f16 v=f16",
        "q=i3/tok k=u4/head/dyn v=i4/head/dyn p=u4", "q=f8e4m3/tok k=i8/tok",
    ],
)  # fmt: skip
def test_every_kind_of_format(formats: str) -> None:
    wanted, found = both(operands(), formats, steps=STEPS if "i8/head k=i8 v" in formats else None, mask=KEEP)
    assert sqnr_db(wanted, found) > near(formats)


def test_heads_have_formats_of_their_own() -> None:
    formats = "q=[i8/tok,f16,i8,i8/tok] k=[i8/tok,f8e4m3/head/dyn] p=[u8,f32]"
    steps: dict[str, Any] = {"q": ([1.0, 1.0, 0.04, 1.0], [])}
    for how in ("plain", "everything"):
        wanted, found = both(operands(), formats, steps=steps, **HOW[how])
        assert sqnr_db(wanted, found) > 45
    mask = seeded(1, 4, 37, 70, seed=8)
    wanted, found = both(operands(), formats, steps=steps, mask=mask)
    assert sqnr_db(wanted, found) > 45 > sqnr_db(both(operands(), formats, steps=steps)[0], found)


@settings(max_examples=5, deadline=None)
@given(
    new=st.integers(1, 150), old=st.integers(1, 150), own=st.integers(1, 2), share=st.integers(1, 3),
    width=st.integers(1, 70), wide=st.integers(1, 40), causal=st.booleans(), p=st.sampled_from(["", " p=u8"]),
)  # fmt: skip
@example(new=1, old=1, own=1, share=1, width=1, wide=1, causal=True, p=" p=u8")
@example(new=300, old=129, own=1, share=1, width=128, wide=16, causal=True, p="")
def test_odd_shapes(new: int, old: int, own: int, share: int, width: int, wide: int, causal: bool, p: str) -> None:
    given_ = operands(new, old, heads=own * share, own=own, width=width, wide=wide)
    wanted, found = both(given_, TOKENS + p, causal=causal, scale=width**-0.5)
    assert sqnr_db(wanted, found) > near(TOKENS + p)


def test_strides_of_the_caller_and_nothing_at_all() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands())
    wanted, found = both((q[..., ::2], k[..., 1::2], v), TOKENS)
    assert sqnr_db(wanted, found) > NEAR[torch.float32]
    for new, old in ((0, 5), (5, 0)):
        wanted, found = both(operands(new, old), "v=i8/tok p=u8/tok")
        assert found.shape == wanted.shape and found.eq(0).all()


def test_a_prepared_call_copies_nothing_from_the_host() -> None:
    formats = ("[i8,f16,u8,i8/tok]", "i8/head", "", "u8")
    steps: Any = ([0.5, 1.0, 0.25, 1.0], [0, 0, 120, 0], [0.5, 0.125], [], [], [])
    prepare(steps, formats, 4, 2, torch.device("meta"))
    args: Any = (*(x.to("meta") for x in operands()), KEEP.to("meta"), None, *steps, 0.3, True, 0.0, *formats)
    with recorded(H200) as launches:
        assert through_host(lambda: quantized_attention(*args)) == set()
    assert [one.kernel.fn.__name__ for one in launches].count("attention") == 4


def test_other_scales_give_another_result() -> None:
    """Negative control."""
    formats, twice = "q=i8/head k=i8 v=u8", {**STEPS, "q": ([2 * s for s in STEPS["q"][0]], [])}
    wanted, found = both(operands(), formats, steps=STEPS)
    assert sqnr_db(wanted, found) > NEAR[torch.float16]
    assert sqnr_db(wanted, both(operands(), formats, steps=twice)[1]) < 30


def test_accuracy_with_random_keys_and_with_channels_far_from_zero() -> None:
    q, k, v = (seeded(1, 2, 128, 64, seed=i) for i in range(3))
    far = k + torch.zeros(64, device=DEVICE).index_fill(0, torch.tensor([3, 40], device=DEVICE), 40.0)
    how: dict[str, Any] = {"scale": 64**-0.5, "causal": True}
    exact = v
    for keys in (k, far):
        exact = torch.ops.qfx.attention(q, keys, v, None, None, how["scale"], True, 0.0)
        assert sqnr_db(exact, both((q, keys, v), TOKENS, **how)[1]) > 38
    rounded = fake_quantize(far, Format.parse("i8/tok"))  # as it would be without the centring
    assert sqnr_db(exact, both((q, rounded, v), "q=i8/tok", **how)[1]) < 25


class _OnKernels(TorchDispatchMode):
    """Attention of a model on the kernels of this backend."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.qfx.quantized_attention.default:
            self.calls += 1
            return torch.ops.qfx_triton.quantized_attention(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param({"q": "i8/tok", "k": "i8", "v": "i8/head", "p": "u8/tok"}, marks=pytest.mark.slow),
        {"q": ["i8/tok", "f16", "i8/tok", "i8/tok"], "k": ["u8", "f16", "u8", "i4/tok"], "v": "i8/tok"},
    ],
)
def test_models_that_were_trained_with_fake_quantization(rule: dict[str, Any]) -> None:
    plan = qfx.plan(Net().eval(), recipe({"target": "attention", **rule}, WEIGHTS), data=[X, 2 * X])
    model = qfx.prepare_qat(Net(), plan).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(X).square().mean().backward()
    optimizer.step()
    converted = qfx.convert(model.eval()).to(DEVICE)
    with torch.no_grad():
        wanted = converted(X.to(DEVICE))
        with _OnKernels() as kernels:
            found = converted(X.to(DEVICE))
    assert kernels.calls == 2
    assert sqnr_db(wanted, found) > 45


@pytest.mark.parametrize("q", [pytest.param("i8/tok", marks=pytest.mark.slow), ["i8/tok", "f16", "i8/tok", "i8/tok"]])
def test_a_model_is_lowered_to_the_kernels(q: Any) -> None:
    gm = capture(Net().eval().to(DEVICE), X.to(DEVICE))
    prepare_graph(gm)
    apply_plan(gm, None, Recipe.parse(recipe({**DYNAMIC, "q": q})))
    lowered = lower(gm)
    assert list(lowered.kernels.values()).count("quantized_attention (Triton)") == 2
    assert sqnr_db(gm(X.to(DEVICE))[0], lowered(X.to(DEVICE))[0]) > 45


def test_operands_of_several_types() -> None:
    q, k, v = operands()
    wanted, found = both((q.half(), k, v.bfloat16()), TOKENS)
    assert found.dtype == torch.float16
    assert sqnr_db(wanted.float(), found.float()) > NEAR[torch.bfloat16]


def test_what_is_refused() -> None:
    q, k, v = operands()
    rest: Any = (None, None, *([] for _ in range(6)), 1.0, False, 0.0, "i8/tok", "i8/tok", "", "")
    with pytest.raises(ValueError, match=r"v \[B, G, L, Dv\], all on one device(.|\n)*next step: bring them"):
        torch.ops.qfx_triton.quantized_attention(q, k, v[:, :, 1:], *rest)
    with pytest.raises(ValueError, match="heads of 1 to 256 channels have kernels, not of 300 and 20"):
        torch.ops.qfx_triton.quantized_attention(*operands(width=300), *rest)
    with pytest.raises(ValueError, match="has not the scales that it needs"):
        both((q, k, v), "q=i8")
    assert reason_against(64, 64, torch.float64) == "operands in f16, bf16 or f32 have kernels, not in torch.float64"
    assert reason_against(256, 64, torch.float16) is None


def test_any_number_of_sequences_has_a_grid() -> None:
    """Windows of images are sequences. Of a grid the first axis alone has room for more than 65,535 programs."""
    q, k, v = torch.empty(3, 70_000, 2, 49, 32, dtype=torch.float16, device="meta")
    mask = torch.empty(70_000, 1, 49, 49, dtype=torch.bool, device="meta")
    with recorded(H200) as launches:
        quantized_attention(q, k, v, mask, None, [], [], [], [], [], [], 0.1, False, 0.0, "i8/tok", "i8/tok", "", "")
    found = {one.kernel.fn.__name__ for one in launches}
    assert found == {"round_operand", "mask_bounds", "attention"}
    assert max(size for one in launches for size in one.grid[1:]) < 65_536


def test_configurations_to_measure() -> None:
    for device in (A100, H200):
        for wide, lean in itertools.product((64, 128, 256, 512, 1024), (False, True)):
            found = candidates(4096, wide, lean, device)
            assert 0 < len(found) <= 20 and len({tuple(one.items()) for one in found}) == len(found)


def test_torch_approves_of_the_operator() -> None:
    q, k, v = operands()
    args: Any = (q, k, v, KEEP, None, [], [], [0.05], [], [0.05], [128], 0.3, False, 0.0, "i8/tok", "i8", "u8", "u8")
    torch.library.opcheck(torch.ops.qfx_triton.quantized_attention, args, test_utils=("test_schema", "test_faketensor"))


def test_what_a_graph_of_cuda_read_is_never_let_go() -> None:
    first = [look((1,), torch.device(DEVICE)) for look in (numbers, indices)]
    for i in range(2, 5000):
        numbers((float(i),), torch.device(DEVICE))
        indices((i,), torch.device(DEVICE))
    again = [look((1,), torch.device(DEVICE)) for look in (numbers, indices)]
    assert all(a is b for a, b in zip(first, again, strict=True))
