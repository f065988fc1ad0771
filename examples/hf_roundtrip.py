"""A language model in transformers' own way: quantized while it loads, saved with its tokenizer, loaded, generating.

python examples/hf_roundtrip.py FOLDER_OR_HUB_NAME [RECIPE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qfx

PROMPT = "def main():"


def size(folder: Path) -> int:
    """Bytes of the files with weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def roundtrip(source: str, folder: Path, recipe: str = "w4a16") -> tuple[str, str]:
    """What the model writes after PROMPT: quantized while it loads, and saved and loaded again."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=qfx.QfxConfig(recipe=recipe))
    model.save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)  # its chat template, too

    again = AutoModelForCausalLM.from_pretrained(folder)  # a program that does so imports qfx first
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        written = [one.generate(**inputs, do_sample=False, max_new_tokens=20)[0] for one in (model, again)]
    first, second = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written)
    return first, second


def main(source: str, recipe: str = "w4a16") -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = roundtrip(source, folder, recipe)
        before = f"{size(Path(source)) / 2**20:.1f} MiB -> " if Path(source).is_dir() else ""
        print(f"{source} by {recipe}: {before}{size(folder) / 2**20:.1f} MiB of weights")
        print(f"quantized while loading: {first!r}")
        print(f"saved and loaded again:  {second!r}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
