"""qfx::embedding on ONNX Runtime against its reference: every layout of a table, and that none lies in floats."""

from __future__ import annotations

import math

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor, fx, nn

import qfx.ops.packed
from qfx.backends.onnx import OnnxLowered, lower
from qfx.backends.onnx.kernels import optimized_graph
from qfx.backends.onnx.lowering import build
from qfx.format import Format
from qfx.packing import Packed, pack_weight
from tests.backends.onnx.checks import floats, sqnr
from tests.backends.onnx.test_quant import graph_of

assert qfx.ops.packed.embedding is not None

EXACT = 120.0  # dB: the same codes, one product each
IDS = torch.tensor([[0, 29, 3], [3, 7, 11]])
AS_STORED = ["i8/ch", "i8", "u8/ch", "u8"]
BLOCKS = [
    *("i4/g32", "u4/g64", "i4/g128", "u4/ch", "i4", "i2/g64", "u2/g16", "i3/g32", "u3/g128", "u5/g16", "i7/ch"),
    *("i8/g32", "u8/g48", "i4/b8x32", "u4/b7x16", "i4/g32/f16", "u8/g32/bf16", "i8/g16/e4m3", "i4/g16/e4m3", "i4/g256"),
]
BY_VALUE = [
    *("nf4/g32", "nf4/g64", "nf4", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/ch", "f8e5m2", "f8e4m3/g32"),
    *("i4/g20", "u4/g20", "u3/g5", "i2/g7", "u8/g20", "i6/g9", "nf4/b4x20", "u4/b3x10"),
]


def packed_table(w_format: str, rows: int = 30, width: int = 64, seed: int = 0) -> Packed:
    return pack_weight(floats(rows, width, seed=seed) * 2 + 0.5, Format.parse(w_format))


def call(packed: Packed, ids: Tensor) -> tuple[fx.GraphModule, Tensor]:
    given_ = (packed.data, packed.scale, packed.zero, str(packed.format), packed.shape[-1], torch.float32)
    return graph_of(torch.ops.qfx.embedding.default, ids, *given_)


def lowered_table(packed: Packed, ids: Tensor = IDS) -> tuple[float, OnnxLowered]:
    gm, reference = call(packed, ids)
    lowered = lower(gm, strict=True)
    (found,) = lowered(ids)
    assert found.shape == reference.shape
    assert found.dtype == reference.dtype
    return sqnr(reference, found), lowered


def told(lowered: OnnxLowered) -> list[str]:
    """Reasons of the notes about the node; scales in half precision have one about the graph."""
    return [note.reason for note in lowered.notes if note.node != "graph"]


def bytes_held(lowered: OnnxLowered) -> int:
    (built,) = lowered.models
    return sum(t.numel() * t.element_size() for t in built.weights.values())


@pytest.mark.parametrize("width", [64, 100, 48, 5])
@pytest.mark.parametrize("w_format", [*AS_STORED, *BLOCKS, *BY_VALUE])
def test_rows_are_those_of_the_reference(w_format: str, width: int) -> None:
    quality, lowered = lowered_table(packed_table(w_format, width=width))
    assert quality > EXACT
    assert not told(lowered)
    assert not lowered.slow
    kernel = lowered.kernels["embedding_default"]
    if w_format in BLOCKS:
        assert kernel.startswith("GatherBlockQuantized")
    else:
        assert "int8" in kernel


@pytest.mark.parametrize("w_format", [*AS_STORED, *BLOCKS, *BY_VALUE])
def test_no_table_lies_in_floats(w_format: str) -> None:
    """The session's weights take the bytes of the format, in codes of 2, 4 or 8 bits, and not those of floats."""
    fmt = Format.parse(w_format)
    packed = packed_table(w_format, rows=512, width=256)
    _, lowered = lowered_table(packed, torch.tensor([3, 511]))
    bits = next(size for size in (2, 4, 8) if fmt.bits <= size)
    group = min((size for size in (16, 32, 64, 128) if (fmt.group or size) % size == 0), default=16)
    assert bytes_held(lowered) <= fmt.nbytes(packed.shape) * 1.5 * bits / fmt.bits + 5 * 512 * 256 // group
    assert all(
        t.dtype == torch.uint8 or t.numel() < packed.data.numel() for m in lowered.models for t in m.weights.values()
    ) or fmt.type.startswith("i8")


def test_plain_formats_are_told_to_lie_in_floats() -> None:
    quality, lowered = lowered_table(packed_table("bf16"))
    assert quality == math.inf
    assert told(lowered) == ["the table is stored as bf16, gathered from f32"]


@pytest.mark.parametrize("w_format", ["i8/ch", "u4/g32", "i2/g64", "nf4/g32"])
@pytest.mark.parametrize("ids", [torch.tensor(7), torch.zeros(0, 3, dtype=torch.int64), torch.arange(24).view(2, 3, 4)])
def test_ids_of_any_shape(w_format: str, ids: Tensor) -> None:
    quality, _ = lowered_table(packed_table(w_format, width=100), ids)
    assert quality > EXACT


def test_int32_ids() -> None:
    assert lowered_table(packed_table("u4/g32"), IDS.to(torch.int32))[0] > EXACT


@pytest.mark.parametrize("w_format", ["i8/ch", "u4/g32", "i2/g64", "nf4/g32"])
def test_ids_that_are_not_in_the_table_fail(w_format: str) -> None:
    _, lowered = lowered_table(packed_table(w_format))
    for wrong in (30, -31):
        with pytest.raises(RuntimeError, match="out of data bounds"):
            lowered(torch.tensor([[0, wrong, 3], [3, 7, 11]]))


def test_the_ids_that_there_are_cost_nothing_in_the_file_and_are_made_once() -> None:
    gm, _ = call(packed_table("u4/g32", rows=1000), IDS)
    builder, built = build(gm)
    held = {t.name for t in built.model.graph.initializer if 1000 in t.dims}
    assert held == {"c0.4b32", "c2", "c1"}, "codes, packed zero points, scales"
    assert builder.external.keys() <= {t.name for t in built.model.graph.initializer}
    (session,) = lower(gm).models
    assert [n.op_type for n in optimized_graph(session).node] == ["Gather", "GatherBlockQuantized", "Reshape"]


@given(
    st.sampled_from([f"{sign}{bits}" for sign in "iu" for bits in range(2, 9)]),
    st.sampled_from(["", "ch", "g5", "g16", "g24", "g32", "g96", "g128", "b3x16", "b2x11"]),
    st.integers(1, 140),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_integer_table(kind: str, granularity: str, width: int, rows: int, seed: int) -> None:
    w_format = f"{kind}/{granularity}" if granularity else kind
    ids = torch.randint(0, rows, (2, 3), generator=torch.Generator().manual_seed(seed))
    packed = packed_table(w_format, rows, width, seed)
    assert lowered_table(packed, ids)[0] > EXACT
    assert standard(packed, ids)[0] > EXACT


def test_the_control_sees_a_neighbouring_row() -> None:
    """Negative control: another row, and another zero point, are far off."""
    packed = packed_table("u4/g32")
    gm, reference = call(packed, IDS)
    assert sqnr(reference, lower(gm)((IDS + 1) % 30)[0]) < 10
    assert packed.zero is not None
    moved = Packed(packed.data, packed.scale, packed.zero + 1, packed.format, packed.shape)
    assert sqnr(reference, lower(call(moved, IDS)[0])(IDS)[0]) < 25


def test_the_stored_bytes_are_gathered_where_they_lie() -> None:
    """A bitstream of whole blocks is the kernel's layout already."""
    packed = packed_table("u4/g128", rows=64, width=256)
    _, lowered = lowered_table(packed)
    (built,) = lowered.models
    assert packed.data.data_ptr() in {t.data_ptr() for t in built.weights.values()}


def standard(packed: Packed, ids: Tensor) -> tuple[float, onnx.ModelProto]:
    """SQNR of the standard's operators, run by ONNX Runtime, and the model with its weights."""
    import onnxruntime as ort

    from qfx.backends.onnx.export import _serialized

    gm, reference = call(packed, ids)
    builder, built = build(gm, runtime="standard")
    whole = b"".join(_serialized(built.model, builder.external))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": ids.numpy()})
    return sqnr(reference, torch.from_numpy(found)), onnx.load_from_string(whole)


@pytest.mark.parametrize("w_format", [*AS_STORED, *BLOCKS, *BY_VALUE])
def test_by_the_standards_operators(w_format: str) -> None:
    packed = packed_table(w_format, rows=64, width=100)
    quality, model = standard(packed, IDS)
    assert quality > EXACT
    assert {node.domain for node in model.graph.node} == {""}
    held = {TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if math.prod(t.dims) >= 64 * 25}
    assert held <= {"UINT8", "INT8"}


class Tied(nn.Module):
    """A table and the linear that reads it."""

    def __init__(self, packed: Packed, x_format: str) -> None:
        super().__init__()
        self.packed, self.x_format = packed, x_format

    def forward(self, ids: Tensor) -> Tensor:
        p = self.packed
        rows = torch.ops.qfx.embedding(ids, p.data, p.scale, p.zero, str(p.format), p.shape[-1], torch.float32)
        y: Tensor = torch.ops.qfx.linear(
            rows, p.data, p.scale, p.zero, None, None, None, None, self.x_format, str(p.format)
        )
        return y


def tied_graph(packed: Packed, x_format: str) -> fx.GraphModule:
    gm, rows = call(packed, IDS)
    (table,) = (n for n in gm.graph.nodes if n.op == "call_function")
    gm.graph.erase_node(gm.graph.output_node())
    args = (table, *table.args[1:4], None, None, None, None, x_format, str(packed.format))
    head = gm.graph.call_function(torch.ops.qfx.linear.default, args)
    head.meta["val"] = table.meta["val"].new_empty(*rows.shape[:-1], packed.shape[0])
    gm.graph.output((head,))
    return gm


@pytest.mark.parametrize("x_format", ["", "f32", "i8/tok"])
@pytest.mark.parametrize("w_format", ["i4/g32", "u4/g128", "u2/g64", "i3/g32", "u8/g32", "i8/ch", "u8/ch"])
def test_a_tied_linear_reads_the_same_tensor(w_format: str, x_format: str) -> None:
    packed = packed_table(w_format, rows=96, width=200)
    lowered = lower(tied_graph(packed, x_format))
    expected = Tied(packed, x_format)(IDS)
    assert sqnr(expected, lowered(IDS)[0]) > (110 if x_format == "f32" else 35)
    (built,) = lowered.models
    tables = [t for t in built.weights.values() if t.dtype in (torch.uint8, torch.int8) and t.numel() >= 96 * 200 // 4]
    bits = Format.parse(w_format).bits
    other = (x_format == "f32" and bits in (2, 8)) or (x_format == "i8/tok" and w_format == "u8/ch")  # columns, halves
    assert len(tables) == (1 if not other else 2 if bits < 8 or x_format == "i8/tok" else 3)
