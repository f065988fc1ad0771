"""Products that become angles: coordinates times a matrix of frequencies, and sin and cos of the result.

%linear: f32[1,5,8] = aten.linear(%points, @positional_embedding)
%mul: f32[1,5,8] = aten.mul.Tensor(%linear, 6.283185307179586)
%sin: f32[1,5,8] = aten.sin.default(%mul)

An angle counts by what is left of it beyond whole turns: of ten turns a hundredth is a tenth of a turn, so that 8 bits
of the matrix lose what a model knows of places (the prompts of SAM, the key points of LightGlue). It has as many
columns as there are coordinates, which is next to nothing to save.
"""

from __future__ import annotations

from torch import fx

from qfx import graph

_COORDINATES = 8  # a matrix of more columns is a layer like others, with a periodic activation (SIREN)
_SAME = {
    "mul", "div", "add", "sub", "neg", "to", "_to_copy", "clone", "contiguous", "view", "reshape", "_unsafe_view",
    "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat", "repeat_interleave", "transpose", "permute",
    "slice", "select", "cat", "stack", "split", "chunk", "unbind", "getitem",
}  # fmt: skip


def becomes_angle(node: fx.Node) -> bool:
    """Whether sin or cos is taken of the result of a linear with few columns, which is at most moved and scaled."""
    operand = graph.weight_operand(node)
    if operand is None or graph.val(operand).dim() != 2 or int(graph.val(operand).shape[1]) > _COORDINATES:
        return False
    seen, left = {node}, [node]
    while left:
        for user in left.pop().users:
            name = graph.op_name(user) if user.op == "call_function" else ""
            if name in ("sin", "cos"):
                return True
            if name in _SAME and user not in seen:
                seen.add(user)
                left.append(user)
    return False
