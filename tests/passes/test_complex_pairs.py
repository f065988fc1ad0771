"""qfx.passes.complex_pairs: what is complex is computed in real and imaginary parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.passes import complex_pairs as passes_complex_pairs
from qfx.passes.complex_pairs import complex_pairs
from tests.graphs import Function, after, capture, counts, error, text

GOLDEN = """\
%inputs_0: f32[2,3,4] = input
%inputs_1: f32[3,2] = input
%cos: f32[3,2] = aten.cos(%inputs_1)
%sin: f32[3,2] = aten.sin(%inputs_1)
%reshape: f32[2,3,2,2] = aten.reshape(%inputs_0, [2, 3, -1, 2])
%select: f32[2,3,2] = aten.select.int(%reshape, -1, 0)
%select_1: f32[2,3,2] = aten.select.int(%reshape, -1, 1)
%mul: f32[2,3,2] = aten.mul.Tensor(%select, %cos)
%mul_1: f32[2,3,2] = aten.mul.Tensor(%select_1, %sin)
%sub: f32[2,3,2] = aten.sub.Tensor(%mul, %mul_1)
%mul_2: f32[2,3,2] = aten.mul.Tensor(%select, %sin)
%mul_3: f32[2,3,2] = aten.mul.Tensor(%select_1, %cos)
%add: f32[2,3,2] = aten.add.Tensor(%mul_2, %mul_3)
%stack: f32[2,3,2,2] = aten.stack([%sub, %add], -1)
%reshape_1: f32[2,3,4] = aten.reshape(%stack, [2, 3, 4])
return [%reshape_1]
"""
DEEP = 300
X, ANGLES = torch.randn(2, 3, 4), torch.randn(3, 2)


def rotary(_: Any, x: Tensor, angles: Tensor) -> Tensor:
    """As Llama 4 turns queries and keys."""
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(2).type_as(x)


def pairs_of(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z)


def test_golden() -> None:
    gm, count = after(complex_pairs, Function(rotary), X, ANGLES)
    assert count == 3 and text(gm) == GOLDEN


def on_pairs(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return Function(lambda _, x, angles: function(pairs_of(x), angles))


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polar of lengths": lambda z, a: real(z * torch.polar(a.abs(), a)),
    "polar of broadcast ones": lambda z, a: real(z * torch.polar(a.new_ones(2, 3, 2), a)),
    "complex": lambda z, a: real(z * torch.complex(a, a + 1)),
    "by a real tensor": lambda z, a: real(a * z),
    "by a number": lambda z, a: real(z * 3.0),
    "sum": lambda z, a: real(z + z * z),
    "sum with real": lambda z, a: real(z + z.real * 2),
    "real less": lambda z, a: real(z.imag * 2 - z),
    "difference": lambda z, a: real(z * z - z),
    "conjugate": lambda z, a: real((z * z).conj() * 1.0),
    "moves": lambda z, a: real((-z).transpose(0, 1)[:, None, 1:].expand(3, 2, 2, 2).reshape(6, 4) * 2.0),
    "rows": lambda z, a: real(z[:, torch.tensor([2, 0])] * 2.0),
    "real and imaginary": lambda z, a: (z * z).real + (z * z).imag,
    "length": lambda z, a: (z * z).abs(),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_nothing_is_complex(name: str) -> None:
    function = on_pairs(CASES[name])
    gm, count = after(complex_pairs, function, X, ANGLES, dynamic=name != "rows")
    assert count > 0
    assert not [n for n in gm.graph.nodes if getattr(n.meta.get("val"), "is_complex", bool)()]
    (found,) = gm(X, ANGLES) if len(gm.meta["used_inputs"]) == 2 else gm(X)
    assert error(function(X, ANGLES), found) < 1e-6


def test_double_precision_stays() -> None:
    x, angles = X.double(), ANGLES.double()
    gm, _ = after(complex_pairs, on_pairs(CASES["complex"]), x, angles)
    (found,) = gm(x, angles)
    assert found.dtype == torch.float64 and error(CASES["complex"](pairs_of(x), angles), found) < 1e-14


@pytest.mark.parametrize(
    "function",
    [
        lambda z, a: real(torch.fft.fft(z)),
        lambda z, a: real(torch.fft.fft(z * 2.0) * 2.0),  # nothing beside a transform
        lambda z, a: z * 2.0,  # an output
        lambda z, a: real(z * 2j),
        lambda z, a: real(torch.exp(z)),
        lambda z, a: real(z + a),  # one broadcast: the imaginary part alone would keep its size
    ],
)
def test_others_stay(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = on_pairs(function)
    before = counts(capture(model, X, ANGLES))
    found = counts(after(complex_pairs, model, X, ANGLES)[0])
    assert {k: found[k] for k in found if "complex" in k} == {k: before[k] for k in before if "complex" in k}


def test_a_complex_parameter_stays() -> None:
    model = Function(lambda own, x: real(pairs_of(x) * own.turns), turns=torch.randn(3, 2, dtype=torch.complex64))
    assert after(complex_pairs, model, X)[1] == 0


def test_a_file_computes_lengths(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = Function(lambda _, x: torch.complex(x, x * 2).abs())
    session = ort.InferenceSession(str(qfx.export_onnx(model.eval(), (X,), tmp_path / "m.onnx").path))
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert error(X.abs() * 5**0.5, torch.from_numpy(found)) < 1e-6


def test_a_file_computes_it(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = Function(rotary)
    with pytest.warns(qfx.QfxWarning, match="looks at the size of dimension 2"):  # reshape to pairs
        written = qfx.export_onnx(model.eval(), (X, ANGLES), tmp_path / "m.onnx")
    session = ort.InferenceSession(str(written.path))
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), (X, ANGLES), strict=True)}
    assert error(rotary(None, X, ANGLES), torch.from_numpy(session.run(None, feed)[0])) < 1e-6


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize(
    "result",
    [lambda z, a: real(z * torch.complex(a, a)), lambda z, a: (z * 2.0).imag, lambda z, a: (z * a).abs()],
)
def test_half_precision_stays(result: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Real tensors of complex32 are float16, whatever the parts are computed in."""
    x, angles = X.half(), ANGLES.half()
    function = on_pairs(result)
    gm, count = after(complex_pairs, function, x, angles)
    assert count > 0
    (found,) = gm(x, angles) if len(gm.meta["used_inputs"]) == 2 else gm(x)
    assert found.dtype == torch.float16
    assert error(result(pairs_of(x.float()), angles.float()), found.float()) < 2e-3


