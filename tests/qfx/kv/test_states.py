"""PackedStates: what attention does with keys and values runs over the codes; anything else says that it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.errors import QfxWarning
from qfx.kv import states as module
from qfx.kv.formats import cache_formats
from qfx.kv.states import PackedStates, packed
from qfx.kv.store import Store
from tests.seeded import randn

HEADS, LENGTH, WIDTH = 2, 40, 16


def states(kv: Any = "i8") -> tuple[PackedStates, PackedStates]:
    keys, values = (randn(2, HEADS, LENGTH, WIDTH, seed=s) for s in (1, 2))
    store = Store(cache_formats(kv, 1)[0], keys, values, where="layer 0")
    store.append(keys[:, :, :-2], values[:, :, :-2])
    return packed(store.append(keys[:, :, -2:], values[:, :, -2:]))


@pytest.fixture
def over_codes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts how often attention ran over the codes."""
    count = [0]
    for name in ("attend", "scores", "weighted"):
        kept = getattr(module, name)

        def counted(*args: Any, kept: Any = kept, **kwargs: Any) -> Any:
            count[0] += 1
            return kept(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return lambda: count[0]


def repeat_kv(x: Tensor, n: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)


def close(a: Tensor, b: Tensor) -> bool:
    return type(a) is Tensor and a.shape == b.shape and float((a - b).abs().max()) < 2e-4


def test_it_looks_like_a_tensor() -> None:
    keys, values = states()
    assert keys.shape == (2, HEADS, LENGTH, WIDTH) and keys.size(-1) == WIDTH and keys.dim() == 4
    assert keys.dtype == torch.float32 and keys.device.type == "cpu" and len(keys) == 2
    assert repr(values) == "PackedStates([2, 2, 40, 16], values)"
    assert keys.contiguous() is keys and keys.to(torch.float32) is keys and keys.to("cpu") is not None
    assert not keys.requires_grad and keys.detach() is keys


def test_attention(over_codes: Callable[[], int]) -> None:
    keys, values = states()
    k, v = keys.dense(), values.dense()
    q, mask = randn(2, 6, 3, WIDTH), randn(2, 1, 3, LENGTH, seed=4) > 0
    attention = F.scaled_dot_product_attention
    assert close(attention(q[:, :2], keys, values), attention(q[:, :2], k, v))
    assert close(attention(q, keys, values, enable_gqa=True), attention(q, k, v, enable_gqa=True))
    assert close(attention(q, repeat_kv(keys, 3), repeat_kv(values, 3), attn_mask=mask, dropout_p=0.0, scale=0.5),
                 attention(q, repeat_kv(k, 3), repeat_kv(v, 3), mask, scale=0.5))  # fmt: skip
    twice = keys.repeat_interleave(3, dim=1), torch.repeat_interleave(values, 3, 1)
    assert close(attention(q, *twice), attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))
    cut = keys[:, :, :3, :], values[:, :, :3]
    assert close(
        attention(q[:, :2], *cut, is_causal=True), attention(q[:, :2], k[:, :, :3], v[:, :, :3], is_causal=True)
    )
    assert over_codes() == 5


def test_matmul(over_codes: Callable[[], int]) -> None:
    keys, values = states()
    k, v = keys.dense(), values.dense()
    q, p = randn(2, 6, 3, WIDTH), randn(2, 6, 3, LENGTH, seed=3)
    assert close(torch.matmul(q, repeat_kv(keys, 3).transpose(2, 3)), q @ repeat_kv(k, 3).transpose(2, 3))
    assert close(q[:, :2] @ keys.transpose(-1, -2), q[:, :2] @ k.transpose(2, 3))
    assert close(torch.matmul(p, repeat_kv(values, 3)), p @ repeat_kv(v, 3))
    assert close(p[:, :2].matmul(values), p[:, :2] @ v)
    assert over_codes() == 4
    assert repeat_kv(keys, 3).transpose(2, 3).shape == (2, 6, WIDTH, LENGTH)
    assert torch.equal(repeat_kv(keys, 3).transpose(2, 3).dense(), repeat_kv(k, 3).transpose(2, 3))  # type: ignore[attr-defined]


