"""Codes in 32-bit words: the bit stream, the words of whole codes, and zero points less one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.interop.words import less_one, pack_words, plus_one, unpack_padded_words, unpack_words, width


def codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70))
def test_words_come_back(bits: int, rows: int, columns: int) -> None:
    wanted = codes(bits, rows, columns)
    words = pack_words(wanted, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, width(columns, bits))
    assert torch.equal(unpack_words(words, bits, columns, "w"), wanted)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_element_i_holds_bits_from_i_times_bits(bits: int) -> None:
    wanted = codes(bits, 1, 64)
    stream = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(pack_words(wanted, bits)[0]))
    assert [stream >> i * bits & 2**bits - 1 for i in range(64)] == wanted[0].tolist()


def test_columns_of_a_transposed_tensor_pack_too() -> None:
    wanted = codes(4, 24, 1)
    assert torch.equal(unpack_words(pack_words(wanted.t(), 4), 4, 24, "w"), wanted.t())
    words = pack_words(codes(4, 3, 8), 4).t()  # [1, 3] seen as [3, 1]
    assert torch.equal(unpack_words(words.t(), 4, 8, "w"), codes(4, 3, 8))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), r"int32, shape \[2, 3\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"int64, shape \[2, 2\]"),
        (torch.zeros(2, dtype=torch.int32), r"int32, shape \[2\]"),
    ],
)
def test_words_that_do_not_fit_are_named(words: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"'a\.qweight' does not hold 16 codes of 4 bits a row(.|\n)*{found}"):
        unpack_words(words, 4, 16, "a.qweight")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_whole_codes(bits: int) -> None:
    each, wanted = 32 // bits, codes(bits, 2, 40)
    words = torch.zeros(2, -(-40 // each), dtype=torch.int64)
    for i in range(40):
        words[:, i // each] |= wanted[:, i].to(torch.int64) << i % each * bits
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(unpack_padded_words(words, bits, 40), wanted)
    assert not torch.equal(unpack_words(words[:, : width(40, bits)], bits, 40, "w"), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_whole_codes_are_the_stream_where_codes_fit_words(bits: int) -> None:
    wanted = codes(bits, 2, 32)
    assert torch.equal(unpack_padded_words(pack_words(wanted, bits), bits, 32), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_one_and_plus_one(bits: int) -> None:
    wanted = codes(bits, 3, 32).clamp(min=1)
    zero, unsure = plus_one(pack_words(less_one(wanted), bits), bits, 32, "z")
    assert torch.equal(zero, wanted) and not unsure
    with pytest.raises(AssertionError, match="zero point of 0"):
        less_one(torch.zeros(2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_borrow_through_a_word_is_undone(bits: int) -> None:
    wanted = codes(bits, 4, 32)
    wanted[:, 5] = 0
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (pack_words(wanted, bits).to(torch.int64) % 2**32 - ones) % 2**32
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    zero, unsure = plus_one(words, bits, 32, "z")
    assert unsure and torch.equal(zero, wanted)
