"""Channel divisors of an equalized input: d_j = 2^(e_j / 4), written as text so that expressions and records hold them.

Quarter octaves: a divisor is within 9 % of the one that was wanted, and a channel costs one byte. `HadamardRotate`
gets them with its signs, as x diag(signs / d) H; the weights that read it carry W diag(signs * d) H.

>>> divisors(encode(np.array([1.0, 2.0, 0.5, 245.0]))).tolist()
[1.0, 2.0, 0.5, 256.0]
"""

from __future__ import annotations

import base64

import numpy as np

PER_OCTAVE = 4
LARGEST = 127  # of an exponent: 2^±31.75


def encode(wanted: np.ndarray) -> str:
    """The nearest divisors to those `wanted` (n,), positive and finite, as text. Raises ValueError for others."""
    wanted = np.asarray(wanted, np.float64)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise ValueError("an equalizer's divisors must be positive and finite")
    exponents = np.rint(PER_OCTAVE * np.log2(wanted)).clip(-LARGEST, LARGEST)
    return base64.b64encode(exponents.astype(np.int8).tobytes()).decode()


def divisors(text: str) -> np.ndarray:
    """d (n,) float64 of an encoded equalizer. Raises ValueError for text that is none."""
    exponents = np.frombuffer(base64.b64decode(text, validate=True), np.int8)
    return np.exp2(exponents / PER_OCTAVE)


def part(text: str, start: int, stop: int) -> str:
    """The equalizer of channels `start` to `stop` alone.

    >>> divisors(part(encode(np.array([1.0, 2.0, 0.5, 256.0])), 1, 3)).tolist()
    [2.0, 0.5]
    """
    return base64.b64encode(base64.b64decode(text, validate=True)[start:stop]).decode()
