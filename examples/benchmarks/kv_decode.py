"""Caches of keys and values in 8 and 4 bits against float32 ones, in ONNX Runtime on this machine's CPU.

    python examples/benchmarks/kv_decode.py --threads 2 --json numbers.json --plot times.png
    python examples/benchmarks/kv_decode.py --part attention --tokens 8192
    python examples/benchmarks/kv_decode.py --quick

attention: one GroupQueryAttention over a cache of so many tokens, for one new token; with a mask as its bias, as
qfx.export_onnx writes it, and without one. The caches of several layers take turns, as in a model, so that they come
from memory. decode: one token of a model under `qfx.onnx.load` over a cache filled with random codes, weights of the
recipe. prefill: a whole prompt of that model. All caches take a turn in each round; a row has the median of the rounds
and how many times faster than float32 that is, in the same graph. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import typer
from onnx import TensorProto, helper

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.kv_decode` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
import qfx.onnx
from examples.benchmarks.peers import decoding, table
from examples.benchmarks.peers.decoding import DecoderJob
from examples.benchmarks.peers.turns import in_turn
from qfx.backends.onnx.session_options import options

PARTS = ("attention", "decode", "prefill")
CACHES = {"float32": 0, "i8": 8, "i4": 4}  # bits of a code, as the operator is told; 0: no codes
TYPES = {0: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}
HEADS = {  # query heads, key heads, elements of a head
    "llama-0.1b": (12, 4, 64),
    "llama-1b": (32, 4, 64),
    "qwen3-1.7b": (16, 8, 128),
    "tiny": (4, 2, 32),
}
DOMAIN = "com.microsoft"
COLD = 96 << 20  # bytes of float32 caches that take turns: more than a processor's last cache holds
COLUMNS = {"tokens": "tokens", "ms": "ms", "times": "times as fast as float32"}
Row = dict[str, Any]


def attention_model(heads: tuple[int, int, int], bits: int, *, masked: bool) -> onnx.ModelProto:
    """One GroupQueryAttention on packed rows [1, 1, (H + 2G) * D], its caches [1, G, R, D] in memory that it shares.

    masked: with a bias [1, 1, 1, T] and without the operator's own causal order, as qfx.export_onnx writes it.
    """
    h, g, d = heads
    cache = [1, g, "R", d // 2 if bits == 4 else d]
    inputs = {
        "rows": (TensorProto.FLOAT, [1, "S", (h + 2 * g) * d]),
        "past_k": (TYPES[bits], cache),
        "past_v": (TYPES[bits], cache),
        "last": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, [1]),
    }
    names = ["rows", "", "", "past_k", "past_v", "last", "total", "", "", "", "bias" if masked else "", ""]
    settings: dict[str, Any] = {"num_heads": h, "kv_num_heads": g, "causal": int(not masked)}
    if masked:
        inputs["bias"] = (TensorProto.FLOAT, [1, 1, "S", "T"])
    if bits:
        inputs |= {name: (TensorProto.FLOAT, [1, g, 1, d]) for name in ("k_scale", "v_scale")}
        names += ["k_scale", "v_scale"]
        settings |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    outputs = {"y": (TensorProto.FLOAT, [1, "S", h * d]), "k": (TYPES[bits], cache), "v": (TYPES[bits], cache)}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain=DOMAIN, **settings)
    given, found = (
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in ends.items()]
        for ends in (inputs, outputs)
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        helper.make_graph([node], "attention", given, found), opset_imports=versions, ir_version=10
    )


def attention_run(
    heads: tuple[int, int, int], bits: int, tokens: int, layers: int, threads: int, *, masked: bool
) -> Callable[[], list[np.ndarray]]:
    """One new token after `tokens - 1` in each of `layers` caches of random codes; the results [1, 1, H * D]."""
    h, g, d = heads
    random = np.random.default_rng(0)
    session = ort.InferenceSession(
        attention_model(heads, bits, masked=masked).SerializeToString(),
        options(threads),
        providers=["CPUExecutionProvider"],
    )
    values = random.standard_normal((1, g, tokens, d)).astype(np.float32)
    step = np.float32(4 / (7 if bits == 4 else 127))
    codes = np.clip(np.round(values / step), *((-8, 7) if bits == 4 else (-128, 127)))
    stored: np.ndarray = _pairs(codes + 8) if bits == 4 else codes.astype(np.int8) if bits else values
    plain = {
        "rows": random.standard_normal((1, 1, (h + 2 * g) * d)).astype(np.float32),
        "last": np.array([tokens - 1], np.int32),
        "total": np.array([tokens], np.int32),
        **({"bias": np.zeros((1, 1, 1, tokens), np.float32)} if masked else {}),
        **(dict.fromkeys(("k_scale", "v_scale"), np.full((1, g, 1, d), step)) if bits else {}),
    }
    bound = []
    for _ in range(layers):
        binding = session.io_binding()
        binding.bind_output("y")
        for past, present in (("past_k", "k"), ("past_v", "v")):
            memory = ort.OrtValue.ortvalue_from_numpy(stored.copy())
            binding.bind_ortvalue_input(past, memory)
            binding.bind_ortvalue_output(present, memory)
        for name, array in plain.items():
            binding.bind_cpu_input(name, array)
        bound.append(binding)

    def run() -> list[np.ndarray]:
        for binding in bound:
            session.run_with_iobinding(binding)
        return [binding.get_outputs()[0].numpy() for binding in bound]

    return run


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Codes 0 to 15 [.., D] two in a byte, the first in the low bits."""
    whole = codes.astype(np.uint8)
    found: np.ndarray = whole[..., ::2] | whole[..., 1::2] << 4
    return found


