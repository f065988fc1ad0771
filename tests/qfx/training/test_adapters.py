"""QLoRA: adapters of peft above packed linears, saved and loaded, and merged back by rounding again."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

import qfx
from qfx.format import Format
from qfx.live.modules import QuantEmbedding, quantized_parts
from qfx.live.permuted import QuantPermuted
from qfx.measuring.measure import sqnr_db
from qfx.packing import pack_weight
from qfx.qat import quantizers
from qfx.training.adapters import lora_config
from tests import tiny
from tests.qat_nets import DATA, Net, both, ids, net, out, prepared

TARGETS = ["up", "down", "head"]
RECIPES: dict[str, Any] = {
    "nf4": both("nf4/g16/dq"),
    "i4": both("u4/g16"),
    "w4a8": both("i4/ch", "i8/tok"),
    "smooth": both("i8/ch", "u8", rewrites=("smooth",)),
    "low rank": both("u4/g16", low_rank=2),
    "rotate down": both("u4/g16", rewrites=("rotate-down",)),
    "heads": {"rules": [{"target": "up", "w": ["i8/ch", "u4/g16", "i8/ch", "i4/g8"]}]},
    "columns": {"rules": [{"target": "down", "x": "i8/tok", "w": ["i8/ch", "i4/g8", "i8/ch"], "along": "columns"}]},
}

FAST = ("nf4", "smooth", "columns")  # the others are slow together


@functools.cache
def plan(name: str) -> qfx.Plan:
    return qfx.plan(net(), RECIPES[name], DATA)


def packed(name: str) -> Any:
    return qfx.quantize(net(), plan(name))


def adapted(name: str, *, size: float = 0.0, **fields: Any) -> Any:
    """The small net, packed, with adapters; size: of B, which peft begins at zero."""
    model = packed(name)
    torch.manual_seed(0)
    fields.setdefault("target_modules", [fqn for fqn in TARGETS if fqn in quantized_parts(model)])
    model = qfx.add_adapters(model, LoraConfig(r=4, lora_alpha=8, **fields))
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if "lora_B" in fqn and size:
                parameter.normal_(std=size)
    return model


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_adapters_learn_above_a_packed_base_that_stays_as_it_is() -> None:
    model = adapted("nf4")
    base = {n: b.clone() for n, b in model.named_buffers()}
    assert torch.equal(out(model), out(packed("nf4"))), "adapters begin as nothing"
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = model.train()(ids()).square().mean()
    whole = {(48, 32), (32, 48)}
    assert not any(t.is_floating_point() and tuple(t.shape) in whole for t in saved), "no dequantized weight is kept"
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    losses = train(model, 30)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(b, base[n]) for n, b in model.named_buffers())


def test_the_gradient_is_that_of_the_dequantized_weight() -> None:
    model = adapted("i4", size=0.1)
    model(ids()).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain = copy.deepcopy(net())
    base = model.get_base_model()
    with torch.no_grad():
        plain.table.weight.copy_(base.table.weight)
        for name in TARGETS:
            plain.get_parameter(f"{name}.weight").copy_(base.get_submodule(name).base.weight)
    wanted = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    wanted.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    wanted(ids()).square().sum().backward()
    others = {n: p.grad for n, p in wanted.named_parameters() if p.grad is not None}
    assert len(found) == 6 and found.keys() == others.keys()
    assert all(torch.allclose(found[n], others[n], rtol=1e-3, atol=1e-4) for n in found)


def test_adapters_are_saved_alone_and_loaded(tmp_path: Path) -> None:
    model = adapted("i4", size=0.2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 15_000
    again = qfx.load_adapters(packed("i4"), tmp_path)
    assert torch.equal(out(again), out(model))
    assert not any(p.requires_grad for p in again.parameters())
    again = qfx.load_adapters(packed("i4"), tmp_path, trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 6


@pytest.mark.filterwarnings("ignore:.*lose more than half of the adapters:qfx.QfxWarning")
@pytest.mark.parametrize("into", ["weight", "low-rank"])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_merging(name: str, into: Any) -> None:
    """A large change comes through up to the step of the format, by factors up to the last bit."""
    model = adapted(name, size=0.3)
    wanted, batch = out(model), [{"ids": ids(9)}]
    if into == "low-rank" and name in ("heads", "columns"):
        with pytest.raises(ValueError, match="(?s)several formats has no factors.*into='weight'"):
            qfx.merge_adapters(model, batch, into=into)
        return
    merged = qfx.merge_adapters(model, batch, into=into)
    assert not any("lora" in n for n, _ in merged.model.named_modules())
    found = out(merged.model)
    assert merged.output is not None
    assert merged.output.sqnr_db == pytest.approx(sqnr_db(wanted, found), abs=0.5)
    rows = {row.node: row for row in merged.rows}
    assert rows and all(row.moved > 0.1 for row in rows.values())
    if into == "low-rank":
        assert torch.allclose(found, wanted, atol=0.1 if name in ("w4a8", "smooth") else 1e-5)
        assert all(row.lost == 0 for row in rows.values())
    else:
        assert all(0.5 * row.moved > row.lost > 0 for row in rows.values())
        assert float((found - wanted).norm()) < 0.25 * float((wanted - out(packed(name))).norm())
    assert quantized_parts(merged.model) and {r.sqnr_db for r in qfx.report(merged.model) if r.node in rows} == {
        row.output_sqnr_db for row in merged.rows
    }


@pytest.mark.parametrize("into", ["weight", "low-rank"])
def test_merging_into_a_weight_whose_columns_are_sorted_by_their_groups(into: Any) -> None:
    """As checkpoints of GPTQ with its order of columns have it: the change goes to the columns that it is of."""
    model: Any = net()
    columns = torch.randperm(model.up.in_features, generator=torch.Generator().manual_seed(1))
    codes = pack_weight(model.up.weight.detach()[:, columns], Format.parse("i8/g16"))
    model.up = QuantPermuted(codes, model.up.bias, columns)
    before = out(model)
    model = qfx.add_adapters(model, LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    wanted, data = out(model), [{"ids": ids(9)}]
    merged = qfx.merge_adapters(model, data, into=into)
    error = float((out(merged.model) - wanted).norm() / (wanted - before).norm())
    assert error < (0.1 if into == "weight" else 1e-5)
    (row,) = merged.rows
    assert row.output_lost is not None and row.output_moved is not None and row.output_lost < 0.1 * row.output_moved


def test_what_is_lost_is_measured_against_the_merged_weight() -> None:
    model = adapted("i4", size=0.3)
    layer = model.get_base_model().up
    wanted = layer.base.weight + layer.lora_B.default.weight @ layer.lora_A.default.weight * 2
    wanted = wanted.detach()
    merged = qfx.merge_adapters(model)
    (row,) = [row for row in merged.rows if row.node == "up"]
    lost = float((merged.model.up.weight - wanted).norm() / wanted.norm())  # type: ignore[union-attr]
    assert row.lost == pytest.approx(lost, rel=1e-4) and row.sqnr_db == pytest.approx(-20 * math.log10(lost), abs=0.01)
    assert row.output_lost is None and row.output_sqnr_db is None and merged.output is None


def test_a_small_change_is_told_to_be_lost() -> None:
    """Below half a step of the format the nearest codes are those of before: rounding loses all of the adapter."""
    model = adapted("i4", size=0.002)
    before = out(model)
    with pytest.raises(ValueError, match="(?s)3 of 3 merged weights lose more than half.*'low-rank'"):
        qfx.merge_adapters(model, strict=True)
    assert torch.equal(out(model), before) and not model.get_base_model().up.merged, "nothing is changed"
    with pytest.warns(qfx.QfxWarning, match=r"(?s)3 of 3 merged weights.*w=u4/g16: lost 0\.\d+%, adapters 0\.\d+%"):
        merged = qfx.merge_adapters(model)
    assert all(row.moved >= row.lost > 0.9 * row.moved for row in merged.rows), "never worse than dropping it"


def test_data_says_how_to_round_again() -> None:
    """GPTQ loses less of what each linear gives than the scales of least error do, on data that it has not seen."""
    lost = []
    for rounding in ("mse", "gptq"):
        model = adapted("i4", size=0.05)
        batches = [{"ids": ids(seed)} for seed in range(20, 28)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qfx.QfxWarning)
            merged = qfx.merge_adapters(copy.deepcopy(model), batches, rounding=rounding)
        rows = merged.rows
        lost.append((sum(row.output_lost or 0.0 for row in rows), float((out(merged.model) - out(model)).norm())))
    assert lost[1][0] < 0.8 * lost[0][0] and lost[1][1] < lost[0][1]


def test_peft_merges_and_unmerges_by_itself() -> None:
    model = adapted("nf4", size=0.3)
    before, codes = out(model), model.get_base_model().up.base.w_codes
    model.merge_adapter()
    assert not torch.equal(model.get_base_model().up.base.w_codes, codes)
    merged = out(model)
    assert 0 < float((merged - before).norm()) < 0.2 * float(before.norm())
    with model.disable_adapter():
        assert torch.equal(out(model), out(packed("nf4")))
    model.unmerge_adapter()
    assert torch.equal(out(model), before) and model.get_base_model().up.base.w_codes is codes


@pytest.mark.parametrize("name", ["i4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smooth", "rotate down"))])
def test_adapters_inside_fake_quantization_are_converted_as_they_were_trained(name: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS)
    model = qfx.add_adapters(prepared(net(), plan(name)), config)
    assert torch.allclose(out(model), out(packed(name)), atol=1e-4), "adapters begin as nothing"
    assert not any(p.requires_grad for q in quantizers(model).values() for p in q.parameters())
    losses = train(model.train(), 20)
    assert losses[-1] < 0.8 * losses[0]
    trained = out(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(out(qfx.load_adapters(prepared(net(), plan(name)), tmp_path)), trained)
    with model.disable_adapter():
        assert torch.allclose(out(model), out(packed(name)), atol=1e-4)
    with pytest.raises(ValueError, match="(?s)no packed linear.*merge_and_unload"):
        qfx.merge_adapters(model)
    merged = model.merge_and_unload()
    assert torch.allclose(out(qfx.convert(merged)), trained, atol=1e-4) and quantized_parts(merged)


@pytest.mark.filterwarnings("ignore:.*lose more than half of the adapters:qfx.QfxWarning")
@pytest.mark.parametrize("into", ["weight", "low-rank"])
def test_only_active_adapters_are_merged(into: Any) -> None:
    model = adapted("i4", target_modules=["up"])
    model.add_adapter("other", lora_config(model.get_base_model(), LoraConfig(target_modules=["down"])))
    assert [row.node for row in qfx.merge_adapters(model, into=into).rows] == ["up"]


def test_a_linear_that_data_does_not_reach_is_judged_by_its_weight() -> None:
    model = adapted("i4", size=0.002, target_modules=["up", "down"])
    net_ = model.get_base_model()
    net_.forward = lambda ids: net_.head(net_.down(torch.relu(net_.table(ids)).repeat(1, 1, 2)[..., :48]))
    with pytest.warns(qfx.QfxWarning, match=r"(?s)up \(w=u4/g16: lost .* of the weight\)") as told:
        merged = qfx.merge_adapters(model, [{"ids": ids()}], rounding="mse")
    assert "of the output)" in str(told[0].message)
    rows = {row.node: row for row in merged.rows}
    assert rows["up"].output_lost is None and rows["up"].worse and rows["down"].output_lost is not None
    merged.show()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_padding_is_no_part_of_what_is_measured() -> None:
    model = qfx.add_adapters(
        qfx.quantize(tiny.build("llama"), "w4a16"), LoraConfig(target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    text, kept = tiny.ids(), torch.ones(2, 6, dtype=torch.long)
    padded = {
        name: nn.functional.pad(v, (0, 4), value=0) for name, v in (("input_ids", text), ("attention_mask", kept))
    }
    alone, filled = (
        qfx.merge_adapters(copy.deepcopy(model), [batch], rounding="mse").rows
        for batch in ({"input_ids": text, "attention_mask": kept}, padded)
    )
    assert len(alone) == len(filled) == 2
    for row, same in zip(alone, filled, strict=True):
        assert row.output_moved == pytest.approx(same.output_moved, rel=1e-4), row.node
        assert row.output_lost == pytest.approx(same.output_lost, rel=1e-4), row.node


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:UserWarning")
def test_biases_of_adapters() -> None:
    model = adapted("i4", size=0.3, lora_bias=True, target_modules=["up", "down"])
    before = out(model)
    merged = qfx.merge_adapters(copy.deepcopy(model), DATA)
    assert all(row.output_lost is not None and row.output_lost < 0.15 for row in merged.rows), "biases are not lost"
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(out(model), before), "bit for bit"
    with pytest.raises(ValueError, match="(?s)'default' has no bias.*node: head.*lora_bias=False"):
        qfx.merge_adapters(adapted("i4", lora_bias=True, target_modules=["head"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("head", [False, True])
def test_a_language_model_with_one_table_is_merged_saved_and_loaded(tmp_path: Path, head: bool) -> None:
    """All linears are found, packed ones too. An adapter on the head parts it from the table."""
    model = qfx.quantize(tiny.build("tied"), "w4a16")
    targets = ["q_proj", "lm_head"] if head else "all-linear"
    model = qfx.add_adapters(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    all_of_them = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert found == (set(targets) if head else all_of_them)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with_adapters = tiny.logits(model)
    merged: Any = qfx.merge_adapters(model).model
    assert (merged.lm_head.w_codes is merged.model.embed_tokens.w_codes) != head
    assert merged.config.tie_word_embeddings != head
    assert float((tiny.logits(merged) - with_adapters).norm() / with_adapters.norm()) < 0.3
    merged.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(tiny.CLASSES["tied"].from_pretrained(tmp_path)), tiny.logits(merged))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_merged_model_that_loses_nothing_is_saved_and_loaded(tmp_path: Path) -> None:
    """Its error is no number, of which JSON has no text that both transformers and qfx read alike."""
    model = qfx.quantize(tiny.build("llama"), "w4a16")
    model = qfx.add_adapters(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = qfx.merge_adapters(model, [{"input_ids": tiny.ids()}], into="low-rank")
    assert 200 in [row.output_sqnr_db for row in found.rows]
    merged: Any = found.model
    merged.save_pretrained(tmp_path / "a")
    qfx.save(merged, tmp_path / "b")
    for again in (
        qfx.load(tmp_path / "a"),
        tiny.CLASSES["llama"].from_pretrained(tmp_path / "a"),
        qfx.load(tmp_path / "b"),
    ):
        assert torch.equal(tiny.logits(again), tiny.logits(merged))
        assert qfx.report(again).to_json() == qfx.report(merged).to_json()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_other_doors_of_peft_and_transformers(tmp_path: Path) -> None:
    """`prepare_model_for_kbit_training`, `add_adapter`, `save_pretrained` and `load_adapter`; autocast, generate."""
    batch = {"input_ids": tiny.ids(), "labels": tiny.ids()}
    model: Any = prepare_model_for_kbit_training(qfx.quantize(tiny.build("llama"), "nf4"))
    model.add_adapter(lora_config(model, LoraConfig(target_modules="all-linear")))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == 14
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again: Any = qfx.quantize(tiny.build("llama"), "nf4")
    again.load_adapter(str(tmp_path), peft_config=lora_config(again, LoraConfig.from_pretrained(tmp_path)))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert again.generate(tiny.ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 9)
    with pytest.raises(ValueError, match="model of peft is needed"):
        qfx.merge_adapters(again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["table"]}, "(?s)no linear cannot have an adapter.*QuantEmbedding"),
        ({"modules_to_save": ["head"]}, "(?s)'head' should learn, but its weight is packed.*ignore=.'head'"),
        ({"trainable_token_indices": {"table": [1]}}, "'table' should learn"),
        ({"init_lora_weights": "pissa"}, "(?s)'pissa' changes the base's weight.*low_rank"),
        ({"use_dora": True}, "variant"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_cannot_learn_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted("i4", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["table"]}, "(?s)no linear cannot have an adapter.*FakeEmbedding"),
        ({"target_modules": ["head"]}, "(?s)would change 'table', too.*node: head"),
        (
            {"target_modules": ["up"], "trainable_token_indices": {"table": [1]}},
            "(?s)single rows of 'table'.*whole",
        ),
    ],
)
def test_what_would_not_train_inside_fake_quantization_is_refused(fields: dict[str, Any], message: str) -> None:
    rules = [{"target": "linear", "w": "i8/ch"}, {"target": "tied", "w": "i8/ch"}]
    with pytest.raises(ValueError, match=message):
        qfx.add_adapters(prepared(net(tied=True), {"rules": rules}, DATA), LoraConfig(**fields))


class Read(Net):
    """A linear whose weight another forward reads, too."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.sigmoid(self.up.weight.sum())


