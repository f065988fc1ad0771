"""Needles in a haystack: does a model still find, far back, what its quantized cache of keys and values holds?

    pip install -e ".[demo]" -c constraints.txt
    python examples/needle.py --threads 2 --json numbers.json --plot map.png
    python examples/needle.py --quick

A small Llama is trained from scratch, in minutes, to look things up: a text is random hay with needles in it, tokens
that each say a value for a key; after it come questions, a key each, and the model has to answer with its value. Then
it reads texts of several lengths with each cache, CHUNK tokens at a time, and answers one token at a time, so that what
it knows of a needle is what the cache kept. The table has the share of right answers by cache and length; the map by
the depth of the needle too: 0 is the start of the text, 1 where the questions begin.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

if __name__ == "__main__":  # import the sibling files as `python -m examples.needle` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import qfx
from examples.train_tiny_lm import learning_rate, optimizers_for
from qfx.storage.files import write_text

CHUNK = 64  # tokens of a text that are read at once
BINS = 8  # of the depth
CACHES: Mapping[str, Any] = {
    "float": None,
    "i8": "i8",
    "i4": "i4",
    "k4v2": {"k": "i4", "v": "i2"},
    "k2v4": {"k": "i2", "v": "i4"},
    "i3": "i3",
    "i2": "i2",
    "u2 of a token": {"k": "u2/tok/f16", "v": "u2/tok/f16"},
}


@dataclass(frozen=True)
class Task:
    """Token ids: 0 begins a text, then needles (key by key, a token for each value), hay, questions, answers."""

    keys: int = 32
    values: int = 32
    hay: int = 64

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 1 + self.keys * self.values + self.hay + self.keys + self.values

    def texts(self, count: int, length: int, needles: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(token ids [count, length], places of the needles [count, needles]).

        The last 2 * needles tokens are a question and its answer for each needle, in the order of `places`. No two
        needles of a text have the same key. Raises ValueError where that cannot be, or the text is too short.
        """
        body = length - 2 * needles
        if not 1 <= needles <= min(self.keys, body - 1):
            raise ValueError(
                f"expected 1 to {min(self.keys, body - 1)} needles in a text of {length} tokens and {self.keys} keys, "
                f"found {needles}"
            )
        hay, question = 1 + self.keys * self.values, 1 + self.keys * self.values + self.hay
        ids = torch.randint(hay, question, (count, length), generator=random)
        ids[:, 0] = 0
        places = 1 + torch.rand(count, body - 1, generator=random).argsort(1)[:, :needles]
        keys = torch.rand(count, self.keys, generator=random).argsort(1)[:, :needles]
        values = torch.randint(self.values, (count, needles), generator=random)
        ids.scatter_(1, places, 1 + keys * self.values + values)
        ids[:, body::2], ids[:, body + 1 :: 2] = question + keys, question + self.keys + values
        return ids, places


@dataclass(frozen=True)
class Stage:
    """So many steps on batches of texts."""

    steps: int
    texts: int
    length: int
    needles: int


STAGES = (Stage(130, 64, 64, 16), Stage(70, 16, 256, 32), Stage(120, 4, 1024, 32), Stage(120, 2, 2048, 32))
SMALL, QUICK = Task(8, 8, 16), (Stage(60, 48, 32, 6), Stage(25, 16, 96, 8))


def untrained(task: Task, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of two query heads of 16 that share one of keys and values: few channels, which rounding hurts."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.04,
            bos_token_id=0,
            eos_token_id=None,
        )
    )


def answers(logits: Tensor, ids: Tensor, needles: int) -> tuple[Tensor, Tensor]:
    """(logits [B, needles, V] after each question, the answers [B, needles]) of texts read at once."""
    tail = 2 * needles
    return logits[:, -tail::2], ids[:, 1 - tail :: 2]


