"""The lrq dialect: what every op means. One op per file; a new op is a file and a line in `OPS`.

Bodies are attached when a model is saved, never while passes run: optimizers inline a function that they can see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx.defs
import onnx.inliner

from graphs import names
from graphs.ops.codebook_dequant import CODEBOOK_DEQUANT
from graphs.ops.codebook_linear import CODEBOOK_LINEAR
from graphs.ops.codebook_linear_residual import CODEBOOK_LINEAR_RESIDUAL
from graphs.ops.geglu_rotate import GEGLU_ROTATE
from graphs.ops.gelu_rotate import GELU_ROTATE
from graphs.ops.gelu_tanh_rotate import GELU_TANH_ROTATE
from graphs.ops.hadamard_rotate import HADAMARD_ROTATE
from graphs.ops.int8_dequant import INT8_DEQUANT
from graphs.ops.int8_linear import INT8_LINEAR
from graphs.ops.int8_linear_residual import INT8_LINEAR_RESIDUAL
from graphs.ops.layer_norm_rotate import LAYER_NORM_ROTATE
from graphs.ops.rms_norm_rotate import RMS_NORM_ROTATE
from graphs.ops.silu_rotate import SILU_ROTATE
from graphs.ops.spec import OpSpec
from graphs.ops.twin_log_dequant import TWIN_LOG_DEQUANT
from graphs.ops.twin_log_linear import TWIN_LOG_LINEAR
from graphs.ops.twin_log_linear_residual import TWIN_LOG_LINEAR_RESIDUAL

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        HADAMARD_ROTATE,
        LAYER_NORM_ROTATE,
        RMS_NORM_ROTATE,
        GELU_ROTATE,
        GELU_TANH_ROTATE,
        SILU_ROTATE,
        GEGLU_ROTATE,
        TWIN_LOG_DEQUANT,
        CODEBOOK_DEQUANT,
        INT8_DEQUANT,
        TWIN_LOG_LINEAR,
        CODEBOOK_LINEAR,
        INT8_LINEAR,
        TWIN_LOG_LINEAR_RESIDUAL,
        CODEBOOK_LINEAR_RESIDUAL,
        INT8_LINEAR_RESIDUAL,
    )
}


def register() -> None:
    """Make the schemas known to ONNX (checker, shape inference, exporter). Calling it again does nothing."""
    for spec in OPS.values():
        if not onnx.defs.has(spec.name, names.OPSET, names.DOMAIN):
            onnx.defs.register_schema(spec.schema())


def attach_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model, in place, the bodies of exactly the lrq ops that it uses, and the opsets these need.

    Raises ValueError for an lrq node that is unknown, has wrong attributes or computes what its body does not, and for
    a model of an older ONNX opset than the bodies are written in.
    """
    used = set()
    for node in lrq_nodes(model.graph.node):
        if node.op_type not in OPS:
            raise ValueError(f"node {node.name!r}: no op {node.op_type!r} in the dialect; it has {', '.join(OPS)}")
        spec = OPS[node.op_type]
        problem = spec.body_valid(spec.attributes_of(node))
        if problem:
            raise ValueError(f"node {node.name!r} ({node.op_type}): {problem}")
        used.add(node.op_type)
    detach_bodies(model)
    if not used:
        return model
    model.functions.extend(spec.function() for name, spec in OPS.items() if name in used)
    _import_opsets(model)
    model.ir_version = names.IR_VERSION
    return model


def inline_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in standard ops alone, each lrq node replaced by its body: for parsers that import no body twice.

    Raises ValueError as `attach_bodies` does.
    """
    standard = onnx.ModelProto()
    standard.CopyFrom(model)
    functions = [(names.DOMAIN, op) for op in OPS]
    standard = onnx.inliner.inline_selected_functions(attach_bodies(standard), functions)
    kept = [entry for entry in standard.opset_import if entry.domain != names.DOMAIN]
    del standard.opset_import[:]
    standard.opset_import.extend(kept)
    return standard


def detach_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove, in place, every body of an lrq op; other functions stay."""
    kept = [function for function in model.functions if function.domain != names.DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    return model


def lrq_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Every lrq node among these and in the subgraphs they carry."""
    for node in nodes:
        if node.domain == names.DOMAIN:
            yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from lrq_nodes(graph.node)


def _import_opsets(model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("", names.ONNX_OPSET) < names.ONNX_OPSET:
        raise ValueError(f"the model imports ONNX opset {versions['']}; bodies need {names.ONNX_OPSET} or newer")
    versions.setdefault("", names.ONNX_OPSET)
    versions[names.DOMAIN] = names.OPSET
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in versions.items())
