"""What the linear ops of all weight formats share: quantize each token, multiply integers, dequantize, add the bias.

With a = act_bits and limit = 2^(a-1) - 1, per token (the last axis of x), in float32:

    s = max|x| / limit            an all-zero token uses s = 1: its result is the bias
    q = clamp(round_half_even(x / s), -limit, limit)
    acc = q w^T                   exact integers
    y = (acc s) scale[row] + bias

What a node does with y before it rounds it to x's type is its `Epilogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphs import names
from graphs.ops.hadamard import transform
from graphs.ops.spec import Attribute, AttributeValue, Example, OpSpec, Shape, Tensor, Tolerance, dims, same
from graphs.ops.weight_format import WeightFormat

ACTIVATION_BITS = (8, 6, 4)


def quantize_tokens(x: np.ndarray, act_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """x (..., cols) of any float type -> q (..., cols) int8, s (..., 1) float32."""
    limit = np.float32((1 << (act_bits - 1)) - 1)
    values = x.astype(np.float32)
    scale = np.abs(values).max(axis=-1, keepdims=True) / limit
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(values / scale), -limit, limit).astype(np.int8), scale


def token_product(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, *, act_bits: int
) -> np.ndarray:
    """x (..., cols) times integers w (rows, cols) int8 -> y (..., rows) of x's type; scale and bias (rows,) float32."""
    return _float_product(x, weight, scale, bias, act_bits).astype(x.dtype)


def _float_product(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, act_bits: int) -> np.ndarray:
    quantized, token_scale = quantize_tokens(x, act_bits)
    # float64 holds every sum below 2^53 exactly and, unlike numpy's integer product, runs on BLAS.
    product = (quantized.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)
    return product * token_scale * scale.astype(np.float32) + bias.astype(np.float32)


def rotated(x: np.ndarray, rotation: str, block: int) -> np.ndarray:
    """x, or x H on blocks of channels if the rotation is fused into the node (plugin targets only)."""
    return x if rotation == "none" else transform(x, block)


def product_shape(x: Shape, bias: Shape, attributes: Mapping[str, AttributeValue]) -> Shape:
    """The shape (..., rows) of y. Raises ValueError if x or bias does not fit the weights."""
    same("bias", dims("bias", bias, 1)[0], attributes["rows"])
    rotation, block = attributes["rotation"], attributes["block"]
    if rotation != "none" and (block < 1 or attributes["cols"] % block):
        raise ValueError(f"block {block} of rotation {rotation!r} does not divide the {attributes['cols']} columns")
    if x is None:
        return None
    if not x:
        raise ValueError("x is a scalar, needed (..., cols)")
    same("the last axis of x", x[-1], attributes["cols"])
    return (*x[:-1], attributes["rows"])


def body_valid(attributes: Mapping[str, AttributeValue]) -> str | None:
    """None, or why the body does not compute this node."""
    rotation, layout = attributes["rotation"], attributes.get("layout", names.STORAGE)
    if rotation != "none":
        return f"rotation {rotation!r} is fused into the node; only a plugin computes that, the body does not"
    if layout != names.STORAGE:
        return f"its codes lie in layout {layout!r}; only a plugin reads that, the body does not"
    return None


X = Tensor("x", "T", "(..., cols)")
BIAS = Tensor("bias", "float", "(rows,); zeros if the layer has none")
Y = Tensor("y", "T", "(..., rows)")

PRODUCT_ATTRIBUTES = (
    Attribute("act_bits", int, "bits of a quantized activation", choices=ACTIVATION_BITS),
    Attribute("rotation", str, "rotation fused into the node; other than 'none' in plugin targets only", "none",
              choices=("none", "hadamard")),
    Attribute("block", int, "channels that the fused rotation mixes; 0 without one", 0),
)  # fmt: skip

FLOAT_ACCUMULATION = (
    "the body accumulates integers in float32, exact below 2^24: always up to 1040 columns, in practice at any width; "
    "float16 rounds the result"
)


@dataclass(frozen=True)
class Epilogue:
    """What follows the product in a node, in float32.

    inputs: of type T, behind those of the product.
    reference: (y (..., rows) float32, arrays of `inputs` as float32) -> y.
    body: ONNX text from `inputs` and `y_f`, the product as float, to `y` of x's type.
    check_shapes: (shape of y, shapes of `inputs`); raises ValueError where known sizes disagree.
    examples: generator, shape of y -> float32 arrays of `inputs`; one example of the op for each.
    """

    inputs: tuple[Tensor, ...]
    reference: Callable[..., np.ndarray]
    body: str
    check_shapes: Callable[[Shape, Sequence[Shape]], None]
    examples: Callable[[np.random.Generator, tuple[int, ...]], Sequence[tuple[np.ndarray, ...]]]