def as_rows(found: Mapping[str, float], title: str, tokens: int, remarks: str = "", share: float = 1) -> list[Row]:
    """A row for each cache. found: seconds by cache; share: the part of them that counts."""
    whole = found["float32"]
    return [
        {"peer": f"{title} {n}", "tokens": tokens, "ms": 1e3 * s * share, "times": whole / s, "remarks": remarks}
        for n, s in found.items()
    ]


def attention_rows(shapes: Sequence[str], tokens: Sequence[int], threads: int, rounds: int, cold: int) -> list[Row]:
    """One row for each shape, mask, length and cache: milliseconds of one attention."""
    rows: list[Row] = []
    for shape in shapes:
        for masked in (True, False):
            for length in tokens:
                _, g, d = HEADS[shape]
                layers = max(2, cold // (8 * g * d * length))
                runs = {
                    name: attention_run(HEADS[shape], bits, length, layers, threads, masked=masked)
                    for name, bits in CACHES.items()
                }
                remarks = "with a mask" if masked else "without a mask"
                rows += as_rows(in_turn(runs, rounds), f"attention {shape}", length, remarks, 1 / layers)
    return rows


def exported(job: DecoderJob, recipe: str, kv: str) -> Path:
    """The folder of the model with this cache, written at the first call."""
    path = job.path / f"{recipe}_{kv}"
    if path.exists():
        return path
    module: Any = job.module()
    data = [{"input_ids": torch.tensor([job.tokens(256)])}]
    asked: Any = {"recipe": None if recipe == "float32" else recipe}
    with decoding.made(path) as folder:
        if kv == "float32":
            qfx.export_onnx(module, None, folder, **asked)
        else:
            qfx.export_onnx(module, None, folder, kv=kv, data=data, **asked)
        module.config.save_pretrained(folder)
    return path


def filled(model: Any, tokens: int, room: int) -> Any:
    """A cache of `model` that holds random codes of `tokens` tokens, with memory for `room` more."""
    cache = model._new_cache(tokens + room)
    cache.reserve(1, tokens + room)
    for memory in (*cache.keys, *cache.values):
        if memory.is_floating_point():
            memory.normal_()
        else:
            memory.random_(0, 100)
    cache.length = tokens
    return cache


def model_rows(job: DecoderJob, recipe: str, parts: Sequence[str], tokens: Sequence[int], rounds: int) -> list[Row]:
    """Rows of decoding over caches of these lengths, and of prompts as long."""
    models = {name: qfx.onnx.load(exported(job, recipe, name), threads=job.threads) for name in CACHES}
    rows: list[Row] = []
    for part in [p for p in PARTS[1:] if p in parts]:
        for length in tokens if part == "decode" else [n for n in tokens if n <= job.prompt]:
            new = torch.tensor([job.tokens(1 if part == "decode" else length)])
            old = length - 1 if part == "decode" else 0
            caches = {name: filled(model, old, length) for name, model in models.items()}

            calls = {name: partial(_turn, models[name], new, cache, old) for name, cache in caches.items()}
            with torch.no_grad():
                rows += as_rows(in_turn(calls, rounds), f"{part} {job.model} {recipe}", length)
    return rows


def _turn(model: Any, new: torch.Tensor, cache: Any, old: int) -> None:
    """The model reads new tokens after `old` ones."""
    cache.length = old
    model(new, past_key_values=cache)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Times as fast as float32 over tokens; a panel for each kind of run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kind, name = row["peer"].rsplit(" ", 1)
        panels.setdefault(f"{kind} {row['remarks']}".strip(), {}).setdefault(name, []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), squeeze=False, sharey=True)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, found in lines.items():
            axis.plot([r["tokens"] for r in found], [r["times"] for r in found], marker="o", label=name)
        ticks = sorted({r["tokens"] for found in lines.values() for r in found})
        axis.set(xscale="log", xlabel="tokens")
        axis.set_title(title.replace(" with", "\nwith"), fontsize=9)
        axis.set_xticks(ticks, [str(n) for n in ticks], fontsize=8)
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylabel("times as fast as float32")
    axes[0][0].legend(title="cache")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(PARTS)}; left out: all.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help=f"Of attention, out of {', '.join(HEADS)}.")] = None,
    model: Annotated[str, typer.Option(help=f"Of decode and prefill, out of {', '.join(decoding.SHAPES)}.")] = "",
    recipe: Annotated[list[str] | None, typer.Option(help="Of the model's weights; float32: as they are.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=2, help="Lengths of caches and prompts.")] = None,
    prompt: Annotated[int, typer.Option(help="The longest prompt.")] = 2048,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each cache.")] = 15,
    folder: Annotated[Path | None, typer.Option(help="Keep the exported models here, for the next run.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="Small, one round: to see it run.")] = False,
) -> None:
    """Time caches in every form there is, and print a table."""
    parts = part or list(PARTS)
    table.check(parts, PARTS, "--part")
    table.check(shape or (), HEADS, "--shape")
    table.check(filter(None, [model]), decoding.SHAPES, "--model")
    lengths = tokens or ([64] if quick else [1024, 2048, 4096, 8192])
    shapes = shape or (["tiny"] if quick else [name for name in HEADS if name != "tiny"])
    rounds, cold = (1, 0) if quick else (rounds, COLD)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    where = table.place(threads)
    rows: list[Row] = []
    if "attention" in parts:
        rows += attention_rows(shapes, lengths, threads, rounds, cold)
    if set(parts) - {"attention"}:
        with tempfile.TemporaryDirectory() as scratch:
            name = model or ("tiny" if quick else "llama-0.1b")
            job = DecoderJob(name, prompt, 1, 2, threads, str(folder or scratch))
            for one in recipe or (["float32"] if quick else ["float32", "w8a8"]):
                rows += model_rows(job, one, parts, lengths, rounds)
    console = table.console()
    console.print(where)
    console.print(table.shown(rows, COLUMNS, f"median of {rounds}"))
    table.write(json_file, {"where": where, "rounds": rounds, "rows": rows})
    if plot_file is not None:
        plot(plot_file, rows)


if __name__ == "__main__":
    typer.run(main)
