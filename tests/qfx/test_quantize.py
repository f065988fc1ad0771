"""qfx.plan and qfx.quantize as their users meet them. Architectures: test_quantize_zoo; refusals: test_bad_input."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Plan, QfxWarning, Recipe, Rule, UnsupportedError
from qfx.live.modules import QuantEmbedding, QuantLinear
from qfx.measuring.measure import sqnr_db
from tests.quantized import call, quantized
from tests.zoo import VOCAB, ZOO, ids

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "quantize_cost.py"


class Net(nn.Module):
    """A table, three linears, dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.drop = nn.Embedding(20, 16), nn.Dropout(0.5)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> [batch, length, 5]."""
        x = self.table(ids)
        found: Tensor = self.head(x + self.down(torch.relu(self.up(self.drop(x)))))
        return found


IDS = torch.arange(20).reshape(4, 5)
DATA = [IDS, IDS.flip(0), IDS.flip(1)]


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS)
    return found


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize(
    "recipe", ["w8a8", "w8a8-static", "w8a8-smooth", "w8a16", "w4a16", "w4a8", "fp8", "nf4", "mixed"]
)
def test_presets(recipe: str) -> None:
    model = Net().eval()
    wanted = out(model)
    found = qfx.quantize(model, recipe, DATA)
    assert found is model and sqnr_db(wanted, out(found)) > (25 if "8" in recipe[:2] else 15)
    assert all(isinstance(m, QuantLinear) for m in (model.up, model.down, model.head))
    assert isinstance(model.table, QuantEmbedding) == (recipe != "mixed")
    report = qfx.report(model)
    assert {row.node for row in report.rows if row.quantized} >= {"up", "down", "head"}


def test_planning_changes_nothing_and_uses_up_no_random_numbers() -> None:
    model = Net().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    plan = qfx.plan(model, "w8a8-smooth", DATA, progress=False, smooth_alpha=0.5)
    assert same_state(model, before) and all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert plan.annotations["up"] == {"x": "u8", "w": "i8/ch"} and plan.layouts["up"] == "linear"
    assert plan.tensors["up/x_scale"].shape == () and plan.tensors["up/x_zero"].dtype == torch.uint8
    assert plan.recipe.name == "w8a8-smooth" and plan.notes == []


def test_a_plan_is_used_again_and_from_a_file(tmp_path: Path) -> None:
    plan = qfx.plan(Net().eval(), "w8a8-smooth", DATA, progress=False)
    first, second = qfx.quantize(Net().eval(), plan), None
    plan.save(tmp_path)
    second = qfx.quantize(Net().eval(), Plan.load(tmp_path))
    assert torch.equal(out(first), out(second))
    assert torch.equal(out(first), out(qfx.quantize(Net().eval(), "w8a8-smooth", DATA)))
    assert first.up.sqnr_db == second.up.sqnr_db == plan.sensitivities["sqnr_db"]["up"]  # type: ignore[union-attr]


def test_another_models_plan_is_told() -> None:
    plan = qfx.plan(Net().eval(), "w8a8", DATA)
    with pytest.warns(QfxWarning, match="made for another model"):
        model = qfx.quantize(Net(seed=1).eval(), plan)
    assert sqnr_db(out(Net(seed=1).eval()), out(model)) > 25


def test_overrides_change_the_recipe() -> None:
    model: Any = qfx.quantize(Net().eval(), "w8a8", DATA, ignore=("up", "embedding"), rounding="mse")
    assert type(model.up) is nn.Linear and type(model.table) is nn.Embedding and isinstance(model.down, QuantLinear)
    rules = (*Recipe.parse("w8a8").rules, Rule(target="head", x="none", w="f16"))
    model = qfx.quantize(Net().eval(), Recipe(name="own", rules=rules), DATA)
    assert (model.head.w_format, model.head.x_format, model.up.w_format) == ("f16", "", "i8/ch")


def test_targets_that_match_nothing_are_told_but_not_those_of_presets() -> None:
    rules = (*Recipe.parse("mixed").rules, Rule(target="encoder.*", w="none"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = qfx.plan(Net().eval(), Recipe(name="own", rules=rules), DATA)
    told = [str(w.message) for w in caught if w.category is QfxWarning]
    assert len(told) == 1 and told[0].startswith("'encoder.*': this target of the recipe matches no node")
    assert plan.notes == told


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", "w4a16"])
def test_the_error_of_every_node_is_measured_where_there_is_data(recipe: str) -> None:
    model: Any = Net().eval()
    plan = qfx.plan(model, recipe, DATA, progress=False)
    measured = plan.sensitivities["sqnr_db"]
    assert list(measured) == ["table", "up", "down", "head"]
    assert all(10 < value < 80 for value in measured.values()) and measured["down"] < measured["table"]
    twin = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}
    hooks = [getattr(twin, n).register_forward_hook(lambda *a, n=n: seen.update({n: a[2]})) for n in measured]
    out(twin)
    wanted = dict(seen)
    qfx.quantize(model, plan)
    for hook in hooks:
        hook.remove()
    hooks = [getattr(model, n).register_forward_hook(lambda *a, n=n: seen.update({n: a[2]})) for n in measured]
    out(model)
    for name, value in measured.items():
        assert sqnr_db(wanted[name], seen[name]) == pytest.approx(value, abs=0.01)
        assert getattr(model, name).sqnr_db == value
    rows = {row.node: row.sqnr_db for row in qfx.report(model).rows}
    assert rows["down"] == measured["down"]
    assert "sqnr_db" not in qfx.plan(ZOO["gpt2"]()[0], "w8a8").sensitivities, "no data, no error"


def test_a_node_without_error_is_json_able(tmp_path: Path) -> None:
    recipe = Recipe(name="exact", rules=(Rule(target="linear", w="f32"),))
    plan = qfx.plan(Net().eval(), recipe, DATA)
    assert set(plan.sensitivities["sqnr_db"].values()) == {200.0}
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


def test_data_of_all_kinds() -> None:
    expected = out(qfx.quantize(Net().eval(), "w8a8-static", DATA))
    loader = torch.utils.data.DataLoader(torch.cat(DATA), batch_size=4)  # type: ignore[arg-type, var-annotated]
    for data in ([(d,) for d in DATA], [{"ids": d} for d in DATA], (d for d in DATA), loader):
        assert torch.equal(out(qfx.quantize(Net().eval(), "w8a8-static", data)), expected)


def test_batches_of_other_sizes_and_of_one() -> None:
    for data in ([IDS[:1], IDS, IDS[:3, :2]], [IDS[:1, :3], IDS[:1, :5]]):
        found = qfx.quantize(Net().eval(), "w8a8-static", data)
        assert sqnr_db(out(Net().eval()), out(found)) > 20


def test_modes_come_back() -> None:
    model = Net().train()
    model.up.eval()
    found = qfx.quantize(model, "w8a8", DATA)
    assert found.training and found.get_submodule("down").training and not found.get_submodule("up").training
    assert torch.equal(out(found.eval()), out(qfx.quantize(Net().eval(), "w8a8", DATA))), "dropout was off meanwhile"


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5"))])
def test_generation_goes_on(name: str) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model: Any = ZOO[name]()[0]
    wanted = model.generate(ids(), **settings)
    found: Any = quantized(name).model
    got = found.generate(ids(), **settings)
    assert got.shape == wanted.shape
    if name != "t5":  # whose weights are other ones here
        assert float((got == wanted).double().mean()) > 0.6
    assert torch.equal(found.generate(ids(), **settings, use_cache=False), got)
    beams = found.generate(ids(), **settings, num_beams=2)
    assert beams.shape == wanted.shape


def test_a_quantized_model_trains_what_is_left_in_float() -> None:
    model: Any = qfx.quantize(Net().train(), "w8a8", DATA, ignore=("head",))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    before, codes = model.head.weight.detach().clone(), model.up.w_codes.clone()
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before) and torch.equal(model.up.w_codes, codes)


def test_states_are_plain_tensors() -> None:
    model = qfx.quantize(Net().eval(), "w8a8-static", DATA)
    state = model.state_dict()
    assert {"up.w_codes", "up.w_scale", "up.bias", "up.x_scale", "up.x_zero", "table.w_codes"} <= set(state)
    other = qfx.quantize(Net(seed=1).eval(), "w8a8-static", DATA)
    assert not torch.equal(out(other), out(model))
    other.load_state_dict(state)
    assert torch.equal(out(other), out(model))
    lost = {n: t for n, t in state.items() if n != "up.w_scale"}
    with pytest.raises(RuntimeError, match=r"up\.w_scale"):
        other.load_state_dict(lost)


def test_strict_refuses_what_modules_cannot_do_before_anything_changes() -> None:
    model, _ = ZOO["mixtral"]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="weight-only, not x=i8/tok"):
        qfx.quantize(model, strict=True)
    assert same_state(model, before)


def test_a_warning_that_is_an_error_comes_before_anything_changes() -> None:
    model, _ = ZOO["mixtral"]()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(QfxWarning, match="weight-only, not x=i8/tok"):
            qfx.quantize(model)
    assert same_state(model, before)


def test_the_live_model_and_the_graph_agree() -> None:
    torch._dynamo.reset()
    model, inputs = ZOO["gpt2"]()
    compiled = call(torch.compile(copy.deepcopy(model), backend="qfx", options={"backend": "reference"}), inputs)
    live = call(quantized("gpt2").model, inputs)
    assert sqnr_db(compiled[0], live[0]) > 100
    torch._dynamo.reset()


@pytest.mark.slow
def test_memory_beside_the_model_is_that_of_a_layer(tmp_path: Path) -> None:
    sizes = ["--layers", "4", "--hidden", "512", "--vocabulary", "96000"]
    command = [sys.executable, str(BENCHMARK), "--only", "memory", *sizes, "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, timeout=300)
    import json

    found = json.loads((tmp_path / "out.json").read_text())["memory"]
    assert found["grown"] <= 1.5 * found["largest"], found
    assert found["quantized"] < 0.27 * found["model"]


@pytest.mark.slow
def test_the_passes_take_linear_time(tmp_path: Path) -> None:
    import json

    command = [sys.executable, str(BENCHMARK), "--only", "time", "--json", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, timeout=500)
    rows = json.loads((tmp_path / "out.json").read_text())["time"]
    rates = [(row["normalize"] + row["quantize"]) / row["nodes"] for row in rows]
    assert max(rates) < 3 * min(rates) and max(rates) < 4e-3, rates  # seconds per node, on a busy machine


@pytest.mark.parametrize("recipe", ["w8a8-static", pytest.param("w4a16-gptq", marks=pytest.mark.slow)])
def test_batches_in_order_are_those_by_name(recipe: str) -> None:
    """A decoder's cache is left out of its graph in both, and padding counts in neither."""
    tokens = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    states = []
    for batches in (
        [(tokens, mask)],
        [{"input_ids": tokens, "attention_mask": mask}],
        [{"input_ids": tokens}],
        [tokens],
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*GPTQ saw fewer tokens|.*and padded|.*cannot be smoothed")
            states.append(qfx.quantize(ZOO["llama"]()[0], recipe, batches).state_dict())
    for one, other in (states[:2], states[2:]):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0]), "the mask is seen"


