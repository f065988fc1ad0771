"""Calibration data without a text: what a language model writes itself.

Tokens are drawn from the model's own distribution, one after the other, so that what its layers see is what they see
when it writes. Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning"; Liu et al. 2023,
"LLM-QAT", train on such text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import explain, first_line
from qfx.quantize import evaluating

_TOGETHER = 32  # texts that are written at once: a step takes hardly longer for them than for one


def generated_batches(
    model: nn.Module,
    *,
    seq_len: int = 512,
    batch_size: int = 4,
    samples: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches {"input_ids": int64 [batch_size, seq_len]} that a language model of transformers wrote, on its device.

    Each text begins with the model's token for beginnings, or with one drawn from the vocabulary where it has none;
    tokens that end texts are not drawn. temperature: below 1 the likely tokens are drawn more often, above 1 less. The
    same arguments give the same text. Text like that which the model will see is better data, where there is some. The
    model is not changed, nor is torch's random generator.
    Raises ValueError for sizes below 1, a temperature that is not above 0, a model that does not write (no generate(),
    an encoder-decoder, weights on disk), more tokens than its positions, and one that computes NaN.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, found {value}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, found {temperature}")
    config = _checked(model, seq_len)
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
        for start in range(0, samples, _TOGETHER):
            _seed(device, seed * 1_000_003 + start)
            first = _first(model, config, min(_TOGETHER, samples - start), device)
            rows.append(first if seq_len == 1 else _written(model, first, seq_len - 1, temperature))
    return [{"input_ids": batch} for batch in torch.cat(rows).split(batch_size)]


def _checked(model: nn.Module, seq_len: int) -> Any:
    """The configuration of a model that writes text. Raises ValueError for any other."""
    config = getattr(model, "config", None)
    writes = callable(getattr(model, "can_generate", None)) and model.can_generate()  # type: ignore[operator]
    if config is None or not writes or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            explain(
                f"{type(model).__name__} does not write text of its own",
                expected="a language model of transformers that has generate() and no encoder",
                next_step="give batches, such as qfx.data.text_batches(tokenizer, texts)",
            )
        )
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and seq_len > most:
        raise ValueError(f"the model takes {most} tokens, found seq_len={seq_len}")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            explain(
                "the model's weights are on disk, and text is written with all of them",
                next_step="load the whole model, or give batches of a text",
            )
        )
    return text


def _seed(device: torch.device, seed: int) -> None:
    """Seed what draws on this device, and no other as torch.manual_seed does."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _first(model: nn.Module, config: Any, count: int, device: torch.device) -> Tensor:
    """int64 [count, 1], the token that each text begins with."""
    own = getattr(model, "generation_config", None)
    begin = next((b for c in (own, config) if isinstance(b := getattr(c, "bos_token_id", None), int)), None)
    if begin is not None and 0 <= begin < config.vocab_size:
        return torch.full((count, 1), begin, device=device)
    return torch.randint(0, config.vocab_size, (count, 1)).to(device)


def _written(model: Any, first: Tensor, tokens: int, temperature: float) -> Tensor:
    """int64 [count, 1 + tokens]: `first` [count, 1] and so many tokens that were drawn."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    way = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        min_new_tokens=tokens, max_new_tokens=tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    try:
        found: Tensor = model.generate(first, attention_mask=torch.ones_like(first), generation_config=way)
    except RuntimeError as error:
        raise ValueError(
            explain(
                f"the model cannot write text: {first_line(error)}",
                expected="finite logits for each token",
                next_step="qfx.data.text_batches(tokenizer, texts) makes data of a text; is the model trained?",
            )
        ) from error
    return found
