"""Move every lrq node to the domain in which ONNX Runtime's TensorRT provider registers plugins.

    lrq::TwinLogLinear  ->  trt.plugins::TwinLogLinear

The graph has no function bodies then, and no import of the dialect. Last of its target: by the domain all else knows
what is an lrq node.
"""

from itertools import chain

import onnx
import onnx_graphsurgeon as gs

from graphs import names
from graphs.ops import OPS
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph


def target_onnxruntime_trt(traced: TracedGraph) -> PassResult:
    result, graph = PassResult(), traced.graph
    for node in [node for node in _all_nodes(graph) if node.domain == names.DOMAIN]:
        if node.op not in OPS:
            result.skip(node, f"{node.op} is not an op of the dialect")
            continue
        node.domain = names.TRT_PLUGINS
        result.fired += 1
    if result.fired:
        _import_used(graph)
    return result


def _all_nodes(graph: gs.Graph) -> chain[gs.Node]:
    return chain(graph.nodes, *(subgraph.nodes for subgraph in graph.subgraphs(recursive=True)))


def _import_used(graph: gs.Graph) -> None:
    """Import the plugins' domain, and the dialect's no more unless a node is left in it."""
    domains = {node.domain for node in _all_nodes(graph)}
    kept = [entry for entry in graph.import_domains if entry.domain != names.DOMAIN or names.DOMAIN in domains]
    if all(entry.domain != names.TRT_PLUGINS for entry in kept):
        kept.append(onnx.helper.make_opsetid(names.TRT_PLUGINS, 1))
    graph.import_domains = kept
