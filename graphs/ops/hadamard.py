"""Hadamard matrices H_n = H_K (x) H_2^m for the widths of diffusion transformers, and their fast transform.

Paley's two constructions need no tables. For a prime q let Q (q, q) be the Jacobsthal matrix, Q[i, j] = chi(i - j) with
chi the quadratic character mod q, and let C (q+1, q+1) be Q bordered by ones:

    C = [[0, 1^T], [e 1, Q]]        C C^T = q I
    Paley I  (q = 3 mod 4): e = -1, C is skew,       H = C + I                 of size q + 1
    Paley II (q = 1 mod 4): e = +1, C is symmetric,  H = C (x) A + I (x) B     of size 2 (q + 1)

with A = [[1, 1], [1, -1]], B = [[1, -1], [-1, -1]]. Both are one formula in t = K / (q + 1): take the leading t x t
corner of A and B, and e = 2 t - 3. q = 0 gives H_1 = [1]. The 2^m part is Sylvester's, H[i, j] = (-1)^popcount(i & j).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

MAX_DENSE = 256  # the largest matrix that is ever multiplied with
MAX_SIZE = MAX_DENSE**2
MIN_RIGHT = 16  # below this, one dense product is faster than two thin ones (measured in ONNX Runtime)


@dataclass(frozen=True)
class Factors:
    """n = base * power: Paley size `base` made from the prime `order` (1 and 0 if n is a power of two), power = 2^m."""

    base: int
    order: int
    power: int

    @property
    def size(self) -> int:
        return self.base * self.power


class UnsupportedSize(ValueError):
    """No Hadamard matrix of this size is built here; the message names a block that works."""


def factorize(n: int) -> Factors:
    """Split n into the smallest Paley size and a power of two.

    Raises UnsupportedSize if n has no such split with a Paley size up to 256, or is larger than 65536.
    """
    factors = _factors(n)
    if factors is None:
        block = max((d for d in range(2, min(n, MAX_SIZE + 1)) if n % d == 0 and _factors(d)), default=None)
        advice = f"use block = {block}, which divides it" if block else "no block divides it either: do not rotate"
        raise UnsupportedSize(
            f"no Hadamard matrix of size {n} (it must be 2^m, or 2^m times a Paley size up to {MAX_DENSE}, "
            f"and at most {MAX_SIZE}); {advice}"
        )
    return factors


def supported(n: int) -> bool:
    """Whether `factorize(n)` succeeds."""
    return _factors(n) is not None


def blocks(width: int) -> list[int]:
    """Divisors of `width` that have a Hadamard matrix, ascending; 1 is the first."""
    return [size for size in range(1, width + 1) if width % size == 0 and supported(size)]


@cache
def base_matrix(base: int, order: int) -> np.ndarray:
    """H_K (K, K) int8 of +-1 with H H^T = K I, for K = base, q = order. Raises ValueError if they do not match."""
    size = order + 1
    copies = base // size
    if copies not in (1, 2) or copies * size != base or not _is_paley(order, copies):
        raise ValueError(f"no Paley construction of size {base} from q = {order}")
    conference = np.zeros((size, size), np.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = 2 * copies - 3
    conference[1:, 1:] = _jacobsthal(order)
    corner_a = np.array([[1, 1], [1, -1]], np.int8)[:copies, :copies]
    corner_b = np.array([[1, -1], [-1, -1]], np.int8)[:copies, :copies]
    matrix = np.kron(conference, corner_a) + np.kron(np.eye(size, dtype=np.int8), corner_b)
    matrix.flags.writeable = False
    return matrix


@cache
def dense(factors: Factors) -> np.ndarray:
    """H_K (x) H_2^m (size, size) int8 of +-1, for a size up to 256: a factor that is multiplied with as it is."""
    if factors.size > MAX_DENSE:
        raise ValueError(f"a dense Hadamard matrix of size {factors.size}, larger than {MAX_DENSE}")
    matrix = np.kron(base_matrix(factors.base, factors.order), _sylvester(factors.power))
    matrix.flags.writeable = False
    return matrix


def split(factors: Factors) -> tuple[Factors, Factors]:
    """H = left (x) right, neither larger than 256: K on the left; all on the right if that is faster.

    Of the cuts left = K 2^i the one with the least left + right, which is the multiplications an element: from i - 1
    to i that sum falls if left < 2 right. The body of HadamardRotate has the same rule.
    """
    left = 1
    while factors.base * (2 * left) < 2 * (factors.power // (2 * left)):
        left *= 2
    right = factors.power // left
    if right < MIN_RIGHT and factors.size <= MAX_DENSE:
        return Factors(1, 0, 1), factors
    return Factors(factors.base, factors.order, left), Factors(1, 0, right)


def hadamard_matrix(n: int) -> np.ndarray:
    """The whole orthogonal H (n, n) float64 = (H_K (x) H_2^m) / sqrt(n). Quadratic in n: for tests only."""
    factors = factorize(n)
    return np.kron(base_matrix(factors.base, factors.order), _sylvester(factors.power)) / np.sqrt(n)


def transform(x: np.ndarray, block: int, *, inverse: bool = False) -> np.ndarray:
    """y = x H on every contiguous block of the last axis (y = x H^T if `inverse`); same shape and type as x.

    Costs left + right of `split` multiplications an element; computed in float32, or in float64 if x is.
    Raises ValueError if `block` does not divide the last axis, UnsupportedSize if it has no Hadamard matrix.
    """
    left, right = split(factorize(block))
    if x.shape[-1] % block:
        raise ValueError(f"block {block} does not divide the {x.shape[-1]} channels")
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    left_matrix, right_matrix = dense(left).astype(dtype), dense(right).astype(dtype)
    if inverse:
        left_matrix, right_matrix = left_matrix.T, right_matrix.T
    y = x.astype(dtype).reshape(-1, right.size) @ right_matrix
    if left.size > 1:
        y = left_matrix.T @ y.reshape(-1, left.size, right.size)
    return (y * dtype(1 / np.sqrt(block))).reshape(x.shape).astype(x.dtype)


@cache
def _factors(n: int) -> Factors | None:
    if not 0 < n <= MAX_SIZE:
        return None
    power = n & -n  # the largest power of two that divides n
    odd = n // power
    if odd == 1:
        return Factors(1, 0, power)
    base = 4 * odd
    while base <= MAX_DENSE and n % base == 0:
        for copies in (1, 2):
            if _is_paley(base // copies - 1, copies):
                return Factors(base, base // copies - 1, n // base)
        base *= 2
    return None


def _is_paley(order: int, copies: int) -> bool:
    if order == 0:
        return copies == 1
    return order % 4 == (3 if copies == 1 else 1) and _is_prime(order)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _sylvester(size: int) -> np.ndarray:
    """H_2^m (size, size) int8 of +-1 in Sylvester order."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _jacobsthal(order: int) -> np.ndarray:
    """Q (q, q): chi(i - j), that is +1 for a nonzero square mod q, -1 for a non-square, 0 on the diagonal."""
    if order == 0:
        return np.zeros((0, 0), np.int8)
    character = np.full(order, -1, np.int8)
    character[np.arange(1, order) ** 2 % order] = 1
    character[0] = 0
    index = np.arange(order)
    return character[(index[:, None] - index[None, :]) % order]
