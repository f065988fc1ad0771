"""`qfx generate`: calibration text that the model writes itself."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from qfx.cli.models import check_device, sample_length
from qfx.cli.terminal import step
from qfx.hf import hub
from qfx.hf.generated import generated_batches
from qfx.storage.files import check_writable, write_text


def run(
    console: Console, model: str, out: Path, *, samples: int, seq_len: int | None, temperature: float, seed: int,
    device: str,
) -> None:  # fmt: skip
    """Write a .jsonl file with one text a line. What can be refused is refused before the model is loaded."""
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ValueError(
            f"{out} has one text a line in JSON\n  expected: a name that ends in .jsonl\n  found: {out.name}"
        )
    place = check_device(device)
    check_writable(out.parent)
    with step(console, f"load {model}"):
        loaded = hub.load(model, device=place)
    if loaded.tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer, so what it writes cannot become text\n"
            "  next step: qfx.generated_batches(model) gives its token ids"
        )
    length = sample_length(loaded, seq_len)
    with step(console, f"write {samples} texts of {length} tokens"):
        made = generated_batches(
            loaded.model, seq_len=length, samples=samples, temperature=temperature, seed=seed
        )  # fmt: skip
    texts = [loaded.tokenizer.decode(row, skip_special_tokens=True) for batch in made for row in batch["input_ids"]]
    write_text(out, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    console.print(
        f"{out}: {sum(map(len, texts))} characters; the first: {texts[0][:200]!r}", soft_wrap=True, markup=False
    )
