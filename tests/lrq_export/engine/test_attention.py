"""Attention in the ONNX Runtime engine: fused where nothing masks it, and the same function."""

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch

from graphs.float_model import float_model, weight_names
from lrq_export.engine.attention import CONTRIB, fuse_attention, match_attention
from lrq_export.evaluate import evaluate
from lrq_export.runtime import feeds
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.source import open_source
from lrq_export.verify.metrics import nmse


@pytest.fixture
def traced(package):
    return rewritten_graph(package)


def answer(traced, tiny, tokens=(8, 12)):
    """The denoised sample of the graph in floating point, with half of the text masked."""
    source, generator = open_source(tiny.source), torch.Generator().manual_seed(0)
    mask = torch.ones(3, 7)
    mask[1:, 3:] = 0
    inputs = {
        "hidden_states": torch.randn(3, 1, *tokens, generator=generator),
        "encoder_hidden_states": torch.randn(3, 7, 16, generator=generator),
        "timestep": torch.tensor([10.0, 500.0, 900.0]),
        "encoder_attention_mask": mask,
    }
    model = float_model(traced)
    model.opset_import.add(domain=CONTRIB, version=1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    weights = {name: evaluate(each, source.checkpoint.read).numpy() for name, each in weight_names(traced).items()}
    return session.run(None, feeds(source.family.inputs(source.config), inputs) | weights)[0]


def fused(traced, edit=lambda attention: None):
    copy = traced.copy()
    fuse_attention(copy.graph)
    for node in copy.graph.nodes:
        if node.op == "MultiHeadAttention":
            edit(node)
    copy.forget_unused()
    return copy


def test_self_attention_is_fused_and_masked_attention_is_not(traced):
    blocks = sum(node.op == "Softmax" for node in traced.graph.nodes) // 2
    result = fused(traced)
    ops = [node.op for node in result.graph.nodes]
    assert ops.count("MultiHeadAttention") == ops.count("Softmax") == blocks == 2
    for softmax in (node for node in result.graph.nodes if node.op == "Softmax"):
        assert softmax.inputs[0].inputs[0].op == "Add"
    (node, *_) = (node for node in result.graph.nodes if node.op == "MultiHeadAttention")
    assert node.attrs["num_heads"] == 2
    assert node.attrs["scale"] == pytest.approx(12**-0.5)


def test_the_fused_graph_computes_the_same(traced, tiny):
    assert nmse(answer(fused(traced), tiny), answer(traced, tiny)) <= 1e-11


@pytest.mark.parametrize("attribute", ["num_heads", "scale"])
def test_another_head_count_or_scale_does_not(traced, tiny, attribute):
    wrong = fused(traced, lambda node: node.attrs.update({attribute: node.attrs[attribute] * 2}))
    assert nmse(answer(wrong, tiny), answer(traced, tiny)) > 1e-6


def first_softmax(traced):
    return next(node for node in traced.graph.nodes if node.op == "Softmax")


def test_what_is_not_the_exporter_s_attention_stays(traced):
    softmax = first_softmax(traced)
    assert match_attention(softmax, traced.graph) is not None
    for spoil in (
        other_heads_for_the_value,
        swap_the_output_s_axes,
        read_the_scores_twice,
        softmax_over_the_queries,
        no_split_of_the_value,
    ):
        copy = traced.copy()
        spoil(first_softmax(copy), copy.graph)
        assert match_attention(first_softmax(copy), copy.graph) is None, spoil.__name__


def other_heads_for_the_value(softmax, graph):
    split = softmax.outputs[0].outputs[0].inputs[1].inputs[0].inputs[0].inputs[0]
    shape = split.inputs[1].inputs[0]
    extents = list(shape.inputs)
    extents[2] = gs.Constant("other_heads", np.array([3]))
    other = gs.Variable("other_shape", np.int64)
    graph.nodes.append(gs.Node("Concat", "other", {"axis": 0}, extents, [other]))
    split.inputs[1] = other


def swap_the_output_s_axes(softmax, graph):
    softmax.outputs[0].outputs[0].outputs[0].outputs[0].attrs["perm"] = [0, 1, 2, 3]


def read_the_scores_twice(softmax, graph):
    graph.nodes.append(gs.Node("Abs", inputs=[softmax.outputs[0]], outputs=[gs.Variable("more", np.float32)]))


def softmax_over_the_queries(softmax, graph):
    softmax.attrs["axis"] = 2


def no_split_of_the_value(softmax, graph):
    mixed = softmax.outputs[0].outputs[0]
    mixed.inputs[1] = gs.Constant("value", np.ones((1, 2, 6, 12), np.float32))
