"""What quantized caches cost and save: qfx.QuantizedCache beside transformers' own QuantizedCache, on one model.

    pip install -e ".[demo,bench]" -c constraints.txt && pip install optimum-quanto hqq
    python examples/benchmarks/kv_accuracy.py --threads 1 --json numbers.json --plot curve.png
    python examples/benchmarks/kv_accuracy.py --tokens 32 --texts 1 --step 32 --agree 0 --timed llama-0.1b --at 8192

Divergence and perplexity: the tiny language model reads held-out text, all caches the same tokens in the same steps
(one token a step unless `--step` says otherwise), each against the float cache. Bytes: of a token, codes, scales, zero
points and what stays in float, the floats counted as 16 bits, averaged over the last 128 lengths. ms: of one token
after so many, averaged over 128 tokens, since some caches round their history anew every so often. same prompts: share
of greedy continuations of 64 tokens that are the float cache's, token for token. A cache whose library is missing is a
row that says why.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.kv_accuracy` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.peers import table
from examples.benchmarks.peers.decoding import SHAPES, DecoderJob
from qfx import data
from qfx.kv.judge import Judgement, judge_each

ASSETS = Path(__file__).resolve().parents[2] / "tests" / "assets"
FLOAT = "float"
WINDOW = 128  # tokens over which bytes and times are averaged: as many as transformers' caches leave in float
PROMPT, NEW = 64, 64  # tokens of a greedy continuation
COLUMNS = {"bytes": "bytes a token", "ratio": "of float16", "kld": "KLD", "change": "perplexity", "top1": "best token"}
FIRST = 16  # tokens that go into a cache first: some can store no fewer
Make = Callable[[Any], Any]  # model -> an empty cache
Row = dict[str, Any]
Numbers = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Entry:
    """A row to be: its name, and how its cache is made."""

    name: str
    make: Make


def _own(kv: Any) -> Make:
    return lambda model: qfx.QuantizedCache(model.config, kv)


def _theirs(backend: str, **options: Any) -> Make:
    def make(model: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(backend, model.config, **options)

    return make


def _dynamic(_: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _by_heads(model: Any) -> Any:
    """The preset kv-heads, planned on Python's help topics: as many bytes as 3 bits everywhere."""
    rows = data.text_batches(tokenizer(), data.python_help(), seq_len=512, batch_size=8, samples=16)
    calls = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    return qfx.QuantizedCache(model.config, qfx.plan(model, "kv-heads", calls))


ENTRIES = (
    Entry(FLOAT, _dynamic),
    *(Entry(f"qfx {kv}", _own(kv)) for kv in ("i8", "fp8", "i4", "i3", "i2")),
    Entry("qfx i4/g64", _own({"k": "u4/g64/f16", "v": "u4/g64/f16"})),
    Entry("qfx i2/g64", _own({"k": "u2/g64/f16", "v": "u2/g64/f16"})),
    Entry("qfx i8/g32", _own({"k": "i8/g32/f16", "v": "i8"})),
    Entry("qfx k4v2", _own({"k": "i4", "v": "i2"})),
    Entry("qfx k2v4", _own({"k": "i2", "v": "i4"})),
    Entry("qfx kv-heads", _by_heads),
    Entry("quanto int4", _theirs("quanto", nbits=4)),
    Entry("quanto int2", _theirs("quanto", nbits=2)),
    *(Entry(f"hqq int{bits}", _theirs("hqq", nbits=bits, axis_key=1, axis_value=1)) for bits in (8, 4, 2)),
    Entry("quanto int4/32", _theirs("quanto", nbits=4, q_group_size=32)),
    Entry("quanto int2/32", _theirs("quanto", nbits=2, q_group_size=32)),
    Entry("hqq int4/32", _theirs("hqq", nbits=4, axis_key=1, axis_value=1, q_group_size=32)),
    Entry("hqq int2/32", _theirs("hqq", nbits=2, axis_key=1, axis_value=1, q_group_size=32)),
    Entry("transformers fp8", _theirs("fp8")),
)


def tokenizer() -> Any:
    """Of the tiny language model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "tiny_lm", model_max_length=10**9)


def load() -> Any:
    """The tiny language model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()


def text(windows: int, length: int) -> Tensor:
    """Held-out token ids [windows, length]."""
    ids: Tensor = tokenizer()(data.read_texts(ASSETS / "eval.txt")[0], return_tensors="pt").input_ids[0]
    return ids[: windows * length].view(windows, length)


