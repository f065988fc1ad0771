"""Memory that caches of keys and values take in a process: of a live model, and of an exported file.

    python examples/benchmarks/kv_memory.py --json numbers.json
    python examples/benchmarks/kv_memory.py --model tiny --tokens 1024

Each cache has a process of its own. There a random model reads a few tokens with that cache, so that everything is
imported; then a cache gets as many tokens, and the model one more. The growth is what the process holds more than
before, at its end and at its peak; the share is that of float16, of which `bytes` are exactly known. Linux only.

live: a model of transformers with DynamicCache or qfx.QuantizedCache; the keys and values go in CHUNK tokens at a time,
in the model's dtype. file: `qfx.onnx.load` of the exported model, whose memory is filled with random codes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.kv_memory` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks import kv_decode, memory
from examples.benchmarks.peers import table
from examples.benchmarks.peers.decoding import SHAPES, DecoderJob
from qfx.storage.spill import give_back

LIVE = ("float16", "float32", "i8", "fp8", "i4", "i3", "i2")
FILE = ("float32", "i8", "i4")
CHUNK = 256
COLUMNS = {
    "cache_bytes": "cache MB",
    "held_bytes": "held MB",
    "peak_bytes": "peak MB",
    "ratio": "held, of float16",
    "peak_ratio": "peak, of float16",
}
Row = dict[str, Any]


def live(name: str, kv: str, tokens: int, folder: Path) -> dict[str, int]:
    """Bytes of a live model's cache of `tokens` tokens, and by how much the process grew, at its end and peak."""
    from transformers import DynamicCache

    import qfx

    model: Any = _job(name, folder).module()
    if kv == "float16":
        model = model.half()

    def made() -> Any:
        return DynamicCache() if kv.startswith("float") else qfx.QuantizedCache(model.config, kv)

    def read(cache: Any, count: int) -> None:
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        for start in range(0, count - 1, CHUNK):
            new = torch.empty(2, 1, heads, min(CHUNK, count - 1 - start), width, dtype=model.dtype)
            for layer in range(model.config.num_hidden_layers):
                cache.update(*new.normal_(), layer)
        with torch.no_grad():
            model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    read(made(), 2 * CHUNK)
    cache = made()
    found = growth(lambda: read(cache, tokens))
    size = getattr(cache, "nbytes", None)
    held = size() if callable(size) else sum(t.nbytes for one in cache.layers for t in (one.keys, one.values))
    assert cache.get_seq_length() == tokens
    return {"cache_bytes": held, **found}


def file(name: str, kv: str, tokens: int, folder: Path) -> dict[str, int]:
    """The same of an exported model's."""
    import qfx.onnx

    model: Any = qfx.onnx.load(kv_decode.exported(_job(name, folder), "float32", kv), threads=1)

    def read(count: int) -> Any:
        cache = kv_decode.filled(model, count - 1, 1)
        with torch.no_grad():
            model(torch.tensor([[3]]), past_key_values=cache)
        return cache

    read(2 * CHUNK)
    kept: list[Any] = []
    found = growth(lambda: kept.append(read(tokens)))
    return {"cache_bytes": sum(t.nbytes for t in (*kept[0].keys, *kept[0].values)), **found}


def _job(name: str, folder: Path) -> DecoderJob:
    """The model, whose checkpoint and files lie in `folder`."""
    return DecoderJob(name, 2, 1, 2, 1, str(folder))


def growth(work: Any) -> dict[str, int]:
    """By how many bytes this process grew, at the end of `work` and at its peak."""
    gc.collect()
    give_back()
    before = memory.resident()
    peak = memory.grown(work)
    gc.collect()
    give_back()
    return {"held_bytes": memory.resident() - before, "peak_bytes": peak}


def half(name: str, tokens: int) -> int:
    """Bytes of a float16 cache."""
    shape = SHAPES[name]
    width = shape["hidden_size"] // shape["num_attention_heads"]
    return int(2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * width * tokens)


def rows(name: str, where: str, caches: tuple[str, ...], tokens: int, folder: Path) -> list[Row]:
    """One dict for each cache, each from a process of its own."""
    found: list[Row] = []
    for kv in caches:
        command = [sys.executable, __file__, "--model", name, "--tokens", str(tokens), "--stage", where, "--cache", kv]
        done = subprocess.run([*command, "--at", str(folder)], check=False, capture_output=True, text=True)
        row: Row = {"peer": f"{where} {kv}"}
        if done.returncode:
            row["failed"] = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
            row["ratio"] = row["held_bytes"] / half(name, tokens)
            row["peak_ratio"] = row["peak_bytes"] / half(name, tokens)
        found.append(row)
    return found


def main(
    model: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-0.1b",
    tokens: Annotated[int, typer.Option(min=2 * CHUNK, help="Tokens in the cache.")] = 8192,
    cache: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(LIVE)}.")] = None,
    stage: Annotated[str, typer.Option(help="Of a process of its own: live or file.")] = "",
    at: Annotated[Path | None, typer.Option(help="Its folder.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the numbers there.")] = None,
) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if unknown := [name for name in cache or () if name not in LIVE]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(LIVE)}", param_hint="--cache")
    if stage:
        assert at is not None and cache is not None, "a stage needs its folder and a cache"
        found = live(model, cache[0], tokens, at) if stage == "live" else file(model, cache[0], tokens, at)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        made = [
            row
            for where, known in (("live", LIVE), ("file", FILE))
            for row in rows(model, where, tuple(n for n in known if not cache or n in cache), tokens, Path(folder))
        ]
    table.console().print(
        table.shown(made, COLUMNS, f"{model}, {tokens} tokens, {half(model, tokens) / 1e6:.1f} MB in float16")
    )
    table.write(output, {"model": model, "tokens": tokens, "rows": made})


if __name__ == "__main__":
    typer.run(main)
