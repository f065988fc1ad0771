"""`qfx analyze --task qa`: questions of a file as batches with the tokens of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

import qfx
from qfx.cli.models import TextOptions
from qfx.cli.questions import Question, question_batches, read_questions
from qfx.hf import hub
from tests.qfx.commands import run, save, tokenizer

LINES: list[dict[str, Any]] = [
    {"question": "w1 w2", "context": "w3 w4 w5 w6", "answer": "w4 w5"},
    {"question": "w1", "context": "w3 w4 w3 w4", "answers": {"text": ["w4"], "answer_start": [9]}},
    {"question": "w1", "context": "w3 w4", "answers": {"text": [], "answer_start": []}},
    {"question": "w2 w1", "context": "w7 w8 w9 w10 w11 w12", "answer": "w11 w12"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT for questions, and the file of LINES."""
    where = save(tmp_path_factory.mktemp("qa"), BertForQuestionAnswering, BertConfig)
    padding = tokenizer()
    padding.pad_token = "[UNK]"
    padding.save_pretrained(where)
    (where / "questions.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return where


def test_answers_are_spans_of_their_texts(folder: Path) -> None:
    found = read_questions(folder / "questions.jsonl")
    assert found[0] == Question("w1 w2", "w3 w4 w5 w6", 3, 8)
    assert [q.context[q.start : q.stop] for q in found] == ["w4 w5", "w4", "", "w11 w12"]
    assert found[1].start == 9, "where the file says, not the first"


def test_positions_are_those_of_tokens(folder: Path) -> None:
    """Of the pair of question and context; an answer that is cut off or missing is at the first."""
    loaded = hub.load(str(folder))
    options = TextOptions(None, "text", None, 4, 7, 0)
    (batch,) = question_batches(loaded, read_questions(folder / "questions.jsonl"), options, 64)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    spans = list(zip(batch["start_positions"].tolist(), batch["end_positions"].tolist(), strict=True))
    assert [spans[order.index(i)] for i in range(4)] == [(3, 4), (4, 4), (0, 0), (0, 0)]
    row = batch["input_ids"][order.index(0)].tolist()
    assert row[3:5] == [4, 5] and batch["input_ids"].shape == (4, 7)
    wide = TextOptions(None, "text", None, 4, 8, 0)
    (batch,) = question_batches(loaded, read_questions(folder / "questions.jsonl"), wide, 64)
    assert batch["end_positions"][order.index(3)] == 7, "with room for it"


def test_samples_and_batches_are_as_asked(folder: Path) -> None:
    questions = read_questions(folder / "questions.jsonl")
    made = question_batches(hub.load(str(folder)), questions, TextOptions(None, "text", None, 2, 8, 0), 3)
    assert [len(batch["start_positions"]) for batch in made] == [2], "the last is not full"
    with pytest.raises(ValueError, match="a fast tokenizer is needed"):
        question_batches(
            hub.Loaded(torch.nn.Linear(1, 1), None, folder), questions, TextOptions(None, "", 1, 1, 8, 0), 3
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"context": "w1", "answer": "w1"}, "line 2 has no field 'question'"),
        ({"question": "w1", "context": "w1"}, "line 2 has no field 'answer'"),
        ({"question": "w1", "context": "w1", "answer": "w2"}, "line 2: its context does not hold the answer 'w2'"),
        ({"question": "w1", "context": "w1", "answers": {"text": ["w1"], "answer_start": [1]}}, "does not hold"),
        ({"question": "w1", "context": "w1", "answers": {"text": "w1"}}, r"line 2: its answers cannot be read"),
        ({"question": "w1", "context": "w1", "answers": ["w1"]}, r"found: \['w1'\]"),
        (["w1"], r"q.jsonl, line 2 is no JSON object\n  found: list"),
    ],
)
def test_bad_lines_are_told(tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, [LINES[0], line])))
    with pytest.raises(ValueError, match=message):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(file)


def test_files_that_are_no_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b"\n{'question': 'w1'}")
    with pytest.raises(ValueError, match=r"q.jsonl, line 2 is no JSON"):
        read_questions(file)
    file.write_bytes(json.dumps(LINES[0]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"q.jsonl is no UTF-8 text"):
        read_questions(file)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    done = run(
        "analyze", folder, "--data", folder / "questions.jsonl", "--task", "qa", "--batch-size", 2, "--seq-len", 8,
        "--measure", 0, "--format", "u4/g16", "--json", tmp_path / "s.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = qfx.Sensitivity.load(tmp_path / "s.json")
    assert found.provenance["loss"] == "qa" and found.provenance["batches"] == 2
    assert max(found.score()["qa_outputs"].values()) > 0


def test_without_a_file_it_says_what_is_needed(folder: Path) -> None:
    done = run("analyze", folder, "--task", "qa")
    assert done.exit_code == 2
    assert "needs labels" in done.output and "'question', 'context' and 'answer'" in done.output