def held(cache: Any) -> int:
    """Bytes of all tensors below a cache's layers, what is floating point counted as 16 bits; each memory once."""
    found: dict[int, int] = {}
    for tensor in _tensors([vars(layer) for layer in cache.layers]):
        size = 2 if tensor.is_floating_point() and tensor.element_size() > 2 else tensor.element_size()
        if tensor.numel():
            found[tensor.data_ptr()] = tensor.numel() * size
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those below a value, what tensors of several parts are made of in their place."""
    if isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    parts: Any = value if isinstance(value, list | tuple) else ()
    if isinstance(value, Tensor):
        parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
    elif isinstance(value, dict):
        parts = value.values()
    for part in parts:
        yield from _tensors(part)


def size_of(cache: Any, config: Any) -> int:
    """Bytes of a cache's tokens in a float16 model: of qfx without the room that it has to grow, of others `held`."""
    if not isinstance(cache, qfx.QuantizedCache):
        return held(cache)
    heads, width, tokens = config.num_key_value_heads, config.head_dim, cache.get_seq_length()
    return sum(int(fmt.nbytes(heads, width, tokens)) for fmt in cache.formats)


def fill(model: Any, cache: Any, tokens: int) -> None:
    """`tokens` random tokens into each layer of an empty cache, FIRST of them before the others."""
    config, random = model.config, torch.Generator().manual_seed(0)
    for count in (FIRST, tokens - FIRST) if tokens > FIRST else (tokens,):
        for layer in range(config.num_hidden_layers):
            new = torch.randn(2, 1, config.num_key_value_heads, count, config.head_dim, generator=random)
            cache.update(new[0], new[1], layer)


@torch.no_grad()
def steps(model: Any, cache: Any, count: int) -> Iterator[float]:
    """Seconds of each of `count` tokens that the model reads after those in the cache."""
    for i in range(count):
        ids = torch.tensor([[i % 100 + 3]])
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        yield time.perf_counter() - started


def sizes_and_times(model: Any, entries: Sequence[Entry], tokens: int, rounds: int = 1) -> Numbers:
    """(bytes a token, milliseconds a token) of each cache, by name: means over the WINDOW tokens that end at `tokens`.

    The caches take turns token by token. The least of the rounds counts.
    """
    found: Numbers = {}
    for _ in range(rounds):
        caches = {entry.name: entry.make(model) for entry in entries}
        for cache in caches.values():
            fill(model, cache, tokens - WINDOW)
        spent = dict.fromkeys(caches, 0.0)
        size = dict.fromkeys(caches, 0.0)
        clocks = {name: steps(model, cache, WINDOW) for name, cache in caches.items()}
        for at in range(tokens - WINDOW + 1, tokens + 1):
            for name, clock in clocks.items():
                spent[name] += next(clock)
                size[name] += size_of(caches[name], model.config) / at
        for name in caches:
            ms = 1e3 * spent[name] / WINDOW
            found[name] = size[name] / WINDOW, min(ms, found[name][1]) if name in found else ms
    return found


def timings(model: Any, name: str, entries: Sequence[Entry], lengths: Sequence[int], rounds: int) -> dict[int, Numbers]:
    """`sizes_and_times` by length, of `model` or of a random one of another shape."""
    if name == "tiny_lm":
        return {length: sizes_and_times(model, entries, length, rounds) for length in lengths}
    with tempfile.TemporaryDirectory() as folder:
        other = DecoderJob(name, 2, 1, 2, torch.get_num_threads(), folder).module()
        good, _ = usable(other, entries)  # not those that are planned for one model
        return {length: sizes_and_times(other, good, length, rounds) for length in lengths}


def agreement(model: Any, entries: Sequence[Entry], prompts: int, new: int = NEW) -> Numbers:
    """(share of prompts, share of tokens) whose greedy continuation is the float cache's, by name."""
    ids = text(prompts, PROMPT)
    wanted: Tensor | None = None
    found: Numbers = {}
    for entry in entries:
        made: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=entry.make(model), max_new_tokens=new,
            min_new_tokens=new, do_sample=False,
        )[:, PROMPT:]  # fmt: skip
        wanted = made if wanted is None else wanted
        same = made == wanted
        found[entry.name] = float(same.all(1).double().mean()), float(same.double().mean())
    return found


