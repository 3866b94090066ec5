"""Graphs in the shorthand of conftest with rotations that can move, which the tests of `commute_rotation` edit."""

import graph_texts

# What joins and divides tokens and channels, between layers whose input is rotated.
PARTS = """
parts (float[batch, 6, 24] x) => (float[batch, 2, 24] y, float[batch, 4, 24] z)
<int64[2] sizes = {2, 4}>
{
    bent = Relu(x)
    a, b = Split<axis = 1>(bent, sizes)
    ra = Rotate<block = 12>(a)
    rb = Rotate<block = 12>(b)
    y = Linear<rows = 24, cols = 24>(ra)
    z = Linear<rows = 24, cols = 24>(rb)
}
"""
SLICED = graph_texts.edited(
    PARTS,
    ("a, b = Split<axis = 1>(bent, sizes)", "a = Slice(bent, zero, two, one) b = Slice(bent, two, six, one)"),
    ("int64[2] sizes = {2, 4}", "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}"),
)
CHANNELS = """
side_by_side (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
{
    a = Relu(x)
    wide = Linear<rows = 48, cols = 24>(x)
    b = Gelu(wide)
    both = Concat<axis = -1>(a, b)
    rotated = Rotate<block = 12, width = 72>(both)
    y = Linear<rows = 24, cols = 72>(rotated)
}
"""
TOKENS = """
joined (float[batch, tokens, 24] x, float[batch, text, 24] c) => (float[batch, both, 24] y)
{
    a = Relu(x)
    ra = Rotate<block = 12>(a)
    rc = Rotate<block = 12>(c)
    both = Concat<axis = 1>(rc, ra)
    y = Kept<rows = 24, cols = 24>(both)
}
"""
# Some tokens of a layer meet those of another source; a rotation of all of the layer's could fold into it.
MEET = """
meet (float[batch, 6, 24] x, float[batch, text, 24] c) => (float[batch, both, 24] y, float[batch, 4, 24] z)
<int64[2] sizes = {2, 4}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}>
{
    made = Kept<rows = 24, cols = 24>(x)
    a, b = Split<axis = 1>(made, sizes)
    ra = Rotate<block = 12>(a)
    rb = Rotate<block = 12>(b)
    rc = Rotate<block = 12>(c)
    met = Concat<axis = 1>(ra, rc)
    y = Linear<rows = 24, cols = 24>(met)
    z = Linear<rows = 24, cols = 24>(rb)
}
"""
MADE, DIVIDED = "made = Kept<rows = 24, cols = 24>(x)", "a, b = Split<axis = 1>(made, sizes)"
LAYOUT = """
layout (float[batch, tokens, 24] x) => (float[tokens, batch, 24] y)
<float half = {0.5}, int64[3] shape = {0, 0, 24}>
{
    a = Relu(x)
    scaled = Mul(half, a)
    turned = Transpose<perm = [1, 0, 2]>(scaled)
    shaped = Reshape(turned, shape)
    r = Rotate<block = 12, seed = 3>(shaped)
    y = Linear<rows = 24, cols = 24>(r)
}
"""
# The first rotation leaves signs for the first 24 channels, which nothing reads any more when the second asks for them.
GONE = """
gone (float[batch, tokens, 12] a, float[batch, tokens, 12] b, float[batch, tokens, 24] d)
    => (float[batch, tokens, 24] y, float[batch, tokens, 24] z)
<float two = {2}>
{
    inner = Concat<axis = -1>(a, b)
    outer = Concat<axis = -1>(inner, d)
    r = Rotate<block = 12, width = 48>(outer)
    y = Linear<rows = 24, cols = 48>(r)
    twice = Concat<axis = -1>(d, d)
    scaled = Mul(twice, two)
    r2 = Rotate<block = 12, width = 48>(scaled)
    z = Linear<rows = 24, cols = 48>(r2)
}
"""
