"""`qfx analyze`: where a model is sensitive to few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qfx.cli.models import DEFAULT_LENGTH, TextOptions, batches, check_device
from qfx.cli.questions import question_batches, read_questions
from qfx.cli.terminal import step
from qfx.data import fitting, python_help, read_texts, records
from qfx.hf import hub

_FIELDS = {
    "classification": "{text!r} and {label!r}", "embedding": "{text!r} and {label!r}",
    "qa": "'question', 'context' and 'answer'",
}  # fmt: skip
_SAMPLES = 64


@dataclass(frozen=True)
class Asked:
    """What `qfx.analyze` is told; label: the field of a .jsonl file that holds a text's label."""

    task: str | None
    label: str
    method: str
    units: str
    formats: list[str] | None
    recipe: str | None
    measure: int
    task_weight: float


def run(
    console: Console, model: str, text: TextOptions, asked: Asked, *, device: str, rows: int, json_file: Path | None,
    html_file: Path | None, strict: bool,
) -> None:  # fmt: skip
    """Load, read data, analyze, show; what can be refused without the model is refused first."""
    from qfx.analysis.analyze import analyze
    from qfx.analysis.losses import find
    from qfx.analysis.score import FORMATS, Options

    Options(method=asked.method, formats=tuple(asked.formats or FORMATS), by=asked.units, measure=asked.measure,  # type: ignore[arg-type]
            task_weight=asked.task_weight)  # fmt: skip
    if html_file is not None:
        from qfx.pictures.canvas import figure

        figure(1, 1)  # refuses where there is no matplotlib
    if asked.task is not None:
        find(asked.task)
    place = check_device(device)
    labelled = asked.task in _FIELDS
    if labelled and (text.file is None or text.file.suffix.lower() not in (".jsonl", ".ndjson")):
        raise ValueError(
            f"the task {asked.task!r} needs labels\n  expected: --data FILE.jsonl with fields "
            f"{_FIELDS[str(asked.task)].format(text=text.field, label=asked.label)} in each line\n"
            f"  found: {text.file or 'no data'}"
        )
    read = _reader(text, asked)
    with step(console, f"load {model}"):
        loaded = hub.load(model, device=place)
    made = read(loaded)
    with step(console, f"analyze {len(made)} batches", spinner=False):
        found = analyze(
            loaded.model, made, loss=asked.task, method=asked.method, formats=asked.formats, units=asked.units,  # type: ignore[arg-type]
            recipe=asked.recipe, measure=asked.measure, task_weight=asked.task_weight, seed=text.seed, strict=strict,
        )  # fmt: skip
    found.show(console, rows=rows)
    if json_file is not None:
        found.save(json_file)
    if html_file is not None:
        from qfx.pictures.report import analysis

        analysis(found, title=f"Sensitivity of {Path(model).name}").write(html_file)


def _reader(text: TextOptions, asked: Asked) -> Callable[[hub.Loaded], list[dict[str, Any]]]:
    """What makes batches for a model; the file is read before the model is."""
    samples = text.samples or _SAMPLES
    if text.file is not None and asked.task == "qa":
        questions = read_questions(text.file)
        return lambda loaded: question_batches(loaded, questions, text, samples)
    texts = python_help() if text.file is None else read_texts(text.file, text.field)
    if text.file is None or asked.task not in _FIELDS:
        return lambda loaded: batches(loaded, texts, text, samples)
    labels = read_labels(text.file, asked.label)
    return lambda loaded: pairs(loaded, texts, labels, text, samples)


def read_labels(file: Path, field: str) -> list[int]:
    """The labels of a .jsonl file: numbers as they are, texts by their order. Raises ValueError for a line without."""
    found: list[Any] = []
    for where, held in records(file):
        value = held.get(field)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"{where} has no label in the field {field!r}\n  next step: --label NAME")
        found.append(value)
    if all(isinstance(value, int) for value in found):
        return found
    order = {name: i for i, name in enumerate(sorted(set(map(str, found))))}
    return [order[str(value)] for value in found]


def pairs(
    loaded: hub.Loaded, texts: list[str], labels: list[int], text: TextOptions, samples: int
) -> list[dict[str, Any]]:
    """Batches of padded texts with their `labels`, drawn in the order that the seed gives."""
    if loaded.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so text cannot become token ids\n  next step: save one into its folder"
        )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(text.seed))[:samples]
    made = []
    for part in order.split(text.batch_size):
        rows = loaded.tokenizer(
            [texts[i] for i in part.tolist()], padding="max_length", truncation=True,
            max_length=text.seq_len or min(DEFAULT_LENGTH, loaded.tokenizer.model_max_length), return_tensors="pt",
        )  # fmt: skip
        batch = fitting(loaded.model, dict(rows))
        made.append({**batch, "labels": torch.tensor([labels[i] for i in part.tolist()])})
    return made[:-1] if len(made) > 1 and len(made[-1]["labels"]) < text.batch_size else made