def usable(model: Any, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """The entries whose caches work here, and why the others do not. A plan is made once."""
    good, failed = [], {}
    for entry in entries:
        try:
            first = entry.make(model)
            fill(model, first, 65)
            made = entry.make
            if isinstance(first, qfx.QuantizedCache):
                alike = len(set(first.formats)) == 1
                made = _own(first.formats[0] if alike else first.formats)
            good.append(Entry(entry.name, made))
        except Exception as error:  # noqa: BLE001  (whatever a library raises is the row's reason)
            failed[entry.name] = f"{type(error).__name__}: {error}"
    return good, failed


def rows_of(entries: Sequence[Entry], failed: dict[str, str], judged: dict[str, Judgement], sizes: Numbers,
            times: dict[int, Numbers], same: Numbers) -> list[Row]:  # fmt: skip
    """One dict for each entry, those that failed with the reason alone."""
    rows: list[Row] = []
    for entry in entries:
        if entry.name in failed:
            rows.append({"peer": entry.name, "failed": failed[entry.name]})
            continue
        one, size = judged[entry.name], sizes[entry.name][0]
        row: Row = {"peer": entry.name, "bytes": size, "ratio": size / sizes[FLOAT][0]}
        row |= {"kld": one.kld, "change": one.change, "top1": one.top1, "curve": one.curve}
        row |= {f"at_{length}_ms": found[entry.name][1] for length, found in times.items() if entry.name in found}
        if entry.name in same:
            row |= {"same_prompts": same[entry.name][0], "same_tokens": same[entry.name][1]}
        rows.append(row)
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each cache of transformers: qfx's of the least divergence in no more bytes, and how much faster it steps."""
    good = [row for row in rows if not row.get("failed") and row["peer"] != FLOAT]
    ours = [row for row in good if row["peer"].startswith("qfx ")]
    lines = []
    for row in good:
        if row in ours:
            continue
        fitting = [own for own in ours if own["bytes"] <= row["bytes"]]
        if not fitting:
            lines.append(f"{row['peer']}: no cache of qfx has as few bytes")
            continue
        best = min(fitting, key=lambda own: own["kld"])
        times = [key for key in row if key.endswith("_ms") and key in best]
        faster = ", ".join(f"{row[key] / best[key]:.1f}x at {key.split('_')[1]}" for key in times)
        named = [f"{one['peer']} ({one['bytes']:.0f} bytes, KLD {one['kld']:.6f})" for one in (row, best)]
        share = [f"has {best['kld'] / row['kld']:.3f} of it"] if row["kld"] else []
        lines.append(f"{named[0]}: {named[1]} {' and '.join([*share, *([f'is {faster}'] if faster else [])])}".rstrip())
    return lines


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Divergence over bytes, and divergence over the context."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    good = [row for row in rows if not row.get("failed") and row["peer"] != FLOAT]
    colours = mpl.colormaps["tab20"]
    for i, row in enumerate(good):
        own = row["peer"].startswith("qfx")
        style: dict[str, Any] = {"color": colours(i % 20), "marker": "o" if own else "x", "ls": "-" if own else ":"}
        left.plot([row["ratio"]], [row["kld"]], ms=8, label=row["peer"], **style)
        part = max(1, len(row["curve"]) // 16)
        pieces = [row["curve"][at : at + part] for at in range(0, len(row["curve"]), part)]
        right.plot([piece[0][0] for piece in pieces], [sum(d for _, d in piece) / len(piece) for piece in pieces],
                   ms=3, lw=1.2, **style)  # fmt: skip
    left.set(yscale="log", xlabel="bytes of the cache, of float16's", ylabel="KL divergence from the float cache, nats")
    right.set(yscale="log", xlabel="tokens read before")
    for axis in (left, right):
        axis.grid(visible=True, alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="center right", frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 1024,
    texts: Annotated[int, typer.Option(min=1, help="Texts that are read side by side.")] = 4,
    step: Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")] = 1,
    at: Annotated[list[int] | None, typer.Option(help="Tokens before those that are timed; 0: none.")] = None,
    timed: Annotated[str, typer.Option(help=f"Times of tiny_lm, or of random {', '.join(SHAPES)}.")] = "tiny_lm",
    agree: Annotated[int, typer.Option(help="Prompts of the greedy comparison.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name holds this word; float stays.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw divergence over bytes into it.")] = None,
) -> None:
    """Read a text with every cache there is, and print a table."""
    table.check([timed], (*SHAPES, "tiny_lm"), "--timed")
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    model, where, console = load(), table.place(threads), table.console()
    chosen = [e for e in ENTRIES if e.name == FLOAT or not only or any(word in e.name for word in only)]
    good, failed = usable(model, chosen)
    judged = judge_each(model, text(texts, tokens), {e.name: e.make(model) for e in good}, step=step)
    lengths = [length for length in (at or [1024, 2048, 8192]) if length > WINDOW]
    sizes = sizes_and_times(model, good, max(tokens, WINDOW + FIRST))
    times = timings(model, timed, good, lengths, rounds)
    same = agreement(model, good, agree) if agree else {}
    rows = rows_of(chosen, failed, judged, sizes, times, same)
    columns = COLUMNS | {f"at_{length}_ms": f"ms at {length}" for length in lengths}
    if same:
        columns |= {"same_prompts": "same prompts", "same_tokens": "same tokens"}
    console.print(where)
    console.print(table.shown(rows, columns, f"tiny_lm, {texts} texts of {tokens} tokens in steps of {step}"))
    for line in verdicts(rows):
        console.print(line, highlight=False)
    table.write(json_file, {"where": where, "tokens": tokens, "texts": texts, "rows": rows})
    if plot_file is not None:
        plot(plot_file, rows)


if __name__ == "__main__":
    typer.run(main)
