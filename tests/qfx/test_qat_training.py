"""A prepared model in training: resuming, modes, precision, compilation, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.live.modules import quantized_parts
from qfx.qat import check_loss, quantizers
from tests.qat_nets import DATA, WIDTH, adam, both, ids, net, out, prepared, step


def test_observed_scales_stand_still_in_eval_mode_and_once_they_are_frozen() -> None:
    model = prepared(net(), "w8a16", DATA, scales="observed", freeze_after=2)
    model.up.weight.data.mul_(3)
    quantizer = quantizers(model)["up.fake_quant.weight.parts.0"]
    moves = []
    for training in (False, True, False, True, True, True):
        model.train(training)(ids())
        moves.append(float(quantizer.log_scale.max()))
    assert moves[0] == 0 < moves[1] == moves[2] < moves[3] == moves[4] == moves[5]


def test_recomputed_forwards_of_checkpoints_do_not_observe_twice() -> None:
    from torch.utils.checkpoint import checkpoint

    model = prepared(net(), "w8a16", DATA, scales="observed").train()
    x = torch.randn(3, WIDTH, requires_grad=True)
    checkpoint(model.up, x, use_reentrant=False).sum().backward()
    assert int(quantizers(model)["up.fake_quant.weight.parts.0"].steps) == 1


def test_gradients_of_checkpoints_are_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = prepared(net(), "w4a8", DATA).train()
        run(model, ids()).square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_training_resumed_from_a_state_dict_goes_on_exactly(scales: Any) -> None:
    recipe = both("i8/ch", "u8")
    plan = qfx.plan(net(), recipe, DATA)

    def start() -> tuple[Any, torch.optim.Optimizer]:
        model = prepared(net(), plan, scales=scales)
        return model, adam(model)

    model, optimizer = start()
    losses = [step(model, optimizer, seed) for seed in range(6)]
    model, optimizer = start()
    for seed in range(3):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    model, optimizer = start()
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    assert torch.equal(torch.stack([step(model, optimizer, seed) for seed in range(3, 6)]), torch.stack(losses[3:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_in_float32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    model: Any = net()
    model.up.weight.data.mul_(1e-6)  # scales of 1e-9, zero in half precision
    model = prepared(model, "w8a16", DATA).to(dtype)
    assert model.up.weight.dtype == dtype
    for quantizer in quantizers(model).values():
        assert quantizer.log_scale.dtype == quantizer.initial_scale.dtype == torch.float32
        assert bool((quantizer.qparams().scale > 0).all())
    assert out(model).dtype == dtype


def test_scales_stay_positive_under_any_step() -> None:
    model = prepared(net(), "w8a16", DATA)
    quantizer = quantizers(model)["up.fake_quant.weight.parts.0"]
    for value in (-300.0, -20.0, 20.0):
        quantizer.log_scale.data.fill_(value)
        scale = quantizer.qparams().scale
        assert bool((scale > 0).all() and torch.isfinite(scale).all())


def test_autocast_and_backward_in_bfloat16() -> None:
    model = prepared(net(), "w4a8", DATA).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(ids())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        plain = model(ids())
    assert float((plain - y.detach().float()).norm() / plain.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, on any such function
@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_a_training_step_is_one_graph(scales: Any, fresh_dynamo: None) -> None:
    """Compiled whole, forward and backward, it gives the gradients and moves the averages of the eager one."""
    plan = qfx.plan(net(), both("u4/g16", "u8"), DATA)
    found = []
    for compiled in (False, True):
        model = prepared(net(), plan, scales=scales).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(ids()).square().mean().backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_copy_trains_apart_and_converts() -> None:
    model = prepared(net(), "w4a8", DATA)
    average = copy.deepcopy(model)
    step(model, adam(model))
    assert not torch.equal(out(model), out(average))
    assert torch.allclose(out(qfx.convert(average)), out(qfx.quantize(net(), "w4a8", DATA)), atol=0.05)
    assert not quantized_parts(model)


def test_scales_alone_can_be_trained() -> None:
    model = net()
    model.norm.bias.requires_grad_(False)
    model = prepared(model, "w2a16", DATA, train="scales")
    assert all(p.requires_grad == name.endswith("log_scale") for name, p in model.named_parameters())
    weight = model.up.weight.detach().clone()
    optimizer = adam(model)
    first, last = step(model, optimizer), torch.zeros(())
    for _ in range(20):
        last = step(model, optimizer)
    assert last < first and torch.equal(model.up.weight, weight)
    trained, quantized = out(model), qfx.quantize(net(), "w2a16", DATA)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)
    assert torch.equal(model.get_buffer("up.w_codes"), quantized.get_buffer("up.w_codes"))
    assert model.norm.weight.requires_grad and model.up.bias.requires_grad and not model.norm.bias.requires_grad


@pytest.mark.parametrize("w", ["i4/g16", "u3/g16/f16"])
def test_scales_alone_go_on_where_a_training_of_all_ended(w: str) -> None:
    """The two phases of EfficientQAT, through a checkpoint: its codes stay, and not those of the first scales."""
    first = prepared(net(), both(w, table=w), DATA)
    optimizer = adam(first)
    for seed in range(5):
        step(first, optimizer, seed)
    model = prepared(net(), both(w, table=w), DATA, train="scales")
    model.load_state_dict(first.state_dict())
    assert torch.equal(out(model), out(first))
    optimizer = adam(model)
    step(model, optimizer)
    again = prepared(net(), both(w, table=w), DATA, train="scales")
    again.load_state_dict(model.state_dict())
    trained = out(model)
    assert torch.equal(out(again), trained) and not torch.equal(trained, out(first))
    with pytest.raises(RuntimeError, match="(?s)codes of .*below stay.*train='scales'"):
        prepared(net(), both(w, table=w), DATA).load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)
    qfx.convert(first)
    assert torch.equal(model.get_buffer("up.w_codes"), first.get_buffer("up.w_codes"))


def test_hooks_and_modes_stay() -> None:
    model: Any = net()
    calls: list[int] = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.norm.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    prepared(model, "w8a16", DATA)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert isinstance(model.up, nn.Linear)
    assert model.get_submodule("up.fake_quant").training
    model(ids())
    assert calls


def test_bad_input_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model: Any = net()
    model.up.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="(?s)frozen: up.*train='scales'"):
        prepared(model, "w8a16", DATA)
    assert type(model.up) is nn.Linear and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    prepared(model, "w8a16", DATA, train="scales")
    with pytest.raises(ValueError, match="(?s)prepared for training: 4 parts.*qfx.convert"):
        prepared(model, "w8a16", DATA)
    with pytest.raises(ValueError, match="prepared for training"):
        qfx.quantize(model, "w8a16")
    with pytest.raises(ValueError, match="(?s)nothing that qfx quantized.*qfx.convert"):
        qfx.save(model, tmp_path / "folder")
    qfx.convert(model)
    with pytest.raises(ValueError, match="quantized already"):
        prepared(model, "w8a16", DATA)
    with pytest.raises(ValueError, match="(?s)Net is not prepared.*prepare_qat"):
        qfx.convert(model)
    with pytest.raises(ValueError, match="torch.nn.Module"):
        qfx.convert("model")  # type: ignore[arg-type]


def test_a_frozen_table_is_rounded_and_stays() -> None:
    """As models freeze their positions (Whisper, Marian)."""
    model: Any = net()
    model.table.weight.requires_grad_(False)
    with pytest.warns(qfx.QfxWarning, match="table: its table is frozen: it is rounded and does not learn"):
        prepared(model, "w8a16", DATA)
    before = model.table(ids())
    step(model, adam(model))
    assert model.table.weight.grad is None and model.up.weight.grad is not None
    assert torch.equal(model.table(ids()), before)
    trained = out(model)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)


@pytest.mark.parametrize("w", ["i8/ch", "i8"])
def test_a_table_divides_gradients_by_frequency_as_it_did(w: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(8, 4, scale_grad_by_freq=True))
    index = torch.tensor([[1, 1, 1, 2]])
    model(index).square().sum().backward()
    wanted, model[0].weight.grad = model[0].weight.grad, None
    prepared(model, {"rules": [{"target": "embedding", "w": w}]}, [index])(index).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scales", ["learned", "observed"])
def test_what_is_looked_up_may_change_in_place(scales: Any) -> None:
    """As CTRL and BLIP do with the rows of their embeddings."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x *= 3.0
            y: Tensor = self.out(x)
            return y

    model = qfx.prepare_qat(Scaled(), "w8a16", [torch.arange(6)], scales=scales)
    twin = copy.deepcopy(model)
    model(torch.arange(6)).square().mean().backward()
    twin.forward = lambda ids: twin.out(twin.embed(ids) * 3.0)  # type: ignore[operator]
    twin(torch.arange(6)).square().mean().backward()
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": "learnt"}, "'learned' or 'observed', found 'learnt'"),
        ({"train": "weights"}, "'all' or 'scales'"),
        ({"freeze_after": 3}, "scales='observed'"),
        ({"scales": "observed", "freeze_after": -1}, "0 or more"),
        ({"scales": "observed", "freeze_after": True}, "0 or more"),
        ({"scales": "observed", "train": "scales"}, "nothing to train"),
        ({"roundin": "mse"}, "roundin"),
    ],
)
def test_bad_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(net(), "w8a16", DATA, **fields)


