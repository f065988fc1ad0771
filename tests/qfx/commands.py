"""What tests of the command line share: how a command is run, and folders of small models to run it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from qfx.cli.app import app

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 60,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: [UNK], w1, ..., w59."""
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 60)}}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=64)


def save(folder: Path, model: Any, config: Any) -> Path:
    """A model of these classes of transformers and its tokenizer, in a folder."""
    torch.manual_seed(0)
    model(config(**SIZES, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
