"""The ops under export, make_fx, torch.compile, opcheck and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE
from torch.fx.experimental.proxy_tensor import make_fx

import qfx.ops.packed  # noqa: F401  registers the ops
from tests.qfx.ops.test_packed import linear, weight


class Linear(torch.nn.Module):
    def __init__(self, w_format: str, x_format: str) -> None:
        super().__init__()
        packed = weight(w_format)
        self.formats = (x_format, w_format)
        self.register_buffer("w", packed.data)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero", packed.zero)
        self.bias = torch.nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.qfx.linear(x, self.w, self.scale, self.zero, self.bias, None, None, None, *self.formats)
        return y


PAIRS = [("i8/ch", "i8/tok"), ("u4/g8", ""), ("f4e2m1/g8/e8m0", "f8e4m3/tok"), ("f4e2m1/g16/e4m3", "")]


# torch.export.load's own, the first of them of torch 2.11
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(("w_format", "x_format"), PAIRS)
def test_export(w_format: str, x_format: str, tmp_path: Path) -> None:
    module = Linear(w_format, x_format).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.randn(4, 3, 20),), dynamic_shapes=({0: rows},))
    assert torch.ops.qfx.linear.default in [node.target for node in program.graph.nodes]
    programs = [program, program.run_decompositions()]
    if module.scale.dtype in _TORCH_TO_SERIALIZE_DTYPE:
        torch.export.save(program, tmp_path / "m.pt2")
        programs.append(torch.export.load(tmp_path / "m.pt2"))
    else:  # torch 2.11 knows no float8_e8m0fnu in files
        with pytest.raises(KeyError, match="float8_e8m0fnu"):
            torch.export.save(program, tmp_path / "m.pt2")
    for runs in programs:
        x = torch.randn(7, 3, 20)
        assert torch.equal(runs.module()(x), module(x))


@pytest.mark.parametrize(("w_format", "x_format"), PAIRS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(w_format: str, x_format: str, dynamic: bool) -> None:
    torch._dynamo.reset()  # the limit of recompiles counts over all instances of a class
    module = Linear(w_format, x_format)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        x = torch.randn(rows, 20)
        assert torch.equal(compiled(x), module(x))
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("mode", ["fake", "symbolic", "real"])
def test_make_fx(mode: Literal["fake", "symbolic", "real"]) -> None:
    packed = weight("i4/g8")

    def forward(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = linear(x, packed, "i8/tok")
        rows = torch.ops.qfx.embedding(ids, packed.data, packed.scale, None, "i4/g8", 20, torch.float16)
        return y, rows, torch.ops.qfx.dequantize(packed.data, packed.scale, None, "i4/g8", 20, torch.bfloat16)

    args = (torch.randn(4, 5, 20), torch.tensor([[1, 2, 3]]))
    gm = make_fx(forward, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    names = {"linear", "embedding", "dequantize"}
    assert names <= {target.__name__.split(".")[0] for target in targets if callable(target)}
    for got, expected in zip(gm(*args), forward(*args), strict=True):
        assert torch.equal(got, expected)


def opcheck(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """All of opcheck's tests; its schema test cannot compare float8 tensors."""
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(arg, Tensor) and arg.is_floating_point() and arg.itemsize == 1 for arg in args):
        tests.remove("test_schema")
    torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
@pytest.mark.parametrize(("w_format", "x_format"), [*PAIRS, ("i3/ch", "i8/dyn"), ("bf16", "")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_passes_opcheck(w_format: str, x_format: str, dtype: torch.dtype) -> None:
    packed, bias = weight(w_format), torch.randn(6, dtype=dtype)
    for x in (torch.randn(4, 20, dtype=dtype), torch.randn(2, 3, 20, dtype=dtype, requires_grad=True)):
        args = (x, packed.data, packed.scale, packed.zero, bias, None, None, None, x_format, w_format)
        opcheck(torch.ops.qfx.linear.default, args)


@pytest.mark.parametrize("text", ["i4/g8", "u8/ch", "f32", "f4e2m1/g16/e4m3"])
def test_weight_ops_pass_opcheck(text: str) -> None:
    packed = weight(text)
    stored = (packed.data, packed.scale, packed.zero, text, 20)
    opcheck(torch.ops.qfx.embedding.default, (torch.tensor([1, 3]), *stored, torch.float32))
    opcheck(torch.ops.qfx.dequantize.default, (*stored, torch.float32))


# ---- gradients


@pytest.mark.parametrize("x_format", ["", "i8/tok", "f8e4m3/tok"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_gradient_passes_straight_through(x_format: str, smoothed: bool) -> None:
    packed, x = weight("i4/g8"), torch.randn(2, 3, 20, requires_grad=True)
    bias, smooth = torch.randn(6, requires_grad=True), torch.rand(20) + 0.5
    up = torch.randn(2, 3, 6)
    y = linear(x, packed, x_format, bias=bias, **({"smooth": smooth} if smoothed else {}))
    y.backward(up)
    expected = up @ packed.dequantize() / (smooth if smoothed else 1.0)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(bias.grad, up.sum((0, 1)))


def test_gradient_dtypes() -> None:
    x = torch.randn(3, 20, dtype=torch.bfloat16, requires_grad=True)
    linear(x, weight("i8/ch"), "i8/tok", bias=torch.randn(6, requires_grad=True)).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_no_gradient_where_none_is_asked() -> None:
    assert not linear(torch.randn(3, 20), weight("i8/ch")).requires_grad
    with torch.no_grad():
        assert not linear(torch.randn(3, 20, requires_grad=True), weight("i8/ch")).requires_grad
    with torch.inference_mode():
        assert linear(torch.randn(3, 20), weight("i8/ch"), "i8/tok").is_inference()


def test_wrong_last_dimension_is_refused_while_tracing() -> None:
    packed = weight("i4/g8")
    with pytest.raises(ValueError, match="packed data does not fit format 'i4/g8'"):
        make_fx(lambda x: linear(x, packed), tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(2, 40))
