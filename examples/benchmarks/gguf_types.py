"""GGUF types by qfx and by llama.cpp's own quantizer: the same model, the same bytes, KL divergence to the float model.

    python examples/benchmarks/gguf_types.py --type Q4_K_M --type Q2_K --wide --json numbers.json

Both files are read back with qfx and run in torch in float32, so that only the rounding differs. Each type is rounded
without data and with the mean squares of the layers' inputs (llama.cpp's importance matrix, the same numbers for both);
by qfx with the same data also by GPTQ and by learned rounding.
--wide: blocks of 256 need widths that 256 divides, and the tiny model is 192 wide; its residual stream is first turned
into 256 channels by a random rotation, which changes no output.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.gguf_types` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.peers.llama_cpp_rounding import importance, quantize
from examples.benchmarks.peers.table import check
from qfx.errors import QfxWarning
from qfx.measuring import measure
from qfx.storage.files import write_text

TINY = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny_lm"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
LENGTH, WINDOWS, CALIBRATION = 512, 8, 16
WAYS = {"gptq": "GPTQ", "learned": "learned"}  # what takes data besides its mean squares
QUIET = llama_cpp.llama_log_callback(lambda *_: None)  # llama.cpp calls it as long as the process lives
Batches = list[dict[str, Tensor]]


def load(folder: Path) -> Any:
    """The float model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows(folder: Path) -> Tensor:
    """Token ids of the text beside the tiny model, [windows, 512]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    text = (TINY.parent / "eval.txt").read_text(encoding="utf-8")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def widened(model: Any, width: int = 768, seed: int = 0) -> Any:
    """A Llama with the same outputs whose residual stream has `width` channels.

    With R [hidden, width] of orthonormal rows the stream x becomes x R: tables and writers are multiplied by R, readers
    (their norm's weights folded in first) too. The norm divides by the root of a mean over more channels, so its weight
    and epsilon are smaller by that ratio.
    """
    config = model.config.__class__(**{**model.config.to_dict(), "hidden_size": width, "tie_word_embeddings": False})
    ratio = model.config.hidden_size / width
    config.rms_norm_eps = model.config.rms_norm_eps * ratio
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0]
    turn = turn[: model.config.hidden_size]
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    new: dict[str, Tensor] = {"lm_head.weight": state["lm_head.weight"] * state["model.norm.weight"] @ turn}
    new["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ turn
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[-2].endswith("norm"):
            new[name] = torch.full((width,), math.sqrt(ratio), dtype=torch.float64)
        elif parts[-2] in ("o_proj", "down_proj"):
            new[name] = turn.T @ tensor
        elif len(parts) > 4:
            norm = ".".join([*parts[:3], norms[parts[3]], "weight"])
            new[name] = tensor * state[norm] @ turn
    wide = model.__class__(config).eval()
    wide.load_state_dict({name: tensor.float() for name, tensor in new.items()})
    return wide


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """f32 [windows, tokens, vocabulary]."""
    return torch.cat([model(input_ids=pair, use_cache=False).logits for pair in ids.split(2)])


class Bench:
    """One float model, its logits, and the folder for files."""

    def __init__(self, model: Any, ids: Tensor, folder: Path, ways: Sequence[str] = tuple(WAYS)) -> None:
        self.model, self.folder, self.ways = model, folder, ways
        self.evaluation = ids[CALIBRATION + 2 : CALIBRATION + 2 + WINDOWS]
        self.calibration: Batches = [{"input_ids": pair} for pair in ids[:CALIBRATION].split(2)]
        self.logits = logits(model, self.evaluation)
        self.source = folder / "float.gguf"
        qfx.export_gguf(model, self.source, "F32", tokenizer=False)
        self.energy = importance(model, self.calibration)

    def row(self, mix: str) -> dict[str, Any]:
        """Bytes and KLD of one type, by either, without and with data."""
        found: dict[str, Any] = {"type": mix}
        own, peer = self.folder / "qfx.gguf", self.folder / "llama.gguf"
        for suffix, data in (("", None), ("_data", self.calibration)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QfxWarning)  # widths that 256 does not divide
                qfx.export_gguf(self.model, own, mix, tokenizer=False, data=data)
                quantize(self.source, peer, mix, self.energy if data else {}, torch.get_num_threads())
                for name, file in (("qfx", own), ("llama_cpp", peer)):
                    found[f"{name}{suffix}"] = self.kld(file)
                    found[f"{name}{suffix}_bytes"] = file.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            for way in self.ways:
                qfx.export_gguf(self.model, own, mix, tokenizer=False, data=self.calibration, rounding=way)
                found |= {f"qfx_{way}": self.kld(own), f"qfx_{way}_bytes": own.stat().st_size}
        return found

    def kld(self, file: Path) -> float:
        """KL divergence of a file's model to the float model, nats a token."""
        return measure.kld(self.logits, logits(qfx.import_gguf(file, packed=False), self.evaluation))


def main(
    types: Annotated[list[str] | None, typer.Option("--type", help="GGUF types; left out: twelve.")] = None,
    model: Annotated[Path, typer.Option(help="Folder of a Llama of transformers.")] = TINY,
    wide: Annotated[bool, typer.Option("--wide", help="Turn the residual stream into 768 channels first.")] = False,
    ways: Annotated[list[str] | None, typer.Option("--way", help="gptq, learned; left out: both.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Print the table."""
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    floats = load(model)
    if wide:
        floats = widened(floats)
    chosen = tuple(ways or WAYS)
    check(chosen, WAYS, "--way")
    heads = ["qfx", "llama.cpp", "ratio", "qfx, data", "llama.cpp, data", "ratio"]
    table = Table("type", "bytes", *heads, *[head for way in chosen for head in (f"qfx, {WAYS[way]}", "ratio")])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(floats, windows(model), Path(folder), chosen)
        rows = [bench.row(mix) for mix in types or TYPES]
    for row in rows:
        pairs = [(row[f"qfx{s}"], row[f"llama_cpp{s}"]) for s in ("", "_data")]
        pairs += [(row[f"qfx_{way}"], row["llama_cpp_data"]) for way in chosen]
        same = len({row[f"{who}_bytes"] for who in ("qfx_data", "llama_cpp_data", *[f"qfx_{w}" for w in chosen])}) == 1
        same &= row["qfx_bytes"] == row["llama_cpp_bytes"]
        size = f"{row['qfx_bytes']:,}" if same else f"{row['qfx_bytes']:,} / {row['llama_cpp_bytes']:,}"
        cells = [t for a, b in pairs[:2] for t in (f"{a:.5f}", f"{b:.5f}", f"{a / b:.3f}")]
        cells += [t for a, b in pairs[2:] for t in (f"{a:.5f}", f"{a / b:.3f}")]
        table.add_row(row["type"], size, *cells)
    Console(width=180).print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
