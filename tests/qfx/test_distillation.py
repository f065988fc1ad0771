"""The loss of a student against its teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx import distillation_loss, hidden_state_loss, measure


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_kl_divergence_that_is_measured() -> None:
    student, teacher = logits(0, 2, 5, 7), logits(1, 2, 5, 7)
    assert float(distillation_loss(student, teacher)) == pytest.approx(measure.kld(teacher, student), rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == 0


def test_the_temperature_keeps_the_size_of_gradients() -> None:
    """At a high temperature the loss tends to half the variance of the difference, whatever T (Hinton, section 2.1)."""
    student, teacher = logits(0, 3, 50), logits(1, 3, 50)
    wanted = float((teacher - student).var(-1, correction=0).mean()) / 2
    assert float(distillation_loss(student, teacher, temperature=200.0)) == pytest.approx(wanted, rel=0.02)


def test_positions_can_be_left_out() -> None:
    student, teacher = logits(0, 2, 4, 6), logits(1, 2, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    wanted = measure.kld(teacher[mask.bool()], student[mask.bool()])
    assert float(distillation_loss(student, teacher, mask=mask)) == pytest.approx(wanted, rel=1e-5)


def test_the_gradient_is_the_difference_of_probabilities_and_the_teacher_gets_none() -> None:
    student, teacher = logits(0, 1, 6).requires_grad_(), logits(1, 1, 6).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    assert torch.allclose(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach(), atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = logits(0, 2, 9).half(), logits(1, 2, 9).half()
    assert distillation_loss(student, teacher).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": logits(1, 2, 4)}, r"student \[2, 3\] and teacher \[2, 4\]"),
        ({"temperature": 0.0}, "above 0, found 0.0"),
        ({"mask": torch.ones(3)}, r"mask of shape \[2\] is needed, found \[3\]"),
        ({"mask": torch.zeros(2)}, "no position counts"),
    ],
)
def test_bad_input(fields: dict[str, Tensor], message: str) -> None:
    given = {"teacher": logits(1, 2, 3), **fields}
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(0, 2, 3), **given)  # type: ignore[arg-type]


def test_hidden_states_count_alike_whatever_their_size() -> None:
    teacher = [logits(layer, 2, 4, 6) * 100.0**layer for layer in (0, 1)]
    student = [(state * 1.1).requires_grad_() for state in teacher]
    loss = hidden_state_loss(student, teacher)
    assert float(loss.detach()) == pytest.approx(0.01, rel=1e-4)
    loss.backward()
    wanted = 0.5 * 2 * 0.1 * teacher[0] / teacher[0].square().sum()
    assert student[0].grad is not None and torch.allclose(student[0].grad, wanted, rtol=1e-4)
    assert float(hidden_state_loss(teacher, teacher)) == 0


def test_hidden_states_of_some_positions() -> None:
    teacher, mask = logits(0, 2, 3, 5), torch.tensor([[1, 0, 0], [1, 1, 0]])
    student = torch.where(mask.bool()[..., None], 2 * teacher, torch.full_like(teacher, torch.nan))
    assert float(hidden_state_loss([student], [teacher], mask=mask)) == pytest.approx(1)
    assert hidden_state_loss([teacher.half()], [teacher.half()]).dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        ([], [], None, "output_hidden_states"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)] * 2, None, r"student \[\[2, 3\]\] and teacher \[\[2, 3\], \[2, 3\]\]"),
        ([torch.ones(2, 3)], [torch.ones(2, 4)], None, "same layers and shapes"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)], torch.ones(3), r"mask of shape \[2\]"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)], torch.zeros(2), "at least one true"),
    ],
)
def test_bad_hidden_states(student: list[Tensor], teacher: list[Tensor], mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hidden_state_loss(student, teacher, mask=mask)
