"""How b-bit codes lie in 32-bit words: the layout that kernels read, for nodes with `layout = "words"`.

Codes C (rows, cols), 0 <= code < 2^bits, become rows of little-endian words, held as INT8 bytes (rows, bytes). A word
is eight nibbles, nibble 0 in its lowest bits:

    bits  codes  words  nibble i of each word                  bits 3..0 of the nibble
    4     8      1      code i                                 [       c(i)        ]
    3     32     3      A: code i, bit 0 of code 24 + i        [c(24+i).0 |  c(i)  ]
                        B: code 8 + i, bit 1 of code 24 + i    [c(24+i).1 | c(8+i) ]
                        C: code 16 + i, bit 2 of code 24 + i   [c(24+i).2 | c(16+i)]
    2     16     1      codes 2 i and 2 i + 1                  [ c(2i+1) |  c(2i)  ]

`cols` is padded with zero codes to a multiple of `codes`. Every row begins with a word, so stacked rows are stacked
bytes. The three words of 3-bit codes have no bit to spare, and the low three bits of every nibble select one of eight
bytes, which is what a GPU's byte permutation takes: it looks four codes up at once. Little-endian words of nibbles are
bytes of two nibbles, low first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from graphs.ops import packing

WORD_BYTES, NIBBLES = 4, 8  # of one word


@dataclass(frozen=True)
class Unit:
    """One row of the table above: the fewest whole words that hold whole codes.

    join: codes (..., codes) uint8 -> nibbles (..., 8 words) uint8; split is its inverse.
    """

    codes: int
    words: int
    join: Callable[[np.ndarray], np.ndarray]
    split: Callable[[np.ndarray], np.ndarray]


def _one_a_nibble(codes: np.ndarray) -> np.ndarray:
    return codes


_WORD = np.arange(3, dtype=np.uint8)[:, None]  # word A, B, C holds bit 0, 1, 2 of the codes that are spread


def _join_3(codes: np.ndarray) -> np.ndarray:
    low = codes[..., :24].reshape(*codes.shape[:-1], 3, NIBBLES)
    top = (codes[..., None, 24:] >> _WORD) & 1
    return (low | top << 3).reshape(*codes.shape[:-1], 3 * NIBBLES)


def _split_3(nibbles: np.ndarray) -> np.ndarray:
    words = nibbles.reshape(*nibbles.shape[:-1], 3, NIBBLES)
    spread = np.bitwise_or.reduce(words >> 3 << _WORD, axis=-2)
    return np.concatenate([nibbles & 7, spread], axis=-1)


def _join_2(codes: np.ndarray) -> np.ndarray:
    return codes[..., 0::2] | codes[..., 1::2] << 2


def _split_2(nibbles: np.ndarray) -> np.ndarray:
    return np.stack([nibbles & 3, nibbles >> 2], axis=-1).reshape(*nibbles.shape[:-1], -1)


UNITS = {
    4: Unit(8, 1, _one_a_nibble, _one_a_nibble),
    3: Unit(32, 3, _join_3, _split_3),
    2: Unit(16, 1, _join_2, _split_2),
}


def words_shape(bits: int, rows: int, cols: int) -> tuple[int, int]:
    """The shape (rows, bytes) of (rows, cols) codes in words. Raises ValueError for a width that has no layout."""
    unit = UNITS[packing.layout(bits).bits]
    return rows, WORD_BYTES * unit.words * _units(unit, cols)


def prepack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, cols) of any integer type -> int8 (rows, bytes).

    Raises ValueError if one is not in [0, 2^bits).
    """
    packing.check_codes(codes, bits)
    unit, (rows, cols) = UNITS[bits], codes.shape
    units = _units(unit, cols)
    padded = np.pad(codes.astype(np.uint8), ((0, 0), (0, units * unit.codes - cols)))
    nibbles = unit.join(padded.reshape(rows, units, unit.codes)).reshape(rows, units * unit.words * NIBBLES)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8)


def unpack_words(array: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """The codes (rows, cols) uint8 held in words int8 (rows, bytes): the inverse of `prepack`.

    Raises ValueError if the type or shape is not that of (rows, cols) codes.
    """
    needed = words_shape(bits, len(array), cols)
    if array.dtype != np.int8 or array.shape != needed:
        raise ValueError(
            f"words of codes are {array.dtype}{list(array.shape)}, needed int8{list(needed)} for {bits} bits and "
            f"{cols} columns"
        )
    unit, byte = UNITS[bits], array.view(np.uint8)
    nibbles = np.stack([byte & 15, byte >> 4], axis=-1).reshape(len(array), _units(unit, cols), unit.words * NIBBLES)
    return unit.split(nibbles).reshape(len(array), _units(unit, cols) * unit.codes)[:, :cols]


def _units(unit: Unit, cols: int) -> int:
    return -(-cols // unit.codes)
