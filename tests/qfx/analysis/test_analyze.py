"""`qfx.analyze` and `qfx analyze` from end to end, and what both refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from tests import tiny
from tests.qfx.analysis.models import causal, ids
from tests.qfx.commands import run, tokenizer
from tests.zoo import ZOO

QUICK: dict[str, Any] = {"formats": ("u3/g16", "i8/ch"), "measure": 0, "progress": False}


def test_a_language_model() -> None:
    model, batches = causal()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = qfx.analyze(model, batches, formats=["u4/g16", qfx.Format.parse("i8/ch")], measure=1, progress=False)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert found.methods == ("quant-fisher",) and found.formats[:2] == ("u4/g16", "i8/ch")
    assert {head.head for head in found.heads} == {0, 1} and found.heads[0].induction is not None
    assert found.provenance["batches"] == 2 and found.provenance["shape"] == [2, 9]
    assert found.provenance["fingerprint"] and found.provenance["loss"] is None
    assert found.measured


class Classifier(nn.Module):
    """Mean of an embedding, one hidden layer, two classes; gives the logits [B, C] alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table, self.up, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.table(tokens).mean(1))))  # type: ignore[no-any-return]


def labelled(count: int = 3) -> list[Any]:
    return [(ids(4, 6, seed=i, vocabulary=32), torch.tensor([0, 1, 1, 0])) for i in range(count)]


def test_a_task_with_labels_in_pairs_or_by_name() -> None:
    pairs = labelled()
    named = [{"tokens": tokens, "labels": labels} for tokens, labels in pairs]
    model = Classifier().eval()
    first, second = (qfx.analyze(model, data, loss="classification", **QUICK) for data in (pairs, named))
    assert first.scores == second.scores and first.provenance["loss"] == "classification"

    def own(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])

    mine = qfx.analyze(model, named, loss=own, **QUICK)
    for name, row in mine.score().items():
        for text, value in row.items():
            assert value == pytest.approx(first.score()[name][text], rel=1e-4)
    assert mine.provenance["loss"] == "own"
    general = qfx.analyze(model, pairs[0][:1], **QUICK)
    assert general.what == "relative squared error of output"


def test_a_recipe_says_what_is_left_out() -> None:
    model, batches = causal()
    recipe = {"rules": [{"target": "linear", "w": "u4/g16"}], "ignore": ["lm_head"], "rounding": "rtn"}
    found = qfx.analyze(model, batches, recipe=recipe, **QUICK)
    fqns = {unit.fqn for unit in found.units}
    assert "lm_head" not in fqns and "model.embed_tokens" not in fqns and "model.layers.0.mlp.up_proj" in fqns
    assert found.provenance["rounding"] == "rtn"


def test_whole_weights() -> None:
    model, batches = causal()
    found = qfx.analyze(model, batches, units="layers", **QUICK)
    assert all(unit.axis is None for unit in found.units)
    assert {"model.layers.0.self_attn.q_proj", "lm_head"} <= {unit.name for unit in found.units}


def test_samples_are_counted() -> None:
    model, batches = causal(batches=4)
    assert qfx.analyze(model, batches, samples=3, **QUICK).provenance["batches"] == 2


def test_bad_input() -> None:
    model, batches = causal()
    with pytest.raises(ValueError, match="a model is needed"):
        qfx.analyze("a folder", batches)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the data holds no batch"):
        qfx.analyze(model, [])
    with pytest.raises(ValueError, match="an iterable of batches is expected"):
        qfx.analyze(model, batches[0])
    with pytest.raises(ValueError, match=r"needs labels, and a batch has no 'labels'(?s:.*)put the labels"):
        qfx.analyze(Classifier().eval(), [tokens for tokens, _ in labelled()], loss="classification", **QUICK)
    with pytest.raises(ValueError, match="there is no loss 'classificaton', did you mean 'classification'"):
        qfx.analyze(model, batches, loss="classificaton")
    with pytest.raises(ValueError, match="a loss is a preset's name or a callable"):
        qfx.analyze(model, batches, loss=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantized already"):
        qfx.analyze(qfx.quantize(causal()[0], "w4a16"), batches)
    with pytest.raises(ValueError, match="no method 'fisher'"):
        qfx.analyze(model, batches, method="fisher")


def test_heads_that_cannot_be_told_apart_are_told() -> None:
    """A query behind an activation does not come straight from its projection."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(torch.tanh(q), k, v)
            return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    data = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))]
    with pytest.warns(qfx.QfxWarning, match="'q' cannot be split by heads") as seen:
        found = qfx.analyze(Odd().eval(), data, **QUICK)
    assert "its linears have one format each" in str(seen[0].message) and len(seen) == 1
    assert any("no scores of induction" in note for note in found.notes)
    assert [unit.name for unit in found.units if unit.fqn == "q"] == ["q"]
    assert [unit.name for unit in found.units if unit.fqn == "k"] == ["k.k0", "k.k1"]
    with pytest.raises(qfx.UnsupportedError, match="strict=True"):
        qfx.analyze(Odd().eval(), data, strict=True, **QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    tiny.build("llama").save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


def test_the_command(folder: Path, tmp_path: Path) -> None:
    done = run(
        "analyze", folder, "--samples", 2, "--batch-size", 2, "--seq-len", 16, "--format", "u4/g16",
        "--format", "i8/ch", "--measure", 1, "--rows", 3, "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("u4/g16", "key-value cache", "heads", "induction", "predicted against measured", "quant-fisher"):
        assert word in done.output
    found = qfx.Sensitivity.load(tmp_path / "s.json")
    assert found.formats[:2] == ("u4/g16", "i8/ch") and found.provenance["batches"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "classification"], "needs labels"),
        (["--task", "summary"], "there is no loss 'summary'"),
        (["--task", "qa"], "'question', 'context' and 'answer'"),
        (["--method", "magic"], "there is no method 'magic'"),
        (["--format", "i4/tok"], "no format of a weight"),
        (["--data", "gone.txt"], "gone.txt"),
    ],
)
def test_mistakes_are_short_messages(folder: Path, options: list[str], message: str) -> None:
    done = run("analyze", folder, *options)
    assert done.exit_code == 2
    assert message in done.output and "Traceback" not in done.output


def test_labels_of_a_file(tmp_path: Path) -> None:
    from qfx.cli.analyze import read_labels

    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": "a", "label": x}) for x in ("spam", "ham", "spam")))
    assert read_labels(file, "label") == [1, 0, 1]
    file.write_text('{"text": "a", "label": 3}\n\n{"text": "b", "label": 1}')
    assert read_labels(file, "label") == [3, 1]
    with pytest.raises(ValueError, match="line 1 has no label in the field 'topic'"):
        read_labels(file, "topic")


def test_the_command_with_a_task(tmp_path: Path) -> None:
    model, _ = ZOO["roberta"]()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    padding = tokenizer()
    padding.pad_token = padding.pad_token or padding.unk_token
    padding.save_pretrained(tmp_path / "model")
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": "the model " * i, "label": i % 2}) for i in range(1, 5)))
    done = run(
        "analyze", tmp_path / "model", "--data", file, "--task", "classification", "--batch-size", 2, "--seq-len", 12,
        "--measure", 0, "--format", "u4/g16", "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert qfx.Sensitivity.load(tmp_path / "s.json").provenance["loss"] == "classification"