OTHERS: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "einsum": lambda k, v, q: torch.einsum("bhsd,bhld->bhsl", q, k),
    "mul": lambda k, v, q: k * 2,
    "mul by": lambda k, v, q: 2 * k,
    "softmax": lambda k, v, q: torch.softmax(k, -1),
    "cat": lambda k, v, q: torch.cat([k, v], 2),
    "permute": lambda k, v, q: k.permute(0, 2, 1, 3),
    "other axes": lambda k, v, q: k.transpose(1, 2),
    "other index": lambda k, v, q: k[:, 0],
    "every second": lambda k, v, q: k[:, :, ::2],
    "other dtype": lambda k, v, q: k.to(torch.float64),
    "other shape": lambda k, v, q: k.reshape(4, -1),
    "other repeats": lambda k, v, q: k.repeat_interleave(2, 2),
    "mT": lambda k, v, q: k.mT,
    "swapped": lambda k, v, q: F.scaled_dot_product_attention(q, v, k),
    "dropout": lambda k, v, q: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9),
    "keys on the left": lambda k, v, q: k @ q.transpose(2, 3),
    "not transposed": lambda k, v, q: torch.matmul(randn(2, 2, 3, LENGTH), k),
    "by name": lambda k, v, q: torch.matmul(input=q, other=k.transpose(2, 3)),
    "unequal axes": lambda k, v, q: k[:, :, None].expand(2, 2, 3, LENGTH, WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_others_get_floats_and_say_so(name: str) -> None:
    keys, values = states()
    q = randn(2, HEADS, 3, WIDTH)
    expected = OTHERS[name](keys.dense(), values.dense(), q)
    if name == "unequal axes":
        found = OTHERS[name](keys, values, q)
        assert isinstance(found, PackedStates) and torch.equal(found.dense(), expected)
        with pytest.warns(QfxWarning, match="does not read a quantized cache"):
            assert torch.equal(found + 0, expected)
        return
    with pytest.warns(
        QfxWarning, match=r"(?s)does not read a quantized cache.*next step: .*attn_implementation='sdpa'"
    ):
        found = OTHERS[name](keys, values, q)
    assert type(found) is Tensor
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_go_through_floats() -> None:
    keys, values = states()
    q = randn(2, HEADS, 3, WIDTH).requires_grad_()
    with pytest.warns(QfxWarning, match="scaled_dot_product_attention"):
        F.scaled_dot_product_attention(q, keys, values).sum().backward()
    assert q.grad is not None and q.grad.abs().max() > 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        F.scaled_dot_product_attention(q, keys, values)


def test_operations_below_python_get_floats_too() -> None:
    keys, _ = states()
    with torch._C.DisableTorchFunctionSubclass(), pytest.warns(QfxWarning, match=r"aten.mul"):
        found = torch.mul(keys, 2)
    assert torch.equal(found, keys.dense() * 2)


@pytest.mark.filterwarnings("ignore:(?s).*dequantized as a whole")
@pytest.mark.parametrize("tracked", range(4))
def test_gradients_reach_whatever_wants_them(tracked: int) -> None:
    old, given = randn(2, HEADS, 45, WIDTH), [randn(2, HEADS, 3, WIDTH, seed=s) for s in range(3)]
    store = Store(cache_formats("i8", 1)[0], old, old, where="layer 0")
    store.append(old, old)
    leaf = [*given, mask := randn(3, 48)][tracked].requires_grad_()
    query, keys, values = given
    k, v = packed(store.append(keys, values))
    F.scaled_dot_product_attention(query, k, v, mask).square().sum().backward()
    found, leaf.grad = leaf.grad, None
    keys, values = (torch.cat((x.dense().detach()[:, :, :45], new), 2) for x, new in ((k, keys), (v, values)))
    F.scaled_dot_product_attention(query, keys, values, mask).square().sum().backward()
    assert found is not None and leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad)


def test_a_compiler_leaves_repeated_heads_to_the_codes(fresh_dynamo: None) -> None:
    """Traced, what stands for keys and values took a shape of one length for another, which dequantized them all."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 2, repeat_kv(k, 2), repeat_kv(v, 2)) * 2

    keys, values = states()
    q = randn(2, 2 * HEADS, 3, WIDTH, seed=0)
    found = torch.compile(attention, backend="eager")(q, keys, values)
    assert close(found, attention(q, keys.dense(), values.dense()))
