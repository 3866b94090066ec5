"""Rewrites of a `TracedGraph`, one a file. A pass edits the graph in place and reports fires and near misses."""

from collections.abc import Callable

from graphs.passes.bind_plugins import bind_plugins
from graphs.passes.cancel_rotations import cancel_rotations
from graphs.passes.commute_rotation import commute_rotation
from graphs.passes.constant_fold import constant_fold
from graphs.passes.dead_code import dead_code
from graphs.passes.fold_rotation_into_producer import fold_rotation_into_producer
from graphs.passes.fold_smoothing import fold_smoothing
from graphs.passes.fuse_activation import fuse_activation
from graphs.passes.fuse_epilogue import fuse_epilogue
from graphs.passes.fuse_modulated_norm import fuse_modulated_norm
from graphs.passes.half_precision import to_bfloat16, to_float16
from graphs.passes.make_linear import make_linear
from graphs.passes.merge_projections import merge_projections
from graphs.passes.prepack import prepack
from graphs.passes.result import PassResult
from graphs.passes.retype_codes import retype_codes
from graphs.passes.share_rotation import share_rotation
from graphs.passes.target_onnxruntime_trt import target_onnxruntime_trt
from graphs.traced import TracedGraph

Pass = Callable[[TracedGraph], PassResult]

PIPELINE: tuple[Pass, ...] = (
    constant_fold,
    dead_code,
    cancel_rotations,
    commute_rotation,
    share_rotation,
    fold_rotation_into_producer,
    fold_smoothing,
    make_linear,
    merge_projections,
    fuse_modulated_norm,
    fuse_activation,
    fuse_epilogue,
    retype_codes,
    bind_plugins,
)

# What a target runs after the pipeline, on a copy: other targets go on from the graph of the pipeline.
TARGETS: dict[str, tuple[Pass, ...]] = {
    "onnxruntime": (),
    "tensorrt": (prepack,),
    "onnxruntime-trt": (prepack, target_onnxruntime_trt),
}

# What comes before these where the activations of a target of TensorRT are to be of another type than float32.
ACTIVATIONS: dict[str, tuple[Pass, ...]] = {"float32": (), "float16": (to_float16,), "bfloat16": (to_bfloat16,)}


def target_passes(target: str, activations: str) -> tuple[Pass, ...]:
    """All that a target runs after the pipeline. ONNX Runtime's own engine keeps float32, as CPUs compute."""
    return TARGETS[target] if target == "onnxruntime" else (*ACTIVATIONS[activations], *TARGETS[target])
