"""A built model becomes files: readable names, metadata, weights in the file or beside it, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import TensorProto
from torch import Tensor

from qfx.backends.onnx.branch import every_node
from qfx.backends.onnx.build import OPSET, Builder, Later
from qfx.backends.onnx.graph import StageModel, made
from qfx.backends.onnx.opset import ir_version, needed_opset
from qfx.errors import explain, first_line
from qfx.storage.files import sha256_file, staged
from qfx.storage.spill import flat_bytes

# Weights of more bytes than this lie in a file of their own, which readers map. Who parses them with the model has them
# in memory once more, which is the price of one file.
EXTERNAL_BYTES = 32 << 20
_MOST_INLINE = 2**31 - (64 << 20)  # protobuf holds less than 2 GiB
_PAGE = 4096  # weights of many pages begin at one, others at a line of the cache: what maps them maps whole pages
_LINE, _MANY = 64, 64 << 10
_PART = 4 << 20  # bytes that are written before those that were read are let go of
_SMALL = 1024  # bytes of a tensor that the checker reads
_FORMED = {"MatMulNBits": 1, "Transpose": 0}  # operators -> which input ONNX Runtime needs no more once it is loaded
WEIGHTS_KEY = "qfx.weights"
INSIDE_KEY = "qfx.inside"
"""Metadata: sha256 of the names and bytes of the weights that lie in the model's file itself."""


@dataclass(frozen=True)
class Written:
    """The files that were written, the model's first, and their bytes; the model's opset."""

    files: tuple[Path, ...]
    nbytes: int
    opset: int


def write(
    builder: Builder,
    built: StageModel,
    path: Path,
    *,
    outputs: Sequence[str],
    documents: Mapping[str, str],
    metadata: Mapping[str, str],
    external_bytes: int = EXTERNAL_BYTES,
    inputs: Mapping[str, str] | None = None,
    rest: Callable[[int], None] = lambda _: None,
) -> Written:
    """Write `path`, and `<path>.data` where the weights have more than `external_bytes` in all.

    outputs: names in the order of the model's outputs. inputs: other names for inputs. documents: doc string by FX
    node. Weights are made and written one after the other; `rest` is told the bytes of each. Weights beside the model
    that was there before go with it. Raises OSError where the disk does not take them; then nothing is left behind.
    """
    model = built.model
    opset = needed_opset(every_node(model.graph.node), _types(builder, model), OPSET)
    standard = next(o for o in model.opset_import if o.domain == "")
    standard.version, model.ir_version = opset, ir_version(opset)
    domains = {node.domain for node in every_node(model.graph.node)}
    for other in [o for o in model.opset_import if o.domain and o.domain not in domains]:
        model.opset_import.remove(other)
    _rename_inputs(model.graph, inputs or {})
    _rename_outputs(model.graph, outputs)
    _name_sizes(model.graph)
    for node in every_node(model.graph.node):
        node.doc_string = documents.get(node.name.split("/")[0], "")
    for key in sorted(metadata):
        _set_metadata(model, key, metadata[key])
    weights = builder.external
    large = sum(_nbytes(w) for w in weights.values()) > min(external_bytes, _MOST_INLINE)
    former = None if large else weights_beside(path)
    with staged(path.parent) as stage:
        files = [path]
        temporary = stage(path.name)  # renamed first: a reader that finds the weights finds the model
        written: Mapping[str, Tensor | Later] = {} if large else weights
        if large:
            second = {} if builder.standard else _second_names(model.graph, weights)  # other programs hold each name
            beside = _beside(path)
            files.append(beside)
            with stage(beside.name).open("wb") as file:
                digest = _write_weights(model.graph.initializer, weights, beside.name, file, rest)
            _place_alike(model.graph, second)
            _set_metadata(model, WEIGHTS_KEY, json.dumps({"file": beside.name, "sha256": digest}, sort_keys=True))
        onnx.checker.check_model(_without_weights(model))
        inside = hashlib.sha256()
        with temporary.open("wb") as file:
            for part in _serialized(model, written, inside.update):
                file.write(part)
                rest(len(part))
            last = onnx.ModelProto()  # what is added to the end of a serialized message is added to the message
            _set_metadata(last, INSIDE_KEY, inside.hexdigest())
            file.write(last.SerializeToString())
    if former is not None:
        former.unlink(missing_ok=True)
    return Written(tuple(files), sum(f.stat().st_size for f in files), opset)


