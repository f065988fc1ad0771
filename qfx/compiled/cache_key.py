"""The key of a compiled graph on disk: everything that what is made of it depends on. Equal keys, equal results.

Structure with edges and arguments, names and source lines (the report and the warnings show them), shapes, content of
the weights, recipe or plan, options, versions, the sources of qfx, the processor's instruction set.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import operator
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qfx import processor
from qfx.names import Translation
from qfx.options import Options
from qfx.storage.spill import flat_bytes

FORMAT = 1  # of what is stored under a key
_PART = 16 << 20
_MODULES = ("torch", "_operator", "operator", "math", "builtins", "itertools")
_NAMESPACES = {"aten", "prims", "qfx", "torchvision", "_c10d_functional"}
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class NoKeyError(Exception):
    """The graph holds something whose content no key can cover; the message says what."""


def key_of(
    gm: fx.GraphModule,
    args: Sequence[Any],
    options: Options,
    *,
    statics: Mapping[int, str],
    live: Collection[int],
    translation: Translation,
    packed: bool,
    example: Callable[[fx.Node], Any],
    source: Callable[[fx.Node], str],
) -> str:
    """The key, in hex. packed: whether the model holds parts that were quantized before.

    example, source: example value and source of a placeholder. Raises NoKeyError.
    """
    weights = {i: args[i] for i in statics if i not in live}
    parts = {
        "format": FORMAT,
        "environment": environment(),
        "state": _torch_state(),
        "options": _options(options),
        "packed": packed,
        "heads": translation.heads,
        "statics": sorted(statics.items()),
        "live": sorted(live),
        "inputs": [
            [source(node), _fake(example(node)), _scalar(args[i])]
            for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")
        ],
        "graph": list(_graph(gm)),
        "weights": digests(weights, torch.get_num_threads()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, the state of qfx's own sources and the processor: what no model can change within a process."""
    names = ("qfx", "torch", "onnxruntime", "onnx", "transformers", "numpy")
    return {
        "versions": {name: _version(name) for name in names},
        "git": torch.version.git_version,
        "sources": _sources(),
        "python": sys.version,
        "processor": [platform.machine(), platform.system(), *_processor()],
    }


def digests(tensors: Mapping[int, Any], threads: int) -> list[list[Any]]:
    """For each tensor its index, dtype, shape, strides and sha256 of its bytes; tensors that share memory say so.

    Large tensors are read in parts, by several threads.
    """
    found: list[list[Any]] = []
    first: dict[Any, int] = {}
    jobs: list[tuple[int, memoryview]] = []
    for i, tensor in tensors.items():
        _check(tensor)
        at = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        same = first.setdefault(at, i) if at[0] else i
        described = [i, same, str(tensor.dtype), list(tensor.shape), list(tensor.stride()), []]
        found.append(described)
        if same == i:
            jobs += [(len(found) - 1, part) for part in _parts(tensor)]
    for (at_, _), text in zip(jobs, processor.each(_digest, [part for _, part in jobs], threads), strict=True):
        found[at_][-1].append(text)
    return found


