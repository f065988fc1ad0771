"""Knowledge distillation: a quantized student follows the float model's distribution, and its hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qfx.errors import explain
from qfx.numerics import TINY


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) of logits [..., V] at temperature T, the mean over positions, in nats; f32, shape ().

    mask: bool [...], the positions that count (None: all). The teacher gets no gradient. Hinton et al. 2015, section 2.
    Raises ValueError where shapes differ, for a temperature that is not above 0 and a mask that leaves nothing.
    """
    if student.shape != teacher.shape or student.dim() == 0:
        raise ValueError(
            f"logits of one shape are needed, found student {list(student.shape)} and teacher {list(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"a temperature is above 0, found {temperature}")
    found = functional.log_softmax(student.float() / temperature, -1)
    wanted = functional.log_softmax(teacher.detach().float() / temperature, -1)
    each = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    if mask is not None:
        if mask.shape != each.shape:
            raise ValueError(f"a mask of shape {list(each.shape)} is needed, found {list(mask.shape)}")
        each = each[mask.bool()]
    if each.numel() == 0:
        raise ValueError(explain("no position counts", next_step="a mask with at least one true value"))
    return each.mean() * temperature**2


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """sum (s - t)^2 / sum t^2 of hidden states [..., D], the mean over layers; f32, shape ().

    student, teacher: one tensor for each layer, such as `hidden_states` of a model of transformers that is called with
    output_hidden_states=True. Relative to the teacher's squares, that layers of large states weigh as much as others;
    else as in Jiao et al. 2020 (TinyBERT, section 3.1). mask: bool [...], the positions that count (None: all). The
    teacher gets no gradient. Raises ValueError where layers or shapes differ, and where nothing counts.
    """
    student, teacher = list(student), list(teacher)
    shapes = [[list(state.shape) for state in states] for states in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise ValueError(
            explain(
                "hidden states of the same layers and shapes are needed",
                found=f"student {shapes[0]} and teacher {shapes[1]}",
                next_step="call both with output_hidden_states=True, and give .hidden_states",
            )
        )
    losses = []
    for own, other in zip(student, teacher, strict=True):
        found, wanted = own.float(), other.detach().float()
        if mask is not None:
            if mask.shape != own.shape[:-1]:
                raise ValueError(f"a mask of shape {list(own.shape[:-1])} is needed, found {list(mask.shape)}")
            found, wanted = found[mask.bool()], wanted[mask.bool()]
        if found.numel() == 0:
            raise ValueError(explain("no position counts", next_step="a mask with at least one true value"))
        losses.append((found - wanted).square().sum() / wanted.square().sum().clamp(min=TINY))
    return torch.stack(losses).mean()
