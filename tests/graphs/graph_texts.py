"""Graphs in the shorthand of conftest that the tests of several passes edit."""

ATTENTION = """
attention (float[batch, tokens, 24] x) => (float[batch, tokens, 24] y)
<int64[4] split = {0, 0, 2, 12}, int64[3] merge = {0, 0, 24}>
{
    q = Linear<rows = 24, cols = 24>(x)
    k = Linear<rows = 24, cols = 24>(x)
    v = Linear<rows = 24, cols = 24>(x)
    q4 = Reshape(q, split)
    k4 = Reshape(k, split)
    v4 = Reshape(v, split)
    qh = Transpose<perm = [0, 2, 1, 3]>(q4)
    kh = Transpose<perm = [0, 2, 3, 1]>(k4)
    vh = Transpose<perm = [0, 2, 1, 3]>(v4)
    scores = MatMul(qh, kh)
    p = Softmax(scores)
    mixed = MatMul(p, vh)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed)
    merged = Reshape(back, merge)
    y = Linear<rows = 24, cols = 24>(merged)
}
"""


def edited(text: str, *edits: tuple[str, str]) -> str:
    """The text with each (old, new) put in; every old must stand there once."""
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text