def weights_beside(path: Path) -> Path | None:
    """The file in which a model that was exported to `path` has its weights; None where no such model is there."""
    beside = _beside(path)
    if not (path.is_file() and beside.is_file()):
        return None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001  (protobuf's own kinds: whatever lies there, it is no model)
        return None
    return beside if any(entry.key == WEIGHTS_KEY for entry in model.metadata_props) else None


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def verify(path: str | Path) -> dict[str, str]:
    """The metadata of a model that was exported, once its files are seen to be whole.

    Raises FileNotFoundError where the model or its weights are missing, ValueError where one is cut short or altered.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"there is no file {target}\n  expected: a model that qfx.export_onnx wrote")
    try:
        model = onnx.load(str(target), load_external_data=False)
        onnx.checker.check_model(_without_weights(model))
    except Exception as error:
        raise ValueError(_damaged(target, f"no ONNX model can be read: {first_line(error)}")) from error
    metadata = {p.key: p.value for p in model.metadata_props}
    if INSIDE_KEY in metadata:
        inside = hashlib.sha256()
        for tensor in model.graph.initializer:
            inside.update(tensor.name.encode() + tensor.raw_data)
        if inside.hexdigest() != metadata[INSIDE_KEY]:
            raise ValueError(_damaged(target, "weights that are not those that were exported"))
    if WEIGHTS_KEY in metadata:
        known = json.loads(metadata[WEIGHTS_KEY])
        beside = target.with_name(known["file"])
        if not beside.is_file():
            raise FileNotFoundError(
                f"{target} has its weights in {beside.name}, which is missing\n"
                f"  next step: copy {beside.name} to {target.parent}"
            )
        if (found := sha256_file(beside)) != known["sha256"]:
            raise ValueError(_damaged(beside, f"sha256 {found}, expected {known['sha256']}"))
    return metadata


def _damaged(path: Path, what: str) -> str:
    return explain(
        f"{path} was altered or is cut short ({path.stat().st_size} bytes)",
        found=what,
        next_step="copy the file again, or export it anew",
    )


def _types(builder: Builder, model: onnx.ModelProto) -> dict[str, int]:
    inputs = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    return {**builder.types, **{t.name: t.data_type for t in model.graph.initializer}, **inputs}


def _rename_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Give the outputs their names; values that have one of them already get another."""
    assert len(names) == len(graph.output), (list(names), [o.name for o in graph.output])
    taken = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    renamed = {}
    for output, name in zip(graph.output, names, strict=True):
        free = name
        while free in taken:
            free += "_out"
        taken.add(free)
        renamed[output.name] = free
        output.name = free
    for node in every_node(graph.node):
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                if value in renamed:
                    values[i] = renamed[value]


def _rename_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for node in every_node(graph.node):
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = names[name]


_SYMBOL = re.compile(r"\b[su]\d+\b")
_AXES = {0: "batch", 1: "sequence"}


def _name_sizes(graph: onnx.GraphProto) -> None:
    """Sizes that vary get names that say whose they are: `batch`, `sequence`, or `<input>_dim<axis>`."""
    names: dict[str, str] = {}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            symbol = dim.dim_param
            if symbol and _SYMBOL.fullmatch(symbol) and symbol not in names:
                plain = (
                    _AXES.get(axis, "") if value.type.tensor_type.elem_type == TensorProto.INT64 or axis == 0 else ""
                )
                taken = set(names.values())
                names[symbol] = plain if plain and plain not in taken else f"{value.name}_dim{axis}"
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), dim.dim_param)


def _set_metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = key, value


