"""The fine-tuning example, on a random encoder of two layers and a task of few texts, from training to ONNX Runtime."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the encoder is a transformers model: pip install qfx[demo]")
from transformers import BertConfig, BertModel

import qfx
from examples import doc_task, qat_finetune
from examples.qat_finetune import Maker, Settings, Trial, exported, recipe
from examples.qat_rows import with_recovered

WORDS = 40  # of a text, each an id


class Texts:
    """A tokenizer whose ids are the first letters of words."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), 16, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            found = [1 + ord(word[0].lower()) % WORDS for word in text.split()[:16]]
            row[: len(found)] = torch.tensor(found)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Loaded:
    """A random encoder in place of MiniLM."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=WORDS + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, initializer_range=0.2,
        )  # fmt: skip
        self.model, self.tokenizer = BertModel(config).eval(), Texts()


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr(doc_task, "minilm", Loaded)
    names = ("alpha", "beta")
    texts = tuple(doc_task.Text(f"{'aaa bbb' if i % 2 else 'ccc'} word{i} other", i % 2) for i in range(48))
    sides: Any = {"train": texts[:32], "calibration": texts[32:40], "test": texts[40:]}
    monkeypatch.setattr(doc_task, "task", lambda **_: doc_task.Task(names, sides))
    return Trial(0, classes=2, length=16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*MatMulNBits rounds them:qfx.QfxWarning")
def test_from_float_to_onnx_runtime(trial: Trial, tmp_path: Path) -> None:
    said: list[str] = []
    maker = Maker(trial, said.append)
    state = {name: value.clone() for name, value in trial.model.state_dict().items()}
    maker.floating(Settings(steps=6, rate=1e-3, texts=8, checks=2))
    assert any(not torch.equal(value, state[name]) for name, value in trial.model.state_dict().items())
    teacher = {name: value.clone() for name, value in trial.model.state_dict().items()}
    model = maker.recipe("w2", Settings(steps=5, rate=1e-3, texts=16, distill=1.0, checks=2))
    assert all(torch.equal(value, teacher[name]) for name, value in trial.model.state_dict().items())
    with_recovered(maker.rows)
    rows = {(row.recipe, row.method): row for row in maker.rows}
    assert list(rows) == [("fp32", ""), ("w2", "PTQ"), ("w2", "QAT, distilled 1")]
    assert [step for step, _ in rows["w2", "QAT, distilled 1"].curve] == [0, 2, 4, 5]
    assert rows["w2", "QAT, distilled 1"].curve[0] == rows["w2", "PTQ"].curve[0], "training begins at PTQ"
    assert len(said) == 5 and json.dumps(said)
    accuracy, same = exported(model, trial, tmp_path / "w2.onnx")
    assert same == 100.0 and math.isclose(accuracy, rows["w2", "QAT, distilled 1"].score)
    asked = {row.asked for row in qfx.report(model) if row.op == "linear" and "pooler" not in row.node}
    assert asked == {"w=u2/g64"}


def test_the_same_settings_train_the_same(trial: Trial) -> None:
    """Dropout and order come from the seed, and the generator of the caller is left as it was."""
    found = []
    for seed in (3, 3, 4):
        model = copy.deepcopy(trial.model)
        before = torch.random.get_rng_state()
        qat_finetune.train(model, trial, Settings(steps=2, rate=1e-3, texts=8, seed=seed), lambda _: None)
        assert torch.equal(torch.random.get_rng_state(), before) and not model.training
        found.append(model.output.weight.detach())
        torch.rand(3)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_batches_lose_their_padding() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    (found,) = qat_finetune.trimmed([{"input_ids": mask * 7, "attention_mask": mask, "labels": torch.tensor([0, 1])}])
    assert found["input_ids"].tolist() == [[7, 7, 0], [7, 7, 7]] and found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("name", [*qat_finetune.RECIPES, "w2a16-gptq"])
def test_recipes_leave_the_pooler_alone(name: str) -> None:
    found = qfx.Recipe.parse(recipe(name))
    assert found.name == name and "*pooler*" in found.ignore
