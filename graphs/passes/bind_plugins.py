"""Put `plugin_version` and `plugin_namespace` on every lrq node.

TensorRT's parser then takes the plugin when its library is loaded and the function body when it is not.
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
        elif any(node.attrs.get(key) != value for key, value in PLUGIN_ATTRIBUTES.items()):
            node.attrs |= PLUGIN_ATTRIBUTES
            result.fired += 1
    return result
