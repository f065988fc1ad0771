"""prepare, train, convert: begins as what qfx.quantize gives, and ends as what was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends.qat import InputQuantizer, WeightQuantizer
from qfx.layouts import ALSO
from qfx.live.modules import quantized_parts
from qfx.qat import quantizers
from tests.qat_nets import DATA, adam, both, ids, net, out, prepared, step

RECIPES: dict[str, Any] = {
    **{w: both(w) for w in (
        "i2/g8", "i3/ch", "i4/g16/f16", "i8", "u2/g8", "u3/ch", "u4/g24", "u8/b4x8", "nf4/g16", "f8e4m3/ch",
        "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "nf4/g16/dq",
    )},
    "bf16": both("bf16", table="bf16"),
    "i8/tok": both("i4/ch", "i8/tok"),
    "u8/tok": both("u4/g16", "u8/tok", "u4/g8"),
    "i4/g8/dyn": both("i4/g16", "i4/g8/dyn"),
    "fp8": both("f8e4m3/ch", "f8e4m3/tok"),
    "bf16 input": both("i4/g16", "bf16"),
    "static": both("i8/ch", "u8"),
    "static i8": both("i8/ch", "i8"),
    "mse": both("i4/g16", rounding="mse"),
    "hqq": both("u3/g16", rounding="hqq"),
    "gptq": both("u3/g16", rounding="gptq"),
    "gptq nf4": both("nf4/g16", rounding="gptq"),
    "learned": both("u2/g16", rounding="learned", learned={"steps": 4}),
    "smooth": both("i8/ch", "u8", rewrites=("smooth",)),
    "low rank": both("u2/g16", low_rank=2),
    "heads": {"rules": [{"target": "up", "x": "i8/tok", "w": ["i8/ch", "u2/g16", "i8/ch", "i4/g8"]}]},
    "columns": {"rules": [{"target": "down", "x": "u8", "w": ["i8/ch", "i4/g8", "i8/ch"], "along": "columns"}]},
    "columns by token": {"rules": [{"target": "down", "x": "i8/tok", "w": ["i4/ch", "i8/ch"], "along": "columns"}]},
    "outliers": both("i8/ch", "i8/tok", outliers=2.0),
}  # fmt: skip


def near(found: Tensor, wanted: Tensor, recipe: Any, most: float = 2e-2) -> None:
    """Equal where weights alone are rounded; with inputs, a last bit of a sum may move an input by one code."""
    rounds_inputs = any(rule.x not in (None, "none") for rule in qfx.Recipe.parse(recipe).rules)
    if rounds_inputs:
        assert float((found - wanted).norm() / wanted.norm()) < most
    else:
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


FAST = ("i4/g16/f16", "u2/g8", "nf4/g16", "static", "columns by token", "gptq")  # the others are slow together
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_training_begins_at_what_quantize_gives_and_ends_at_what_convert_gives(name: str) -> None:
    recipe = RECIPES[name]
    plan = qfx.plan(net(), recipe, DATA)
    model = prepared(net(), plan)
    near(out(model), out(qfx.quantize(net(), plan)), recipe)
    optimizer, before = adam(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        step(model, optimizer)
    assert all(p.grad is not None for p in model.parameters()), "everything learns"
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any("log_scale" in n for n in moved) != (name == "bf16")
    trained = out(model)
    weights = {n: m.fake_quant.weight(m.weight) for n, m in model.named_modules() if hasattr(m, "fake_quant")}
    converted = qfx.convert(model)
    assert converted is model and quantized_parts(model) and not any("fake" in n for n in model.state_dict())
    near(out(converted), trained, recipe)
    assert weights
    if name not in ("smooth", "low rank"):
        for fqn, wanted in weights.items():
            packed: Any = model.get_submodule(fqn)
            assert torch.equal(packed.weight, wanted), f"{fqn}: not bit for bit"
    assert float((trained - out(qfx.quantize(net(), plan))).abs().max()) > 1e-3, "training changed it"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i4/g16/f16", "u2/g8", "static", "f8e4m3/ch", "heads"])
def test_observed_scales_are_buffers_that_follow_the_ranges(name: str) -> None:
    recipe = RECIPES[name]
    model = prepared(net(), recipe, DATA, scales="observed")
    assert not any("fake_quant" in n for n, _ in model.named_parameters())
    first = {n: q.qparams().scale.clone() for n, q in quantizers(model).items()}
    with torch.no_grad():
        model.up.weight.mul_(2)
    with torch.no_grad():
        for _ in range(80):
            model.train()(ids())
    for fqn, quantizer in quantizers(model).items():
        if isinstance(quantizer, WeightQuantizer):
            grown = 2.0 if fqn.startswith("up.") else 1.0
            wanted = first[fqn].float() * grown
            assert torch.allclose(quantizer.qparams().scale.float(), wanted, rtol=2e-3), fqn
    trained = out(model)
    near(out(qfx.convert(model)), trained, recipe)


def test_observed_input_ranges_are_those_of_the_data() -> None:
    model = prepared(net(), RECIPES["static"], DATA, scales="observed")
    seen: list[Tensor] = []
    model.up.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    quantizer = quantizers(model)["up.fake_quant.inputs"]
    assert isinstance(quantizer, InputQuantizer)
    quantizer.decay = 0.5
    with torch.no_grad():
        for _ in range(30):
            model.train()(ids(1))
    scale, zero = quantizer.qparams()
    span = float(seen[-1].max() - seen[-1].min())
    assert float(scale) == pytest.approx(span / 255, rel=1e-3)
    assert zero is not None and int(zero) == round(-float(seen[-1].min()) / float(scale))


def test_tied_weights_have_one_quantizer_and_are_stored_once() -> None:
    recipe = {"rules": [{"target": "linear", "w": "u4/g16"}, {"target": "tied", "w": "u4/g16"}]}
    model = prepared(net(tied=True), recipe, DATA)
    assert model.head.weight is model.table.weight
    fakes = [model.get_submodule(n).fake_quant.weight for n in ("table", "head")]
    assert fakes[0] is fakes[1]
    assert sum("log_scale" in n for n in model.state_dict()) == 3
    copied = copy.deepcopy(model)
    assert copied.table.fake_quant.weight is copied.head.fake_quant.weight is not fakes[0]
    optimizer = adam(model)
    for _ in range(2):
        step(model, optimizer)
    trained = out(model)
    qfx.convert(model)
    assert model.head.w_codes is model.table.w_codes
    assert torch.allclose(out(model), trained, atol=1e-5)


def test_a_tied_weight_of_two_formats_trains_with_both() -> None:
    recipe = {"rules": [{"target": "linear", "w": "u4/g16"}, {"target": "embedding", "w": "i8/ch"}]}
    with pytest.warns(qfx.QfxWarning, match="stored twice"):
        model = prepared(net(tied=True), recipe, DATA, strict=False)
    step(model, adam(model))
    trained = out(model)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them:qfx.QfxWarning")
def test_what_is_converted_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model = prepared(net(), both("u4/g16"), DATA)
    step(model, adam(model))
    trained = out(model)
    qfx.convert(model)
    qfx.save(model, tmp_path / "saved")
    assert torch.equal(out(qfx.load(tmp_path / "saved", net())), out(model))
    qfx.export_onnx(model, (ids(9),), tmp_path / "m.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids(9).numpy()})
    assert float((torch.from_numpy(found) - trained).norm() / trained.norm()) < 1e-2
    assert {row.asked for row in qfx.report(model) if row.op == "linear"} == {"w=u4/g16"}


class Attention(nn.Module):
    """Weights that other forwards read: of nn.MultiheadAttention, in an encoder layer with a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_weights_that_other_forwards_read() -> None:
    torch.manual_seed(0)
    recipe, x = both("i4/g8"), torch.randn(2, 5, 16)
    model: Any = Attention()
    plan = qfx.plan(copy.deepcopy(model).eval(), recipe, [x])
    quantized = qfx.quantize(copy.deepcopy(model).eval(), plan)
    model = prepared(model.eval(), plan)
    with torch.no_grad():
        assert torch.allclose(model(x), quantized(x), atol=1e-5)
    optimizer = adam(model)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "weight" in n)
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert torch.allclose(qfx.convert(model)(x), trained, atol=1e-5)


