"""Rounding block by block, from the recipe to the plan; interrupted and taken up again."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import Note, QfxWarning
from qfx.measuring.measure import sqnr_db
from qfx.packing import pack_weight
from qfx.rounding import rounded
from qfx.rounding.blocks import Block
from qfx.rounding.sequential import TOLD, round_weights
from tests.stack import Stack, annotated, batches
from tests.zoo import ZOO

LINEARS: list[dict[str, Any]] = [{"target": "linear", "w": "u3/g8"}]


@dataclass
class Nearest:
    """A method that rounds to nearest and notes what it is given."""

    needs_float: bool = False
    reads_all: bool = False
    blocks: list[str] = field(default_factory=list)

    def round(self, block: Block) -> list[Note]:
        self.blocks.append(block.name)
        for site in block.sites:
            seen = list(block.inputs_of(site))
            assert all((wanted is not None) == self.needs_float for _, wanted in seen)
            for part in (part for linear in site.linears for part in linear.parts):
                block.put(part, pack_weight(block.weight(part), part.format, name=part.name), {"seen": len(seen)})
        return [Note(block.name, "was here", "nothing", minor=True)]


def recipe(rules: list[dict[str, Any]] = LINEARS, **fields: Any) -> dict[str, Any]:
    return {"rules": rules, "rounding": "gptq", **fields}


def quietly(model: nn.Module, *arguments: Any, **fields: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.quantize(model, *arguments, **fields)


@pytest.mark.parametrize("needs_float", [False, True])
def test_every_block_in_order(needs_float: bool) -> None:
    gm, plan, flat = annotated(Stack(), LINEARS, batches(), rounding="gptq")
    method = Nearest(needs_float)
    notes = round_weights(gm, plan, flat, method=method, progress=False)
    assert method.blocks == ["embed", "layers.0", "layers.1", "head"]
    assert [note.node for note in notes] == method.blocks
    names = [f"layers.{i}.{leaf}" for i in (0, 1) for leaf in ("gate", "up", "down")] + ["head"]
    assert list(plan.sensitivities[TOLD]) == names
    assert {key.rpartition("/")[0] for key in plan.tensors} == set(names)
    assert plan.sensitivities[TOLD]["head"] == {"seen": 3}


def test_what_is_behind_the_last_weight_is_not_run() -> None:
    rules = [{"target": "layers.0.*", "w": "i4/ch"}]
    gm, plan, flat = annotated(Stack(), rules, batches(), rounding="gptq")
    method = Nearest()
    round_weights(gm, plan, flat, method=method, progress=False)
    assert method.blocks == ["embed", "layers.0"]


def test_gptq_is_nearer_than_nearest() -> None:
    data, model = batches(12), Stack()
    with torch.no_grad():
        wanted = torch.cat([model(ids) for ids in data])
        found = {}
        for rounding in ("rtn", "gptq"):
            made = qfx.quantize(Stack(), recipe(rounding=rounding), data)
            found[rounding] = sqnr_db(wanted, torch.cat([made(ids) for ids in data]))
    assert found["gptq"] > found["rtn"] + 1.0, found


class Again(nn.Module):
    """A layer that is called twice, and reads other channels the second time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.energy = nn.Buffer(torch.logspace(-1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(torch.tanh(self.fc(x)) * self.energy))
        return out


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_layer_called_twice_is_rounded_by_all_that_it_reads(asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(32, 32, generator=generator) * torch.logspace(1, -1, 32) for _ in range(8)]
    with torch.no_grad():
        wanted, found = torch.cat([Again()(x) for x in data]), {}
        for rounding in ("rtn", "gptq"):
            fields = {"gptq": {"asymmetric": True}} if asymmetric and rounding == "gptq" else {}
            made = qfx.quantize(
                Again(), recipe([{"target": "linear", "w": "i4/g8"}], rounding=rounding, **fields), data
            )
            found[rounding] = sqnr_db(wanted, torch.cat([made(x) for x in data]))
    assert found["gptq"] > found["rtn"] + 0.5, found


@pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")  # three bits run in float
def test_the_plan_tells_and_both_doors_agree() -> None:
    data = batches(12)
    plan = qfx.plan(Stack(), recipe(), data)
    told = plan.sensitivities[TOLD]["layers.1.down"]
    assert set(told) == {"error_before", "error_after", "seconds", "dampening", "dead", "clipped"}
    assert told["error_after"] < told["error_before"]
    live = qfx.quantize(Stack(), plan)
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(Stack().eval(), backend="qfx", options=options)
    with torch.no_grad():
        assert torch.allclose(live.eval()(data[0]), compiled(data[0]), atol=1e-4)
    torch._dynamo.reset()


def test_a_plan_can_be_kept(tmp_path: Path) -> None:
    plan = qfx.plan(Stack(), recipe(), batches(12))
    plan.save(tmp_path)
    assert qfx.Plan.load(tmp_path) == plan


@pytest.mark.parametrize(
    "name", ["gpt2", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "t5", "bert", "whisper"))]
)
def test_the_zoo(name: str) -> None:
    """Transposed weights, experts, patch convolutions, encoders and decoders: all their linears are rounded so."""
    model, inputs = ZOO[name]()
    rules = [{"target": kind, "w": "u4/g16"} for kind in ("linear", "experts", "conv")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # two sentences are few tokens
        plan = qfx.plan(model, recipe(rules), [inputs])
    planned = {fqn for fqn, roles in plan.annotations.items() if "w" in roles}
    assert set(plan.sensitivities[TOLD]) == planned
    told = [one for one in plan.sensitivities[TOLD].values() if one]
    assert sum(one["error_after"] for one in told) < 0.7 * sum(one["error_before"] for one in told)
    quietly(model, plan)


def test_several_formats_of_one_weight() -> None:
    rules = [
        {"target": "*.up", "w": ["i8/ch", "i3/g8", "i3/g8", "i8/ch"]},
        {"target": "*.down", "w": ["i4/g8", "i3/g8"], "along": "columns"},
    ]
    data = batches(12)
    plan = qfx.plan(Stack(), recipe(rules), data)
    told = plan.sensitivities[TOLD]
    assert [name for name in told if "layers.0" in name] == [
        *("layers.0.up.rows0", "layers.0.up.rows1"),
        *("layers.0.down.columns0", "layers.0.down.columns1"),
    ]
    assert all(one["error_after"] < one["error_before"] for one in told.values())
    assert "layers.0.up.rows1/codes" in plan.tensors
    qfx.quantize(Stack(), plan)


def test_static_inputs_and_smoothing() -> None:
    rules = [{"target": "linear", "x": "u8", "w": "i4/ch"}]
    data, model = batches(12), Stack()
    plan = qfx.plan(model, recipe(rules, rewrites=("smooth",)), data)
    assert all(f"layers.0.{leaf}/x_scale" in plan.tensors for leaf in ("gate", "up", "down"))
    with torch.no_grad():
        wanted = model(data[0])
        assert sqnr_db(wanted, qfx.quantize(model, plan)(data[0])) > 15


def test_a_tied_weight_is_rounded_once_and_told() -> None:
    rules = [*LINEARS, {"target": "tied", "w": "u4/g8"}]
    with pytest.warns(
        QfxWarning, match="'head' reads the same weight, which is rounded once, as an embedding and as a linear"
    ):
        plan = qfx.plan(Stack(tied=True), recipe(rules), batches(12))
    assert plan.tensors["embed/codes"] is plan.tensors["head/codes"]
    assert plan.sensitivities[TOLD]["embed"]["error_after"] < plan.sensitivities[TOLD]["embed"]["error_before"]
    model = quietly(Stack(tied=True), plan)
    assert model.get_buffer("embed.w_codes") is model.get_buffer("head.w_codes")
    with pytest.warns(QfxWarning, match="rounded once"):
        qfx.plan(Stack(tied=True), recipe(rules), batches(12), strict=True)  # minor


def test_few_tokens_are_told() -> None:
    with pytest.warns(QfxWarning, match=r"layers.0-1.gate, .*\d nodes\): GPTQ saw fewer tokens than input"):
        qfx.plan(Stack(), recipe(), batches(1, 1, 8))


def test_groups_wider_than_the_weight_are_told() -> None:
    with pytest.warns(QfxWarning, match="groups of 128 are wider than its 24 input channels, and padded"):
        qfx.plan(Stack(), recipe([{"target": "*.gate", "w": "u4/g128"}]), batches(12))


def test_experts_without_tokens_are_told() -> None:
    model, inputs = ZOO["mixtral"]()
    inputs["input_ids"] = inputs["input_ids"][:1, :2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qfx.plan(model, recipe([{"target": "experts", "w": "u4/g16"}]), [inputs])
    words = r"no token of the data reached \d of \d experts \([\d, ]+\): rounded by 'mse'"
    assert any(re.search(words, str(warning.message)) for warning in caught)


def test_experts_of_few_tokens_count_what_the_others_read() -> None:
    """Of one value; what an expert has made no other reads."""
    found: Any = ZOO["mixtral"]()
    model, inputs = found
    torch.nn.init.zeros_(model.model.layers[0].mlp.gate.weight)  # all tokens go to the same two of four
    shape = (8, model.config.hidden_size)
    inputs["input_ids"] = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qfx.plan(model, recipe([{"target": "*.layers.0.*", "w": "u4/g16"}]), [inputs])
    said = [str(warning.message) for warning in caught]
    words = r"{}: no token of the data reached 2 of 4 experts \(\d, \d\): rounded {}"
    assert any(re.search(words.format("gate_up_proj", "by what the others read"), one) for one in said), said
    assert any(re.search(words.format("down_proj", "by 'mse'"), one) for one in said), said


def test_experts_go_without_the_asymmetric_correction() -> None:
    model, inputs = ZOO["mixtral"]()
    asked = recipe([{"target": "experts", "w": "u4/g16"}], gptq={"asymmetric": True})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = qfx.plan(model, asked, [inputs])
        plain = qfx.plan(model, recipe([{"target": "experts", "w": "u4/g16"}]), [inputs])
    words = "gate_up_proj, model.layers.0-1.mlp.experts.down_proj (4 nodes): experts are rounded without the asymmetric"
    assert any(words in str(warning.message) for warning in caught)
    assert found.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(found.tensors[key], plain.tensors[key]) for key in plain.tensors)


def test_nan_is_named_with_its_source() -> None:
    model: Any = Stack()
    with torch.no_grad():
        model.layers[1].norm.bias[5] = torch.inf
    message = (
        r"the input of 'layers\.1\.gate' is NaN, or too large, in batch 1\n.*\n"
        r"  found: 1 of 24 channels, the first is 5; "
        r"NaN or infinity first comes up in %layer_norm_1 \(layers\.1\.norm\)"
    )
    with pytest.raises(ValueError, match=message):
        qfx.plan(model, recipe(), batches())


@pytest.mark.parametrize("tied", [False, True])
def test_energy_that_is_no_number_in_f32_is_named(tied: bool) -> None:
    model: Any = Stack(tied=tied)
    with torch.no_grad():
        model.norm.bias[4] = 1e25
    rules = [{"target": "head", "w": "u4/g8"}, {"target": "tied", "w": "u4/g8"}]
    message = (
        r"the input of 'head' is NaN, or too large, in batch 1\n.*squares f32 can hold(\n.*)?\n  next step: look at"
    )
    with pytest.raises(ValueError, match=message):
        qfx.plan(model, recipe(rules), batches())


def test_data_is_needed() -> None:
    with pytest.raises(ValueError, match="recipe 'w4a16-gptq' needs calibration data"):
        qfx.quantize(Stack(), "w4a16-gptq")


def test_a_graph_is_needed() -> None:
    class Branches(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (2 if float(ids.float().mean()) > 0 else 1)

    with pytest.raises(qfx.UnsupportedError, match="recipe 'w4a16-gptq' needs the graph of the model"):
        qfx.quantize(Branches(), "w4a16-gptq", batches())


def test_resume_is_for_rounding_that_takes_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe 'w8a8' has nothing to resume.*\n.*rounding 'gptq'"):
        qfx.quantize(Stack(), "w8a8", resume=tmp_path)


def test_rounded_parts_are_held_as_a_plan_holds_them() -> None:
    gm, plan, flat = annotated(Stack(), LINEARS, batches(), rounding="gptq")
    round_weights(gm, plan, flat, method=Nearest(), progress=False)
    weight = gm.get_parameter("head.weight")
    found = rounded.get(
        plan.tensors, "head", pack_weight(weight, qfx.Format.parse("u3/g8")).format, tuple(weight.shape)
    )
    assert found is not None and json.dumps(plan.sensitivities)
