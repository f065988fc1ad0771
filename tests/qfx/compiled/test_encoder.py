"""qfx.compiled.encoder: generate() of a compiled encoder-decoder runs the encoder outside of its graphs: told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx import QfxWarning
from qfx.compiled.encoder import encoder_apart
from tests.zoo import ZOO

TOLD = r"graph: (model\.)?encoder is in no graph of its own: where generate\(\) calls it, it runs in torch as it is"


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = ZOO[name]()
    return model, {key: value for key, value in inputs.items() if not key.startswith("decoder")}


def write(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return found


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_that_is_not_compiled_is_told_once(name: str) -> None:
    model, inputs = made(name)
    model.compile(backend="qfx")
    with pytest.warns(QfxWarning) as caught:
        write(model, inputs)
    told = [str(w.message) for w in caught if "encoder" in str(w.message)]
    assert len(told) == 1 and re.search(TOLD, told[0]), told
    found = qfx.report(model)
    (note,) = [note for note in found.notes if "no graph of its own" in note.reason]
    assert "get_encoder().compile(backend='qfx')" in note.next_step
    inside = [row for row in found.rows if "encoder." in row.node and row.op == "linear" and "decoder" not in row.node]
    assert inside and not any(row.quantized for row in inside), "so it is"


def test_with_its_encoder_compiled_nothing_is_told() -> None:
    model, inputs = made("t5")
    wanted = write(model, inputs)
    model.compile(backend="qfx")
    model.get_encoder().compile(backend="qfx")
    assert write(model, inputs).shape == wanted.shape
    found = qfx.report(model)
    assert not found.notes and all(row.quantized for row in found.rows if row.op == "linear")


def test_an_encoder_that_was_compiled_by_itself_counts() -> None:
    model, inputs = made("t5")
    encoder: Any = torch.compile(model.get_encoder(), backend="qfx")
    fast: Any = torch.compile(model, backend="qfx")
    start = torch.zeros(len(inputs["input_ids"]), 2, dtype=torch.long)
    with torch.no_grad():
        states = encoder(**inputs)
        fast(encoder_outputs=states, decoder_input_ids=start)
    assert not qfx.report(model).notes


def test_strict_makes_it_an_error() -> None:
    model, inputs = made("t5")
    model.compile(backend="qfx", options={"strict": True})
    with pytest.raises(Exception, match=TOLD):
        write(model, inputs)


def test_the_whole_forward_has_the_encoder_in_it() -> None:
    model, inputs = ZOO["t5"]()
    with torch.no_grad():
        torch.compile(model, backend="qfx")(**inputs)
    assert not qfx.report(model).notes


class OwnKind(nn.Module):
    """Looks like an encoder-decoder of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def get_encoder(self, kind: str) -> nn.Module:
        """Takes an argument."""
        return self.encoder


def test_other_models_have_none() -> None:
    plain = nn.Linear(2, 2)
    assert encoder_apart(plain, [plain.weight], []) == [] == encoder_apart(None, [plain.weight], [])
    decoder: Any = ZOO["llama"]()[0]
    assert encoder_apart(decoder, list(decoder.parameters()), []) == []
    own_kind = OwnKind()
    assert encoder_apart(own_kind, [own_kind.decoder.weight], []) == [], "what its method takes is not known"
    model, _ = ZOO["t5"]()
    assert encoder_apart(model, [], []) == [], "a graph that reads no weight"
    assert encoder_apart(model, [model.get_parameter("shared.weight")], []) == [], "tied tables are in both"
    own = model.get_parameter("decoder.final_layer_norm.weight")
    assert len(encoder_apart(model, [own], [])) == 1