def _nbytes(weight: Tensor | Later) -> int:
    return weight.nbytes


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes where they lie."""
    bytes_: Any = flat_bytes(tensor).numpy()
    return memoryview(bytes_)


def _parts(data: memoryview) -> Iterator[memoryview]:
    """The same bytes, a few MiB at a time: a weight that lies in a file is not in memory as a whole."""
    for start in range(0, max(len(data), 1), _PART):
        yield data[start : start + _PART]


def _write_weights(
    initializers: Iterable[TensorProto],
    weights: Mapping[str, Tensor | Later],
    location: str,
    file: BinaryIO,
    rest: Callable[[int], None],
) -> str:
    """Write the external weights, first those of many pages, each at a page's start; returns the file's sha256."""
    digest = hashlib.sha256()
    place = 0

    def put(data: bytes | memoryview) -> None:
        nonlocal place
        file.write(data)
        digest.update(data)
        place += len(data)

    held = [tensor for tensor in initializers if tensor.name in weights]
    for tensor in sorted(held, key=lambda tensor: _nbytes(weights[tensor.name]) < _MANY):
        data = _raw(made(weights[tensor.name]))
        put(bytes(-place % (_PAGE if len(data) >= _MANY else _LINE)))
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", str(place)), ("length", str(len(data)))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        for part in _parts(data):
            put(part)
            rest(len(part))
        del data, part
    return digest.hexdigest()


def _second_names(graph: onnx.GraphProto, weights: Collection[str]) -> dict[str, str]:
    """A name of its own for a weight of which ONNX Runtime makes another form, where another node reads it too;
    returns it -> the first one.

    When it has made that form (MatMulNBits packs its weight, a Transpose is evaluated), it closes its map of the file,
    unless something else has that name. Of a map that only a Gather reads, the rows that are asked for come into
    memory, and no others.

    MatMulNBits(x, w, s), GatherBlockQuantized(w, ids, ..)  ->  GatherBlockQuantized(w.second, ids, ..)
    Transpose(w), Gather(w, ids)                            ->  Gather(w.second, ids)
    """
    nodes = list(every_node(graph.node))
    formed = {node.input[_FORMED[node.op_type]] for node in nodes if node.op_type in _FORMED}.intersection(weights)
    held = {t.name: t for t in graph.initializer}
    second: dict[str, str] = {}
    for node in nodes:
        for i, name in enumerate(node.input):
            if name not in formed or _FORMED.get(node.op_type) == i:
                continue
            again = node.input[i] = f"{name}.second"
            if again not in second:
                assert again not in held, again
                graph.initializer.add().CopyFrom(held[name])
                graph.initializer[-1].name = again
                second[again] = name
    return second


def _place_alike(graph: onnx.GraphProto, second: Mapping[str, str]) -> None:
    """Let second names say where in the file the weights lie that they are names of."""
    held = {t.name: t for t in graph.initializer}
    for again, name in second.items():
        del held[again].external_data[:]
        held[again].external_data.extend(held[name].external_data)


def _serialized(
    model: onnx.ModelProto,
    weights: Mapping[str, Tensor | Later],
    told: Callable[[bytes | memoryview], object] = lambda _: None,
) -> Iterator[bytes | memoryview]:
    """The bytes of the model with these weights inside, which are made one after the other and never held together.

    told: gets the names and bytes of all weights that lie in the file, in their order.
    """
    heads = []
    for tensor in model.graph.initializer:
        head = _copied(tensor, {"external_data", "data_location"} if tensor.name in weights else ())
        text = head.SerializeToString(deterministic=True)
        size = _nbytes(weights[tensor.name]) if tensor.name in weights else None
        raw = b"" if size is None else _field(tensor, "raw_data", size)
        start = _field(model.graph, "initializer", len(text) + len(raw) + (size or 0))
        heads.append((tensor, start + text + raw, size or 0))
    graph = _copied(model.graph, {"initializer"}).SerializeToString(deterministic=True)
    yield _copied(model, {"graph"}).SerializeToString(deterministic=True)
    yield _field(model, "graph", len(graph) + sum(len(head) + size for _, head, size in heads))
    yield graph
    for tensor, head, size in heads:
        yield head
        told(tensor.name.encode() + tensor.raw_data)
        if size:
            data = _raw(made(weights[tensor.name]))
            assert len(data) == size, (tensor.name, len(data), size)
            for part in _parts(data):
                told(part)
                yield part


def _field(message: Any, name: str, size: int) -> bytes:
    """How a field of `size` bytes begins in a serialized message: its number and type, and the size, as varints."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its weights declared as inputs: what the checker can read without them, and no copy of them."""
    graph = _copied(model.graph, {"initializer"})
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or len(tensor.raw_data) > _SMALL:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    copied = _copied(model, {"graph"})
    copied.graph.CopyFrom(graph)
    return copied


def _copied(message: Any, without: Collection[str]) -> Any:
    """A copy of a protobuf message that lacks some of its fields."""
    copied = type(message)()
    for field, value in message.ListFields():
        if field.name in without:
            continue
        if isinstance(value, int | float | str | bytes):
            setattr(copied, field.name, value)
        else:
            getattr(copied, field.name).MergeFrom(value)
    return copied