NO_EPILOGUE = Epilogue(
    inputs=(),
    reference=lambda y: y,
    body="""
    y = CastLike(y_f, x)
""",
    check_shapes=lambda y, shapes: None,
    examples=lambda rng, shape: [()],
)


def linear_op(
    name: str, doc: str, weight: WeightFormat, cases: Sequence[Sequence[int]], epilogue: Epilogue = NO_EPILOGUE
) -> OpSpec:
    """The op x (..., cols) -> y (..., rows) of x's type for weights of one format.

    A case of its examples is the bits of the activations, then a case of the format.
    """
    of_product = (X, *weight.inputs, BIAS)
    count = len(of_product)

    def linear(
        *tensors: np.ndarray, act_bits: int, rotation: str = "none", block: int = 0, **attributes: AttributeValue
    ) -> np.ndarray:
        x, *of_weight, bias = tensors[:count]
        integers = weight.decode(of_weight, attributes)
        y = _float_product(rotated(x, rotation, block), integers, of_weight[-1], bias, act_bits)
        of_epilogue = [tensor.astype(np.float32) for tensor in tensors[count:]]
        epilogue.check_shapes(y.shape, [tensor.shape for tensor in of_epilogue])
        return epilogue.reference(y, *of_epilogue).astype(x.dtype)

    def infer_shape(shapes: Sequence[Shape], attributes: Mapping[str, AttributeValue]) -> Sequence[Shape]:
        x, *of_weight, bias = shapes[:count]
        weight.check_all_shapes(of_weight, attributes)
        y = product_shape(x, bias, attributes)
        epilogue.check_shapes(y, shapes[count:])
        return (y,)

    def examples(rng: np.random.Generator, act_bits: int, *case: int) -> Iterator[Example]:
        of_weight = weight.scaled_example(rng, case)
        rows, cols = of_weight.attributes["rows"], of_weight.attributes["cols"]
        x = rng.standard_normal((2, 3, cols), np.float32)
        x[0, 1] = 0  # a token of zeros
        bias = rng.standard_normal(rows, np.float32)
        for of_epilogue in epilogue.examples(rng, (2, 3, rows)):
            inputs = (x, *of_weight.inputs, bias, *of_epilogue)
            yield Example(inputs, {**of_weight.attributes, "act_bits": act_bits})

    return OpSpec(
        name=name,
        doc=doc,
        inputs=(*of_product, *epilogue.inputs),
        outputs=(Y,),
        attributes=(*weight.all_attributes(), *PRODUCT_ATTRIBUTES, *weight.product_attributes),
        type_vars={"T": ("float", "float16", "bfloat16"), **weight.type_vars},
        reference=linear,
        # Pasted, not called: TensorRT's parser hands no attribute references on to a function called by a function.
        body=f"{weight.body}{_BODY}{epilogue.body}",
        infer_shape=infer_shape,
        tolerance=Tolerance(nmse={"float": 1e-12, "float16": 1e-7}, reason=FLOAT_ACCUMULATION),
        examples=lambda rng: [example for case in cases for example in examples(rng, *case)],
        body_valid=body_valid,
    )


# Reads x, scale, bias and `weight`, the integer-valued float (rows, cols); gives `y_f` float (..., rows).
_BODY = """
    act_bits_i = Constant<value_int: int = @act_bits>()
    limits = Constant<value_floats = [0.0, 0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0]>()
    limit = Gather(limits, act_bits_i)
    limit_low = Neg(limit)
    last = Constant<value_ints = [-1]>()
    x_f = Cast<to = 1>(x)
    x_abs = Abs(x_f)
    peak = ReduceMax<keepdims = 1>(x_abs, last)
    step_or_zero = Div(peak, limit)
    no_step = Constant<value_float = 0.0>()
    any_step = Constant<value_float = 1.0>()
    is_live = Greater(step_or_zero, no_step)
    token_scale = Where(is_live, step_or_zero, any_step)
    x_steps = Div(x_f, token_scale)
    x_round = Round(x_steps)
    x_codes = Clip(x_round, limit_low, limit)
    weight_t = Transpose<perm = [1, 0]>(weight)
    sums = MatMul(x_codes, weight_t)
    in_tokens = Mul(sums, token_scale)
    in_rows = Mul(in_tokens, scale)
    y_f = Add(in_rows, bias)
"""
