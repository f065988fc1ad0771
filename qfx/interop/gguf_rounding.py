"""Weights rounded into the blocks of GGUF by what they read behind those that are rounded already.

What `rounding="gptq"` and "learned" are for formats (`qfx.passes.gptq`, `qfx.passes.learned`), on the factors and
integer scales that a block of GGUF has: GPTQ by `BlockGrid`, descent by `BlockOffsets`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx import data as batches
from qfx.capture_calls import capture_calls
from qfx.errors import Note
from qfx.interop.gguf_blocks import Blocks, BlockType, block_type, pack
from qfx.interop.gguf_encode import check_values
from qfx.interop.gguf_grid import BlockGrid
from qfx.interop.gguf_offsets import BlockOffsets
from qfx.packing import Packed, pack_weight
from qfx.passes._columns import Columns
from qfx.passes._hessian import Hessian
from qfx.passes._sweep import Sweep
from qfx.passes.annotate import annotate
from qfx.passes.gptq import Gptq
from qfx.passes.learned import LearnedRounding
from qfx.pipeline import prepare
from qfx.plan import Plan
from qfx.quantize import evaluating
from qfx.recipe import Recipe, Rule
from qfx.rounding.blocks import Part
from qfx.rounding.method_options import GptqOptions, LearnedOptions
from qfx.rounding.sequential import round_weights
from qfx.storage.spill import rest

_ELEMENTS = 1 << 21  # of the rows that are swept together
_OPTIONS = GptqOptions(act_order=False)
_LEARNED = LearnedOptions()
_HALVES = {torch.float16: "f16", torch.bfloat16: "bf16"}


def round_blocks(
    model: nn.Module, kinds: Mapping[str, str], data: Iterable[Any], *, rounding: str = "gptq"
) -> tuple[dict[str, Tensor], list[Note]]:
    """FQN -> uint8 [N, row bytes] of each weight [N, K] in blocks of its type, and what did not go as asked.

    kinds: FQN of a linear, or for GPTQ of a table and of the linear that reads it, too, -> type. rounding: "gptq" or
    "learned". What the model's graph does not have under its name is left out, and so is a weight that it computes (by
    a parametrization). Beside the blocks one layer of the model is held again. Raises UnsupportedError where
    torch.export does not take the model as one graph, ValueError for bad data and for values that a type cannot hold
    (named).
    """
    calls = batches.calls(model, data)
    into = _Blocks(kinds)
    with evaluating(model):
        captured, flat, told = capture_calls(model, calls)
        prepare(captured.gm)
        rules = _rules(model, kinds)
        recipe = Recipe.parse({"name": "gguf", "rules": rules, "rounding": rounding})
        notes = [*told, *annotate(captured.gm, recipe)]
        plan = Plan.of(model, recipe)
        learned = LearnedRounding(_LEARNED, into.start, into.finish)
        method = learned if rounding == "learned" else Gptq(_OPTIONS, into.solve)
        notes += round_weights(captured.gm, plan, flat, method=method, keep=False)
    return into.data, notes


def _rules(model: nn.Module, names: Collection[str]) -> tuple[Rule, ...]:
    """The layers as they are: what a block gives back is held in the dtype of the weight."""
    linears: list[Any] = [model.get_submodule(name) for name in names]
    pairs = zip(names, linears, strict=True)
    return tuple(Rule(target=name, w=_HALVES.get(linear.weight.dtype, "f32")) for name, linear in pairs)


class _Blocks:
    """Rounds weights into blocks of the types `kinds`, and keeps their bytes."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds
        self.data: dict[str, Tensor] = {}

    def solve(
        self, part: Part, weight: Tensor, seen: list[Hessian], options: GptqOptions
    ) -> tuple[Packed, dict[str, Any]]:
        """For `Gptq`: a weight [N, K] as its blocks give it back."""
        name, (one,) = self._name(part), seen
        data, values = gptq(weight.detach(), block_type(self.kinds[name]), one, options, name=name)
        return self._taken(part, data, values), {}

    def start(self, part: Part, weight: Tensor, options: LearnedOptions) -> BlockOffsets:
        """For `LearnedRounding`: a weight [N, K] in blocks of the least error."""
        name, full = self._name(part), weight.detach().to(torch.float32)
        kind = block_type(self.kinds[name])
        return BlockOffsets(full, kind, optimizer=options.optimizer, reach=options.reach, name=name)

    def finish(self, part: Part, blocks: Blocks, weight: Tensor) -> Packed:
        """For `LearnedRounding`: a weight [N, K] as these blocks give it back."""
        values = blocks.values().reshape(weight.shape)
        return self._taken(part, pack(blocks).reshape(len(weight), -1), values.to(weight.dtype))

    def _taken(self, part: Part, data: Tensor, values: Tensor) -> Packed:
        name = self._name(part)
        alike = [other for other in part.names if self.kinds.get(other) == self.kinds[name]]  # that read this weight
        self.data.update(dict.fromkeys(alike, data.cpu()))
        return pack_weight(values, part.format, name=name)

    def _name(self, part: Part) -> str:
        return next(name for name in part.names if name in self.kinds)


def gptq(weight: Tensor, kind: BlockType, seen: Hessian, options: GptqOptions, *, name: str) -> tuple[Tensor, Tensor]:
    """A weight [N, K] rounded into blocks by the statistics of its inputs: uint8 [N, row bytes], and what they stand
    for, [N, K] in the dtype of the weight. Beside the two it takes memory for codes and for some rows at a time.

    Raises ValueError as `encode` does, and where the statistics cannot be factored.
    """
    check_values(weight, kind, name)
    seen.settle(weight)
    grid = BlockGrid(kind, (len(weight), weight.shape[1]), weight.device)
    columns = Columns.of(seen, grid, options, name, weight)
    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    for rows, found, _ in columns.solve(weight):
        codes[rows] = found
    sweep = Sweep(seen, grid, columns.dampening, moving=True)
    del columns  # with the factor, which is as large as the statistics
    data = torch.empty(len(weight), kind.row_bytes(weight.shape[1]), dtype=torch.uint8, device=weight.device)
    result = torch.empty_like(weight)
    size = max(_ELEMENTS // weight.shape[1], 1)
    for start in range(0, len(weight), size):
        rows = slice(start, min(start + size, len(weight)))
        held = codes[rows]
        values = grid.values(held, rows)
        lost = weight[rows].to(torch.float32).T - values
        rest(weight[rows])
        blocks = grid.blocks(sweep.improve(values, lost, held.T.contiguous(), rows, options.sweeps), rows)
        data[rows] = pack(blocks).reshape(len(held), -1)
        result[rows] = blocks.values().reshape(held.shape).to(weight.dtype)
    return data, result
