"""Spell out every attribute of every lrq node, `plugin_version` and `plugin_namespace` among them.

With these two TensorRT's parser takes the plugin when its library is loaded and the function body when it is not. A
plugin's creator gets the attributes that the node has: it knows no defaults.
"""

from graphs import names
from graphs.ops import OPS
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph

PLUGIN_ATTRIBUTES = {"plugin_version": names.PLUGIN_VERSION, "plugin_namespace": names.PLUGIN_NAMESPACE}


def bind_plugins(traced: TracedGraph) -> PassResult:
    result = PassResult()
    for node in traced.graph.nodes:
        if node.domain != names.DOMAIN:
            continue
        if node.op not in OPS:
            result.skip(node, f"{node.op} is not an op of the dialect")
            continue
        complete = OPS[node.op].node_attributes(**node.attrs | PLUGIN_ATTRIBUTES)
        if node.attrs != complete:
            node.attrs |= complete
            result.fired += 1
    return result