def train(
    model: LlamaForCausalLM, task: Task, stages: Sequence[Stage], *, rate: float = 0.01, seed: int = 1,
    on_stage: Callable[[Stage, float, float], None] | None = None,
) -> float:  # fmt: skip
    """Train in place on the answers alone; the share of right ones of the last step.

    on_stage: is told each stage at its end, with the loss and the share of right answers of its last step.
    """
    random, optimizers = torch.Generator().manual_seed(seed), optimizers_for(model, rate)
    total, done, right = sum(stage.steps for stage in stages), 0, 0.0
    model.train()
    for stage in stages:
        loss = torch.tensor(math.nan)
        for _ in range(stage.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(max(done / total, 1e-3), rate)
            ids, _ = task.texts(stage.texts, stage.length, stage.needles, random)
            found, wanted = answers(model(ids, use_cache=False).logits, ids, stage.needles)
            loss = functional.cross_entropy(found.flatten(0, 1), wanted.flatten())
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            done, right = done + 1, float((found.argmax(-1) == wanted).double().mean())
        if on_stage is not None:
            on_stage(stage, float(loss.detach()), right)
    model.eval()
    return right


@torch.no_grad()
def retrieved(model: Any, ids: Tensor, needles: int, cache: Any) -> Tensor:
    """bool [B, needles]: is the best guess after each question its answer? Texts as `Task.texts` makes them.

    The text is read CHUNK tokens at a time into `cache`, then question and answer one token at a time.
    """
    body = ids.shape[1] - 2 * needles
    for part in ids[:, :body].split(CHUNK, 1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    right = []
    for at in range(body, ids.shape[1], 2):
        found = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        right.append(found.argmax(-1) == ids[:, at + 1])
        model(input_ids=ids[:, at + 1 : at + 2], past_key_values=cache, use_cache=True)
    return torch.stack(right, 1)


def new_cache(model: Any, kv: Any) -> Any:
    """An empty cache of these formats; None: transformers' own, in float."""
    return DynamicCache() if kv is None else qfx.QuantizedCache(model.config, kv)


def measured(
    model: Any, task: Task, lengths: Sequence[int], *, texts: int = 8, needles: int = 32, seed: int = 2,
    caches: Mapping[str, Any] = CACHES,
) -> dict[str, dict[int, list[float]]]:  # fmt: skip
    """Share of right answers of each cache, by length, in each of BINS depths (nan where no needle lies)."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in caches}
    for length in lengths:
        ids, places = task.texts(texts, length, needles, torch.Generator().manual_seed(seed))
        depth = (places * BINS // (length - 2 * needles)).clamp(max=BINS - 1)
        for name, kv in caches.items():
            right = retrieved(model, ids, needles, new_cache(model, kv)).double()
            found[name][length] = [
                float(right[depth == i].mean()) if bool((depth == i).any()) else math.nan for i in range(BINS)
            ]
    return found


def mean(shares: Sequence[float]) -> float:
    """Of those that are numbers."""
    known = [share for share in shares if not math.isnan(share)]
    return sum(known) / len(known)


def shown(found: Mapping[str, Mapping[int, Sequence[float]]], task: Task) -> Table:
    """A row for each cache, a column for each length."""
    lengths = list(next(iter(found.values())))
    title = f"right answers by length of the text ({1 / task.values:.1%} by chance), and the worst depth"
    table = Table("cache", *(str(length) for length in lengths), "worst", title=title, title_justify="left")
    for name, row in found.items():
        worst, at, i = min((s, n, i) for n, each in row.items() for i, s in enumerate(each) if not math.isnan(s))
        cells = [f"{mean(row[length]):.1%}" for length in lengths]
        table.add_row(name, *cells, f"{worst:.1%} at {(i + 0.5) / BINS:.2f} of {at}")
    return table


def plot(path: Path, found: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    """A map for each cache: length of the text, depth of the needle, share of right answers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, -(-len(found) // 2), figsize=(2.9 * -(-len(found) // 2), 6.4), squeeze=False)
    lowest = min(share for row in found.values() for each in row.values() for share in each if not math.isnan(share))
    image = None
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.flat, found.items(), strict=False):
        values = torch.tensor(list(row.values())).T.numpy()
        image = axis.imshow(
            values,
            vmin=math.floor(lowest * 10) / 10,
            vmax=1,
            cmap="RdYlGn",
            aspect="auto",
            origin="upper",
            extent=(-0.5, len(row) - 0.5, 1, 0),
        )
        axis.set_xticks(range(len(row)), [str(length) for length in row], fontsize=8)
        axis.set_title(f"{name}: {mean([mean(each) for each in row.values()]):.0%}", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of the text")
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    figure.colorbar(image, cax=figure.add_axes((0.945, 0.1, 0.012, 0.8)), label="right answers")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a text.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts of each length.")] = 16,
    needles: Annotated[int, typer.Option(min=1, help="Needles in each text.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the weights and the texts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the shares to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the maps into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Short texts, less training: to see it run.")] = False,
) -> None:
    """Train the model, then look for needles with each cache."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    task, console, started = SMALL if quick else Task(), Console(), time.monotonic()
    lengths = length or ([96, 128] if quick else [128, 256, 512, 1024, 2048])
    needles = min(needles, task.keys)

    def on_stage(stage: Stage, loss: float, right: float) -> None:
        spent = time.monotonic() - started
        console.print(
            f"{spent:5.0f} s  {stage.steps} steps of {stage.length} tokens: loss {loss:.3f}, {right:.1%} right"
        )

    model = untrained(task, seed)
    train(model, task, QUICK if quick else STAGES, seed=seed + 1, on_stage=on_stage)
    found = measured(model, task, lengths, texts=texts, needles=needles, seed=seed + 2)
    console.print(shown(found, task))
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")
    if plot_file is not None:
        plot(plot_file, found)


if __name__ == "__main__":
    typer.run(main)
