"""What was trained is what runs: each operator as the prepared model computes it in eval mode, converted, in Triton and
in files.

Weights are equal bit for bit. Products are those of equal codes: their sums differ in the last bits alone, but where a
kernel of ONNX Runtime rounds float inputs to 8 bits itself (a warning says so), or static codes by the reciprocal of
the scale. Rounding to 8 bits costs about 0.6 % of a normal input, whose greatest of 32 lies near 2.5 deviations.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.pipeline import prepare
from qfx.qat import quantizers
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture
from tests.qat_nets import DATA, adam, both, ids, net, prepared

SAME, ROUNDED = 1e-5, 1e-2
slow = pytest.mark.slow
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them:qfx.QfxWarning"),
    pytest.mark.filterwarnings("ignore:.*computed in f32:qfx.QfxWarning"),
]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def trained(model: nn.Module, x: str, w: str, inputs: list[Tensor]) -> Any:
    """The model after three steps, so that neither weights nor scales are those of rounding."""
    model = prepared(model, both(w, x, table=w), [(one,) for one in inputs])
    optimizer = adam(model)
    for one in inputs:
        model.train()(one).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def on_onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Tensor:
    import onnxruntime

    qfx.export_onnx(model, (x,), folder / "m.onnx", dynamic=False)
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


def on_triton(model: nn.Module, x: Tensor) -> Tensor:
    from qfx.backends import triton

    gm = capture(model.to(DEVICE), x.to(DEVICE))
    prepare(gm)
    lowered = triton.lower(gm)
    assert not [note for note in lowered.notes if not note.minor]
    assert any("(Triton)" in kernel for kernel in lowered.kernels.values())
    (found,) = lowered(x.to(DEVICE))
    model.cpu()
    result: Tensor = found.cpu()
    return result


def check(model: Any, x: Tensor, folder: Path, most: float) -> None:
    """Prepared, converted, in Triton and written to a file: one function."""
    with torch.no_grad():
        wanted = model(x)
        weight = model.fake_quant.weight(model.weight)
        converted: Any = qfx.convert(model)
        assert torch.equal(converted.weight.reshape(weight.shape), weight), "not bit for bit"
        assert relative(converted(x), wanted) < SAME
        assert relative(on_triton(converted, x), wanted) < SAME
    assert relative(on_onnxruntime(converted, x, folder), wanted) < most


@pytest.mark.parametrize(
    ("x_format", "w_format", "most"),
    [
        ("i8/tok", "i4/ch", SAME),
        ("u8", "i8/ch", SAME),
        ("none", "u4/g16", ROUNDED),
        pytest.param("none", "i8/ch", ROUNDED, marks=slow),
        pytest.param("none", "u2/g16", ROUNDED, marks=slow),
        pytest.param("none", "i3/ch", ROUNDED, marks=slow),
        pytest.param("none", "nf4/g16", SAME, marks=slow),
        pytest.param("none", "f8e4m3/ch", SAME, marks=slow),
        pytest.param("i8/tok", "i8", SAME, marks=slow),
        pytest.param("i8/tok", "i4/g16", ROUNDED, marks=slow),
        pytest.param("u8/tok", "i8/ch", SAME, marks=slow),
        pytest.param("u4/tok/c90", "i8/ch", SAME, marks=slow),
        pytest.param("i8", "i8/ch", ROUNDED, marks=slow),
    ],
)
def test_linears(x_format: str, w_format: str, most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(nn.Linear(32, 24), x_format, w_format, list(torch.randn(3, 5, 32)))
    check(model, torch.randn(7, 32), tmp_path, most)


@pytest.mark.parametrize("w_format", ["i8/ch", pytest.param("u4/g16", marks=slow)])
def test_tables(w_format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(nn.Embedding(20, 32), "none", w_format, [torch.randint(20, (3, 4)) for _ in range(3)])
    check(model, torch.randint(20, (3, 4)), tmp_path, SAME)


@pytest.mark.slow
@pytest.mark.parametrize("x_format", ["none", "u8"])
def test_convolutions(x_format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(nn.Conv2d(3, 16, 4, stride=4), x_format, "i8/ch", list(torch.randn(3, 2, 3, 8, 8)))
    check(model, torch.randn(2, 3, 8, 8), tmp_path, ROUNDED)


def test_the_tolerance_would_notice_coarser_inputs() -> None:
    """Negative control: inputs of 5 bits are further from those of 8 than what is let pass."""
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 24).eval(), torch.randn(7, 32)
    fine, coarse = (prepared(copy.deepcopy(linear), both("i8/ch", bits), [(x,)])(x) for bits in ("i8/tok", "i5/tok"))
    assert relative(coarse, fine) > 2 * ROUNDED


def decibels(found: Tensor, wanted: Tensor) -> float:
    return -20 * math.log10(relative(found, wanted) + 1e-12)


@pytest.mark.slow
def test_a_deep_model_is_as_near_as_it_is_to_itself() -> None:
    """The last bit of one layer's sums decides a code of the next: what is 1e-7 there may be 1e-3 at the end.

    Given the same input each linear gives the same; and the quantized model, the results of its linears moved by 2e-7
    of themselves, gets about as far from itself as the prepared model is from it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, "n_positions": 64}
    fake = prepared(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval(), "w8a8").eval()
    batches, given = list(torch.randint(300, (8, 2, 64))), dict[str, tuple[Tensor, Tensor]]()
    hooks = [
        module.register_forward_hook(lambda _, args, y, name=name: given.__setitem__(name, (args[0], y)))
        for name, module in fake.named_modules()
        if hasattr(module, "fake_quant") and not isinstance(module, nn.Embedding)
    ]
    with torch.no_grad():
        before = [fake(ids).logits for ids in batches]
    for hook in hooks:
        hook.remove()
    quantized = qfx.convert(fake)
    with torch.no_grad():
        assert len(given) == 13
        for name, (x, y) in given.items():
            assert decibels(quantized.get_submodule(name)(x), y) > 110, name
        after = [quantized(ids).logits for ids in batches]
        for name in given:
            module = quantized.get_submodule(name)
            module.register_forward_hook(lambda *a: a[2] * (1 + 2e-7 * torch.randn_like(a[2])))
        moved = [quantized(ids).logits for ids in batches]
    far, control = (min(map(decibels, found, after)) for found in (before, moved))
    print(f"prepared and quantized: {far:.1f} dB; quantized and moved by 2e-7: {control:.1f} dB")
    assert control < 80, "codes change, or the test shows nothing"
    assert far > control - 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_float32_under_autocast(dtype: torch.dtype) -> None:
    """Products are in half precision, scales and rounding are not: the rounded weight is that of float32."""
    model = prepared(net(), both("u4/g16/f16", "u8"), DATA).train()
    weight = model.up.fake_quant.weight(model.up.weight)
    with torch.autocast("cpu", dtype):
        for quantizer in quantizers(model).values():
            assert {t.dtype for t in quantizer.current() if t is not None} == {torch.float32}
        assert torch.equal(model.up.fake_quant.weight(model.up.weight), weight)
        loss = model(ids()).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