@pytest.mark.parametrize(("w", "x", "other"), [("i4/g16", "none", "i3/g16"), ("i8/ch", "i8", "f8e4m3/ch")])
def test_scales_of_another_format_are_not_loaded(w: str, x: str, other: str) -> None:
    """Names and shapes are the same, but a scale is of steps of another size."""
    trained = prepared(net(), both(w, x), DATA)
    step(trained, adam(trained))
    state = trained.state_dict()
    model = prepared(net(), both(other, x), DATA)
    message = "(?s)another format in up.fake_quant.weight.parts.0.initial_scale.*found: codes up to.*recipe or plan"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=False)
    model.load_state_dict(prepared(net(), both(other, x), DATA).state_dict())
    model = prepared(net(), both(w, x), DATA)
    model.load_state_dict({name: t for name, t in state.items() if not name.endswith(".most")})  # of before
    assert torch.equal(out(model), out(trained))


@pytest.mark.parametrize("train", ["all", "scales"])
def test_an_optimizer_that_was_made_before_the_scales_is_told(train: Any) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model = prepared(model, "w4a16", DATA, train=train)
    step(model, optimizer)
    with pytest.warns(qfx.QfxWarning, match="(?s)no step has moved any.*optimizer.*after qfx.prepare_qat"):
        qfx.convert(model)


