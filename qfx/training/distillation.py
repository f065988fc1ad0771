"""Knowledge distillation: a quantized student follows the float model's distribution, and the states behind it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, finfo, float32, stack
from torch.nn import functional

from qfx.errors import explain


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(teacher || student) of logits [..., V] at temperature T, the mean over positions, in nats; f32, shape ().

    mask: bool [...], the positions that count (None: all), others may hold NaN. The teacher gets no gradient. Words to
    which it gives none of the probability (-inf) count as nothing. Hinton et al. 2015, section 2.
    Raises ValueError where shapes differ, for a temperature that is not above 0 and finite, and a mask that leaves
    nothing.
    """
    if student.shape != teacher.shape or student.dim() == 0:
        raise ValueError(
            f"logits of one shape are needed, found student {list(student.shape)} and teacher {list(teacher.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"a temperature is above 0 and finite, found {temperature}")
    student, teacher = _counted(student, mask), _counted(teacher.detach(), mask)
    least = finfo(float32).min  # -inf less -inf is NaN
    found = functional.log_softmax(student.float() / temperature, -1).clamp(min=least)
    wanted = functional.log_softmax(teacher.float() / temperature, -1).clamp_(min=least)
    each = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return each.mean() * temperature**2


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """The mean over layers of |s - t|^2 / |t|^2, of states s and t [..., D] of one layer each; f32, shape ().

    student, teacher: as `model(..., output_hidden_states=True).hidden_states` gives them; leave out the first, which no
    layer has changed, and layers that need not follow. mask: bool [...], the positions that count (None: all), others
    may hold NaN. The teacher gets no gradient. The intermediate loss of Jiao et al. 2020 ("TinyBERT", equation 8), each
    layer's error relative to its states, so that layers count alike. A rewrite that rotates the residual stream gives
    the student states in another basis: there this loss says nothing.
    Raises ValueError where numbers of layers or shapes differ, for no layer and a mask that leaves nothing.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"states of the same layers are needed, found {len(student)} and {len(teacher)}")
    found = []
    for i, (own, wanted) in enumerate(zip(student, teacher, strict=True)):
        if own.shape != wanted.shape or own.dim() == 0:
            shapes = f"student {list(own.shape)} and teacher {list(wanted.shape)}"
            raise ValueError(f"states of one shape are needed, found {shapes} in layer {i}")
        t = _counted(wanted.detach(), mask).float()
        error, size = (_counted(own, mask).float() - t).square().sum(-1), t.square().sum(-1)
        found.append(error.mean() / size.mean().clamp(min=1e-12))
    return stack(found).mean()


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of values [..., D] at the positions that count."""
    if mask is not None:
        if mask.shape != values.shape[:-1]:
            raise ValueError(f"a mask of shape {list(values.shape[:-1])} is needed, found {list(mask.shape)}")
        values = values[mask.bool()]
    if values[..., 0].numel() == 0:
        raise ValueError(explain("no position counts", next_step="a mask with at least one true value"))
    return values
