"""Where the inputs and calls of a graph of Dynamo's come from, as names in the user's model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

_SOURCE = "qfx_source"


def keep_sources(gm: fx.GraphModule) -> None:
    """Keep what `source_of` reads, which Dynamo takes away once it has compiled the graph."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta[_SOURCE] = source_of(node)


# What nn.Module.__getattr__ reads is named by way of __dict__ where Dynamo traces that function itself.
_STORE = re.compile(r"\.__dict__\['(_modules|_parameters|_buffers)'\]")


def source_of(node: fx.Node) -> str:
    """The expression by which Dynamo found a graph input; "" where it is not known."""
    if _SOURCE in node.meta:
        return str(node.meta[_SOURCE])
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return _STORE.sub(r".\1", str(name() if callable(name) else name))


_MODULE_STEP = re.compile(r"(?:\._modules\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]|\['([^']+)'\])")
_SLICE = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)")
_STATIC = re.compile(r"^(.*)\._(?:parameters|buffers)\['([^']+)'\]$")


def static_names(gm: fx.GraphModule, examples: Sequence[Any]) -> dict[int, str]:
    """Index -> FQN of every input of a graph of Dynamo's that is a parameter or buffer.

    Names start at the module that holds them all; where there are several (a function of two models) they keep the name
    of the variable that holds the module.
    """
    return statics(gm, examples)[0]


def statics(gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[dict[int, str], str]:
    """`static_names`, and the expression of the module that holds them all ("" where there are several)."""
    found: dict[int, tuple[str, str, str]] = {}
    for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        source = source_of(node)
        match = _STATIC.match(source)
        if match is None and not isinstance(examples[i], nn.Parameter):
            continue
        owner, leaf = match.groups() if match else (source, "")
        base, head, steps = _root_of(owner)
        path = ".".join([*steps, leaf] if leaf else steps)
        found[i] = (base, head, path or node.name)
    bases = {base for base, _, _ in found.values()}
    if len(bases) <= 1:
        return {i: path for i, (_, _, path) in found.items()}, "".join(bases)
    several = len({head.partition(".")[0] for _, head, _ in found.values()}) > 1
    heads = {i: head if several else head.partition(".")[2] for i, (_, head, _) in found.items()}
    return {i: f"{heads[i]}.{path}" if heads[i] else path for i, (_, _, path) in found.items()}, ""


def _root_of(owner: str) -> tuple[str, str, list[str]]:
    """(the expression of the outermost module, its name in words, the path of sub-modules) of a source's text."""
    base, *_ = owner.partition("._modules[")
    words = [next(w for w in word if w) for word in re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)", base)]
    head = ".".join(word for word in words if word != "__self__")
    return base, head, [next(p for p in m if p) for m in _MODULE_STEP.findall(owner[len(base) :])]


def input_name(source: str, fallback: str) -> str:
    """The name of a graph input in words of its source; `fallback` where that has none."""
    source = re.sub(r"^L\['k?w?args'\](\[\d+\])?(?=\[')", "L", source)
    words = re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)", source)
    name = "_".join(next(w for w in word if w) for word in words if any(word))
    return re.sub(r"\W", "_", name) or fallback


def module_path(node: fx.Node, names: Collection[str], base: str) -> str:
    """The path of the module that a node comes from, from the module `base`; where that is not known with the variable
    that holds the module, if `names` of weights have it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    source = str(list(stack.values())[-1][0]).replace(".__dict__['_modules']", "")
    if base and source.startswith(base):
        return _words(source[len(base) :])
    variable = re.match(r"^[LG]\['([^']+)'\]", source)
    if variable is None:
        return _words(source)
    path = _words(source[variable.end() :].removeprefix(".__self__"))
    full = f"{variable.group(1)}.{path}".strip(".")
    return full if any(_starts(name, full) for name in names) and not any(_starts(n, path) for n in names) else path


def unsliced(model: nn.Module, path: str) -> str:
    """`layers.slice(2, None, None).0`, as torch.export calls a module of `self.layers[2:]` where modules are shared, by
    its own path in the model: `layers.2`."""
    if not _SLICE.search(path):
        return path
    found: list[str] = []
    module, keys = model, list[str]()
    for part in path.split("."):
        if bounds := _SLICE.fullmatch(part):
            keys = (keys or list(module._modules))[slice(*(None if b == "None" else int(b) for b in bounds.groups()))]
            continue
        found.append(keys[int(part)] if keys and isinstance(module, nn.ModuleList) else part)  # a Sequential keeps them
        module, keys = module._modules.get(found[-1]) or nn.Module(), []
    return ".".join(found)


def _words(source: str) -> str:
    return re.sub(r"\['([^']+)'\]|\[(\d+)\]", r".\1\2", source).strip(".")


def _starts(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")
