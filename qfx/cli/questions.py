"""Questions whose answer is a span of a text, from a .jsonl file, for `qfx analyze --task qa`.

{"question": "Who calls?", "context": "The loop calls the hook.", "answer": "The loop"}
{"question": "Who calls?", "context": "...", "answers": {"text": ["The loop"], "answer_start": [0]}}     (SQuAD's)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qfx.cli.models import DEFAULT_LENGTH, TextOptions
from qfx.data import fitting, records
from qfx.hf import hub


@dataclass(frozen=True)
class Question:
    """The answer is context[start:stop]; start = stop where the context does not hold it."""

    question: str
    context: str
    start: int
    stop: int


def read_questions(file: Path) -> list[Question]:
    """The questions of a .jsonl file. Raises ValueError for lines without one, and answers not in their text."""
    found = []
    for where, held in records(file):
        missing = [name for name in ("question", "context") if not isinstance(held.get(name), str)]
        if missing or not ("answer" in held or "answers" in held):
            raise ValueError(
                f"{where} has no field {(missing or ['answer'])[0]!r}\n"
                "  expected: question, context and answer (its text), or answers as SQuAD has them"
            )
        found.append(Question(held["question"], held["context"], *_span(held, where)))
    if not found:
        raise ValueError(f"{file} holds no question")
    return found


def _span(held: dict[str, Any], where: str) -> tuple[int, int]:
    """[start, stop) of the first answer among the characters of the context; (0, 0) where there is none."""
    answers = held.get("answers") or {"text": [held.get("answer")]}
    texts, starts = (answers.get(key, []) if isinstance(answers, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list):
        expected = '{"text": ["The loop"], "answer_start": [0]}'
        raise ValueError(f"{where}: its answers cannot be read\n  expected: {expected}\n  found: {answers!r}")
    if not texts or not texts[0]:
        return 0, 0
    text = str(texts[0])
    start = starts[0] if starts and isinstance(starts[0], int) else held["context"].find(text)
    if start < 0 or held["context"][start : start + len(text)] != text:
        raise ValueError(f"{where}: its context does not hold the answer {text!r}")
    return start, start + len(text)


def question_batches(
    loaded: hub.Loaded, questions: list[Question], text: TextOptions, samples: int
) -> list[dict[str, Any]]:
    """Batches of padded pairs with `start_positions` and `end_positions` of the answers' first and last tokens, drawn
    in the order that the seed gives. An answer that was cut off, or is not there, has the first position, as BERT has
    it. Raises ValueError without a fast tokenizer, which alone tells where a token stands in a text.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "a fast tokenizer is needed to tell which tokens are the answer, and the model has none\n"
            "  next step: save one into its folder"
        )
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(text.seed))[:samples]
    made = []
    for part in order.split(text.batch_size):
        own = [questions[i] for i in part.tolist()]
        rows = tokenizer(
            [q.question for q in own], [q.context for q in own], truncation="only_second", padding="max_length",
            max_length=text.seq_len or min(DEFAULT_LENGTH, tokenizer.model_max_length), return_tensors="pt",
            return_offsets_mapping=True,
        )  # fmt: skip
        offsets = rows.pop("offset_mapping").tolist()
        spans = [_tokens(q, rows.sequence_ids(i), offsets[i]) for i, q in enumerate(own)]
        starts, ends = (torch.tensor([span[side] for span in spans]) for side in (0, 1))
        made.append({**fitting(loaded.model, dict(rows)), "start_positions": starts, "end_positions": ends})
    return made[:-1] if len(made) > 1 and len(made[-1]["start_positions"]) < text.batch_size else made


def _tokens(question: Question, sequences: list[int | None], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The numbers of the answer's first and last token; (0, 0) where it is not among the tokens."""
    inside = [
        number
        for number, (sequence, (start, stop)) in enumerate(zip(sequences, offsets, strict=True))
        if sequence == 1 and start < question.stop and stop > question.start
    ]
    whole = inside and offsets[inside[-1]][1] >= question.stop
    return (inside[0], inside[-1]) if whole else (0, 0)
