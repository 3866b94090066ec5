"""Give the codes of every weight the type that their layout has, so that the graph says what its file will hold.

    int8 codes (rows, 1, cols) of 4 bits  ->  int4 codes (rows, 1, cols)

torch has no INT4 to trace with; elements of 2 and 3 bits fill an INT8 and stay. Codes of any other type are widened,
which `graphs.checks` refuses.
"""

import numpy as np

from graphs.passes.patterns import CODED_OPS, codes_form, is_lrq, operand
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def retype_codes(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for node in [node for node in traced.graph.nodes if is_lrq(node, *CODED_OPS)]:
        codes, (needed, _) = operand(node, "codes"), codes_form(node)
        if codes.dtype == needed:
            continue
        if codes.dtype != np.int8:
            result.skip(node, f"its codes are {codes.dtype}, needed int8 or {needed.name}")
            continue
        codes.dtype = needed
        result.fired += 1
    return result
