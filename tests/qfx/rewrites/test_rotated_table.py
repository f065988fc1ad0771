"""A rotated language model keeps the one table of its embedding and lm_head, through every door; and where not."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as tf

import qfx
from qfx import Plan, QfxWarning, Recipe, Rule, UnsupportedError
from qfx.interop.gguf_arch import architecture_of
from qfx.interop.gguf_source import sources_of
from qfx.live.modules import QuantLinear
from qfx.rewrites import rotation
from qfx.training.requantize import as_packed, read_by
from tests import tiny
from tests.qfx.rewrites.test_transform import error
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FLOAT = tuple(Rule(target=kind, w="f32") for kind in ("linear", "embedding"))
ROTATED = ("rotate", "rotate-down")
EIGHT = (Rule(target="linear", x="i8/tok", w="i8/ch"), Rule(target="embedding", w="i8/ch"))
TABLE = "model.embed_tokens"


def tied(**config: Any) -> Any:
    model = tiny.build("tied")
    model.config.update({"use_cache": False, **config})
    return model


def recipe(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(**{"name": "r", "rules": rules or EIGHT, "rewrites": ROTATED, **fields})


def quantized(model: Any, asked: Any, data: Any = None) -> Any:
    """A live model, of which mypy need not know the modules."""
    return qfx.quantize(model, asked, data)


def names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(record["name"] for record in plan.rewrites))


def pointers(model: Any) -> tuple[int, int]:
    head, table = model.lm_head.weight, model.get_submodule(TABLE).weight
    if isinstance(model.lm_head, QuantLinear):
        head, table = model.lm_head.w_codes, model.get_submodule(TABLE).w_codes
    return head.data_ptr(), table.data_ptr()


def one_table(model: Any) -> bool:
    head, table = pointers(model)
    assert bool(model.config.tie_word_embeddings) == (head == table), "the config says what is"
    return head == table


# ---- what stays


def test_the_live_function_stays_by_a_plan_that_was_saved(tmp_path: Path) -> None:
    model = tied()
    wanted = tiny.logits(model)
    plan = qfx.plan(model, recipe(*FLOAT))
    assert names(plan) == ["norm-fold", "rotate", "rotate-heads", "rotate-down"]
    plan.save(tmp_path / "plan")
    assert not plan.tensors, "the gain is the norm's weight, which the model has"
    live = quantized(copy.deepcopy(model), Plan.load(tmp_path / "plan"))
    assert error([wanted], [tiny.logits(live)]) <= 1e-5
    assert one_table(live) and live.lm_head.rotation == (32, 0)
    assert torch.equal(live.lm_head.gain, model.model.norm.weight) and bool((live.model.norm.weight == 1).all())
    assert "rotation=(32, 0) around a gain" in repr(live.lm_head)
    read = (model.lm_head.weight * model.model.norm.weight).detach().double() @ rotation.matrix(32, 0)
    torch.testing.assert_close(live.lm_head.weight.double(), read, rtol=0, atol=1e-5)  # as other code reads it


def test_it_takes_a_table_less() -> None:
    model = tied()
    one = quantized(copy.deepcopy(model), recipe())
    two = quantized(model, recipe(rewrites=("untie", *ROTATED)))
    assert one_table(one) and not one_table(two)
    table = qfx.Format.parse("i8/ch").nbytes((tiny.VOCAB, 32))
    both = [qfx.report(each).totals["bytes_after"] for each in (one, two)]
    assert both[1] - both[0] == table - one.lm_head.gain.nbytes


def test_save_load_and_from_pretrained(tmp_path: Path) -> None:
    model = tied()
    float_model = copy.deepcopy(model)
    live = quantized(model, recipe())
    wanted = tiny.logits(live)
    qfx.save(live, tmp_path / "saved")
    live.save_pretrained(tmp_path / "pretrained")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is True
    found = [
        qfx.load(tmp_path / "saved"),
        qfx.load(tmp_path / "saved", float_model),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained"),
    ]
    for again in found:
        assert one_table(again) and torch.equal(tiny.logits(again), wanted)
    prompt = tiny.ids()[:1, :3]
    written = [each.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True) for each in (live, *found)]
    assert all(torch.equal(each, written[0]) for each in written)


def test_quantized_while_it_is_loaded(tmp_path: Path) -> None:
    model = tied()
    model.save_pretrained(tmp_path)
    wanted = tiny.logits(quantized(model, recipe()))
    asked = qfx.QfxConfig(recipe=recipe())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # a recipe with rewrites needs the whole model
        found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked)
    assert one_table(found) and torch.equal(tiny.logits(found), wanted)


def test_streamed_from_a_folder(tmp_path: Path) -> None:
    model = tied()
    model.save_pretrained(tmp_path / "float")
    wanted = tiny.logits(quantized(model, recipe()))
    found = quantized(str(tmp_path / "float"), recipe())
    assert one_table(found) and torch.equal(tiny.logits(found), wanted)
    qfx.save(found, tmp_path / "out")
    del found
    gc.collect()
    again = qfx.load(tmp_path / "out")
    assert one_table(again) and torch.equal(tiny.logits(again), wanted)


def test_every_door_gives_the_same(tmp_path: Path) -> None:
    """Live, compiled by recipe, by plan and after qfx.quantize, and both files."""
    model, ids = tied(), tiny.ids()
    plan = qfx.plan(model, recipe())
    live = quantized(copy.deepcopy(model), plan)
    wanted = tiny.logits(live)
    asks: list[tuple[Any, dict[str, Any]]] = [(model, {"recipe": recipe()}), (model, {"plan": plan}), (live, {})]
    for target, options in asks:
        torch._dynamo.reset()
        compiled: Any = torch.compile(target, backend="qfx", options={**options, "strict": True, "cache": False})
        with torch.no_grad():
            assert error([wanted], [compiled(ids).logits]) < 1e-5
        rows = {row.node: row for row in qfx.report(compiled)}
        assert rows["lm_head"].shared, "the table is stored once"
    for number, (source, asked) in enumerate([(live, None), (model, recipe())]):
        path = tmp_path / f"{number}.onnx"
        qfx.export_onnx(source, {"input_ids": ids}, path, recipe=asked)
        found = onnxruntime.InferenceSession(path).run(None, {"input_ids": ids.numpy()})[0]
        assert error([wanted], [torch.from_numpy(found)]) < 1e-5


def test_training_begins_where_the_quantized_model_is(tmp_path: Path) -> None:
    model = tied()
    live = quantized(copy.deepcopy(model), recipe())
    prepared: Any = qfx.prepare_qat(model, recipe())
    assert error([tiny.logits(live)], [tiny.logits(prepared)]) < 1e-5
    loss = prepared(tiny.ids(), labels=tiny.ids()).loss
    loss.backward()
    table = prepared.get_submodule(TABLE).weight.grad
    assert table is not None and bool(table.abs().sum() > 0)
    torch.optim.SGD(prepared.parameters(), 1e-3).step()
    wanted = tiny.logits(prepared)
    converted = qfx.convert(prepared)
    assert one_table(converted) and error([wanted], [tiny.logits(converted)]) < 1e-5
    qfx.save(converted, tmp_path)
    assert torch.equal(tiny.logits(qfx.load(tmp_path)), tiny.logits(converted))


def test_data_rounds_the_table_by_what_the_head_reads() -> None:
    model = tied()
    batches = [{"input_ids": tiny.ids()}] * 2
    wanted = tiny.logits(model)
    four = recipe(Rule(target="linear", x="i8/tok", w="i4/ch"), *(Rule(target="tied", w="i8/ch"),), rounding="gptq")
    with pytest.warns(QfxWarning) as told:
        live = quantized(model, four, batches)
    assert any("rounded once, as an embedding and as a linear" in str(w.message) for w in told)
    assert one_table(live) and error([wanted], [tiny.logits(live)]) < 0.3


@pytest.mark.parametrize("name", ["w8a8-rotate", "w4a8-rotate", "w4a4-rotate"])
def test_presets_keep_the_table(name: str) -> None:
    data = None if name == "w8a8-rotate" else [{"input_ids": tiny.ids()}] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        assert one_table(quantized(tied(), name, data))


def test_casts_keep_the_gain() -> None:
    live = quantized(tied(), recipe())
    wanted, gain = tiny.logits(live), live.lm_head.gain.clone()
    half = live.to(torch.bfloat16)
    assert half.lm_head.gain.dtype == torch.float32 and torch.equal(half.lm_head.gain, gain)
    found = tiny.logits(half)
    assert found.dtype == torch.bfloat16 and error([wanted], [found.float()]) < 5e-2


# ---- other libraries' files


def test_a_checkpoint_holds_the_output_by_itself(tmp_path: Path) -> None:
    """In float, as it acts without the products; the table is another tensor."""
    rules = (Rule(target="linear", w="i8/ch"), Rule(target="embedding", w="i8/ch"))
    live = quantized(tied(), recipe(*rules, rewrites=("rotate",)))
    with pytest.warns(QfxWarning) as told:
        qfx.export_compressed_tensors(live, tmp_path)
    assert any("lm_head" in str(w.message) and "written in float" in str(w.message) for w in told)
    found = qfx.import_checkpoint(tmp_path)
    assert getattr(found, "config").tie_word_embeddings is False  # noqa: B009
    assert error([tiny.logits(live)], [tiny.logits(found)]) < 1e-5
    with pytest.raises(UnsupportedError, match="lm_head"):
        qfx.export_compressed_tensors(live, tmp_path / "strict", strict=True)


def test_gguf_holds_the_output_by_itself() -> None:
    live = quantized(tied(), recipe(rewrites=("rotate",)))
    found, _ = sources_of(live, architecture_of(live.config))
    output = found["output.weight"]
    assert torch.equal(output.value(), live.lm_head.weight)
    assert "rotated first" in str(output.exact()) and "output.weight" in found
    plain, _ = sources_of(quantized(tied(), recipe(rewrites=())), architecture_of(live.config))
    assert "output.weight" not in plain


# ---- what gets a weight of its own

APART = r"lm_head: it shares the table \S+ in one format, and gets a weight of its own \([\d,]+ values\)"


@pytest.mark.parametrize(
    "asked",
    [
        recipe(rewrites=("untie", *ROTATED)),
        recipe(*EIGHT, Rule(target="lm_head", x="i8/tok", w="i4/g32")),
        recipe(*EIGHT, ignore=("lm_head",)),
        recipe(Rule(target="linear", x="i8/tok", w="i8/ch")),
        recipe(*EIGHT, Rule(target="lm_head", x="i8/tok", w=["i8/ch", "i8/ch"])),
    ],
    ids=["asked", "other formats", "float head", "float table", "several formats"],
)
def test_untied(asked: Recipe) -> None:
    model = tied()
    wanted = tiny.logits(model)
    plan = qfx.plan(model, asked)
    assert names(plan)[:2] == ["untie", "norm-fold"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # two formats are stored twice
        live = quantized(model, plan)
    assert not live.config.tie_word_embeddings and "gain" not in live.lm_head._buffers
    assert error([wanted], [tiny.logits(live)]) < 0.1


def test_channels_that_are_scaled_want_a_weight_of_their_own() -> None:
    """A shared weight takes no factors, nor some columns in 16 bits."""
    data = [{"input_ids": tiny.ids()}]
    for fields in ({"rewrites": (*ROTATED, "smooth")}, {"outliers": 0.5}):
        with pytest.warns(QfxWarning, match=APART):
            plan = qfx.plan(tied(), recipe(**fields), data)
        assert names(plan)[0] == "untie"


def test_a_head_that_reads_its_weight_itself_is_untied() -> None:
    """Nothing in the live model could rotate its input."""
    model = tied()
    head = model.lm_head
    head.forward = lambda x: torch.nn.functional.linear(x, head.weight)
    with pytest.warns(QfxWarning, match=APART):
        assert names(qfx.plan(model, recipe()))[0] == "untie"


def test_a_norm_that_feeds_more_than_the_head() -> None:
    """A second linear reads what the norm gives, which is folded into that one: the function stays."""

    class Valued(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.value = tied(), torch.nn.Linear(tied().config.hidden_size, 1)

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = self.lm.model(input_ids=input_ids, use_cache=False).last_hidden_state
            return self.lm.lm_head(hidden), self.value(hidden)

    model, data = Valued().eval(), [tiny.ids()]
    with torch.no_grad():
        wanted = model(*data)
        with pytest.warns(QfxWarning, match=APART):
            live = qfx.quantize(model, recipe(), data)
        found = live(*data)
    assert error(list(wanted), list(found)) < 0.1


def test_strict_allows_it_and_a_named_untie_is_no_news() -> None:
    model, _ = ZOO["gpt2"]()
    with pytest.warns(QfxWarning, match=APART):
        qfx.plan(model, recipe(rewrites=("rotate",)), strict=True)
    qfx.plan(model, recipe(rewrites=("untie", "rotate")), strict=True)  # warnings are errors


def test_a_model_of_layer_norms_is_untied() -> None:
    model, _ = ZOO["gpt2"]()
    with pytest.warns(QfxWarning, match=APART):
        found = names(qfx.plan(model, recipe(rewrites=("rotate",))))
    assert found[:3] == ["untie", "norm-fold", "centre"]


def test_plans_of_the_version_before(tmp_path: Path) -> None:
    """They untied, and still do."""
    model = tied()
    wanted = tiny.logits(model)
    plan = qfx.plan(model, recipe(*FLOAT, rewrites=("untie", *ROTATED)))
    plan.save(tmp_path)
    fields = json.loads((tmp_path / "plan.json").read_text())
    fields["version"] = 3
    for record in fields["rewrites"]:
        for key in ("heads", "norms") if record["name"] == "rotate" else ():
            assert record.pop(key) == []
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    live = quantized(model, Plan.load(tmp_path))
    assert not one_table(live) and error([wanted], [tiny.logits(live)]) <= 1e-5


# ---- adapters


def test_a_change_of_the_head_is_put_where_it_acts() -> None:
    live = quantized(tied(), recipe(*FLOAT))
    head = live.lm_head
    generator = torch.Generator().manual_seed(0)
    delta, x = torch.randn(tiny.VOCAB, 32, generator=generator), torch.randn(3, 32, generator=generator)
    wanted, found = x @ delta.mT, read_by(head, x) @ as_packed(head, delta).mT
    assert error([wanted], [found]) < 1e-4
    head.gain[3] = 0.0
    with pytest.raises(ValueError, match="divided by the gain of the norm before it, which is 0 in places"):
        as_packed(head, delta)
