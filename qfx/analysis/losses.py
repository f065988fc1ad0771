"""What gradients are taken of: the model's own distribution, or a task's loss.

    loss = "classification"                                    a preset: `batch["labels"]`, `outputs.logits`
    loss = lambda outputs, batch: ...                          any callable that gives a scalar, or one value a sample

Without a task the labels are drawn from the model's own distribution p. E[g g^T] is then its Fisher information, and a
small change d of the weights gives KL(p || p') = d^T E[g g^T] d / 2 (Amari 1998; Kunstner et al. 2019, "Limitations of
the empirical Fisher approximation"). With the text's own labels it would be a mere estimate of that. A model without
logits is taken as the mean of a normal distribution: g is the gradient of the sum of outputs times normal noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qfx.calibration.padding import predicted
from qfx.errors import explain, nearest

Loss = Callable[[Any, Any], Tensor]
LABELS = ("labels", "label", "start_positions", "end_positions")  # entries of a batch that are for the loss alone
_IGNORED = -100
_ELEMENTS = 1 << 22  # logits whose loss is computed at once
_TEMPERATURE = 0.05  # of similarities, as SimCSE has it (Gao et al. 2021)


class Outputs(dict[str, Any]):
    """A model's outputs by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the model has no output {name!r}, {nearest(name, self)}")
        return self[name]


class Objective(Protocol):
    """What is differentiated. factor: what half the mean squared change of the loss is to be multiplied by."""

    @property
    def factor(self) -> float: ...

    def __call__(self, outputs: Sequence[Any], number: int, samples: int) -> tuple[Tensor, float]:
        """(sum over the samples of batch `number`, counted from 0; by what mean squares are divided)."""


@dataclass
class General:
    """The model's own distribution. main: the number of its output. masks: positions [B, T] of each batch that count,
    None where all do. Labels are drawn anew with the seed for each batch."""

    main: int
    is_logits: bool
    masks: Sequence[Tensor | None]
    seed: int = 0

    @property
    def factor(self) -> float:
        return 0.5 if self.is_logits else 1.0

    def __call__(self, outputs: Sequence[Any], number: int, samples: int) -> tuple[Tensor, float]:
        value = outputs[self.main].float()
        mask = self.masks[number]
        if mask is not None and mask.shape == value.shape[:-1] and not mask.all():  # what is taken is a copy
            value = value[mask]
        random = torch.Generator(value.device).manual_seed(self.seed + number)
        rows = value.reshape(-1, value.shape[-1])
        if self.is_logits:
            labels = torch.multinomial(rows.detach().softmax(-1), 1, generator=random)[:, 0]
            return _CrossEntropy.apply(rows, labels), len(rows)  # type: ignore[no-untyped-call]
        noise = torch.randn(rows.shape, generator=random, device=rows.device)
        return (rows * noise).sum(), float(rows.detach().square().sum(dtype=torch.float64))


@dataclass
class Task:
    """A loss of outputs and batches. names: of the graph's outputs; one alone is given to the loss as it is."""

    loss: Loss
    batches: Sequence[Any]
    names: Sequence[str]
    name: str = "task"
    factor: float = field(default=0.5, init=False)

    def __call__(self, outputs: Sequence[Any], number: int, samples: int) -> tuple[Tensor, float]:
        value = self.value(outputs, number)
        if not isinstance(value, Tensor) or value.dim() > 1 or not value.requires_grad:
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                explain(
                    f"the loss {self.name!r} of batch {number + 1} cannot be differentiated",
                    expected="a tensor with a gradient: one value for the batch, or one a sample",
                    found=f"{found}{', without a gradient' if isinstance(value, Tensor) else ''}",
                )
            )
        return (value.sum() if value.dim() else value * samples), samples

    def value(self, outputs: Sequence[Any], number: int) -> Tensor:
        """What the loss gives for batch `number`."""
        alone = len(outputs) == 1 and tuple(self.names) in ((), ("output",))
        return self.loss(outputs[0] if alone else Outputs(zip(self.names, outputs, strict=True)), self.batches[number])


