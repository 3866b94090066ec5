"""What TensorRT's inspector says of the layers of a plan, held to the graph: one plugin layer for each lrq node.

The inspector answers, of an engine built with detailed verbosity, `{"Layers": [layer, ...], "Bindings": [...]}`:

    {"Name": "blocks.0.ff [profile 1]", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: blocks.0.ff]",
     "Inputs": [{"Name": "x", "Dimensions": [2, 64], "Format/Datatype": "Half"}, ...], "Outputs": [...], ...}

- a plugin layer has the name of its node; what TensorRT fuses is named `a + b`, `PWN(a, b)`, or by its compiler alone,
  `__myl_FcAdd_myl3_5`. So which nodes a layer runs is also read from what NVIDIA's parser notes of each (the metadata);
- an engine has its layers once for all profiles, or once more for each, then named ` [profile 1]` and so on;
- copies to another layout or type are layers of their own, of the type Reformat or Cast, and named after the node that
  they serve; so may be a constant that it reads;
- formats are short, "Half", or told, "Row major linear FP16 format"; of tensors whose sizes are free, as those of most
  engines here, it is "N/A due to dynamic shapes", and there is nothing to judge.

A float fallback is an lrq node that something else than its plugin runs, in any profile, or beside the plugin: layers
that multiply decoded weights in floating point have the node in their names or metadata. Or it is a plugin that reads
or writes another float type than its node in the graph. Everything but lrq nodes is meant to run in floating point: of
that nothing is said here.

No engine of TensorRT's was at hand: the forms are those of its documentation and of plans that others have published.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_PROFILE = re.compile(r" \[profile (\d+)\]$")
_FUSED = re.compile(r" \+ |PWN\(|, |\)")
_NOTED = re.compile(r"\[ONNX Layer: (.*?)\](?=\[|[\x1e\x1f]|$)")
_COPIES = ("reformat", "noop", "cast", "constant")  # what computes nothing of the node that it is named after
_PLUGINS = ("plugin", "custom")  # PluginV2, PluginV3, custom_layer
_TYPES = {
    **dict.fromkeys(("float", "fp32", "float32"), "float32"),
    **dict.fromkeys(("half", "fp16", "float16"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
}


class NodeTypes(NamedTuple):
    """The float types of an lrq node's first input and of its output; None is none, such as that of codes."""

    reads: str | None
    writes: str | None


def float_type(text: str) -> str | None:
    """float32, float16 or bfloat16 for any name of it, or a format told in words; None for other types.

    >>> float_type("HALF"), float_type("Row major linear FP32"), float_type("Int8")
    ('float16', 'float32', None)
    """
    return next((_TYPES[word] for word in re.findall(r"\w+", text.lower()) if word in _TYPES), None)


def layer_faults(layers: Sequence[Any], nodes: Mapping[str, NodeTypes]) -> list[str]:
    """Why `layers`, of the inspector's JSON, do not run every lrq node by one plugin: a line for each; none is well."""
    unnamed = [layer for layer in layers if not isinstance(layer, Mapping)]
    if nodes and unnamed:
        return [f"{unnamed[0]}: got the layer's name alone, needed its type: build with detailed profiling verbosity"]
    serving: dict[str, list[Mapping[str, Any]]] = {name: [] for name in nodes}
    for layer in layers:
        if not _is(layer, _COPIES):
            for name in _nodes_of(layer) & nodes.keys():
                serving[name].append(layer)
    profiles = {_profile_of(layer) for layer in layers} | {0}
    return [fault for name, found in serving.items() for fault in _faults_of(name, found, profiles, nodes)]


def judged_types(layers: Sequence[Any], nodes: Mapping[str, NodeTypes]) -> int:
    """Of how many plugin layers the inspector says in which float type they write."""
    plugins = [layer for layer in layers if _is(layer, _PLUGINS) and _nodes_of(layer) & nodes.keys()]
    return sum(_type_of(layer, "Outputs") is not None for layer in plugins)


def type_faults(name: str, got: tuple[str | None, str | None], needed: NodeTypes) -> list[str]:
    """Where the float types that a plugin reads and writes differ from its node's; what is None is not judged."""
    pairs = zip(("reads", "writes"), got, needed, strict=True)
    return [
        f"{name}: its plugin {does} {is_type}, needed {wanted} as in the graph"
        for does, is_type, wanted in pairs
        if None not in (is_type, wanted) and is_type != wanted
    ]


def _faults_of(
    name: str, layers: Sequence[Mapping[str, Any]], profiles: set[int], nodes: Mapping[str, NodeTypes]
) -> list[str]:
    plugins = [layer for layer in layers if _is(layer, _PLUGINS)]
    fallback = next((layer for layer in layers if not _is(layer, _PLUGINS)), None)
    if fallback is not None:
        return [f"{name}: got {fallback['Name']!r} of the type {fallback['LayerType']}, needed a plugin layer alone"]
    lacking = profiles - set(map(_profile_of, plugins))
    if lacking:
        return [f"{name}: got no layer in profile {min(lacking)}, needed a plugin layer"]
    others = {other for layer in plugins for other in _nodes_of(layer) & nodes.keys() if other != name}
    if others:
        return [f"{name}: its plugin layer also runs {min(others)}, needed one of its own"]
    profile, times = Counter(map(_profile_of, plugins)).most_common(1)[0]
    if times > 1:
        return [f"{name}: got {times} plugin layers in profile {profile}, needed one"]
    return [
        fault
        for layer in plugins
        for fault in type_faults(name, (_type_of(layer, "Inputs"), _type_of(layer, "Outputs")), nodes[name])
    ]


def _nodes_of(layer: Mapping[str, Any]) -> set[str]:
    """The nodes of the graph that a layer runs."""
    noted = set(_NOTED.findall(layer.get("Metadata") or ""))
    return noted or set(_FUSED.split(_PROFILE.sub("", layer["Name"])))


def _profile_of(layer: Mapping[str, Any]) -> int:
    found = _PROFILE.search(layer["Name"])
    return int(found[1]) if found else 0


def _is(layer: Mapping[str, Any], kinds: Sequence[str]) -> bool:
    return any(kind in layer.get("LayerType", "").lower() for kind in kinds)


def _type_of(layer: Mapping[str, Any], side: str) -> str | None:
    """The float type of a layer's first input or output; None if it is none, or not told."""
    tensors = layer.get(side) or [{}]
    return float_type(tensors[0].get("Format/Datatype", ""))
