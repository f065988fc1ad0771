"""Whole models of several architectures, tiny and random, captured by both doors and run on ONNX Runtime."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, fx

from qfx.backends import reference
from qfx.backends.onnx import lower
from qfx.capture import capture_dynamo, capture_export
from qfx.errors import Note
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.onnx.checks import same, sqnr
from tests.zoo import VOCAB, ZOO, ids, noise, randomize

ENCODERS = {"bert", "roberta", "distilbert", "electra", "vit", "clip"}
QUICK = ("bert", "llama", "mixtral", "t5", "vit")
SLOW = tuple(name for name in ZOO if name not in QUICK)
ALL = [*QUICK, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]
TOLERANCE = 5e-6


def model_of(name: str, **how: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    model, inputs = ZOO[name](**how)
    return model, inputs if name in ENCODERS else {**inputs, "use_cache": False}


def outputs(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [v for v in torch.utils._pytree.tree_leaves(model(**inputs)) if isinstance(v, Tensor)]


def larger(inputs: dict[str, Any]) -> dict[str, Any]:
    """One more in the batch, and three more tokens where there are tokens."""
    grown = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            longer = torch.cat([value, value[:, :3]], 1) if value.dim() == 2 else value
            grown[name] = torch.cat([longer, longer[:1]])
        else:
            grown[name] = value
    return grown


def llava() -> tuple[torch.nn.Module, dict[str, Any]]:
    """A vision tower whose four patches stand among the tokens of a text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16, **sizes}
    text = {"model_type": "llama", "vocab_size": VOCAB, "num_key_value_heads": 2, **sizes}
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    randomize(model, 0)
    tokens = ids(10)
    tokens[:, 2:6] = 1
    return model, {"input_ids": tokens, "pixel_values": noise(2, 3, 16, 16), "use_cache": False}


@pytest.mark.parametrize("recipe", [None, "w8a8"])
def test_a_model_that_reads_images_among_tokens(recipe: str | None) -> None:
    model, inputs = llava()
    captured = capture_export(model, (), inputs)
    if recipe is not None:
        prepare(captured.gm)
        assert not apply_plan(captured.gm, None, Recipe.parse(recipe))
    lowered = lower(captured.gm, strict=True)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"][:, :2], inputs["input_ids"]], 1)}
    other = {**longer, "input_ids": longer["input_ids"].roll(1, 1), "pixel_values": inputs["pixel_values"].flip(0)}
    for case in (inputs, longer, other):
        for one, wanted in zip(lowered(*captured.flatten((), case)), outputs(model, case), strict=True):
            if recipe is None:
                same(one, wanted, tolerance=TOLERANCE)
            else:
                assert sqnr(wanted, one) > 25


@pytest.mark.parametrize("name", ALL)
def test_exported_model(name: str) -> None:
    model, inputs = model_of(name)
    captured = capture_export(model, (), inputs)
    lowered = lower(captured.gm, strict=True)
    assert not lowered.notes
    cases = [inputs] if name == "whisper" else [inputs, larger(inputs)]  # export fixes whisper's batch size
    for case in cases:
        found = lowered(*captured.flatten((), case))
        for one, other in zip(found, outputs(model, case), strict=True):
            same(one, other, TOLERANCE)


def _compiled(model: torch.nn.Module, notes: list[Note]) -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        captured = capture_dynamo(gm, examples)
        lowered = lower(captured.gm)
        notes.extend(lowered.notes)
        graphs.append(captured.gm)

        def run(*args: Any) -> tuple[Any, ...]:
            found = lowered(*[args[i] for i in captured.inputs])
            for output, i in captured.mutations.items():
                args[i].copy_(found[output])
            return found[len(captured.mutations) :]

        return run

    return torch.compile(model, backend=backend), graphs


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_compiled_model_static_then_dynamic(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = model_of(name)
    notes: list[Note] = []
    compiled, graphs = _compiled(model, notes)
    for case in (inputs, larger(inputs)):
        for found, expected in zip(outputs(compiled, case), outputs(model, case), strict=True):  # type: ignore[arg-type]
            same(found, expected, TOLERANCE)
    assert len(graphs) == 2
    assert not notes


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "whisper"])
def test_generation_with_a_cache(name: str, cache: str) -> None:
    torch._dynamo.reset()
    model, inputs = ZOO[name]()
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder") and k != "use_cache"}
    how: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    how |= {"cache_implementation": cache} if cache == "static" else {}
    expected = model.generate(**given, **how)  # type: ignore[operator]
    notes: list[Note] = []
    model.forward, graphs = _compiled(model.forward, notes)  # type: ignore[arg-type]
    assert torch.equal(model.generate(**given, **how), expected)  # type: ignore[operator]
    assert 2 <= len(graphs) <= 3
    assert not notes


@pytest.mark.parametrize("name", ["bert", "mixtral", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["w8a8", pytest.param("w4a16", marks=pytest.mark.slow)])
def test_quantized_model_equals_the_reference(name: str, recipe: str) -> None:
    model, inputs = model_of(name)
    captured = capture_export(model, (), inputs)
    prepare(captured.gm)
    apply_plan(captured.gm, None, Recipe.parse(recipe))
    given = captured.flatten((), inputs)
    lowered = lower(captured.gm, strict=True)
    kernels = [k for name_, k in lowered.kernels.items() if "linear" in name_]
    wanted = ("MatMulIntegerToFloat u8 x s8",) if recipe == "w8a8" else ("MatMulNBits 4-bit", "QMoE 4-bit")
    assert kernels
    assert all(kernel.startswith(wanted) for kernel in kernels)
    for one, other in zip(lowered(*given), reference.lower(captured.gm)(*given), strict=True):
        tokens = [sqnr(*pair) for pair in zip(other.flatten(0, -2), one.flatten(0, -2), strict=True)]
        assert statistics.median(tokens) > (60 if recipe == "w8a8" else 25)
        assert sqnr(other, one) > (35 if recipe == "w8a8" else 25)  # a sum between two codes may go to either
