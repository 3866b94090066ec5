"""Rewrites of a `TracedGraph`, one a file. A pass edits the graph in place and reports fires and near misses."""

from collections.abc import Callable

from graphs.passes.bind_plugins import bind_plugins
from graphs.passes.fold_rotation_into_producer import fold_rotation_into_producer
from graphs.passes.fold_rotation_into_value import fold_rotation_into_value
from graphs.passes.make_linear import make_linear
from graphs.passes.merge_projections import merge_projections
from graphs.passes.result import PassResult
from graphs.passes.share_rotation import share_rotation
from graphs.traced import TracedGraph

Pass = Callable[[TracedGraph], PassResult]

PIPELINE: tuple[Pass, ...] = (
    share_rotation,
    fold_rotation_into_producer,
    fold_rotation_into_value,
    make_linear,
    merge_projections,
    bind_plugins,
)
