"""Settings of the methods that `Recipe.rounding` names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qfx.strict import Strict


class GptqOptions(Strict):
    """How `rounding="gptq"` goes about it.

    act_order: input channels of great energy first (scales then stay those of the weights as they are), else in their
    own order (the scales of a group are found when it is reached). dampening: share of the mean energy that is added to
    each channel's; grows where it is not enough. asymmetric: make good what earlier layers lost, too (GPTAQ). clip:
    scales that clip where the error, weighted by energy, is least.
    """

    act_order: Annotated[bool, Field(strict=True)] = True
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.01
    asymmetric: Annotated[bool, Field(strict=True)] = False
    clip: Annotated[bool, Field(strict=True)] = False


class LearnedOptions(Strict):
    """How `rounding="learned"` goes about it.

    steps: of gradient descent for each block. batch: samples that a step looks at, in whole batches of the data.
    learning_rate: of the first step, in steps of the format; it falls to 0 (None: 2 / steps; signs: 1 / steps).
    optimizer: "adam", or "sign" as AutoRound has it.
    """

    steps: Annotated[int, Field(strict=True, ge=0)] = 150
    batch: Annotated[int, Field(strict=True, ge=1)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer: Literal["adam", "sign"] = "adam"
