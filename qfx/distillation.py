"""Knowledge distillation: a quantized student follows the float model's distribution."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qfx.errors import explain


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
