"""A text task that every Python carries: which module is this docstring from? A small head on MiniLM learns it.

    python examples/doc_task.py [--classes 16] [--epochs 20] [--seed 0]

The classes are the top-level modules of the standard library with most docstrings. The names of all classes are taken
out of the texts, a text that two modules share is left out, and the side of a text (training, calibration, held out) is
a hash of what it says and the seed. The encoder stays as it is: its mean state of each text is computed once, and a
hidden layer and an output layer are trained on these, which takes seconds.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

if __name__ == "__main__":  # import the sibling files as `python -m examples.doc_task` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from examples.demo import minilm
from examples.python_text import module_files, normal

SHORTEST = 40  # characters of a docstring that says something
MOST = 250  # docstrings of one module, so that none is the answer to most questions
LENGTH = 64  # tokens; longer texts are cut
LEFT_OUT = frozenset({"distutils"})  # not in every Python
SHARES = {"train": 0.45, "calibration": 0.15, "test": 0.4}  # of each module's docstrings
Batches = list[dict[str, Tensor]]
Side = Literal["train", "calibration", "test"]


@dataclass(frozen=True)
class Text:
    """A docstring without names of classes, and the number of its module in `Task.names`."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """names: the modules. sides: "train", "calibration" (labelled, not trained on) and "test"; no text is on two."""

    names: tuple[str, ...]
    sides: dict[Side, tuple[Text, ...]]


@cache
def docstrings() -> dict[str, list[str]]:
    """Top-level module -> the docstrings of its classes and functions, white space as single spaces, none twice."""
    homes: dict[str, set[str]] = defaultdict(set)
    for name, path in module_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for text in _pieces(tree):
            homes[text].add(name.partition(".")[0])
    found: dict[str, list[str]] = defaultdict(list)
    for text, modules in homes.items():
        if len(modules) == 1 and not LEFT_OUT & modules:
            found[next(iter(modules))].append(text)
    return found


def _pieces(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = normal(ast.get_docstring(node) or "")
            if len(text) >= SHORTEST:
                yield text


def without_names(text: str, names: tuple[str, ...]) -> str:
    """`text` less the words that are names of classes."""
    words = "|".join(re.escape(name.strip("_")) for name in names)
    return normal(re.sub(rf"\b_?({words})\b", " ", text, flags=re.IGNORECASE))


def task(*, classes: int = 16, seed: int = 0, most: int = MOST) -> Task:
    """The task of telling `classes` modules apart, by at most `most` docstrings each. The seed chooses the sides.

    Raises ValueError for fewer than two classes and for more than there are modules with docstrings.
    """
    found = docstrings()
    if not 2 <= classes <= len(found):
        raise ValueError(f"classes must be between 2 and {len(found)}, found {classes}")
    names = tuple(sorted(sorted(found, key=lambda name: (-len(found[name]), name))[:classes]))
    labels: dict[str, set[int]] = defaultdict(set)  # some texts differ in names alone
    for label, name in enumerate(names):
        for text in found[name]:
            labels[without_names(text, names)].add(label)
    sides: dict[Side, list[Text]] = {"train": [], "calibration": [], "test": []}
    for label in range(classes):
        own = [text for text, several in labels.items() if several == {label}]
        ranked = sorted(own, key=lambda text: _hash(f"{seed} {text}"))[:most]
        start = 0.0
        for side, share in SHARES.items():
            stop = start + share * len(ranked)
            sides[side] += [Text(text, label) for text in ranked[round(start) : round(stop)]]  # type: ignore[index]
            start = stop
    order = {side: tuple(sorted(texts, key=lambda t: _hash(f"order {seed} {t.text}"))) for side, texts in sides.items()}
    return Task(names, order)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def batches(tokenizer: Any, texts: tuple[Text, ...], *, size: int = 32, length: int = LENGTH) -> Batches:
    """Batches of input_ids and attention_mask [size, length] and labels [size], padded, in the order of the texts."""
    made = []
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        ids = tokenizer([t.text for t in part], truncation=True, max_length=length, padding="max_length",
                        return_tensors="pt")  # fmt: skip
        labels = torch.tensor([t.label for t in part])
        made.append({"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels})
    return made


class DocClassifier(nn.Module):
    """An encoder, the mean of its states over a text's tokens, a hidden layer, and logits of the classes."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """f32 [batch, width]: the mean state."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def head(self, features: Tensor) -> Tensor:
        """f32 [batch, classes] from [batch, width]."""
        logits: Tensor = self.output(functional.relu(self.hidden(features)))
        return logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits [batch, classes] of token ids and mask [batch, tokens]."""
        return SequenceClassifierOutput(logits=self.head(self.features(input_ids, attention_mask)))


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch: all but the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.no_grad()
def features(model: DocClassifier, data: Batches) -> Tensor:
    """f32 [texts, width]."""
    return torch.cat([model.features(**inputs(batch)) for batch in data])


def train_head(model: DocClassifier, x: Tensor, labels: Tensor, *, epochs: int = 20, seed: int = 0) -> None:
    """Train the two layers of the head on features x [texts, width] and labels [texts], in place. Adam, dropout 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.hidden, model.output):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            layer.bias.zero_()
    parameters = [*model.hidden.parameters(), *model.output.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            kept = torch.rand(x[rows].shape, generator=generator) >= 0.2
            loss = functional.cross_entropy(model.head(x[rows] * kept / 0.8), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def trained(
    found: Task, *, seed: int = 0, epochs: int = 20, length: int = LENGTH
) -> tuple[DocClassifier, dict[Side, Batches]]:
    """The classifier in eval mode, and the batches of each side. The head's numbers depend on the seed."""
    loaded = minilm()
    config: Any = loaded.model.config
    model = DocClassifier(loaded.model, config.hidden_size, len(found.names)).eval()
    sides = {side: batches(loaded.tokenizer, texts, length=length) for side, texts in found.sides.items()}
    train_head(model, features(model, sides["train"]), labels_of(sides["train"]), epochs=epochs, seed=seed)
    return model, sides


def labels_of(data: Batches) -> Tensor:
    """int64 [texts]."""
    return torch.cat([batch["labels"] for batch in data])


@torch.no_grad()
def logits(model: Any, data: Batches) -> Tensor:
    """f32 [texts, classes]."""
    return torch.cat([model(**inputs(batch)).logits for batch in data]).float()


def judged(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers, and mean cross-entropy in nats."""
    right = (found.argmax(-1) == labels).double().mean()
    return {"accuracy": float(right), "loss": float(functional.cross_entropy(found.double(), labels))}


def main(
    classes: Annotated[int, typer.Option(help="Modules to tell apart.")] = 16,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Sides of the texts, and the head.")] = 0,
) -> None:
    """Train the head, and tell how well it answers."""
    found = task(classes=classes, seed=seed)
    model, sides = trained(found, seed=seed, epochs=epochs)
    console = Console()
    console.print(f"{len(found.names)} modules: {', '.join(found.names)}")
    for side, data in sides.items():
        labels = labels_of(data)
        figures = judged(logits(model, data), labels)
        most = float(labels.bincount().max()) / len(labels)
        console.print(
            f"{side}: {len(labels)} texts, accuracy {figures['accuracy']:.3f} (the commonest module: {most:.3f}), "
            f"loss {figures['loss']:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
