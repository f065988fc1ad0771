"""Peak memory of exporting a quantized model and of running its files, against the size of the files.

    python examples/benchmarks/memory.py --model llama-0.1b --recipe w4a16 --recipe w8a8 --json numbers.json

Each measurement is a process of its own, in which a small model has done the same before, so that everything is
imported. Export: by how much the process grew at the peak beyond the float model, which stays. Run: by how much it grew
at the peak while the files were opened and used: a prompt of 128 tokens read and continued, or, for an encoder, a batch
of 8 x 128 tokens. `ratio` is that growth over the bytes of the files and, for the run, of the activations: the values
that one layer holds at once, and what a decoder has of logits and cache. `mapped` is what of the growth was pages of
files in the end, which the system takes back where memory is short; the ratio counts them.

Where the run of w4a16 takes more than files and activations, for llama-0.1b in MB (53.7 + 11.1 become 94): MatMulNBits
packs the weights with a scale and a sum in float32 for each block where the file has 16 bits and a zero point, 8 % more
in blocks of 128 and 30 % in the table's of 32. ONNX Runtime keeps scales, in float32, and zero points although they are
packed too, and those of the table once more. Rows of the table are mapped with many neighbours, as the system does.
Memory for values comes in powers of two. In llama-1b the peak is when the tied table is packed, the last of all
weights: its pages are let go of right after that.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from qfx.storage.files import write_text
from qfx.storage.spill import give_back

MODELS = {  # layers, hidden size, its inner size, heads, heads of keys and values, rows of the tables
    "llama-0.1b": (12, 768, 2048, 12, 4, 32000),
    "llama-1b": (16, 2048, 8192, 32, 8, 128256),
    "bert-base": (12, 768, 3072, 12, 12, 30522),
    "minilm": (6, 384, 1536, 12, 12, 30522),
    "tiny": (2, 64, 128, 4, 2, 256),
    "tiny-bert": (2, 64, 128, 4, 4, 256),
}
BATCH = 8
PROMPT, NEW = 128, 8


def model_of(name: str) -> Any:
    """A random model in eval mode: BERT, or a decoder of Llama's structure whose tables are tied."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    layers, hidden, inner, heads, kv_heads, rows = MODELS[name]
    sizes = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512 if is_encoder(name) else 2048,
    }
    if is_encoder(name):
        return BertModel(BertConfig(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=kv_heads, tie_word_embeddings=True)).eval()


def is_encoder(name: str) -> bool:
    """Or a decoder."""
    return "bert" in name or name == "minilm"


def activations(name: str) -> int:
    """Bytes of the greatest values that are alive at once: hidden and inner states of a layer, logits, the cache."""
    layers, hidden, inner, heads, kv_heads, rows = MODELS[name]
    if is_encoder(name):
        return 4 * BATCH * PROMPT * (5 * hidden + 2 * inner + heads * PROMPT)
    width = hidden // heads
    cache = 2 * layers * kv_heads * width * 256
    return 4 * (PROMPT * (4 * hidden + 3 * inner) + rows + cache)


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or another size that Linux tells, such as the peak (VmHWM)."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def grown(work: Any) -> int:
    """Bytes by which this process grew at the peak of `work`."""
    gc.collect()
    give_back()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    work()
    return resident("VmHWM") - before


def export(name: str, recipe: str, folder: Path) -> dict[str, int]:
    """Bytes of the float model, of the files, and of the growth while they were written."""
    import qfx

    def write(model: Any, which: str) -> None:
        at = folder / which
        qfx.export_onnx(model, None, at / "model.onnx" if is_encoder(which) else at, recipe=recipe)

    write(model_of(small(name)), small(name))
    model = model_of(name)
    found = grown(lambda: write(model, name))
    return {"model": sum(p.nbytes for p in model.parameters()), "files": size_of(folder / name), "grown": found}


def small(name: str) -> str:
    """The small model of the same kind."""
    return "tiny-bert" if is_encoder(name) else "tiny"


def run(name: str, folder: Path) -> dict[str, int]:
    """Bytes of the files and the activations, of the growth while they were opened and used, and of pages of files."""
    import qfx.onnx

    def use(which: str) -> Any:
        if is_encoder(which):
            encoder: Any = qfx.onnx.load(folder / which / "model.onnx")
            ids = torch.arange(BATCH * PROMPT).reshape(BATCH, PROMPT) % 200 + 3
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            encoder(**{key: given[key] for key in encoder.inputs})
            return encoder
        model: Any = qfx.onnx.load(folder / which)
        prompt = torch.arange(PROMPT)[None] % 200 + 3
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return model

    use(small(name))
    opened: list[Any] = []
    before = resident("RssFile")
    found = grown(lambda: opened.append(use(name)))
    mapped = resident("RssFile") - before
    return {"files": size_of(folder / name), "activations": activations(name), "grown": found, "mapped": mapped}


def size_of(folder: Path) -> int:
    """Bytes of the model's files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("model.onnx"))


def measured(name: str, recipe: str) -> list[dict[str, Any]]:
    """One row for the export and one for the run, each from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for stage in ("export", "run"):
            command = [sys.executable, __file__, "--model", name, "--recipe", recipe, "--stage", stage, "--at", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["grown"] / (found["files"] + found.get("activations", 0))
            rows.append({"model": name, "recipe": recipe, "stage": stage, "bytes": found, "ratio": ratio})
        return rows


def main(
    model: Annotated[list[str], typer.Option(help=", ".join(MODELS))] = ["llama-0.1b", "bert-base"],  # noqa: B006
    recipe: Annotated[list[str], typer.Option(help="recipes")] = ["w4a16", "w8a8"],  # noqa: B006
    stage: Annotated[str, typer.Option(help="of a process of its own: export or run")] = "",
    at: Annotated[Path | None, typer.Option(help="its folder")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="write the numbers there")] = None,
) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if stage:
        assert at is not None, "a stage needs its folder"
        found = export(model[0], recipe[0], at) if stage == "export" else run(model[0], at)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows = [row for name in model for one in recipe for row in measured(name, one)]
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")
    table = Table("model", "recipe", "stage", "files MB", "activations MB", "grown MB", "mapped MB", "ratio")
    for row in rows:
        sizes = [f"{row['bytes'].get(key, 0) / 1e6:.1f}" for key in ("files", "activations", "grown", "mapped")]
        table.add_row(row["model"], row["recipe"], row["stage"], *sizes, f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
