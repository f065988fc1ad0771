"""A fast tokenizer of transformers as the metadata from which llama.cpp makes its own.

Three kinds: byte-level BPE ("gpt2": merges, and a name for the way in which text is cut first), BPE that came from
SentencePiece ("llama": merges become scores, as llama.cpp joins the pair of the best score first), WordPiece ("bert":
`##x` is `x`, and a word's first piece begins with a low line).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qfx.errors import Note, UnsupportedError, explain

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_P = "tokenizer.ggml."
_SPACE = "\u2581"
# How text is cut before merges, as tokenizer.json has it -> llama.cpp's name for it.
_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {_LETTERS % "": "qwen2", _LETTERS % "{1,3}": "llama-bpe", _CASES: "tekken"}


def fields_of(tokenizer: Any, vocab_size: int) -> tuple[dict[str, Any], list[Note]]:
    """Metadata of the tokenizer for a table of `vocab_size` rows, and what llama.cpp will do otherwise.

    Raises UnsupportedError for tokenizers that are not fast or of another kind, ValueError where the vocabulary is
    larger than the table.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            explain(
                "the tokenizer cannot be written as GGUF",
                expected="a fast tokenizer of transformers",
                found=type(tokenizer).__name__,
                next_step="load it with AutoTokenizer.from_pretrained(folder)",
            )
        )
    parsed = json.loads(backend.to_str())
    kind = _kind(parsed)
    tokens, types = _tokens(tokenizer, parsed, vocab_size, kind)
    fields: dict[str, Any] = {_P + "model": kind, _P + "tokens": tokens, _P + "token_type": types}
    notes: list[Note] = []
    if kind == "bert":
        fields |= {_P + "token_type_count": 2}
        notes += _bert_notes(parsed)
    else:
        merges = [m.split(" ") if isinstance(m, str) else m for m in parsed["model"]["merges"]]
        if kind == "gpt2":
            cut, more = _cut(parsed)
            notes += more
            fields |= {_P + "pre": cut, _P + "merges": [" ".join(merge) for merge in merges]}
        else:
            fields |= {_P + "pre": "default", _P + "scores": _scores(tokens, types, merges)}
            fields |= {_P + "add_space_prefix": _prefixed(backend)}
    fields |= _special_ids(tokenizer, kind) | _added(tokenizer, kind)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        fields["tokenizer.chat_template"] = template
    return fields, notes


def no_vocabulary() -> dict[str, Any]:
    """Metadata of a file without a tokenizer: tokens go in and come out as numbers."""
    return {_P + "model": "no_vocab"}


def _kind(parsed: Mapping[str, Any]) -> str:
    model = parsed["model"]
    if model.get("type") == "WordPiece":
        return "bert"
    if model.get("type") == "BPE":
        if model.get("byte_fallback") or not _has_byte_level(parsed):
            if any(f"<0x{b:02X}>" not in model["vocab"] for b in range(256)):
                raise _unlike("BPE over characters without tokens for all bytes")
            return "llama"
        return "gpt2"
    raise _unlike(f"a model of type {model.get('type')!r}")


def _unlike(found: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            "the tokenizer cannot be written as GGUF",
            expected="byte-level BPE, BPE made from SentencePiece, or WordPiece",
            found=found,
            next_step="tokenizer=False writes the file without one",
        )
    )


def _steps(parsed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of the pre-tokenizer: those of a Sequence, or itself."""
    part = parsed.get("pre_tokenizer")
    if part is None:
        return []
    inner = part.get("pretokenizers")
    return list(inner) if part.get("type") == "Sequence" and inner is not None else [part]


def _has_byte_level(parsed: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(parsed))


def _tokens(tokenizer: Any, parsed: Mapping[str, Any], size: int, kind: str) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids that the tokenizer does not use are unused tokens."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise ValueError(
            explain(
                "the tokenizer does not fit the model",
                expected=f"token ids below {size}, the rows of the model's table",
                found=f"{by_id[max(by_id)]!r} with id {max(by_id)}",
                next_step="give the tokenizer of this model, or call model.resize_token_embeddings",
            )
        )
    added = {entry["id"]: entry for entry in parsed.get("added_tokens", ())}
    unknown = tokenizer.unk_token_id
    tokens, types = [], []
    for i in range(size):
        token = by_id.get(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            types.append(UNUSED)
            continue
        tokens.append(_word_piece(token) if kind == "bert" and i not in added else token)
        types.append(_type(i, token, added, unknown, kind))
    return tokens, types


def _type(i: int, token: str, added: Mapping[int, Mapping[str, Any]], unknown: int | None, kind: str) -> int:
    if kind == "llama" and i == unknown:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i].get("special") else USER_DEFINED
    if kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _word_piece(token: str) -> str:
    return token[2:] if token.startswith("##") else _SPACE + token


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a token: what is merged first has the best score."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    last = float(len(merges))
    return [-float(rank.get(t, last)) if kind == NORMAL else 0.0 for t, kind in zip(tokens, types, strict=True)]


def _prefixed(backend: Any) -> bool:
    """Whether a space is put before the text."""
    encoded = backend.encode("a", add_special_tokens=False).tokens
    return bool(encoded) and encoded[0].startswith(_SPACE)


def _cut(parsed: Mapping[str, Any]) -> tuple[str, list[Note]]:
    """llama.cpp's name for how text is cut before merges."""
    steps = _steps(parsed)
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    digits = any(s.get("type") == "Digits" and s.get("individual_digits") for s in steps)
    if not patterns and any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps):
        return ("smollm" if digits else "gpt-2"), []
    if len(patterns) == 1 and patterns[0] in _CUTS and not digits:
        return _CUTS[patterns[0]], []
    found = patterns[0] if patterns else ", ".join(str(s.get("type")) for s in steps)
    return "gpt-2", [
        Note(
            "tokenizer",
            f"llama.cpp's name for its way to cut text is not known ({found}): written as 'gpt-2', so that some text "
            "becomes other tokens",
            "set tokenizer.ggml.pre in the file to the name that llama.cpp has for it",
        )
    ]


def _bert_notes(parsed: Mapping[str, Any]) -> list[Note]:
    normalizer = parsed.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer" and normalizer.get("lowercase") is True:
        return []
    reason = "llama.cpp writes all text in small letters before it looks for word pieces, this tokenizer does not"
    return [Note("tokenizer", reason, "give llama.cpp the tokens instead of text")]


def _special_ids(tokenizer: Any, kind: str) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
    if kind == "bert":
        names |= {"bos": "cls", "eos": "sep", "cls": "cls"}
    found = {name: getattr(tokenizer, f"{short}_token_id", None) for name, short in names.items()}
    return {f"{_P}{name}_token_id": int(i) for name, i in found.items() if isinstance(i, int)}


def _added(tokenizer: Any, kind: str) -> dict[str, bool]:
    """Whether special tokens stand at the ends of a text, as the tokenizer itself does it."""
    if kind == "bert":
        return {}
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = bos is not None and len(ids) > 1 and ids[0] == bos
    return {_P + "add_bos_token": first, _P + "add_eos_token": eos is not None and len(ids) > 1 and ids[-1] == eos}
