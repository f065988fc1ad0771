"""The loss of a student against its teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfx import distillation_loss, hidden_state_loss
from qfx.measuring import measure


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
        ({"temperature": 0.0}, "above 0 and finite, found 0.0"),
        ({"temperature": torch.inf}, "above 0 and finite, found inf"),
        ({"mask": torch.ones(3)}, r"mask of shape \[2\] is needed, found \[3\]"),
        ({"mask": torch.zeros(2)}, "no position counts"),
    ],
)
def test_bad_input(fields: dict[str, Tensor], message: str) -> None:
    given = {"teacher": logits(1, 2, 3), **fields}
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(0, 2, 3), **given)  # type: ignore[arg-type]


def test_what_padding_holds_reaches_no_gradient() -> None:
    """Rows of attention that see nothing give NaN; they lie at positions that do not count."""
    mask = torch.tensor([[True, True, False]])
    teacher = torch.randn(1, 3, 8)
    broken = teacher.masked_fill(~mask[..., None], torch.nan)
    losses: list[Any] = [distillation_loss, lambda s, t, mask: hidden_state_loss([s], [t], mask=mask)]
    for loss in losses:
        grads: list[Any] = []
        for other in (teacher, broken):
            student = torch.ones(1, 3, 8, requires_grad=True)
            loss(student, other, mask=mask).backward()
            grads.append(student.grad)
        assert torch.equal(grads[0], grads[1]) and not bool(grads[1][~mask].any())


@pytest.mark.parametrize("masked_too", [False, True])
def test_words_that_the_teacher_never_says_count_as_nothing(masked_too: bool) -> None:
    teacher = torch.randn(2, 8)
    teacher[:, 5:] = -torch.inf
    student = torch.randn(2, 8)
    if masked_too:
        student[:, 5:] = -torch.inf
    student.requires_grad_()
    loss = distillation_loss(student, teacher)
    p, q = teacher.softmax(-1)[:, :5], student.softmax(-1)[:, :5]
    assert torch.allclose(loss, (p * (p / q).log()).sum(-1).mean(), atol=1e-6)
    loss.backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach().softmax(-1) - teacher.softmax(-1)) / 2, atol=1e-6)


def test_states_are_compared_layer_by_layer() -> None:
    """An error of a tenth of the states costs a hundredth, however large a layer's states are."""
    teacher = [logits(0, 2, 3, 8), 1000 * logits(1, 2, 3, 8)]
    student = [1.1 * teacher[0], teacher[1].clone()]
    assert float(hidden_state_loss(student, teacher)) == pytest.approx(0.01 / 2, rel=1e-4)
    student[1] *= 0.9
    assert float(hidden_state_loss(student, teacher)) == pytest.approx(0.01, rel=1e-4)
    assert float(hidden_state_loss(teacher, teacher)) == 0


def test_masked_states_have_no_part() -> None:
    teacher, mask = [logits(0, 2, 3, 8)], torch.tensor([[True, False, True], [False, False, True]])
    student = [teacher[0] + 5.0 * ~mask[..., None]]
    assert float(hidden_state_loss(student, teacher)) > 1
    assert float(hidden_state_loss(student, teacher, mask=mask)) == 0


def test_states_of_half_precision_have_a_gradient_and_the_teacher_has_none() -> None:
    student, teacher = logits(0, 4, 8).bfloat16().requires_grad_(), logits(1, 4, 8).bfloat16().requires_grad_()
    loss = hidden_state_loss([student], [teacher])
    loss.backward()
    assert loss.dtype == torch.float32 and teacher.grad is None and student.grad is not None
    s, t = student.detach().float(), teacher.detach().float()
    assert torch.allclose(student.grad.float(), 2 * (s - t) / t.square().sum(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ([], [], {}, "found 0 and 0"),
        ([(2, 3)], [(2, 3), (2, 3)], {}, "found 1 and 2"),
        ([(2, 3), (2, 3)], [(2, 3), (2, 4)], {}, r"student \[2, 3\] and teacher \[2, 4\] in layer 1"),
        ([(2, 3)], [(2, 3)], {"mask": torch.ones(3)}, r"mask of shape \[2\] is needed, found \[3\]"),
        ([(2, 3)], [(2, 3)], {"mask": torch.zeros(2)}, "no position counts"),
    ],
)
def test_states_that_cannot_be_compared(student: Any, teacher: Any, options: dict[str, Tensor], message: str) -> None:
    first, second = ([logits(0, *shape) for shape in shapes] for shapes in (student, teacher))
    with pytest.raises(ValueError, match=message):
        hidden_state_loss(first, second, **options)