class Sum(nn.Module):
    """A product with a matrix that it is given."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.table = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.table


class Twins(nn.Module):
    """One parameter in two modules with forwards of their own, or in a linear and in one of these."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 16, bias=False)
        self.first: nn.Module = self.up if linear else Sum(nn.Parameter(torch.randn(16, 16) / 4))
        self.second = Sum(self.up.weight if linear else self.first.table)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.up(self.first(x)))
        return found


@pytest.mark.parametrize("train", ["all", "scales"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("w", ["i4/g8", "i8/ch"])
def test_a_parameter_of_two_forwards_is_rounded_in_both(w: str, linear: bool, train: Any) -> None:
    """SAM's positions: what the plan names once is packed in both."""
    x = torch.randn(5, 16)
    model: Any = prepared(Twins(linear).eval(), both(w), [x], train=train)
    quantized = qfx.quantize(Twins(linear).eval(), both(w), [x])
    with torch.no_grad():
        assert torch.allclose(model(x), quantized(x), atol=1e-5)
    copied = copy.deepcopy(model)
    optimizer = adam(model)
    model.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert not torch.allclose(trained, copied(x), atol=1e-5), "the copy has quantizers of its own"
        assert torch.allclose(copied(x), quantized(x), atol=1e-5)
        scales = {t.data_ptr() for name, t in model.state_dict().items() if "log_scale" in name}
        assert len(scales) == (1 if linear else 2)
        assert torch.allclose(qfx.convert(model)(x), trained, atol=1e-5)
        assert torch.allclose(qfx.convert(copied)(x), quantized(x), atol=1e-5)


class Tied(nn.Module):
    """A head with the weight of a table, whose rows a forward of another module takes as `read` says."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.places, self.head = read, nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.places.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(x) + self.read(self.places, torch.arange(x.shape[0])))
        return found


@pytest.mark.parametrize(
    "read",
    [
        lambda table, index: table(index),
        lambda table, index: table.weight[index],
        lambda table, index: table.weight[: len(index)],
        lambda table, index: table.weight[index - 3],
    ],
    ids=["embedding", "index", "slice", "from the end"],
)
def test_a_table_that_a_head_shares_is_rounded_however_it_is_read(read: Any) -> None:
    x, w = torch.randn(5, 16), "i8/ch"
    quantized = qfx.quantize(Tied(read).eval(), both(w), [x])
    model: Any = prepared(Tied(read).eval(), both(w), [x])
    with torch.no_grad():
        assert torch.allclose(model(x), quantized(x), atol=1e-5)
    optimizer = adam(model)
    model.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert not torch.allclose(trained, quantized(x), atol=1e-3)
        assert torch.allclose(qfx.convert(model)(x), trained, atol=1e-5)


ALIKE = {"rules": [{"target": kind, "w": "i4/g8"} for kind in ("linear", "embedding", "tied")]}


class Read(nn.Module):
    """A table, a convolution and a linear, whose weights `read` gives to another forward, too."""

    def __init__(self, read: Any, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.table, self.patch = read, nn.Embedding(12, 16), nn.Conv2d(1, 16, 4, stride=4)
        self.lin, self.head = nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.lin(self.table(ids))
        x = x + self.patch(x.reshape(-1, 1, 4, 4)).reshape(x.shape)
        y: Tensor = self.head(x) * torch.tanh(self.read(self, x))
        return y


READINGS = {
    "output": lambda net, x: x @ net.table.weight.t(),
    "normed": lambda net, x: x @ nn.functional.normalize(net.table.weight, dim=-1).t(),
    "twice": lambda net, x: nn.functional.linear(x, net.lin.weight) @ net.table.weight.t(),
    "turned": lambda net, x: (x @ net.lin.weight)[..., :12],
    "kernel": lambda net, x: (x @ net.patch.weight.flatten(1))[..., :12],
    "head": lambda net, x: net.head.weight.sum(1),
}


@pytest.mark.filterwarnings("ignore:.*the other way round than it is stored", "ignore:.*not corrected")
@pytest.mark.parametrize("fields", [{}, {"low_rank": 2}, {"tied": True}], ids=str)
@pytest.mark.parametrize("name", READINGS)
def test_a_weight_that_another_forward_reads_too_is_rounded_there_too(name: str, fields: dict[str, Any]) -> None:
    low, batch = {k: v for k, v in fields.items() if k == "low_rank"}, torch.tensor([[1, 5, 3]])
    made = {"tied": fields.get("tied", False)}
    plan = qfx.plan(Read(READINGS[name], **made).eval(), ALIKE, [batch], **low)
    assert any(layout.endswith(ALSO) for layout in plan.layouts.values())
    quantized = qfx.quantize(Read(READINGS[name], **made).eval(), plan)
    model: Any = prepared(Read(READINGS[name], **made).eval(), plan)
    with torch.no_grad():
        assert torch.allclose(model(batch), quantized(batch), atol=1e-5)
    optimizer = adam(model)
    model.train()(batch).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(batch)
        assert not torch.allclose(trained, quantized(batch), atol=1e-3)
        assert torch.allclose(copy.deepcopy(model)(batch), trained)
        assert torch.allclose(qfx.convert(model)(batch), trained, atol=1e-5)


def test_a_weight_that_its_own_forward_alone_reads_is_the_parameter() -> None:
    model: Any = prepared(net(tied=True).eval(), ALIKE, DATA)
    assert all(isinstance(model.get_submodule(n).weight, nn.Parameter) for n in ("table", "up", "down", "head"))


def test_a_shared_parameter_that_one_name_leaves_in_float_is_told() -> None:
    x = torch.randn(5, 16)
    with pytest.warns(qfx.QfxWarning, match="second: its weight is first.table too, which the recipe leaves in float"):
        model: Any = qfx.quantize(Twins(linear=False).eval(), both("i8/ch"), [x], ignore=["first*"])
    assert quantized_parts(model) == ["up"] and model.second.table is model.first.table


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.wide = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(self.patch(x).flatten(2))
        return y


@pytest.mark.parametrize(
    "x_format", ["none", pytest.param("i8/tok", marks=pytest.mark.slow), pytest.param("u8", marks=pytest.mark.slow)]
)
def test_convolutions(x_format: str) -> None:
    torch.manual_seed(0)
    recipe = {"rules": [{"target": "linear", "x": x_format, "w": "i8/ch"}]}
    model: Any = Patches().eval()
    x = torch.randn(2, 3, 8, 12)
    data = [(x,)]
    plan = qfx.plan(model, recipe, data)
    quantized = qfx.quantize(copy.deepcopy(model), plan)
    model = prepared(model, plan)
    with torch.no_grad():
        assert torch.allclose(model(x), quantized(x), atol=0.03)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    adam(model).step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert torch.allclose(qfx.convert(model)(x), trained, atol=0.03)


def test_a_bare_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    model = prepared(nn.Linear(16, 8), both("i4/ch"), [x])
    with torch.no_grad():
        wanted = model.eval()(x)
        assert torch.equal(qfx.convert(model)(x), wanted)
