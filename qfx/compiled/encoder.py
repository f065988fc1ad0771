"""The encoder of an encoder-decoder, which generate() calls by itself: a graph of the model does not reach it there."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from qfx.compiled.records import GraphRecord
from qfx.errors import Note
from qfx.hf.attach import is_pretrained
from qfx.names import index, is_within


def encoder_apart(root: nn.Module | None, weights: Iterable[Tensor], others: Iterable[GraphRecord]) -> list[Note]:
    """A note where a graph reads the decoder's weights and none of the encoder's, which has no graph of its own.

    root: what was compiled. weights: those of the graph. others: the records of all graphs.
    """
    name = _encoder(root)
    if root is None or not name or root.get_submodule(name)._compiled_call_impl is not None:
        return []
    names = index(root)
    inside = {one for one, own in names.items() if any(is_within(n, name) for n in own)}
    both = {one for one in inside if any(not is_within(n, name) for n in names[one])}  # tied tables
    read = {id(t) for t in weights}
    if read & (inside - both) or not read & (names.keys() - inside):
        return []
    for record in others:
        found = {id(t) for _, ref in record.weights if (t := ref()) is not None}
        if found & (inside - both) and found <= inside:
            return []
    what = f"{name} is in no graph of its own: where generate() calls it, it runs in torch as it is"
    return [Note("graph", what, "compile it, too: model.get_encoder().compile(backend='qfx')")]


def _encoder(root: nn.Module | None) -> str:
    """Its name in an encoder-decoder of transformers, "" in other models."""
    if root is None or not is_pretrained(root) or not getattr(root.config, "is_encoder_decoder", False):
        return ""
    encoder = root.get_encoder()  # type: ignore[operator]
    return next((name for name, module in root.named_modules() if module is encoder), "")