def test_what_torch_export_made_is_quantized_and_written(tmp_path: Path) -> None:
    """It refuses eval(), and each of its modules says that it is in train() mode."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).eval(), torch.randn(3, 8)
    made = torch.export.export(model, (x,)).module()
    with pytest.warns(qfx.QfxWarning, match=r"dimension 0 of 'input' \(3\), which is fixed"):  # as it was exported
        assert len(qfx.export_onnx(made, x, tmp_path / "m.onnx", recipe="w8a8").formats) == 2
    live = qfx.quantize(made, "w8a16", [x])
    assert all(module.training for module in live.modules()), "as it was"
    assert sum(tensor.dtype == torch.int8 for tensor in live.state_dict().values()) == 2
    assert 30 < sqnr_db(model(x), live(x)) < 90


@torch.no_grad()
def test_a_module_under_several_names_has_one_scale_for_all_that_it_reads() -> None:
    class Twice(nn.Module):
        """The second call reads values that are 20 times as large."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
            self.layers[1] = self.layers[0]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layers[0](x), self.layers[1](20 * x)

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 16)
    wanted = model(x)
    made = qfx.plan(model, "w8a8-static", [x])
    assert torch.equal(made.tensors["layers.0/x_scale"], made.tensors["layers.1/x_scale"])
    found = [sqnr_db(a, b) for a, b in zip(wanted, qfx.quantize(model, made)(x), strict=True)]
    told = made.sensitivities["sqnr_db"]
    assert found == pytest.approx([told["layers.0"], told["layers.1"]], abs=0.5)
    assert found[1] > 35 and found[0] < 25, "what is large is not clipped, what is small has few steps"
