"""Let products read their codes in 32-bit words, as kernels do, in targets that run plugins.

    TwinLogLinear(x, codes (rows, planes, elements), ...)
        ->  TwinLogLinear<layout = "words">(x, codes (rows, bytes) int8, ...)

and likewise for its siblings. `graphs.ops.words` says where each code lies; whoever binds the weights writes them so.
Rows begin with a word, so stacks of rows are words of stacks. Function bodies read storage: such a graph has none.
"""

from graphs import names
from graphs.passes.patterns import CODED_OPS, LINEAR_OPS, codes_form, is_lrq, operand
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def prepack(traced: TracedGraph) -> PassResult:
    result, inputs = PassResult(), set(traced.codes_inputs())
    for node in [node for node in traced.graph.nodes if is_lrq(node, *CODED_OPS)]:
        codes = operand(node, "codes")
        if node.attrs.get("layout", names.STORAGE) == names.WORDS:
            continue
        if node.op not in LINEAR_OPS:
            result.skip(node, "its activations stay in floating point, and only integer products read words")
        elif codes.name not in inputs:
            result.skip(node, "its codes are in no row of the weight table")
        elif len(codes.outputs) > 1:
            result.skip(node, "its codes are also read elsewhere")
        else:
            node.attrs["layout"] = names.WORDS
            codes.dtype, codes.shape = codes_form(node)
            result.fired += 1
    return result
