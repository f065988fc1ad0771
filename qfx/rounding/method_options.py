"""Settings of the methods that a recipe names: of rounding, of allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from qfx.format import Format
from qfx.strict import Strict

WAYS = ("heads", "edges", "max_loss")
BUDGETS = ("avg_bits", "max_bytes", "ratio", "max_loss", "max_memory")
CANDIDATES = (*(f"u{b}/g{g}/f16" for b in (2, 3, 4, 5, 6) for g in (16, 32, 64)), "i8/g64/f16", "f16")


def _candidate(value: object) -> str:
    fmt = value if isinstance(value, Format) else Format.parse(value)  # type: ignore[arg-type]
    if fmt.dynamic or fmt.granularity == "head":
        raise ValueError(f"'{fmt}' is no format of a weight")
    return str(fmt)


def changed(options: object, value: object) -> object:
    """What a field is to hold that holds `options`: of a mapping those, with what it names in place of theirs; where
    one of several may be given, as of budgets, in place of any. Else the value."""
    if not isinstance(options, Strict) or not isinstance(value, Mapping):
        return value
    gone = {name for one_of in (WAYS, BUDGETS) if not set(one_of).isdisjoint(value) for name in one_of}
    return {**{name: getattr(options, name) for name in type(options).model_fields if name not in gone}, **value}


CandidateText = Annotated[str, BeforeValidator(_candidate)]


class GptqOptions(Strict):
    """How `rounding="gptq"` goes about it.

    act_order: input channels of great energy first (scales then stay those of the weights as they are), else in their
    own order (the scales of a group are found when it is reached). dampening: share of the mean energy that is added to
    each channel's; grows where it is not enough. asymmetric: make good what earlier layers lost, too (GPTAQ). clip:
    scales that clip where the error, weighted by energy, is least. sweeps: over all codes and scales once more, by
    coordinate descent on what GPTQ minimizes. As published, with neither: clip=False, sweeps=0.
    """

    act_order: Annotated[bool, Field(strict=True)] = True
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.01
    asymmetric: Annotated[bool, Field(strict=True)] = False
    clip: Annotated[bool, Field(strict=True)] = True
    sweeps: Annotated[int, Field(strict=True, ge=0, le=100)] = 2


class LearnedOptions(Strict):
    """How `rounding="learned"` goes about it.

    steps: of gradient descent for each block. batch: samples that a step looks at, in whole batches of the data.
    learning_rate: of the first step, in steps of the format; it falls to 0 (None: 2 / steps; signs: 1 / steps).
    optimizer: "adam", or "sign" as AutoRound has it. reach: how far a weight may move from where it was, in steps of
    the format: by 0.5 it takes either neighbour, by 1 and more it is trained, block by block, for which more steps, a
    higher rate and more data pay (EfficientQAT's first phase; the second is `qfx.prepare_qat` with train="scales").
    """

    steps: Annotated[int, Field(strict=True, ge=0)] = 100
    batch: Annotated[int, Field(strict=True, ge=1)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    optimizer: Literal["adam", "sign"] = "adam"
    reach: Annotated[float, Field(ge=0.5, le=256)] = 0.5


class LiftOptions(Strict):
    """What is lifted from the formats of a recipe's rules to more bits (see `qfx.allocation.simple`), in one way:

    heads: this share of the attention heads, those first whose quantization costs most. edges: so many layers at either
    end. max_loss: as few layers, those first that cost most, as let perplexity on the data rise by at most so many
    percent. format: that of what is lifted. samples: positions of the data on which is measured.
    """

    heads: Annotated[float, Field(gt=0, le=1)] | None = None
    edges: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_loss: Annotated[float, Field(gt=0)] | None = None
    format: CandidateText = "i8/g32/f16"
    samples: Annotated[int, Field(strict=True, ge=1)] = 2048

    @model_validator(mode="after")
    def _valid(self) -> Self:
        given = {name: value for name in WAYS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            found = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise ValueError(f"one of heads, edges and max_loss says what is lifted, found {found}")
        return self


class AllocationOptions(Strict):
    """Which format each unit of a model gets (`qfx.analysis.units`), under one budget.

    avg_bits: of the weights that get formats, scales, zero points and padding counted. max_bytes: of all weights and
    buffers of the model. ratio: of the bytes that those weights have in 16 bits, from 0 to 1. max_loss: the least bytes
    with which perplexity on the data rises by no more than this many percent. max_memory: bytes of a device, for all
    weights, the caches of `batch` sequences of `context` tokens (`cache`: their format; None: that of rules for
    "cache") and the activations of one token more (of all `context` tokens, for a model that has no cache).
    units: "layers" (weights whole), or "heads": of these the weights of attentions are cut into the rows and columns of
    each head where that loses less on data that nothing else was measured on. formats: candidates of linears and
    experts; embeddings: of tables. method: what predicts the loss: a method of `qfx.analyze` (those without the scale
    of a divergence are brought to it by some measurements), or "measured": each unit is measured once, in `probe`, and
    its other formats are told by the error of the weight. task_weight: share of the task where there is one, in what
    is predicted and in what is measured. refine: how many assignments are measured to improve the first one, and up to
    half as many again for cuts by heads; 0: none. samples: positions of the data on which is measured; as many behind
    them, where there are, are kept apart.
    ties: "qkv" (all rows of q, k and v of an attention have one format), "groups" (the Q rows, and the O columns, of
    the query heads of a KV head have one). classes: most different numbers of bits in a layer. tile: rows (columns) of
    any one format in a weight of heads come in multiples of this. seconds: limit of the exact solver.
    """

    avg_bits: Annotated[float, Field(gt=0)] | None = None
    max_bytes: Annotated[int, Field(strict=True, gt=0)] | None = None
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    max_loss: Annotated[float, Field(gt=0)] | None = None
    max_memory: Annotated[int, Field(strict=True, gt=0)] | None = None
    batch: Annotated[int, Field(strict=True, ge=1)] = 1
    context: Annotated[int, Field(strict=True, ge=1)] = 2048
    cache: CandidateText | None = None
    units: Literal["heads", "layers"] = "heads"
    formats: tuple[CandidateText, ...] = CANDIDATES
    embeddings: tuple[CandidateText, ...] = CANDIDATES
    method: Literal["quant-fisher", "measured", "michel", "tacq", "outlier", "activation-norm", "weight-error"] = (
        "quant-fisher"
    )
    task_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    probe: CandidateText = "u3/g32/f16"
    refine: Annotated[int, Field(strict=True, ge=0)] = 60
    samples: Annotated[int, Field(strict=True, ge=1)] = 4096
    ties: tuple[Literal["qkv", "groups"], ...] = ()
    classes: Annotated[int, Field(strict=True, ge=1)] | None = None
    tile: Annotated[int, Field(strict=True, ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] = 10.0

    @model_validator(mode="after")
    def _valid(self) -> Self:
        for name in ("formats", "embeddings"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one format")
        if len(given := self.budgets) > 1:
            raise ValueError(f"one budget is needed, found {' and '.join(f'{k}={v}' for k, v in given.items())}")
        return self

    @property
    def budgets(self) -> dict[str, float]:
        """Those that are given, by name."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