def test_an_adapter_on_a_weight_that_another_forward_reads_is_refused() -> None:
    model = prepared(Read(), {"rules": [{"target": "linear", "w": "i8/ch"}]}, DATA)
    with pytest.raises(ValueError, match="(?s)would change what another forward reads, too.*node: up"):
        qfx.add_adapters(model, LoraConfig(target_modules=["up"]))
    qfx.add_adapters(model, LoraConfig(target_modules=["down"]))


def test_adapters_that_are_not_merged_are_told() -> None:
    model = prepared(net(), plan("i4"))
    schedule = qfx.QATSchedule(model, start_after=1)
    model = qfx.add_adapters(model, LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="(?s)stands around.*node: up"):
        schedule.step()
    with pytest.raises(ValueError, match=r"(?s)lies inside PeftModel.*merge_and_unload\(\)\)$"):
        qfx.convert(model)
    for take in (qfx.convert, qfx.QATSchedule):
        with pytest.raises(ValueError, match="(?s)found: FakeLoraLinear.*node: up.*merge_and_unload"):
            take(model.get_base_model())


def test_adapters_beside_fake_quantization_are_told() -> None:
    """Those of peft itself: their layers know nothing of it."""
    model: Any = get_peft_model(prepared(net(), plan("i4")), LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="(?s)merge_and_unload.*rounds what these adapters.*qfx.add_adapters"):
        qfx.convert(model)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="(?s)nothing in the model is quantized.*nf4.*prepare_qat"):
        qfx.add_adapters(net(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="LoraConfig"):
        qfx.add_adapters(packed("i4"), {"r": 8})
    with pytest.raises(ValueError, match="(?s)model of peft.*Net.*add_adapters"):
        qfx.merge_adapters(net())
    with pytest.raises(ValueError, match="(?s)no packed linear.*merge_and_unload"):
        qfx.merge_adapters(get_peft_model(net(), LoraConfig(target_modules=TARGETS)))
    with pytest.raises(ValueError, match="(?s)nothing can be dropped.*lora_dropout=0.1.*node: up"):
        qfx.add_adapters(prepared(net(), plan("i4")), LoraConfig(target_modules=["up"], lora_dropout=0.1))
    model = adapted("i4", size=0.3)
    with pytest.raises(ValueError, match="'weight' or 'low-rank', found 'weigth'"):
        qfx.merge_adapters(model, into="weigth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'gptq' needs data"):
        qfx.merge_adapters(model, rounding="gptq")
    model.merge_adapter()
    with pytest.raises(ValueError, match="(?s)merged already.*unmerge_adapter"):
        qfx.merge_adapters(model)
    model.unmerge_adapter()
    model.get_base_model().down.lora_A.default.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="(?s)NaN or Inf.*node: down.*checkpoint"):
        qfx.merge_adapters(model)
    assert isinstance(model.get_base_model().table, QuantEmbedding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unload()
