"""Where a graph of Dynamo's comes from: the module whose forward it is, and what torch.compile was given.

What is read here is internal to torch.compile, and every reading may come back empty: names are then those of the
frame, a model in training mode is told by its dropouts alone, and the report finds a graph by its weights.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

_WRAPPER = ("compile_wrapper", "eval_frame.py")  # torch.compile's own function around what it was given
_BETWEEN = (
    "qfx.compiled.frame",
    "qfx.compile",
    "torch._dynamo.eval_frame",
)  # between a graph and the frame that calls it


@dataclass(frozen=True)
class Frame:
    """What is known of the Python frame that a graph stands for. Holds nothing alive.

    code: the frame's code. modules: those among its variables, its own first. target: the module or function that was
    given to torch.compile.
    """

    code: Callable[[], types.CodeType | None]
    modules: tuple[Callable[[], nn.Module | None], ...]
    target: Callable[[], Any]

    @property
    def root(self) -> nn.Module | None:
        """The module that was given to torch.compile, if it was a module or a method of one."""
        found = self.target()
        return found if isinstance(found, nn.Module) else None

    @property
    def place(self) -> str:
        """`file:line, in function` of the frame; empty where it is not known."""
        code = self.code()
        return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}, in {code.co_name}"

    def same_as(self, other: Frame) -> bool:
        """Whether both belong to one model or function; where that is not known, whether their code is the same."""
        own, others = self.target(), other.target()
        return own is others if own is not None else others is None and self.code() is other.code()

    @property
    def training(self) -> bool:
        """Whether a module of the frame, or the module that was compiled, is in train() mode now."""
        root = self.target()
        if isinstance(root, nn.Module) and _trains(root):
            return True
        for ref in self.modules:  # in every call, so without a generator
            module = ref()
            if module is not None and _trains(module):
                return True
        return False


def _trains(module: nn.Module) -> bool:
    """Whether a module is in train() mode. What torch.export made always says so, refuses eval(), and is not: its graph
    has the mode in which it was exported, and that is told by its dropouts."""
    return module.training and not (isinstance(module, fx.GraphModule) and "eval" in vars(module))


def at_compile() -> Frame:
    """The frame that Dynamo is compiling: to be called by a backend."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        translator = InstructionTranslator.current_tx()
        return _frame(translator.f_code, translator.f_locals, translator.f_globals)
    except (ImportError, AttributeError, AssertionError):
        return _frame(None, {}, {})


def at_call() -> Frame:
    """The frame that calls a compiled graph now: to be called, through functions of qfx, by what a backend returned."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return _frame(None, {}, {}) if frame is None else _frame(frame.f_code, frame.f_locals, frame.f_globals)


def unwrapped(function: Any) -> Any:
    """What was given to torch.compile: the module of a bound method or compiled module, else the function."""
    for _ in range(16):
        inner = getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", None)
        if inner is None and not isinstance(function, nn.Module):
            owner = getattr(function, "__self__", None)
            inner = owner if isinstance(owner, nn.Module) else getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def asked_with(compiled: Any) -> Any:
    """The `options` that a compiled module or function was made with (None where there were none), or `unknown`."""
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None:
        cells = getattr(compiled, "__closure__", None) or ()
        contents = [c.cell_contents for c in cells]
        context = next((c for c in contents if hasattr(c, "callback") and hasattr(c, "fullgraph")), None)
    backend = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    kwargs = getattr(backend, "kwargs", None)
    return kwargs.get("options") if isinstance(kwargs, dict) else unknown


unknown = object()


def _frame(code: types.CodeType | None, local: Mapping[str, Any], world: Mapping[str, Any]) -> Frame:
    used = [world[name] for name in code.co_names if name in world] if code is not None else []
    found = [_module(v) for v in (*local.values(), *used)]
    return Frame(_ref(code), tuple(_ref(m) for m in dict.fromkeys(found) if m is not None), _ref(_target()))


def _target() -> Any:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _WRAPPER[0] and frame.f_code.co_filename.endswith(_WRAPPER[1]):
            return unwrapped(frame.f_locals.get("fn"))
        frame = frame.f_back
    return None


def _module(value: Any) -> nn.Module | None:
    """The module that a local variable is, or whose method it is."""
    if isinstance(value, types.MethodType):
        value = value.__self__
    return value if isinstance(value, nn.Module) else None


def _ref(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return _nothing


def _nothing() -> None:
    return None