def _digest(part: memoryview) -> str:
    return hashlib.sha256(part).hexdigest()


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order."""
    if tensor.numel():
        data = memoryview(flat_bytes(tensor).numpy().data)
        yield from (data[start : start + _PART] for start in range(0, len(data), _PART))


def _check(tensor: Any) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise NoKeyError(f"a weight of type {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise NoKeyError(f"a weight on {tensor.device} with layout {tensor.layout}")


def _graph(gm: fx.GraphModule) -> Iterator[list[Any]]:
    """One line for each node: operator, arguments by the number of the node that gives them, where it comes from."""
    numbers = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        module = str(list(stack.values())[-1][0]) if stack else ""
        target = _target(gm, node)
        args = [_value(a, numbers) for a in node.args]
        kwargs = [[k, _value(v, numbers)] for k, v in node.kwargs.items()]
        trace = node.meta.get("stack_trace") or ""
        yield [node.op, node.name, target, args, kwargs, module, hashlib.sha256(trace.encode()).hexdigest()]


def _target(gm: fx.GraphModule, node: fx.Node) -> Any:
    target = node.target
    if node.op == "get_attr":
        held = operator.attrgetter(str(target))(gm)
        if isinstance(held, fx.GraphModule):
            return [str(target), list(_graph(held))]
        if isinstance(held, Tensor):
            return [str(target), digests({0: held}, 1)]
        raise NoKeyError(f"an attribute of type {type(held).__name__}")
    if node.op == "call_module":
        raise NoKeyError(f"a call of the module {target}")
    return str(target) if isinstance(target, str) else _function(target)


def _function(target: Any) -> list[str]:
    """The name of a function of torch or Python. What users define has content that its name does not tell."""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in _NAMESPACES:
            raise NoKeyError(f"the operator {target}, which is not torch's")
        return ["op", str(target)]
    if isinstance(target, torch._ops.OpOverloadPacket):
        if target._qualified_op_name.split("::")[0] not in _NAMESPACES:
            raise NoKeyError(f"the operator {target}, which is not torch's")
        return ["packet", target._qualified_op_name]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return ["higher", target.name()]
    module = str(getattr(target, "__module__", "") or "")
    name = str(getattr(target, "__qualname__", "") or getattr(target, "__name__", ""))
    if module.partition(".")[0] not in _MODULES or not name or "<locals>" in name:
        raise NoKeyError(f"the function {module}.{name}, which is not torch's")
    return ["function", module, name]


def _value(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """A JSON value that tells arguments of a node apart, types included."""
    if isinstance(value, fx.Node):
        return ["node", numbers[value]]
    if isinstance(value, _PLAIN):
        return [type(value).__name__, repr(value)]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [_value(v, numbers) for v in value]]
    if isinstance(value, dict):
        return ["dict", [[_value(k, numbers), _value(v, numbers)] for k, v in value.items()]]
    if isinstance(value, slice):
        return ["slice", [_value(v, numbers) for v in (value.start, value.stop, value.step)]]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _fake(value)
    if value is Ellipsis:
        return ["..."]
    if isinstance(value, range):
        return ["range", repr(value)]
    raise NoKeyError(f"an argument of type {type(value).__name__}")


def _fake(value: Any) -> Any:
    """An example value: dtype, sizes and strides with their symbols, and the sizes of the traced call."""
    if isinstance(value, Tensor):
        sizes = [_size(s) for s in (*value.shape, *value.stride(), value.storage_offset())]
        return [str(value.dtype), str(value.device), str(value.layout), value.dim(), sizes, value.requires_grad]
    return [type(value).__name__, _size(value)]


def _size(size: Any) -> Any:
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        hint = size.node.hint if size.node.has_hint() else None
        return [str(size.node.expr), repr(hint)]
    return repr(size)


def _scalar(value: Any) -> Any:
    """The value of what a graph may be specialised on: numbers, and Python floats, which come as tensors."""
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and value.dtype == torch.float64 and value.device.type == "cpu"
        return repr(float(value)) if is_number else None
    return None


def _options(options: Options) -> list[Any]:
    plan = options.plan
    told = None
    if plan is not None:
        fields = {k: v for k, v in plan._fields().items() if k != "tensors"}
        tensors = dict(sorted(plan.tensors.items()))
        told = [fields, list(tensors), digests(dict(enumerate(t.contiguous() for t in tensors.values())), 1)]
    return [options.recipe.to_json(), told, options.strict, options.backend, options.default, options.kv is not None]


def _torch_state() -> list[str]:
    """Settings of torch that capturing a graph may depend on."""
    return [
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        str(torch.is_autocast_enabled("cpu")),
        str(torch.backends.mha.get_fastpath_enabled()),
        str(torch.are_deterministic_algorithms_enabled()),
    ]


def _version(name: str) -> str:
    loaded = getattr(sys.modules.get(name), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sources() -> str:
    """Names, sizes and times of qfx's own files: work on qfx itself makes new keys."""
    root = Path(__file__).resolve().parents[1]
    found = []
    for folder in (root, root / "passes", root / "backends"):
        for path in sorted(folder.resolve().rglob("*.py")):
            stat = path.stat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _processor() -> list[str]:
    """What decides which kernels run: instruction sets as torch and ONNX Runtime find them, the model of the chip."""
    return [torch.backends.cpu.get_cpu_capability(), *processor.instruction_sets(), processor.flags()]