def test_inference_mode_is_told() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="(?s)inference_mode.. cannot train.*outside"):
        prepared(net(), "w4a16", DATA)


def test_a_recipe_that_names_nothing() -> None:
    with pytest.raises(ValueError, match="(?s)gives no format to anything.*nowhere.*qfx.presets"):
        prepared(net(), {"rules": [{"target": "*.nowhere", "w": "i8/ch"}]}, DATA)


def test_a_wrapped_or_partial_model_names_what_to_convert() -> None:
    model = prepared(net(), "w8a16", DATA)
    with pytest.raises(ValueError, match=r"(?s)inside Sequential, under '0'.*convert\(model.0\)"):
        qfx.convert(nn.Sequential(model))
    with pytest.raises(ValueError, match="FakeLinear is a part of a prepared model"):
        qfx.convert(model.up)


def test_an_observed_scale_that_became_nan_is_named() -> None:
    model = prepared(net(), both("u4/g16", "u8"), DATA, scales="observed")
    quantizers(model)["up.fake_quant.inputs"].log_scale.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"(?s)'up.fake_quant.inputs.log_scale' holds NaN.*checkpoint"):
        qfx.convert(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_overflows_leaves_nothing_in_observed_ranges(value: float) -> None:
    """Such a step is skipped, by torch.amp.GradScaler or by the loop."""
    model = prepared(net(), both("u4/g16", "u8"), DATA, scales="observed")
    before: Any = copy.deepcopy(quantizers(model)["up.fake_quant.inputs"])
    handle = model.norm.register_forward_hook(lambda *given: given[-1] * value)
    model.train()(ids())
    handle.remove()
    inputs: Any = quantizers(model)["up.fake_quant.inputs"]
    assert torch.equal(inputs.low, before.low) and torch.equal(inputs.high, before.high)
    assert bool(model(ids()).isfinite().all()) and not torch.equal(inputs.high, before.high)


@pytest.mark.parametrize("x", ["none", "i8/tok", "u8"])
def test_gradients_of_single_samples_and_ensembles_by_vmap(x: str) -> None:
    model = prepared(
        nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)), both("i4/g4", x), [torch.randn(5, 16)]
    )
    state, batch = dict(model.named_parameters()), torch.randn(3, 1, 16)

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, state, (x,))
        return found.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, batch)
    for i, one in enumerate(batch):
        for name, grad in torch.func.grad(loss)(state, one).items():
            assert torch.allclose(each[name][i], grad, atol=1e-4), name
    models = [model, copy.deepcopy(model)]
    models[1][0].weight.data.mul_(2)
    both_states = torch.func.stack_module_state(models)
    found = torch.func.vmap(lambda *s: torch.func.functional_call(model, s, (batch[0],)))(*both_states)
    assert all(torch.allclose(y, one(batch[0]), atol=1e-5) for y, one in zip(found, models, strict=True))