class _CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of rows of logits f32 [N, C] with labels [N]. Logits are many: what is held is their
    gradient, which is found some rows after the other, and no probabilities."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor) -> Tensor:
        slope, total = torch.empty_like(rows), rows.new_zeros(())
        step = max(1, _ELEMENTS // max(1, rows.shape[-1]))
        for start in range(0, len(rows), step):
            at = slice(start, start + step)
            with torch.enable_grad():
                part = rows[at].detach().requires_grad_()
                loss = functional.cross_entropy(part, labels[at], reduction="sum")
            (slope[at],) = torch.autograd.grad(loss, [part])
            total += loss.detach()
        ctx.slope = slope
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        own, ctx.slope = ctx.slope, None  # once: nothing is held by what has been differentiated
        return own.mul_(slopes[0]), None


def find(loss: str | Loss) -> tuple[str, Loss]:
    """(name, function) of a preset or a callable. Raises ValueError for other names."""
    if isinstance(loss, str):
        if loss not in PRESETS:
            raise ValueError(f"there is no loss {loss!r}, {nearest(loss, PRESETS)}; or pass loss(outputs, batch)")
        return loss, PRESETS[loss]
    if not callable(loss):
        raise ValueError(f"a loss is a preset's name or a callable, found {type(loss).__name__}")
    return getattr(loss, "__name__", type(loss).__name__), loss


def need(batch: Any, names: Sequence[str], task: str) -> list[Tensor]:
    """The labels of a batch. Raises ValueError where one is missing."""
    held = batch if isinstance(batch, Mapping) else {}
    missing = [name for name in names if name not in held]
    if missing:
        raise ValueError(
            explain(
                f"the task {task!r} needs labels, and a batch has no {missing[0]!r}",
                expected=f"batches with {', '.join(map(repr, names))}",
                found=", ".join(map(str, held)) or type(batch).__name__,
                next_step="put the labels into each batch under that name; they are kept from the model itself",
            )
        )
    return [held[name] for name in names]


def causal_lm(outputs: Any, batch: Any) -> Tensor:
    """Next-token cross-entropy [B] in nats, mean over tokens. labels: `labels` (-100 is left out), else `input_ids`."""
    first = batch[0] if isinstance(batch, list | tuple) else batch
    held = batch if isinstance(batch, Mapping) else {"input_ids": first}
    labels = held["labels"] if "labels" in held else need(held, ["input_ids"], "causal-lm")[0]
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    if "attention_mask" in held:
        targets = targets.masked_fill(~predicted(held["attention_mask"]), _IGNORED)
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none")
    return losses.view(targets.shape).sum(1) / (targets != _IGNORED).sum(1).clamp_min(1)


def classification(outputs: Any, batch: Any) -> Tensor:
    """Cross-entropy [B] of logits [B, C] (or [B, T, C] of tokens) with the classes `labels`."""
    (labels,) = need(batch, ["labels"], "classification")
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    losses = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=_IGNORED, reduction="none"
    )
    return losses.view(len(labels), -1).sum(1) / (labels.view(len(labels), -1) != _IGNORED).sum(1).clamp_min(1)


def question_answering(outputs: Any, batch: Any) -> Tensor:
    """Cross-entropy [B] of `start_positions` and `end_positions`, their mean; those beyond the text do not count."""
    start, end = need(batch, ["start_positions", "end_positions"], "qa")
    each = [
        functional.cross_entropy(logits, at.clamp(0, logits.shape[1]), ignore_index=logits.shape[1], reduction="none")
        for logits, at in ((outputs.start_logits, start), (outputs.end_logits, end))
    ]
    return (each[0] + each[1]) / 2


def embedding(outputs: Any, batch: Any) -> Tensor:
    """Contrastive loss [B] of texts: mean hidden states that share a number in `labels` shall be near to each other.

    A batch needs two texts of one number at least; others than those have no loss (Khosla et al. 2020).
    """
    (labels,) = need(batch, ["labels"], "embedding")
    states = outputs if isinstance(outputs, Tensor) else outputs.last_hidden_state
    if states.dim() == 3:
        mask = batch.get("attention_mask", torch.ones(states.shape[:2], device=states.device))[..., None]
        states = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
    texts = functional.normalize(states.float(), dim=-1)
    itself = torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    near = (texts @ texts.T / _TEMPERATURE).masked_fill(itself, -torch.inf).log_softmax(-1).masked_fill(itself, 0)
    same = (labels[:, None] == labels) & ~itself
    if not same.any():
        raise ValueError("the task 'embedding' needs two texts of one label in a batch, found none")
    return -(near * same).sum(1) / same.sum(1).clamp_min(1)


PRESETS: dict[str, Loss] = {
    "causal-lm": causal_lm, "classification": classification, "qa": question_answering, "embedding": embedding,
}  # fmt: skip
