"""qfx.report: rows, totals, notes, JSON and errors of what was compiled, quantized, or both."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.report import Report
from qfx.reporting.rows import Row
from tests.zoo import ZOO, ids

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # said of every weight-only linear, and tested in tests/qfx/test_compile.py
    pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them"),
]


def of(name: str, **options: Any) -> tuple[Any, dict[str, Any], Report]:
    model, inputs = ZOO[name]()
    fast = torch.compile(model, backend="qfx", options=options or None)
    with torch.no_grad():
        fast(**inputs)
    return fast, inputs, qfx.report(fast)


def test_rows_of_an_encoder() -> None:
    _, _, report = of("bert")
    rows = {row.node: row for row in report}
    assert report.title == "BertModel" and report.graphs == 1
    kinds = {kind: [r.node for r in report if r.op == kind] for kind in ("linear", "embedding", "attention")}
    assert [len(nodes) for nodes in kinds.values()] == [13, 3, 2]
    query = rows["encoder.layer.0.attention.self.query"]
    assert query.asked == "x=i8/tok w=i8/ch" and "MatMul" in query.kernel and query.reason == ""
    assert (query.elements, query.bytes_before, query.bytes_after) == (64 * 64, 4 * 64 * 64, 64 * 64 + 4 * 64)
    assert query.macs == 2 * 7 * 64 * 64 and query.quantized and query.sqnr_db is None
    attention = rows["encoder.layer.0.attention.self.scaled_dot_product_attention"]
    assert attention.asked == "" and attention.kernel and not attention.quantized


def test_rows_of_experts_and_convolutions() -> None:
    _, _, report = of("mixtral")
    experts = [row for row in report if row.op == "experts"]
    assert [row.node for row in experts][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert all(row.quantized and row.asked == "x=i8/tok w=i8/ch" for row in experts)
    _, _, report = of("whisper")
    convolutions = {row.node: row for row in report if row.op in ("conv", "linear") and "conv" in row.node}
    assert set(convolutions) == {"model.encoder.conv1", "model.encoder.conv2"}
    assert all(row.kernel for row in convolutions.values())
    positions = next(row for row in report if row.node == "model.decoder.embed_positions")
    assert positions.quantized and not positions.reason, "rows picked from a table are looked up"


def test_totals() -> None:
    fast, _, report = of("bert")
    totals = report.totals
    stored = sum(t.nbytes for t in (*fast.parameters(), *fast.buffers()))
    assert (totals["linear"], totals["linear_quantized"], totals["graphs"]) == (13, 13, 1)
    assert totals["weight_coverage"] == totals["work_coverage"] == 1
    assert totals["bytes_before"] == stored
    assert 8 < totals["effective_bits"] < 9 and 3 < totals["compression"] < 4
    assert totals["compression"] == pytest.approx(totals["bytes_before"] / totals["bytes_after"])


def test_totals_where_some_is_float() -> None:
    recipe = {"rules": [{"target": "linear", "w": "i8/ch"}], "ignore": ["encoder.layer.1.*", "pooler.dense"]}
    _, _, report = of("bert", recipe=recipe)
    quantized = {row.node for row in report if row.quantized}
    assert len(quantized) == 6 == report.totals["linear_quantized"]
    linear = [row for row in report if row.op == "linear"]
    share = sum(r.macs for r in linear if r.quantized) / sum(r.macs for r in linear)
    assert 0.4 < share < 0.5 and report.totals["work_coverage"] == pytest.approx(share)
    before = sum(r.bytes_before for r in report)
    assert report.totals["weight_coverage"] == pytest.approx(
        sum(r.bytes_before for r in report if r.quantized) / before
    )
    assert report.totals["effective_bits"] > 16
    ignored = next(row for row in report if row.node == "pooler.dense")
    assert ignored.asked == "" == ignored.reason and ignored.bytes_before == ignored.bytes_after


def test_float_matrices_that_are_no_layers_have_rows_and_count() -> None:
    """Experts, recurrent layers and other parameters of a forward of its own are seen where they stay in float."""
    model, _ = ZOO["mixtral"]()
    report = qfx.report(qfx.quantize(model, "w4a16", ignore=["*experts*"]))
    rows = [row for row in report.rows if not row.quantized and row.op != "attention"]
    assert [row.node.rpartition(".")[2] for row in rows] == ["gate_up_proj", "down_proj"] * 2
    assert {(row.op, row.kernel, row.reason) for row in rows} == {("parameter", "torch", "")}, "none was asked for"
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name)
    assert sum(row.bytes_after for row in rows) == experts
    assert report.totals["weight_coverage"] < 0.3

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.norm = nn.Linear(8, 8), nn.LSTM(8, 8), nn.LayerNorm(8)
            self.table = self.other = nn.Parameter(torch.randn(1, 5, 8))
            self.token = nn.Parameter(torch.randn(1, 1, 8))

    with pytest.warns(QfxWarning, match="not seen: 0.table"):
        report = qfx.report(qfx.quantize(nn.Sequential(Recurrent()), "w8a8"))
    told = {row.node: row.op for row in report.rows}
    reasons = {row.node: row.reason for row in report.rows}
    assert reasons["0.lstm.weight_ih_l0"] == "a parameter that LSTM reads by itself: stays float"
    assert told == {"0.first": "linear", "0.lstm.weight_ih_l0": "parameter", "0.lstm.weight_hh_l0": "parameter"} | {
        "0.table": "parameter"
    }


def deberta() -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 128}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = transformers.DebertaV2Config(
        **sizes, **relative, num_hidden_layers=1, max_position_embeddings=32, norm_rel_ebd="layer_norm"
    )
    torch.manual_seed(0)
    return transformers.DebertaV2Model(config).eval()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # transformers 5.17's
def test_a_table_that_is_no_lookup_is_told_by_either_door() -> None:
    """DeBERTa's relative positions, which a norm reads."""
    told = r"encoder\.rel_embeddings: its weight is read as a plain tensor \(by layer_norm\), .* stays in float"
    with pytest.warns(QfxWarning, match=told):
        report = qfx.report(qfx.quantize(deberta(), "w8a8"))
    rows = {row.node: row for row in report.rows}
    assert "read as a plain tensor" in rows["encoder.rel_embeddings"].reason
    assert {row.node for row in report.rows if row.reason} == {"encoder.rel_embeddings"}
    fast: Any = torch.compile(deberta(), backend="qfx")
    with pytest.warns(QfxWarning, match=told), torch.no_grad():
        fast(ids())
    rows = {row.node: row for row in qfx.report(fast).rows}
    assert "plain tensor" in rows["encoder.rel_embeddings"].reason
    with pytest.raises(UnsupportedError, match=told):
        qfx.quantize(deberta(), "w8a8", strict=True)
    quiet = qfx.report(qfx.quantize(deberta(), "w8a8", strict=True, ignore=["*rel_embeddings"]))
    assert not any(row.reason for row in quiet.rows)