@pytest.mark.parametrize("exponent", [0, 15, -15])
def test_lengths_of_any_size(exponent: int) -> None:
    gm, _ = after(complex_pairs, on_pairs(lambda z, a: z.abs()), X, ANGLES)
    x = X * 10.0**exponent
    assert error(pairs_of(x).abs(), gm(x)[0]) < 1e-6


def test_a_length_of_nothing_has_the_gradient_of_torch() -> None:
    gm, _ = after(complex_pairs, on_pairs(lambda z, a: z.abs()), X, ANGLES)
    one, other = (X.clone().index_fill_(1, torch.tensor(1), 0.0).requires_grad_() for _ in range(2))
    gm(one)[0].sum().backward()
    pairs_of(other).abs().sum().backward()
    assert one.grad is not None and not one.grad[:, 1].any()
    assert error(other.grad, one.grad) < 1e-6


@pytest.mark.parametrize("closed", [True, False])
def test_many_in_a_row_take_time_by_their_number(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read by an operator without a form in parts is found from there, each node looked at once."""

    def deep(z: Tensor, a: Tensor) -> Tensor:
        for _ in range(DEEP):
            z = z * 2.0
        return real(z) if closed else real(torch.exp(z))

    gm, asked = capture(on_pairs(deep), X, ANGLES), 0

    def counted(value: Any) -> bool:
        nonlocal asked
        asked += 1
        return bool(is_complex(value))

    is_complex = passes_complex_pairs._is_complex
    monkeypatch.setattr(passes_complex_pairs, "_is_complex", counted)
    assert complex_pairs(gm) is closed
    assert asked < 10 * DEEP


def test_gradients_are_those_of_complex_numbers() -> None:
    gm, _ = after(complex_pairs, Function(rotary), X, ANGLES)
    one, other = (a.clone().requires_grad_() for a in (X, X))
    (gm(one, ANGLES)[0] ** 2 * ANGLES.sum()).sum().backward()
    (rotary(None, other, ANGLES) ** 2 * ANGLES.sum()).sum().backward()
    assert error(other.grad, one.grad) < 1e-5
