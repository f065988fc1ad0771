"""Data: from files, texts and loaders to the calls of a model."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from qfx import data


class Named(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> Tensor:
        return input_ids


def _tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


TEXT = " ".join(f"w{i % 50}" for i in range(200))


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping() -> None:
    ids = torch.ones(2, 3)
    assert data.calls(Named(), [ids]) == [((ids,), {})]
    assert data.calls(Named(), [(ids, ids)]) == [((ids, ids), {})]
    assert data.calls(Named(), [[ids]]) == [((ids,), {})]
    assert data.calls(Named(), [{"input_ids": ids}]) == [((), {"input_ids": ids})]
    assert data.calls(Named(), [UserDict(input_ids=ids, use_cache=False)]) == [
        ((), {"input_ids": ids, "use_cache": False})
    ]


def test_a_loader_and_a_generator_are_read_once_and_only_as_far_as_needed() -> None:
    loader = DataLoader(TensorDataset(torch.arange(20.0)[:, None]), batch_size=4)
    assert len(data.calls(nn.Linear(1, 1), loader)) == 5
    read: list[int] = []

    def batches() -> Any:
        for i in range(100):
            read.append(i)
            yield torch.ones(4, 1)

    assert len(data.calls(nn.Linear(1, 1), batches(), samples=10)) == 3
    assert read == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 3), r"found one Tensor\n.*\[batch\]"),
        ({"input_ids": torch.ones(2)}, r"found one dict\n.*\[batch\]"),
        ("corpus.txt", r"found the text or path 'corpus.txt'\n.*read_texts"),
        (3, "an iterable of batches is expected, found int"),
        ([], "no batch"),
        (iter(()), "a generator that was read before is empty"),
        (["hello"], "batch 1 is text: 'hello'"),
        ([torch.ones(1), 3], "batch 2 is of type int"),
        ([{"input_ids": [1, 2]}], "batch 1 holds no tensor"),
        ([{1: torch.ones(1)}], "a key that is no name: 1"),
        ([{"ids": torch.ones(1)}], r"batch 1 does not fit the model: .*input_ids(.|\n)*found: ids"),
        ([[torch.ones(1)] * 4], r"too many positional(.|\n)*found: 4 in order(.|\n)*inputs for inputs, _ in loader"),
    ],
)
def test_what_is_no_data_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.calls(Named(), given)


def test_texts_come_from_text_and_json_lines(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes("\ufefföne\ntwo\n".encode())
    lines.write_text('{"text": "one\u2028still one", "n": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert data.read_texts(plain) == ["öne\ntwo\n"]
    assert data.read_texts(lines) == ["one\u2028still one", "two"]
    lines.write_text(json.dumps({"prompt": "p"}), encoding="utf-8")
    assert data.read_texts(lines, field="prompt") == ["p"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text(.|\n)*found: 3 bytes"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", b"good\xff\xfe", r"no UTF-8 text: byte 0xff at position 4(.|\n)*iconv"),
        ("a.jsonl", b'{"text": "x"}\n{"text": }', r"a.jsonl, line 2 is no JSON: .* at column 10"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 has no text in the field 'text'\n  found: fields body"),
        ("a.jsonl", b'{"text": 3}', "has no text in the field 'text'"),
        ("a.jsonl", b"[1]", r"a.jsonl, line 1 is no JSON object\n  found: list"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_texts(tmp_path / name)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        data.read_texts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="is a folder"):
        data.read_texts(tmp_path)


def test_python_help_is_there_to_try_things_out() -> None:
    assert sum(map(len, data.python_help())) > 100_000


def test_text_is_cut_into_full_chunks_with_special_tokens() -> None:
    batches = data.text_batches(_tokenizer(), [TEXT], seq_len=10, batch_size=4, samples=100)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4, 4, 4, 1]
    assert ids.shape == (25, 10)
    assert (ids[:, 0] == 1).all() and (ids[:, -1] == 2).all()
    assert sorted(ids[:, 1:-1].flatten().tolist()) == sorted(3 + i % 50 for i in range(200)), "each token once"
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    assert all((batch["attention_mask"] == 1).all() for batch in batches), "nothing is padded"


def test_samples_are_drawn_by_seed() -> None:
    def drawn(seed: int) -> Tensor:
        return data.text_batches(_tokenizer(), [TEXT], seq_len=10, batch_size=5, samples=5, seed=seed)[0]["input_ids"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert len(drawn(1)) == 5


def test_a_short_text_gives_one_short_batch() -> None:
    (batch,) = data.text_batches(_tokenizer(special=False), ["w1 w2", "w3"], seq_len=100)
    assert batch["input_ids"].tolist() == [[4, 5, 6]]


def test_bad_sizes_and_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be 1 or more, found 0"):
        data.text_batches(_tokenizer(), [TEXT], seq_len=0)
    with pytest.raises(ValueError, match="seq_len 2 leaves no room for text beside 2 special tokens"):
        data.text_batches(_tokenizer(), [TEXT], seq_len=2)
    with pytest.raises(ValueError, match="no tokenizer"):
        data.text_batches(None, [TEXT])
    with pytest.raises(ValueError, match="a fast tokenizer is needed to cut text, found object"):
        data.text_batches(object(), [TEXT])
    with pytest.raises(ValueError, match="the texts are empty"):
        data.text_batches(_tokenizer(), ["", " "])


def test_fitting_keeps_what_forward_takes() -> None:
    class Open(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["x"]

    ids = torch.ones(1)
    assert data.fitting(Named(), {"input_ids": ids, "token_type_ids": ids}) == {"input_ids": ids, "use_cache": False}
    assert data.fitting(Open(), {"x": ids}) == {"x": ids}


def test_the_roomiest_call_has_fewest_sizes_of_one_then_most_elements() -> None:
    shapes = ((1, 99), (2, 9), (3, 9))
    one, small, large = [((torch.zeros(*shape),), dict[str, Tensor]()) for shape in shapes]
    assert data.roomiest([one, small, large]) is large
    assert data.roomiest([one]) is one
    named: data.Call = ((), {"x": torch.zeros(3, 9), "mask": torch.zeros(3, 1)})
    assert data.roomiest([named, small]) is small
