"""How much perplexity on the batches of a `Measure` rises with an assignment of formats."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from qfx.allocation.problem import Assignment
from qfx.analysis.measured import Measure
from qfx.calibration.padding import predicted
from qfx.errors import explain
from qfx.measuring import measure as functions


class Perplexity:
    """measure: of a language model, whose batches have input_ids [B, T] and whose main output is logits [B, T, V].

    Raises ValueError for other models: max_loss is about perplexity.
    """

    def __init__(self, measure: Measure) -> None:
        names = [node.meta.get("qfx_name", node.name) for node in measure.program.inputs]
        if "input_ids" not in names or not measure.is_kld:
            raise ValueError(
                explain(
                    "max_loss is a rise of perplexity, which this model does not have",
                    expected="input_ids [B, T] and logits [B, T, V] of the next token",
                    found=f"inputs {', '.join(names)}; the main output is {measure.output}",
                    next_step="give a budget: avg_bits, max_bytes or ratio",
                )
            )
        at = names.index("input_ids")
        mask = names.index("attention_mask") if "attention_mask" in names else None
        self.measure = measure
        self.ids: list[Tensor] = [batch[at] for batch in measure.batches]
        self.masks = [None if mask is None else batch[mask] for batch in measure.batches]
        self.reference = self._nll(measure.outputs({}))

    def rise(self, assignment: Assignment) -> float:
        """In percent of the float model's perplexity."""
        return 100 * (functions.exp(self._nll(self.measure.outputs(assignment)) - self.reference) - 1)

    def _nll(self, outputs: Iterable[Tensor]) -> float:
        """Mean negative log likelihood of the tokens that are there, the first of each text aside."""
        total = count = 0.0
        for logits, ids, mask in zip(outputs, self.ids, self.masks, strict=True):
            each = functions.nll(logits, ids)
            kept = each if mask is None or mask.shape != ids.shape else each[predicted(mask)]
            total, count = total + float(kept.sum()), count + kept.numel()
        return total / count if count else math.nan