def test_a_weight_that_became_a_parametrization_is_told() -> None:
    model = prepared(net().eval(), "w4a16", DATA)
    torch.nn.utils.parametrizations.weight_norm(model.up)
    step(model, adam(model))
    trained = out(model)
    for take in (qfx.convert, qfx.QATSchedule):
        with pytest.raises(
            ValueError, match="(?s)'weight' of a prepared module is computed.*node: up.*remove_parametriz"
        ):
            take(model)
    torch.nn.utils.parametrize.remove_parametrizations(model.up, "weight")
    assert torch.allclose(out(model), trained, atol=1e-5)
    assert torch.allclose(out(qfx.convert(model)), trained, atol=1e-5)


def test_what_became_nan_is_named() -> None:
    model = prepared(net(), "w8a16", DATA)
    quantizers(model)["up.fake_quant.weight.parts.0"].log_scale.data[3] = torch.nan
    loss = model(ids()).sum()
    with pytest.raises(ValueError, match=r"(?s)loss of step 7 is nan.*'up.fake_quant.weight.parts.0.log_scale'.*rate"):
        check_loss(loss, 7, model)
    with pytest.raises(ValueError, match=r"(?s)'up.fake_quant.weight.parts.0.log_scale' holds NaN.*checkpoint"):
        qfx.convert(model)
    assert not quantized_parts(model), "nothing is changed"
    check_loss(torch.ones(()), 1, model)
    with pytest.raises(ValueError, match="(?s)step 2 is inf.*all parameters are finite"):
        check_loss(torch.tensor(torch.inf), 2, net())


def test_learning_in_float16_is_told_before_it_ends_in_nan() -> None:
    with pytest.warns(qfx.QfxWarning, match="8 parameters learn in float16.*NaN follows(.|\n)*model.float") as told:
        model = prepared(net().half(), "w8a16", DATA)
    assert len(told) == 1
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids()).float().square().mean().backward()
        optimizer.step()
    assert not all(bool(torch.isfinite(p).all()) for p in model.parameters()), "what was told is so"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_learn_without_a_warning(dtype: torch.dtype) -> None:
    prepared(net().to(dtype), "w8a16", DATA)


def test_scales_alone_learn_in_float32_beside_weights_in_float16() -> None:
    prepared(net().half(), "w8a16", DATA, train="scales")
