"""A model run in slices computes what it computes whole, and holds the weights of one slice at a time."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from lrq_export.errors import MissingError
from lrq_export.verify.array_file import ArrayFile
from lrq_export.verify.sliced import SlicedModel, cut

TEXT = """
<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
mlp (float[samples, 8] x, float[8, 8] fed) => (float[samples, 8] hidden, float[samples, 8] y)
{
    shape = Shape(x)
    first = MatMul(x, w0)
    hidden = Relu(first)
    second = MatMul(hidden, w1)
    third = own.Twice(second)
    skip = Add(third, first)
    flat = MatMul(skip, fed)
    y = Reshape(flat, shape)
}
<domain: "own", opset_import: ["" : 21]>
Twice (a) => (b) { b = Add(a, a) }
"""
WEIGHT_BYTES = 8 * 8 * 4


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    model = parser.parse_model(TEXT)
    for name in ("w0", "w1"):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((8, 8), np.float32), name))
    return model


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    fed = rng.standard_normal((8, 8), np.float32)
    return [{"x": rng.standard_normal((samples, 8), np.float32), "fed": fed} for samples in (2, 5)]


def run(model, inputs, limit, **options):
    sliced = SlicedModel(model, limit=limit, **options)
    return sliced, {(case, name): array for case, name, array in sliced.run([case.__getitem__ for case in inputs])}


@pytest.mark.parametrize(
    ("lazily", "limit", "slices"),
    [(True, 1, 3), (True, 2 * WEIGHT_BYTES, 2), (True, 1 << 30, 1), (False, 1, 2), (False, 2 * WEIGHT_BYTES, 1)],
)
def test_slices_compute_what_the_whole_computes(model, inputs, lazily, limit, slices):
    inputs[1]["fed"] = inputs[0]["fed"]
    whole = onnxruntime.InferenceSession(model.SerializeToString())
    sliced, got = run(model, inputs, limit, weights={"fed": lambda: inputs[0]["fed"]} if lazily else {})
    assert len(sliced.slices) == slices
    for case, given in enumerate(inputs):
        for name, wanted in zip(("hidden", "y"), whole.run(None, given), strict=True):
            np.testing.assert_allclose(got[case, name], wanted, rtol=1e-5, atol=1e-5)


def test_another_weight_gives_another_answer(model, inputs):
    _, right = run(model, inputs, 1)
    wrong = numpy_helper.to_array(model.graph.initializer[1]).copy()
    wrong[3, 3] += 1
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(wrong, "w1"))
    _, got = run(model, inputs, 1)
    assert np.array_equal(got[0, "hidden"], right[0, "hidden"])
    assert not np.allclose(got[0, "y"], right[0, "y"])


def test_a_weight_is_made_once_for_all_cases_and_only_for_its_slice(model, inputs):
    made, seen = [], []

    def make():
        made.append("fed")
        return inputs[0]["fed"]

    sliced = SlicedModel(model, weights={"fed": make}, limit=1)
    for case, name, _ in sliced.run([{"x": each["x"]}.__getitem__ for each in inputs]):
        seen.append((case, name, len(made)))
    assert seen == [(0, "hidden", 0), (1, "hidden", 0), (0, "y", 1), (1, "y", 1)]


def test_no_slice_holds_more_than_the_limit_but_for_a_single_node(model):
    sizes = {"w0": 3, "w1": 4, "fed": 9}
    for limit in range(1, 20):
        runs = list(cut(model.graph, sizes, limit))
        assert [node for nodes in runs for node in nodes] == list(model.graph.node)
        for nodes in runs:
            held = {name for node in nodes for name in node.input if name in sizes}
            assert sum(sizes[name] for name in held) <= limit or len(held) == 1


def test_external_weights_are_read_from_their_folder(model, inputs, tmp_path):
    _, wanted = run(model, inputs, 1)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    _, got = run(bare, inputs, 1, folder=tmp_path)
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


def test_arrays_lie_in_a_file_without_a_name():
    before = set(Path(tempfile.gettempdir()).iterdir())
    arrays = ArrayFile()
    arrays["a/b"] = np.arange(6).reshape(2, 3)
    arrays["c"] = np.zeros(2)
    arrays["none"] = np.zeros((0, 4), np.float32)
    arrays["number"] = np.array(7)
    arrays["c"] = np.ones(3, np.float32).T[::2]
    assert set(Path(tempfile.gettempdir()).iterdir()) - before == set()
    assert list(arrays) == ["a/b", "c", "none", "number"]
    assert len(arrays) == 4
    assert arrays["a/b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["c"].dtype == np.float32
    assert arrays["c"].tolist() == [1, 1]
    assert arrays["none"].shape == (0, 4)
    assert arrays["number"] == 7
    with pytest.raises(KeyError):
        arrays["d"]


def test_a_full_disk_says_so(file_size_limit):
    arrays = ArrayFile()
    with file_size_limit(100), pytest.raises(MissingError, match="needed at least 4000 bytes"):
        arrays["a"] = np.zeros(1000, np.float32)
    arrays["a"] = np.zeros(3, np.float32)
    assert arrays["a"].tolist() == [0, 0, 0]
