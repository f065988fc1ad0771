"""Tokenizers of the three kinds as metadata. That llama.cpp cuts text in the same way: test_gguf_llama_cpp.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qfx.errors import UnsupportedError
from qfx.interop.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    fields_of,
    no_vocabulary,
)

transformers = pytest.importorskip("transformers", reason="tokenizers are those of transformers: pip install qfx[hf]")
tokenizers = pytest.importorskip("tokenizers")
TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny_lm"
SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def wrapped(backend: Any, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level(pre: Any = None) -> Any:
    """A byte-level BPE of a few merges."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(["low lower lowest new newer newest"] * 4, trainer)
    return backend


def sentencepiece_like() -> Any:
    """BPE over characters with tokens for bytes, as Llama 2 and Mistral have it."""
    from tokenizers import decoders, models, normalizers

    letters = [SPACE, "l", "o", "w", "e", "r"]
    merges = [("l", "o"), ("lo", "w"), (SPACE, "low"), ("e", "r"), (f"{SPACE}low", "er")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *("".join(m) for m in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece(*, lowercase: bool = True) -> Any:
    from tokenizers import models, normalizers, pre_tokenizers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er", "##est", "new"]
    backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    return wrapped(backend, **{f"{name}_token": token for name, token in special.items()})


def test_the_tiny_language_model() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    fields, notes = fields_of(tokenizer, 2048)
    assert notes == []
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 2048
    assert len(fields["tokenizer.ggml.merges"]) == 1791 and fields["tokenizer.ggml.merges"][0] == "\u0120 \u0120"
    assert fields["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][:2] == [CONTROL, NORMAL]
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.chat_template" not in fields


def test_rows_without_a_token_and_added_tokens() -> None:
    tokenizer = wrapped(byte_level(), bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    count = len(tokenizer)
    fields, notes = fields_of(tokenizer, count + 2)
    assert fields["tokenizer.ggml.tokens"][-3:] == ["<tool>", f"[PAD{count}]", f"[PAD{count + 1}]"]
    assert fields["tokenizer.ggml.token_type"][-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert fields["tokenizer.chat_template"] == "{{ messages }}" and notes == []


def test_a_template_that_adds_tokens_is_seen() -> None:
    backend = byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fields, _ = fields_of(wrapped(backend, bos_token="<s>", eos_token="</s>"), 400)
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is True


@pytest.mark.parametrize(("pattern", "name"), [(LLAMA3, "llama-bpe"), (LLAMA3.replace("{1,3}", ""), "qwen2")])
def test_known_cuts(pattern: str, name: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fields, notes = fields_of(wrapped(byte_level(steps)), 400)
    assert fields["tokenizer.ggml.pre"] == name and notes == []


def test_digits_one_by_one() -> None:
    from tokenizers import pre_tokenizers

    steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()])
    assert fields_of(wrapped(byte_level(steps)), 400)[0]["tokenizer.ggml.pre"] == "smollm"


def test_a_cut_that_llama_cpp_has_no_name_for_is_told() -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\d+|\D+"), behavior="isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fields, notes = fields_of(wrapped(byte_level(steps)), 400)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(notes) == 1 and r"cut text is not known (\d+|\D+): written as 'gpt-2'" in str(notes[0])


def test_bpe_of_sentencepiece() -> None:
    fields, notes = fields_of(sentencepiece_like(), 270)
    assert notes == []
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    assert scores["lo"] == 0 > scores["low"] == -1 > scores[f"{SPACE}low"] == -2 > scores["er"] == -3
    assert scores["l"] < scores[f"{SPACE}lower"], "letters come last"
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and types[tokens.index("lo")] == NORMAL
    assert "tokenizer.ggml.merges" not in fields


def test_word_pieces() -> None:
    fields, notes = fields_of(word_piece(), 9)
    assert notes == []
    assert fields["tokenizer.ggml.model"] == "bert" and fields["tokenizer.ggml.token_type_count"] == 2
    assert fields["tokenizer.ggml.tokens"][-4:] == [f"{SPACE}low", "er", "est", f"{SPACE}new"]
    assert fields["tokenizer.ggml.tokens"][2] == "[CLS]"
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding", "mask")}
    assert ids == {"bos": 2, "eos": 3, "unknown": 1, "padding": 0, "mask": 4}


def test_capitals_of_word_pieces_are_told() -> None:
    _, notes = fields_of(word_piece(lowercase=False), 9)
    assert [note.node for note in notes] == ["tokenizer"] and "small letters" in notes[0].reason


def test_no_vocabulary() -> None:
    assert no_vocabulary() == {"tokenizer.ggml.model": "no_vocab"}


def test_a_vocabulary_larger_than_the_table() -> None:
    with pytest.raises(ValueError, match=r"does not fit the model[\s\S]*below 5[\s\S]*with id 8"):
        fields_of(word_piece(), 5)


def test_other_kinds() -> None:
    from tokenizers import models

    unigram = wrapped(tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0)))
    with pytest.raises(UnsupportedError, match="found: a model of type 'Unigram'"):
        fields_of(unigram, 9)
    letters = wrapped(tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(UnsupportedError, match="BPE over characters without tokens for all bytes"):
        fields_of(letters, 9)
    with pytest.raises(UnsupportedError, match=r"a fast tokenizer of transformers[\s\S]*found: object"):
        fields_of(object(), 9)