def test_rows_that_a_forward_picks_from_a_table_are_packed() -> None:
    """Whisper's decoder reads its positions so."""
    model, inputs = ZOO["whisper"]()
    with torch.no_grad():
        wanted = model(**inputs).logits
        quantized = qfx.quantize(model, "w8a16", strict=True)
        found = quantized(**inputs).logits
    rows = {row.node: row for row in qfx.report(quantized).rows}
    assert rows["model.decoder.embed_positions"].asked == "w=i8/ch"
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_parameter_of_a_compiled_graph_has_the_row_of_its_product() -> None:
    model, inputs = ZOO["mixtral"]()
    recipe = qfx.Recipe.parse("w4a16").override(ignore=["*experts*"])
    compiled = torch.compile(model, backend="qfx", options={"recipe": recipe, "backend": "reference"})  # type: ignore[dict-item]
    with torch.no_grad():
        compiled(**inputs)
    found = [row for row in qfx.report(compiled).rows if "experts" in row.node]
    assert len(found) == 4 and {row.op for row in found} == {"experts"}


def test_totals_of_rows_whose_work_is_not_known() -> None:
    known = Row("a", "linear", "w=i8/ch", elements=10, bytes_before=40, bytes_after=10, macs=100)
    unknown = Row("b", "linear", elements=30, bytes_before=120, bytes_after=120)
    assert Report((known, unknown)).totals["work_coverage"] == pytest.approx(100 / (100 + 30 * 10))
    assert Report((unknown,)).totals["work_coverage"] == 0
    assert Report(()).totals["weight_coverage"] == 0 == Report(()).totals["effective_bits"]


def test_tied_weights_count_once() -> None:
    fast, _, report = of("gpt2")
    assert report.totals["bytes_before"] == sum(t.nbytes for t in (*fast.parameters(), *fast.buffers()))


