"""Train a tiny Llama (2.8 M parameters) on the text that every Python ships, on a CPU in under half an hour.

    python examples/train_tiny_lm.py --out DIR --minutes 25 --seed 0 --threads 2

Writes a transformers checkpoint in float16 (config, weights, tokenizer, README with the loss curve) to DIR each time
the validation loss improves, so an interrupted run leaves the best model so far. `--minutes` trains less on a busy
machine (there, OMP_WAIT_POLICY=PASSIVE helps); `--steps` fixes the work instead.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__":  # import the sibling files as `python -m examples.train_tiny_lm` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from examples.lm_eval import bits_per_byte, next_token_loss, nll, perplexity
from examples.python_text import Document, documents, normal, paragraphs, sample, split_documents, without_seen

END = "<|endoftext|>"
WINDOW = 1024
PROSE_REPEATS = 4  # prose is 2 MB, source 8 MB: one pass over the mixture reads prose four times
README = """# tiny_lm

A {millions:.2f} M parameter Llama for tests: hidden {c.hidden_size}, {c.num_hidden_layers} layers, \
{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of {c.head_dim}, MLP {c.intermediate_size}, \
byte-level BPE of {c.vocab_size} tokens, tied embeddings, trained on windows of 512 and 1,024 tokens, stored in float16.

    model = AutoModelForCausalLM.from_pretrained("tests/assets/tiny_lm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("tests/assets/tiny_lm")

Made by `python examples/train_tiny_lm.py` from the help topics, docstrings and source of the standard library of \
Python {python}. That text, and the held-out `eval.txt` beside this folder, is under the PSF License Version 2 \
(https://docs.python.org/3/license.html), copyright Python Software Foundation and the authors named in the modules.

| on `eval.txt` ({size:,} bytes, {tokens:,} tokens, never trained on) | |
|---|---|
| perplexity per token, window 1,024 | {ppl:.3f} |
| perplexity per token, window 512 | {ppl512:.3f} |
| bits per byte, window 1,024 | {bpb:.4f} |

Training: {steps:,} steps of {batch:,} tokens, {minutes:.1f} minutes with {threads} threads, seed {seed}.

| step | minutes | training loss | validation loss |
|---|---|---|---|
{curve}
"""


@dataclass(frozen=True)
class Settings:
    """One training run; `steps` > 0 ends it by count, so that it can be repeated exactly, else `minutes` does."""

    minutes: float = 25.0
    steps: int = 0
    seed: int = 0
    threads: int = 2
    peak_rate: float = 4e-3
    batch: int = 2  # windows of 1,024 tokens a step; three steps of four see them as windows of 512
    checks: int = 16
    autocast: bool = True


@dataclass
class Progress:
    """Where a run stands: `done` goes from 0 to 1; `curve` rows are (step, minutes, training, validation loss)."""

    step: int = 0
    done: float = 0.0
    best: float = math.inf
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)


def model_config(vocabulary: int = 2048) -> LlamaConfig:
    """Grouped-query attention, tied embeddings, room for 2,048 positions."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(texts: list[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes there and back unchanged. Token 0 ends a document, starts one and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """One stream of token ids [T], an end token before each text."""
    end = tokenizer.convert_tokens_to_ids(END)
    pieces = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for piece in pieces for token in (end, *piece.ids)], dtype=torch.long)


def training_texts(train: list[Document], held_out: str) -> list[str]:
    """Prose `PROSE_REPEATS` times and source once, less every paragraph of the text `held_out`."""
    seen = {normal(p) for p in paragraphs(held_out)}
    kept = [without_seen(document, seen) for document in train]
    prose = [document.text for document in kept if document.kind != "source"]
    return prose * PROSE_REPEATS + [document.text for document in kept if document.kind == "source"]


def batches(stream: Tensor, size: int, seed: int, window: int = WINDOW) -> Iterator[Tensor]:
    """Endless batches of ids: all windows in random order, cut anew each epoch; every fourth batch is
    [size, window], the others the same tokens as [2 * size, window // 2]."""
    if len(stream) < (size + 1) * window:
        raise ValueError(f"expected a text of at least {(size + 1) * window} tokens, found {len(stream)}")
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        start = int(torch.randint(window, (1,), generator=generator))
        pieces = stream[start : start + (len(stream) - start) // window * window].view(-1, window)
        for rows in torch.randperm(len(pieces), generator=generator).split(size):
            if len(rows) == size:
                step += 1
                yield pieces[rows] if step % 4 == 0 else pieces[rows].view(2 * size, window // 2)


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine to zero."""
    return peak * min(done / 0.03, 0.5 + 0.5 * math.cos(math.pi * done))


def optimizers_for(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (it needs about half the steps of AdamW here), AdamW for the rest."""
    named = list(model.named_parameters())
    layers = [p for name, p in named if p.dim() == 2 and "embed_tokens" not in name]
    rest = [p for name, p in named if p.dim() != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(layers, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    validation: Tensor,
    settings: Settings,
    on_check: Callable[[Progress, bool], None],
) -> Progress:
    """Train in place; `on_check(progress, better)` runs after each validation, `better` where the loss is the lowest.
    Validation does not count as training time."""
    progress, optimizers = Progress(), optimizers_for(model, settings.peak_rate)
    next_check, seconds, losses = 0.0, 0.0, list[float]()
    for ids in batches(stream, settings.batch, settings.seed):
        started = time.monotonic()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(max(progress.done, 1e-3), settings.peak_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            logits = model(ids, use_cache=False).logits
        loss = next_token_loss(logits, ids)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
        progress.step += 1
        seconds += time.monotonic() - started
        minutes = seconds / 60
        progress.done = min(1.0, progress.step / settings.steps if settings.steps else minutes / settings.minutes)
        if progress.done >= next_check:
            next_check = min(1.0, progress.done + 1 / settings.checks)
            model.eval()
            held = nll(model, validation, WINDOW)
            model.train()
            progress.curve.append((progress.step, minutes, sum(losses) / len(losses), held))
            better, progress.best = held < progress.best, min(held, progress.best)
            losses.clear()
            on_check(progress, better)
        if progress.done >= 1:
            return progress
    raise AssertionError("batches() ends")


def describe(model: LlamaForCausalLM, ids: Tensor, size: int, progress: Progress, settings: Settings) -> str:
    """Text of the asset's README, measured on `ids` [T] of a text of `size` bytes."""
    return README.format(
        c=model.config,
        millions=model.num_parameters() / 1e6,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        size=size,
        tokens=len(ids),
        ppl=perplexity(model, ids, 1024),
        ppl512=perplexity(model, ids, 512),
        bpb=bits_per_byte(model, ids, size, 1024),
        steps=progress.step,
        batch=settings.batch * WINDOW,
        minutes=progress.curve[-1][1],
        threads=settings.threads,
        seed=settings.seed,
        curve="\n".join(f"| {s:,} | {m:.1f} | {t:.3f} | {v:.3f} |" for s, m, t, v in progress.curve),
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, readme: Callable[[], str], out: Path) -> None:
    """Write the whole asset to a folder beside `out`, then put it in its place. `model` is rounded to float16 values
    while `readme()` measures it, so that the numbers are those of the stored weights, and comes back as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.half().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        model.float().eval()
        (fresh / "README.md").write_text(readme(), encoding="utf-8")
        fresh.chmod(0o755)
        for path in fresh.iterdir():
            path.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        fresh.replace(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        model.float().load_state_dict(exact)
        model.train()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    minutes: Annotated[float, typer.Option(help="Length of the training.")] = 25.0,
    steps: Annotated[int, typer.Option(help="Length in steps instead: repeatable.")] = 0,
    seed: Annotated[int, typer.Option(help="Weights and order of the text.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    batch: Annotated[int, typer.Option(help="Windows of 1,024 tokens a step.")] = 2,
    eval_text: Annotated[Path | None, typer.Option(help="Held-out text; left out: a sample of this Python's.")] = None,
    stdlib: Annotated[Path | None, typer.Option(help="Folder of the library; left out: this Python's.")] = None,
) -> None:
    """Train and write the checkpoint each time the validation loss improves."""
    settings = Settings(minutes, steps, seed, threads, peak_rate, batch)
    console = Console()
    disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    sides = split_documents(documents(stdlib))
    held_out = eval_text.read_text(encoding="utf-8") if eval_text else sample(sides["eval"], 60_000)
    texts = training_texts(sides["train"], held_out)
    tokenizer = train_tokenizer(texts)
    stream, eval_ids = encode(tokenizer, texts), encode(tokenizer, [held_out])
    validation = encode(tokenizer, [document.text for document in sides["validation"]])
    model = LlamaForCausalLM(model_config(len(tokenizer)))
    console.print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens")

    def on_check(progress: Progress, better: bool) -> None:
        step, spent, training, held = progress.curve[-1]
        mark = "[green]best[/green]" if better else ""
        console.print(f"step {step:6,}  {spent:5.1f} min  training {training:.3f}  validation {held:.3f}  {mark}")
        if better:
            size = len(held_out.encode())
            save(model, tokenizer, lambda: describe(model, eval_ids, size, progress, settings), out)

    progress = train(model, stream, validation, settings, on_check)
    console.print(f"best validation loss {progress.best:.3f}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
