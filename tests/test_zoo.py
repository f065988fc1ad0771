"""tests.zoo: models are the same every time, and their norms and biases are not trivial."""

from __future__ import annotations

import torch

from tests.graphs import error
from tests.zoo import ZOO


def test_the_same_seed_gives_the_same_model() -> None:
    (one, inputs), (two, _), (other, _) = ZOO["bert"](), ZOO["bert"](), ZOO["bert"](seed=1)
    with torch.no_grad():
        assert error(one(**inputs), two(**inputs)) == 0
        assert error(one(**inputs), other(**inputs)) > 0.1


def test_norms_and_biases_are_random() -> None:
    model, _ = ZOO["llama"]()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms and all(p.std() > 0.05 for p in norms)
    model, _ = ZOO["gpt2"]()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases and all(p.std() > 0.05 for p in biases)


def test_attention_can_be_spelled_out() -> None:
    model, inputs = ZOO["llama"](attention="eager")
    other, _ = ZOO["llama"]()
    with torch.no_grad():
        assert error(model(**inputs), other(**inputs)) < 1e-5