def test_a_tied_table_of_a_quantized_model_counts_once() -> None:
    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 90, bias=False))
    model[2].weight = model[0].weight
    rules = [{"target": "linear", "w": "i8/ch"}, {"target": "tied", "w": "u4/g32"}]
    report = qfx.report(qfx.quantize(model, {"rules": rules}, data=[torch.arange(6).view(2, 3)]))
    assert [row.shared for row in report] == [False, False, True]
    table, linear = 90 * (64 // 2 + 2 * 4 + 1), 64 * (64 + 4)  # both zero points of a row in a byte
    assert report.totals["bytes_after"] == table + linear
    assert report.totals["bytes_before"] == 4 * (90 * 64 + 64 * 64)


@pytest.mark.parametrize("table", ["bf16", "none"])
def test_a_tied_table_that_stays_in_floats_counts_once(table: str) -> None:
    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 90, bias=False))
    model[2].weight = model[0].weight
    asked = [{"target": "1", "w": "i8/ch"}, {"target": "tied", "w": table}]
    report = qfx.report(qfx.quantize(model, {"rules": asked}, data=[torch.arange(6).view(2, 3)]))
    assert [(row.node, row.shared) for row in report] == [("0", False), ("1", False), ("2", True)]
    assert report.totals["bytes_before"] == 4 * (90 * 64 + 64 * 64)
    assert report.totals["bytes_after"] == (2 if table == "bf16" else 4) * 90 * 64 + 64 * (64 + 4)


def test_what_quantizing_adds_was_not_there_before() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    before = sum(p.nbytes for p in model.parameters())
    fields: dict[str, Any] = {"rules": [{"target": "linear", "x": "u8", "w": "i8/ch"}], "low_rank": 2}
    quantized = qfx.quantize(model, fields, data=[torch.randn(9, 64, generator=torch.Generator().manual_seed(0))])
    report = qfx.report(quantized)
    assert report.added_bytes == 2 * (4 + 1)  # a scale and a zero point of each input
    assert report.totals["bytes_before"] == before
    assert report.totals["bytes_after"] == sum(t.nbytes for t in (*quantized.parameters(), *quantized.buffers()))


def test_a_reason_that_changes_nothing_leaves_a_node_quantized() -> None:
    model, inputs = ZOO["distilbert"]()
    fast = torch.compile(model, backend="qfx", options={"recipe": "nf4"})
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast(**inputs)
    told = [str(w.message) for w in said if "stored as" in str(w.message)]
    assert len(told) == 2 and "(11 nodes): the weight is stored as nf4/g64/f16" in told[0], "one for all of a reason"
    assert "transformer.layer.0-1.ffn.lin2 (2 nodes): the weight is stored as nf4/g32/f16" in told[1], told
    report = qfx.report(fast)
    rows = [row for row in report if row.op == "linear"]
    assert all(row.quantized and row.reason and row.as_asked for row in rows)
    assert report.totals["weight_coverage"] == 1


def test_experts_without_static_inputs_are_one_warning_and_each_says_so_in_its_row() -> None:
    model, inputs = ZOO["mixtral"]()
    with pytest.raises(UnsupportedError, match=r"experts\.down_proj \(4 nodes\): x=u8 was asked, but"):
        qfx.quantize(model, "w8a8-static", [inputs], strict=True)
    with pytest.warns(QfxWarning) as said:
        qfx.quantize(model, "w8a8-static", [inputs])
    experts = [str(w.message) for w in said if "experts" in str(w.message)]
    assert len(experts) == 1 and "model.layers.0-1.mlp.experts.gate_up_proj, " in experts[0]
    rows = {row.node: row for row in qfx.report(model)}
    named = [f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(2) for name in ("gate_up", "down")]
    assert {rows[name].reason for name in named} == {
        "weight-only, not x=u8: its weight is read by a forward of its own"
    }
    assert all(rows[name].quantized for name in named) and not rows["model.embed_tokens"].reason
    weights = qfx.quantize(ZOO["mixtral"]()[0], "w4a16")
    assert not any(row.reason for row in qfx.report(weights)), "no format of inputs was asked"


def test_a_quantized_node_that_runs_in_torch_counts_as_quantized_and_says_so() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(3, 16)
    fast = torch.compile(model, backend="qfx", options={"recipe": "fp8"})
    with torch.no_grad(), pytest.warns(QfxWarning, match="runs in torch"):
        fast(x)
    (row,) = qfx.report(fast).rows
    assert row.quantized and "runs in torch" in row.reason and row.bytes_after < row.bytes_before / 3


def test_json() -> None:
    fast, inputs, _ = of("bert")
    report = qfx.report(fast, data=inputs)
    read = json.loads(report.to_json())
    assert list(read) == ["title", "totals", "rows", "notes"] and read["totals"] == report.totals
    assert read["rows"][3]["node"] == report.rows[3].node and read["rows"][3]["sqnr_db"] == report.rows[3].sqnr_db
    exact = Report((Row("a", "linear", sqnr_db=math.inf), Row("b", "linear", sqnr_db=math.nan), Row("c", "linear")))
    assert [row["sqnr_db"] for row in json.loads(exact.to_json())["rows"]] == [None] * 3


