"""A quantized model whose activations are in half precision, every tensor rounded, beside the same in float32."""

import onnx
import pytest
from rounded_run import run_rounded

from graphs.passes import half_precision
from lrq_export.bind import write_portable
from lrq_export.engine.tensorrt import lower
from lrq_export.package import QUANTIZED, load_manifest
from lrq_export.quantized import QuantizedFile
from lrq_export.runtime import feeds
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.verify.against import _subject
from lrq_export.verify.metrics import nmse

# 4.6e-5 and 1.2e-4 were measured. Most of it are codes of activations that a rounding sends to the other side, which
# the demo, wider and trained, averages out: 5.6e-7 and 1.2e-5 there (docs/engines.md).
BOUND = {"float16": 1e-4, "bfloat16": 1e-3}


@pytest.fixture(scope="module")
def subject(package):
    return _subject(package, load_manifest(package), None, 3)


@pytest.fixture(scope="module")
def answer(package, subject, tmp_path_factory):
    def run(activations):
        path = tmp_path_factory.mktemp("model") / "model.onnx"
        write_portable(lower(rewritten_graph(package), False, activations), QuantizedFile(package / QUANTIZED), path)
        return run_rounded(onnx.load(path), feeds(subject.specs, subject.cases[0]))["sample"]

    return run


@pytest.fixture(scope="module")
def expected(answer):
    return answer("float32")


@pytest.mark.parametrize("activations", BOUND)
def test_half_precision_moves_the_output_by_little(answer, expected, activations):
    assert 0 < nmse(answer(activations), expected) < BOUND[activations]


def test_sinusoids_of_rounded_angles_would_be_seen(answer, expected, monkeypatch):
    """Of timesteps and positions: float16 knows an angle near 900 to a half."""
    monkeypatch.setattr(half_precision._Lowering, "_is_reached", lambda self, node: node.op != "Range")
    monkeypatch.setattr(half_precision, "is_standard", lambda node, *ops: ops[0] != "Sin" and node.op in ops)
    assert nmse(answer("float16"), expected) > 2 * BOUND["float16"]
