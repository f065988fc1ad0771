"""linear_weight_only that ends with a gate: the reference's results on every way that a product goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton import weight_only_config
from qfx.backends.triton.device import H100
from qfx.backends.triton.launch import recorded
from qfx.backends.triton.products import ACTIVATIONS
from qfx.backends.triton.weight_only import linear_weight_only
from qfx.backends.triton.weight_only_config import ABREAST, DEQUANTIZE, DOT, FRAGMENTS, GEMV
from qfx.backends.triton.weight_only_pack import pack_weight_only
from qfx.ops.packed import linear
from qfx.packing import Packed
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.test_weight_only import STEP, in_turn, weight

GATES = ACTIVATIONS[1:]
REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
PATHS = [
    (GEMV, {"BN": 4, "CHUNKS": 16, "num_warps": 4}),
    (DOT, {"BM": 16, "BN": 32, "SPLITS": 1, "FIRST": 0, "num_warps": 4}),
    (DOT, {"BM": 16, "BN": 32, "SPLITS": 3, "FIRST": 1, "num_warps": 4}),
    (ABREAST, {"SPLITS": 1, "num_warps": 4}),
    (ABREAST, {"SPLITS": 3, "num_warps": 4}),
    (FRAGMENTS, {"ROWS": 2, "num_warps": 2}),
    (DEQUANTIZE, {}),
]


def run(x: Tensor, packed: Packed, bias: Tensor | None, act: str) -> Tensor:
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, str(packed.format), x.shape[-1])
    found = torch.ops.qfx_triton.linear_weight_only(x, w, bias, None, text, packed.shape[0], act)
    assert isinstance(found, Tensor) and found.dtype == x.dtype
    return found


def error(x: Tensor, packed: Packed, bias: Tensor | None, act: str) -> float:
    """The greatest difference to the reference, against what an error of each half comes to."""
    given = (packed.data, packed.scale, packed.zero, bias, None, None, None, "", str(packed.format))
    gate, up = linear(x.float(), *given).chunk(2, -1)
    got, due = run(x, packed, bias, act), REFERENCE[act](gate) * up
    assert got.shape == due.shape
    size = x.float().abs() @ packed.dequantize().abs().t() + (0 if bias is None else bias.float().abs())
    around = [part.abs() + whole for part, whole in zip((gate, up), size.chunk(2, -1), strict=True)]
    limit = 2 * around[0] * around[1] + due.abs() + torch.finfo(x.dtype).tiny  # no gate is steeper than 1.13
    return float(((got.float() - due).abs() / limit).max()) if got.numel() else 0.0


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize(("path", "config"), PATHS)
def test_every_path(act: str, path: int, config: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: {"PATH": path, "num_stages": 1, **config})
    torch.manual_seed(0)
    packed, bias = weight(46, 300, "u4/g32"), torch.randn(46, device=DEVICE)
    for m, dtype in ((3, torch.float16), (3, torch.bfloat16)):
        x = torch.randn(m, 300, device=DEVICE).to(dtype)
        assert error(x, packed, bias, act) < STEP[dtype]
        assert error(x, packed, None, act) < STEP[dtype]


@pytest.mark.parametrize(("text", "rows", "warps"), in_turn((1, 4), (2, 2)))
def test_fragments_of_every_format(text: str, rows: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"PATH": FRAGMENTS, "ROWS": rows, "num_warps": warps, "num_stages": 1}
    monkeypatch.setattr(weight_only_config, "heuristic", lambda *_: kept)
    torch.manual_seed(rows)
    packed, bias = weight(74, 1024 if rows == 2 else 777, text), torch.randn(74, device=DEVICE)
    x = torch.randn(9, packed.shape[1], device=DEVICE).half()
    assert error(x, packed, bias, "silu") < STEP[torch.float16]


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(0, 5) | st.integers(5, 300), half=st.integers(1, 40), k=st.integers(1, 400),
    text=st.sampled_from(["u4/g128", "i8/ch", "i3/g64", "nf4/g64", "f8e4m3/ch"]),
    dtype=st.sampled_from(list(STEP)), act=st.sampled_from(GATES), seed=st.integers(0, 99), biased=st.booleans(),
)  # fmt: skip
def test_every_shape(
    m: int, half: int, k: int, text: str, dtype: torch.dtype, act: str, seed: int, biased: bool
) -> None:
    torch.manual_seed(seed)
    packed = weight(2 * half, k, text)
    bias = torch.randn(2 * half, device=DEVICE).to(dtype) if biased else None
    assert error(torch.randn(m, k, device=DEVICE).to(dtype), packed, bias, act) < STEP[dtype]


def test_swapped_halves_show() -> None:
    torch.manual_seed(0)
    packed, x = weight(32, 64, "i8/ch"), torch.randn(4, 64, device=DEVICE).half()
    gate, up = (x.float() @ packed.dequantize().t()).chunk(2, -1)
    found = run(x, packed, None, "silu")
    assert torch.allclose(found.float(), F.silu(gate) * up, atol=1e-2)
    assert not torch.allclose(found.float(), F.silu(up) * gate, atol=1e-1)


def test_the_halves_are_not_rounded_to_the_type_of_the_result() -> None:
    """Halves beyond the largest float16 whose gated product is small come out finite."""
    packed = weight(16, 256, "i8/ch")
    packed.data.fill_(100)
    packed.data[:8] = -100
    packed.scale.fill_(4.0)
    x = torch.ones(1, 256, dtype=torch.float16, device=DEVICE)
    assert torch.equal(run(x, packed, None, "silu"), torch.zeros(1, 8, dtype=torch.float16, device=DEVICE))


def test_one_kernel_for_few_tokens() -> None:
    packed = weight(512, 256, "u4/g128")
    w, text = pack_weight_only(packed.data, packed.scale, packed.zero, "u4/g128", 256)
    for m, kernels in ((1, ["fragments"]), (8, ["fragments"]), (40, ["abreast", "sum_splits"])):
        x = torch.empty(m, 256, dtype=torch.float16, device=DEVICE)
        with recorded(H100) as launches:
            linear_weight_only(x, w, None, None, text, 512, "silu")
        assert [one.kernel.fn.__name__ for one in launches] == kernels
        assert launches[-1].arguments["ACT"] == "silu"


def test_what_does_not_fit_is_refused() -> None:
    packed = weight(9, 64, "i4/g32")
    x = torch.randn(2, 64, device=DEVICE)
    with pytest.raises(ValueError, match="n does not fit.*\n?.*two halves"):
        run(x, packed, None, "silu")
    with pytest.raises(ValueError, match="act does not fit"):
        run(x, packed, None, "relu")