def test_sqnr_of_a_compiled_model() -> None:
    fast, inputs, before = of("llama")
    assert all(row.sqnr_db is None for row in before)
    report = qfx.report(fast, data=inputs)
    measured = {row.node: row.sqnr_db for row in report if row.sqnr_db is not None}
    assert set(measured) == {row.node for row in report if row.quantized}
    assert all(20 < value < 60 for value in measured.values())
    assert measured["model.layers.0.self_attn.q_proj"] > measured["lm_head"], "errors add up along the graph"
    assert all(row.sqnr_db is None for row in qfx.report(fast)), "asking again without data measures nothing"
    with torch.no_grad():
        fast(**{**inputs, "input_ids": ids(9)})
    other = qfx.report(fast, data={**inputs, "input_ids": ids(9, seed=5)})
    found = {row.node: row.sqnr_db for row in other if row.sqnr_db is not None}
    assert set(found) == set(measured) and found != measured


def test_sqnr_with_every_way_to_give_a_batch() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(5, 16)
    fast = torch.compile(model, backend="qfx")
    with torch.no_grad():
        fast(x)
    found = [qfx.report(fast, data=batch) for batch in (x, (x,), [x], {"input": x})]
    assert all(report.rows == found[0].rows for report in found) and found[0].rows[0].sqnr_db is not None

    def twice(x: Tensor) -> Tensor:
        out: Tensor = 2 * model(x)
        return out

    function = torch.compile(twice, backend="qfx")
    for batch in (x, (x,), {"x": x}):
        assert [r.sqnr_db for r in qfx.report(function, data=batch)] == [r.sqnr_db for r in found[0]]


def test_sqnr_of_shared_code_is_that_of_each_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            out: Tensor = self.fc(x)
            return out

    model, x = nn.Sequential(Layer(), Layer(), Layer()).eval(), torch.randn(5, 16)
    fast = torch.compile(model, backend="qfx")
    with torch.no_grad():
        fast(x)
    values = [row.sqnr_db for row in qfx.report(fast, data=x)]
    assert len(set(values)) == 3 and all(value is not None and value > 30 for value in values)


def test_a_graph_that_changes_its_inputs_is_measured_without_changing_them_twice() -> None:
    class Counting(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            out: Tensor = self.fc(x) * self.count
            return out

    model = Counting().eval()
    fast = torch.compile(model, backend="qfx")
    with torch.no_grad():
        fast(torch.randn(3, 16))
    assert qfx.report(fast, data=torch.randn(3, 16)).rows[0].sqnr_db is not None
    assert float(model.count) == 2


def test_a_quantized_model_shows_what_was_measured_then() -> None:
    model, inputs = ZOO["bert"]()
    quantized = qfx.quantize(model, "w8a8")
    layer = quantized.get_submodule("pooler.dense")
    layer.sqnr_db = 12.5  # type: ignore[assignment]
    report = qfx.report(quantized)
    rows = {row.node: row for row in report}
    assert report.graphs == 0 and rows["pooler.dense"].sqnr_db == 12.5
    assert report.totals["weight_coverage"] == 1 and rows["pooler.dense"].kernel == "qfx::linear (reference)"
    used = qfx.report(quantized, data=inputs)
    assert used.rows == report.rows
    assert "data was not used, SQNR is what qfx.quantize measured" in used.notes[-1].reason
    with torch.no_grad():
        fast = torch.compile(quantized, backend="qfx")
        fast(**inputs)
    rows = {row.node: row for row in qfx.report(fast, data=inputs)}
    assert rows["pooler.dense"].sqnr_db == 12.5 and "MatMul" in rows["pooler.dense"].kernel


def test_data_for_what_is_not_compiled_is_refused() -> None:
    model, inputs = ZOO["distilbert"]()
    fast = torch.compile(model, backend="qfx")
    with torch.no_grad():
        fast(**inputs)
    with pytest.raises(ValueError, match=r"no compiled graph ran it\n  next step: pass what torch.compile returned"):
        qfx.report(model, data=inputs)
    with pytest.raises(ValueError, match="data"):
        qfx.report(fast, data=3)


def test_layers_that_were_not_called_are_listed_with_the_reason() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    fast = torch.compile(Partial().eval(), backend="qfx")
    with torch.no_grad():
        fast(torch.randn(2, 8))
    rows = {row.node: row for row in qfx.report(fast)}
    assert [rows[n].reason for n in ("used", "unused", "table")] == ["", *["in no compiled graph: runs in torch"] * 2]
    assert [rows[n].op for n in ("unused", "table")] == ["linear", "embedding"]
    assert 0 < qfx.report(fast).totals["work_coverage"] <= 0.5
