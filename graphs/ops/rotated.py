"""Ops that end in a Hadamard rotation: y = tokens diag(signs) H on each contiguous block of channels.

H = (H_K (x) H_2^m) / sqrt(block) as in `graphs.ops.hadamard`; the weights that read y carry W diag(signs)^-1 H, because
x W^T = (x R)(W R^-T)^T. Signs are +-1, which makes R orthogonal, or +-1 / d where channels of different size are
equalized first (`graphs.equalizer`); block 1 does only that. `base` (K) and `order` (q) spell out the factorization of
`block`, so that one body builds every matrix from them: no tables in the file, nothing to keep in step.

What the tokens are is the `Prologue` of an op: x itself, or a normalization or activation of x that then need not be
written to memory before it is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphs.ops.hadamard import factorize, transform
from graphs.ops.spec import Attribute, AttributeValue, Example, OpSpec, Shape, Tensor, Tolerance, dims, same

# (block, shape of y), and what the prologue's example takes beside that.
CASES = ((1152, (2, 3, 1152)), (4608, (1, 4608)), (72, (5, 144)), (128, (2, 3, 128)), (1, (4, 10)))

X = Tensor("x", "T", "(..., n)")

ROTATION_ATTRIBUTES = (
    Attribute("block", int, "channels that one H mixes; divides n; block = base * 2^m"),
    Attribute("base", int, "K, the Paley factor of block; 1 if block is a power of two"),
    Attribute("order", int, "q, the prime behind K: K = q + 1 or 2 (q + 1); 0 if K = 1"),
)


def rotation_attributes(block: int) -> dict[str, int]:
    """The attributes {block, base, order} of a rotation. Raises UnsupportedSize if `block` has no Hadamard matrix."""
    factors = factorize(block)
    return {"block": block, "base": factors.base, "order": factors.order}


@dataclass(frozen=True)
class Prologue:
    """What a node computes from x before it rotates that.

    inputs: x first; the signs follow them.
    attributes: its own; those of the rotation follow them.
    reference: (float32 arrays of `inputs`, `attributes` as keywords) -> tokens (..., n) float32.
    body: ONNX text from inputs, attributes and `signs_scaled`, the signs / sqrt(block) as float (n,), to `x_signed`,
        the tokens (..., n) times those, of x's type.
    infer_shape: (shapes of `inputs`, attributes) -> the shape of the tokens; raises ValueError where sizes disagree.
    example: (generator, shape of the tokens, *rest of the case) -> arrays of `inputs`, and its attributes.
    """

    inputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    reference: Callable[..., np.ndarray]
    body: str
    infer_shape: Callable[[Sequence[Shape], Mapping[str, AttributeValue]], Shape]
    example: Callable[..., Example]


def rotated_op(name: str, doc: str, prologue: Prologue, cases: Sequence[Sequence] = CASES) -> OpSpec:
    """The op x -> y (..., n) of x's type: the prologue, then the rotation, in float32 and rounded once.

    Each case of its examples is there twice: with signs of +-1, and of +-1 / d.
    """

    def infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
        *of_prologue, signs = shapes
        if shapes[0] == ():
            raise ValueError("x is a scalar, needed (..., n)")
        tokens = prologue.infer_shape(of_prologue, attributes)
        _check_rotation(tokens, signs, attributes)
        return (tokens,)

    def rotate(*tensors: np.ndarray, **attributes: AttributeValue) -> np.ndarray:
        infer_shape([tensor.shape for tensor in tensors], attributes)
        *of_prologue, signs = (tensor.astype(np.float32) for tensor in tensors)
        own = {attribute.name: attributes[attribute.name] for attribute in prologue.attributes}
        tokens = prologue.reference(*of_prologue, **own)
        return transform(tokens * signs, attributes["block"]).astype(tensors[0].dtype)

    def example(
        rng: np.random.Generator, divisors: Sequence[float], block: int, shape: tuple[int, ...], *case: object
    ) -> Example:
        of_prologue = prologue.example(rng, shape, *case)
        signs = rng.choice(np.float32([-1, 1]), shape[-1]) / rng.choice(np.float32(divisors), shape[-1])
        return Example((*of_prologue.inputs, signs), {**of_prologue.attributes, **rotation_attributes(block)})

    return OpSpec(
        name=name,
        doc=doc,
        inputs=(*prologue.inputs, Tensor("signs", "T", "(n,) of +-1, or +-1 / d")),
        outputs=(Tensor("y", "T", "(..., n)"),),
        attributes=(*prologue.attributes, *ROTATION_ATTRIBUTES),
        type_vars={"T": ("float", "float16", "bfloat16")},
        reference=rotate,
        body=f"{_MATRICES}{_SIGNS}{prologue.body}{_PRODUCTS}",
        infer_shape=infer_shape,
        tolerance=Tolerance(
            nmse={"float": 1e-12, "float16": 1e-6},
            reason="sums of up to block terms in another order; in float16 also the scale and each stage are rounded",
        ),
        examples=lambda rng: [example(rng, divisors, *case) for divisors in _DIVISORS for case in cases],
    )


_DIVISORS = ((1,), (0.25, 1, 2**0.25, 256))


def _check_rotation(tokens: Shape, signs: Shape, attributes: Mapping[str, AttributeValue]) -> None:
    block, base, order = (attributes[name] for name in ("block", "base", "order"))
    factors = factorize(block)
    if (base, order) != (factors.base, factors.order):
        raise ValueError(
            f"block {block} factorizes with base {factors.base} and order {factors.order}, got {base} and {order}"
        )
    (count,) = dims("signs", signs, 1)
    channels = None if tokens is None else tokens[-1]
    same("signs", count, channels)
    if isinstance(channels, int) and channels % block:
        raise ValueError(f"block {block} does not divide the {channels} channels")


# Only what TensorRT's parser imports: no BitwiseAnd, BitShift or integer MatMul. All of it depends on attributes alone,
# so that a runtime folds it into constants when it loads the model.
_MATRICES = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    two = Constant<value_int = 2>()
    onef = Constant<value_float = 1.0>()
    twof = Constant<value_float = 2.0>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    n_block = Constant<value_int: int = @block>()
    k = Constant<value_int: int = @base>()
    q = Constant<value_int: int = @order>()

    # chi (q + 1,): +1 on nonzero squares mod q, -1 on non-squares, 0 at 0. For q = 0 every array has one entry.
    modulus = Max(q, one)
    size = Add(q, one)
    index = Range(zero, size, one)
    index_squared = Mul(index, index)
    squares = Mod(index_squared, modulus)
    column = Unsqueeze(index, axis1)
    row = Unsqueeze(index, axis0)
    squares_row = Unsqueeze(squares, axis0)
    hits = Equal(column, squares_row)
    hits_f = Cast<to = 1>(hits)
    is_square = ReduceMax<keepdims = 0>(hits_f, axis1)
    twice = Mul(is_square, twof)
    signed = Sub(twice, onef)
    is_nonzero = Min(index, one)
    nonzero_f = Cast<to = 1>(is_nonzero)
    chi = Mul(signed, nonzero_f)

    # C (q + 1, q + 1): chi(i - j) bordered by +1 above and e = 2 t - 3 on the left.
    difference = Sub(column, row)
    positive = Add(difference, q)
    residue = Mod(positive, modulus)
    core = Gather(chi, residue)
    t = Div(k, size)
    t_f = Cast<to = 1>(t)
    three = Constant<value_float = 3.0>()
    t_twice = Mul(t_f, twof)
    e = Sub(t_twice, three)
    on_diagonal = Equal(row, column)
    identity = Cast<to = 1>(on_diagonal)
    corner_free = Sub(onef, identity)
    top = Equal(column, zero)
    side = Equal(row, zero)
    with_top = Where(top, onef, core)
    bordered = Where(side, e, with_top)
    conference = Mul(bordered, corner_free)

    # H_K = C (x) A_t + I (x) B_t with A[i, j] = 1 - 2 i j and B[i, j] = 1 - 2 max(i, j).
    copy = Range(zero, t, one)
    copy_f = Cast<to = 1>(copy)
    copy_column = Unsqueeze(copy_f, axis1)
    copy_row = Unsqueeze(copy_f, axis0)
    both = Mul(copy_column, copy_row)
    both_twice = Mul(both, twof)
    a = Sub(onef, both_twice)
    either = Max(copy_column, copy_row)
    either_twice = Mul(either, twof)
    b = Sub(onef, either_twice)
    outer_axes = Constant<value_ints = [1, 3]>()
    inner_axes = Constant<value_ints = [0, 2]>()
    conference_4d = Unsqueeze(conference, outer_axes)
    identity_4d = Unsqueeze(identity, outer_axes)
    a_4d = Unsqueeze(a, inner_axes)
    b_4d = Unsqueeze(b, inner_axes)
    c_part = Mul(conference_4d, a_4d)
    i_part = Mul(identity_4d, b_4d)
    h_4d = Add(c_part, i_part)
    k_1d = Unsqueeze(k, axis0)
    k_by_k = Concat<axis = 0>(k_1d, k_1d)
    h_k = Reshape(h_4d, k_by_k)

    # Where H is cut, as in graphs.ops.hadamard.split: H = left (x) right, 2^m = s (2^m / s), K on one of the sides.
    powers = Constant<value_ints = [1, 2, 4, 8, 16, 32, 64, 128, 256]>()
    power = Div(n_block, k)
    left_sizes = Mul(powers, k)
    right_sizes = Div(power, powers)
    right_twice = Mul(right_sizes, two)
    too_large = GreaterOrEqual(left_sizes, right_twice)
    candidates = Where(too_large, one, powers)
    s_balanced = ReduceMax<keepdims = 1>(candidates, axis0)
    right_balanced = Div(power, s_balanced)
    least = Constant<value_int = 15>()
    most = Constant<value_int = 256>()
    right_is_wide = Greater(right_balanced, least)
    block_is_large = Greater(n_block, most)
    is_cut = Or(right_is_wide, block_is_large)
    one_1d = Constant<value_ints = [1]>()
    s_left = Where(is_cut, s_balanced, one_1d)
    s_right = Div(power, s_left)
    k_left = Where(is_cut, k_1d, one_1d)
    k_right = Div(k_1d, k_left)
    left_size = Mul(k_left, s_left)
    right_size = Mul(k_right, s_right)

    # Sylvester's H_s: its entry at i, j is (-1)^popcount(i & j), and popcount is a product of bit vectors.
    s_right_scalar = Squeeze(s_right, axis0)
    position = Range(zero, s_right_scalar, one)
    position_column = Unsqueeze(position, axis1)
    shifted = Div(position_column, powers)
    bits = Mod(shifted, two)
    bits_f = Cast<to = 1>(bits)
    bits_t = Transpose<perm = [1, 0]>(bits_f)
    overlap = MatMul(bits_f, bits_t)
    parity = Mod<fmod = 1>(overlap, twof)
    parity_twice = Mul(parity, twof)
    h_s_right = Sub(onef, parity_twice)

    # The two factors. The leading 1 x 1 corner of H_K is [1], the leading s x s corner of H_2^m is H_s.
    corner = Constant<value_ints = [0, 0]>()
    s_left_square = Concat<axis = 0>(s_left, s_left)
    k_left_square = Concat<axis = 0>(k_left, k_left)
    k_right_square = Concat<axis = 0>(k_right, k_right)
    left_square = Concat<axis = 0>(left_size, left_size)
    right_square = Concat<axis = 0>(right_size, right_size)
    h_s_left = Slice(h_s_right, corner, s_left_square)
    h_k_left = Slice(h_k, corner, k_left_square)
    h_k_right = Slice(h_k, corner, k_right_square)
    h_s_left_4d = Unsqueeze(h_s_left, inner_axes)
    h_s_right_4d = Unsqueeze(h_s_right, inner_axes)
    h_k_left_4d = Unsqueeze(h_k_left, outer_axes)
    h_k_right_4d = Unsqueeze(h_k_right, outer_axes)
    left_4d = Mul(h_k_left_4d, h_s_left_4d)
    right_4d = Mul(h_k_right_4d, h_s_right_4d)
    h_left = Reshape(left_4d, left_square)
    h_left_t = Transpose<perm = [1, 0]>(h_left)
    h_right = Reshape(right_4d, right_square)
"""

# The scale rides on the signs, so that nothing grows by sqrt(block) in half precision.
_SIGNS = """
    block_f = Cast<to = 1>(n_block)
    root = Sqrt(block_f)
    signs_f = Cast<to = 1>(signs)
    signs_scaled = Div(signs_f, root)
"""

# Reads `x_signed`; gives y = x_signed H sqrt(block).
_PRODUCTS = """
    left_matrix = CastLike(h_left_t, x)
    right_matrix = CastLike(h_right, x)
    rest = Constant<value_ints = [-1]>()
    right_shape = Concat<axis = 0>(rest, right_size)
    # Without a cut the left factor is [[1]]: let it be one long product, not one for every token.
    cut_shape = Concat<axis = 0>(rest, left_size, right_size)
    uncut_shape = Constant<value_ints = [1, 1, -1]>()
    left_shape = Where(is_cut, cut_shape, uncut_shape)
    y_shape = Shape(x_signed)
    x_blocks = Reshape(x_signed, right_shape)
    y_right = MatMul(x_blocks, right_matrix)
    y_blocks = Reshape(y_right, left_shape)
    y_left = MatMul(left_matrix, y_blocks)
    y = Reshape(y_left, y_shape)
"""
