"""For transformers' Trainer: callbacks that stop where the training went wrong, and that step a schedule.

Trainer(model, args, train_dataset=..., callbacks=[StopAtNaN(), Scheduled(start_after=50, bits={0: 8, 100: 4})])

Importing this imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qfx.errors import explain
from qfx.training.schedule import QATSchedule


class StopAtNaN(TrainerCallback):  # type: ignore[misc]
    """Raises ValueError at the first step whose gradients are NaN or infinite, naming the step and the parameters.

    The Trainer itself leaves such losses out of its log (`logging_nan_inf_filter`) and trains on. With `fp16=True` the
    scaler skips such steps, as it should: there the parameters themselves are looked at, after each step. It waits for
    the device once a step.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients, before they reach a weight."""
        if not args.fp16:
            grads = {n: p.grad for n, p in kwargs["model"].named_parameters() if p.grad is not None}
            _check(grads, "gradient", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With fp16, look at the parameters."""
        if args.fp16:
            model: nn.Module = kwargs["model"]
            _check({n: p for n, p in model.named_parameters() if p.requires_grad}, "value", state.global_step)


class Scheduled(TrainerCallback):  # type: ignore[misc]
    """A `qfx.QATSchedule` of these fields, from the step on at which the Trainer begins or resumes. The best model
    (`load_best_model_at_end`) is sought anew where formats change: scales of other formats do not fit."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.schedule: QATSchedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the schedule; a checkpoint has been loaded by now. What an earlier training of it froze learns again."""
        if self.schedule is not None and self.schedule.model is kwargs["model"]:
            self.schedule.unfreeze()
        self.schedule = QATSchedule(kwargs["model"], **self.fields, steps=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        assert self.schedule is not None
        self.schedule.step()
        if self.schedule.steps in (self.schedule.start_after, *self.schedule.bits):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


@torch.no_grad()
def _check(tensors: dict[str, torch.Tensor], what: str, step: int) -> None:
    norms = torch._foreach_norm(list(tensors.values())) if tensors else []
    if not norms or bool(torch.isfinite(torch.stack([norm.float().cpu() for norm in norms])).all()):
        return
    bad = [name for name, norm in zip(tensors, norms, strict=True) if not bool(torch.isfinite(norm))]
    raise ValueError(
        explain(
            f"step {step}: the {what} of {bad[0]!r} is NaN or infinite, {len(bad)} of {len(tensors)} in all",
            expected=f"finite {what}s",
            next_step="train on from the last checkpoint (resume_from_checkpoint) at a lower rate, or with "
            "max_grad_norm; look at the batch of this step",
        )
    )
