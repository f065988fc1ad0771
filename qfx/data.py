"""Calibration and evaluation data: from a file of text, texts, or a loader, to the calls of a model."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.errors import explain
from qfx.inputs import without_cache

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs) of one forward

_JSON_LINES = (".jsonl", ".ndjson")
_CHARACTERS_PER_TOKEN = 16  # text beyond this many characters per wanted token is not tokenized


def calls(model: nn.Module, data: Iterable[Any], samples: int | None = None) -> list[Call]:
    """The calls that batches stand for, checked against the signature of `model.forward`.

    data: a DataLoader, list or any iterable of batches. A batch is a tensor (the first argument), a tuple or list (the
    arguments in order) or a mapping (arguments by name). `samples`: stop once that many samples (sizes of the first
    dimension) are there. Raises ValueError for what is no such data, says at which batch.
    """
    check_iterable(data)
    found: list[Call] = []
    count = 0
    for number, batch in enumerate(data, 1):
        found.append(_call(model, batch, number))
        count += _size(found[-1])
        if samples is not None and count >= samples:
            break
    if not found:
        raise ValueError(
            "the data holds no batch\n  expected: at least one\n"
            "  next step: give a list or a DataLoader; a generator that was read before is empty"
        )
    return found


def roomiest(found: Sequence[Call]) -> Call:
    """The call to trace a graph with: sizes of 1 are fixed in it, so that with the fewest of them, then the largest."""

    def room(call: Call) -> tuple[int, int]:
        tensors = [v for v in pytree.tree_leaves(call) if isinstance(v, Tensor)]
        return -sum(size == 1 for t in tensors for size in t.shape), sum(t.numel() for t in tensors)

    return max(found, key=room)


def read_texts(path: str | os.PathLike[str], field: str = "text") -> list[str]:
    """The texts of a file: of a .jsonl or .ndjson file the values of `field`, line by line; else the whole file.

    Raises FileNotFoundError, and ValueError where the file is empty, no UTF-8, no JSON, or lacks the field.
    """
    file = Path(path)
    if file.suffix.lower() in _JSON_LINES:
        texts = [_field(record, field, where) for where, record in records(file)]
    else:
        texts = [_decoded(file)]
    if not any(piece.strip() for piece in texts):
        size = file.stat().st_size
        raise ValueError(f"{file} holds no text\n  expected: at least one line\n  found: {size} bytes")
    return texts


def records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, for messages; the object) of each line of a .jsonl file that is not empty.

    Raises FileNotFoundError, and ValueError where the file is no UTF-8 or a line is no JSON object.
    """
    found = []
    for number, line in enumerate(_decoded(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no JSON object\n  found: {type(record).__name__}")
        found.append((where, record))
    return found


def python_help() -> list[str]:
    """English text that every Python carries (its help topics, 0.7 MB): for trying things out."""
    from pydoc_data.topics import topics

    return list(topics.values())


def text_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seq_len: int = 512,
    batch_size: int = 4,
    samples: int = 128,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches of token ids [batch_size, seq_len] (and what else the tokenizer gives) from texts put end to end.

    The text is cut into chunks of `seq_len` tokens, special tokens included, so no batch is padded; `samples` of them
    are drawn in the order that `seed` gives. A text shorter than one chunk gives one batch of its own length.
    Raises ValueError for sizes below 1, no text, and a tokenizer that cannot cut.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, found {value}")
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so text cannot become token ids\n  next step: give batches instead"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"a fast tokenizer is needed to cut text, found {type(tokenizer).__name__}\n"
            "  next step: give batches instead"
        )
    if seq_len <= tokenizer.num_special_tokens_to_add():
        raise ValueError(
            f"seq_len {seq_len} leaves no room for text beside {tokenizer.num_special_tokens_to_add()} special tokens"
        )
    text = "\n".join(texts)[: samples * seq_len * _CHARACTERS_PER_TOKEN]
    if not text.strip():
        raise ValueError("the texts are empty\n  expected: at least one word")
    chunks = tokenizer(text, truncation=True, max_length=seq_len, padding=False, return_overflowing_tokens=True)
    names = [name for name in tokenizer.model_input_names if name in chunks]
    rows = [i for i, ids in enumerate(chunks["input_ids"]) if len(ids) == seq_len] or [0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    return [
        {name: torch.tensor([chunks[name][rows[i]] for i in part.tolist()]) for name in names}
        for part in order.split(batch_size)
    ]


def fitting(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that `model.forward` takes, and `use_cache=False` where it takes that."""
    known = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values()) and "input_ids" not in known
    return without_cache(model, {name: value for name, value in batch.items() if takes_any or name in known})


@contextmanager
def telling(number: int) -> Iterator[None]:
    """Errors of operators (an index beyond a table) become ValueErrors that name the batch."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            explain(
                f"the model does not take batch {number} of the data: {type(error).__name__}: {error}",
                expected="batches on which the model runs",
                next_step="try one call of the model with that batch",
            )
        ) from error


def check_batch(batch: Sequence[Any], inputs: Sequence[str], number: int) -> None:
    """Raises ValueError where the flat inputs of a graph are not as many as its placeholders, `inputs`."""
    if len(batch) != len(inputs):
        raise ValueError(
            explain(
                f"batch {number} does not fit the graph",
                expected=f"{len(inputs)} inputs ({', '.join(inputs)})",
                found=f"{len(batch)}",
                next_step="flatten each batch in the order of the graph's inputs",
            )
        )


def check_iterable(data: object) -> None:
    """Raises ValueError for what is one batch, or a name, and no iterable of batches."""
    if isinstance(data, Tensor | Mapping):
        raise ValueError(
            f"an iterable of batches is expected, found one {type(data).__name__}\n"
            "  next step: put it in a list: [batch]"
        )
    if isinstance(data, str | os.PathLike):
        raise ValueError(
            f"batches are expected, found the text or path {str(data)!r}\n"
            "  next step: qfx.data.text_batches(tokenizer, qfx.data.read_texts(path))"
        )
    if not isinstance(data, Iterable):
        raise ValueError(f"an iterable of batches is expected, found {type(data).__name__}")


def _call(model: nn.Module, batch: object, number: int) -> Call:
    args, kwargs = _arguments(batch, number)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise ValueError(f"batch {number} holds no tensor, found {str(batch)[:80]}")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"batch {number} does not fit the model: {error}\n  expected: forward{signature}\n"
            f"  found: {', '.join(kwargs) or f'{len(args)} in order'}\n"
            "  next step: where a loader gives (inputs, labels), pass (inputs for inputs, _ in loader)"
        ) from error
    return args, kwargs


def _arguments(batch: object, number: int) -> Call:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        if bad := [name for name in batch if not isinstance(name, str)]:
            raise ValueError(f"batch {number} has a key that is no name: {bad[0]!r}")
        return (), dict(batch)
    found = f"text: {batch[:40]!r}" if isinstance(batch, str) else f"of type {type(batch).__name__}"
    raise ValueError(
        f"batch {number} is {found}\n  expected: a tensor, tuple, list or mapping of tensors\n"
        "  next step: for text, qfx.data.text_batches(tokenizer, texts)"
    )


def _size(call: Call) -> int:
    first = next(leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))
    return first.shape[0] if first.dim() else 1


def _decoded(file: Path) -> str:
    if file.is_dir():
        raise ValueError(f"{file} is a folder\n  expected: a text or .jsonl file")
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start}\n"
            "  next step: convert it, for example with iconv -t UTF-8"
        ) from error


def _field(record: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(record.get(field), str):
        found = f"fields {', '.join(record)}"
        raise ValueError(f"{where} has no text in the field {field!r}\n  found: {found}\n  next step: --field NAME")
    return str(record[field])
