"""What only TensorRT on a GPU shows: `build --target tensorrt`, its plans, and what serves them. Not yet run.

With the plugins if they are compiled (`lrq-export plugins build`, or LRQ_PLUGINS); from standard ops in any case.
"""

from __future__ import annotations

import json
import os
import threading
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from graphs import names
from lrq_export.engine.built import FOLDERS, TENSORRT
from lrq_export.engine.targets import add_engines
from lrq_export.loading import load
from lrq_export.plugins import find_library
from lrq_export.runtime import feeds, tensors
from lrq_export.verify.against import compare
from lrq_export.verify.metrics import nmse
from lrq_export.verify.reference import Reference

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(find_spec("tensorrt") is None, reason="needs TensorRT: pip install tensorrt-cu13"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PROFILES = ("samples=1:1:1", "samples=2:2:4 height=8:8:16 width=8:8:16")
PLUGINS = pytest.mark.parametrize("plugins", ["always", "never"])
FREE = 1e-4  # of two correct implementations that run freely (docs/graph.md)
PROVIDER = "TensorrtExecutionProvider"


@pytest.fixture
def with_engine(package, copy_of):
    """Builds an engine with these settings into a copy of the package; returns its folder."""
    made = []

    def build(**settings):
        if settings.get("plugins") == "always" and find_library() is None:
            pytest.skip("needs the compiled plugins: lrq-export plugins build")
        folder = copy_of(package, f"package-{len(made)}")
        made.append(folder)
        assert add_engines(folder, [TENSORRT], changes={"profiles": PROFILES} | settings) == []
        return folder

    return build


def facts(folder):
    return json.loads((folder / FOLDERS[TENSORRT] / "build.json").read_text())


def recorded(folder, samples):
    return {name: tensor[:samples] for name, tensor in Reference.load(folder).inputs.items()}


def expected(folder, inputs):
    """What ONNX Runtime's own engine answers."""
    with load(folder, target="onnxruntime") as transformer:
        return transformer.run(tensors(transformer.specs, inputs)).cpu().numpy()


def answer(transformer, inputs):
    return transformer.run(tensors(transformer.specs, inputs, transformer.device)).cpu().numpy()


@PLUGINS
def test_a_plan_answers_as_onnx_runtime_does(with_engine, plugins):
    folder = with_engine(plugins=plugins)
    with load(folder) as transformer:
        assert (transformer.target, transformer.device.type) == (TENSORRT, "cuda")
        for samples in (3, 1, 3):  # both profiles, and a bucket that is there already
            inputs = recorded(folder, samples)
            right = expected(folder, inputs)
            for _ in range(3):  # made ready, then replayed as a CUDA graph
                assert nmse(answer(transformer, inputs), right) < FREE
        assert nmse(answer(transformer, recorded(folder, 3)), right[::-1]) > 10 * FREE


@PLUGINS
def test_threads_get_their_own_answers(with_engine, plugins):
    folder = with_engine(plugins=plugins)
    inputs = [recorded(folder, samples) for samples in (1, 2, 3, 4)]
    got = [None] * 4
    with load(folder, target=TENSORRT) as transformer:

        def call(index):
            with torch.cuda.stream(torch.cuda.Stream()):
                got[index] = [answer(transformer, inputs[index]) for _ in range(10)]

        threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, answers in enumerate(got):
        right = expected(folder, inputs[index])
        assert all(nmse(each, right) < FREE for each in answers)


@PLUGINS
def test_the_drop_in_takes_and_returns_tensors_of_the_gpu(with_engine, plugins):
    folder = with_engine(plugins=plugins)
    inputs = {name: tensor.cuda() for name, tensor in recorded(folder, 2).items()}
    mask = inputs.pop("encoder_attention_mask", None)
    with load(folder, target=TENSORRT) as transformer:
        arguments = {name: tensor for name, tensor in inputs.items() if "." not in name}
        sample = transformer(**arguments, encoder_attention_mask=mask).sample
        assert sample.is_cuda
        assert nmse(sample.cpu().numpy(), expected(folder, recorded(folder, 2))) < FREE


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
@PLUGINS
def test_rungs_hold_in_every_type(with_engine, plugins, activations):
    findings = compare(with_engine(plugins=plugins, activations=activations), TENSORRT)
    assert findings.not_run is None
    assert {"T4", "T5"} <= {rung.rung for rung in findings.rungs}
    assert findings.broken == []


@PLUGINS
def test_a_changed_weight_breaks_the_rungs_and_is_found(with_engine, reseal, tmp_path, plugins):
    """The twin that must fail."""
    folder = with_engine(plugins=plugins)
    path = folder / FOLDERS[TENSORRT] / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    bias = next(
        each for each in model.graph.initializer if "ff.net.0" in each.name and each.name.endswith(("bias", "scale"))
    )
    values = onnx.numpy_helper.to_array(bias, str(path.parent)) + np.float32(0.5)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    path.write_bytes(model.SerializeToString())
    reseal(folder)
    findings = compare(folder, TENSORRT, replay=tmp_path / "replay")
    assert {"T1", "T4"} <= {rung.rung for rung in findings.broken}
    assert findings.bisection.divergence is not None
    assert (" --trt " in findings.bisection.command) == (plugins == "always")  # else T2 has broken first, on the CPU


def test_the_inspector_lists_one_plugin_a_node(with_engine):
    """The build has held the layers to the graph already; here: that it could see their types at all."""
    folder = with_engine(plugins="always", profiles=("samples=2:2:2",))
    place = folder / FOLDERS[TENSORRT]
    layers = json.loads((place / "layers.json").read_text())["Layers"]
    told = facts(folder)
    nodes = [node for node in onnx.load(place / "model.onnx").graph.node if node.domain == names.DOMAIN]
    assert told["plugin_layers"] == len(nodes) > 10
    assert told["inspected"]["layers"] == len(layers)
    assert told["inspected"]["plugin_layers_of_told_type"] > 0


@PLUGINS
def test_layers_are_timed_by_their_names(with_engine, cli, plugins):
    folder = with_engine(plugins=plugins)
    outcome = cli("bench", folder, "--layers", "--runs", 3, "--batch", 1, "--json")
    assert outcome.code == 0, outcome.err
    rows = [row for line in outcome.out.splitlines() if (row := json.loads(line)).get("target") == TENSORRT]
    layers = [row["layer"] for row in rows if row["event"] == "layer"]
    assert plugins == "never" or any("transformer_blocks.1" in layer for layer in layers)  # TensorRT names its fusions
    assert len(layers) > 10


def test_layers_have_names_in_a_profile(with_engine):
    """NVTX ranges, which TensorRT itself pushes: a context tells names, if not all that the plan knows."""
    import tensorrt

    folder = with_engine()
    with load(folder, target=TENSORRT) as transformer:
        answer(transformer, recorded(folder, 2))
        (bucket,) = transformer._runner._buckets.values()
        assert bucket.context.nvtx_verbosity == tensorrt.ProfilingVerbosity.LAYER_NAMES_ONLY


OPTIONS = {  # and what of an engine says that it has it
    "hardware": ("ampere_plus", lambda engine: engine.hardware_compatibility_level.name == "AMPERE_PLUS"),
    "weight_streaming": (True, lambda engine: engine.streamable_weights_size > 0),
    "refit": (True, lambda engine: engine.refittable),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_builder_give_plans_that_answer(with_engine, name):
    value, has = OPTIONS[name]
    plain, folder = with_engine(), with_engine(**{name: value})
    inputs = recorded(folder, 2)
    with load(plain, target=TENSORRT) as transformer:
        assert not has(transformer._runner._engine)
    with load(folder, target=TENSORRT) as transformer:
        assert has(transformer._runner._engine)
        assert nmse(answer(transformer, inputs), expected(folder, inputs)) < FREE


def test_a_stripped_plan_is_smaller_and_refused(with_engine, cli):
    whole, stripped = with_engine(), with_engine(strip=True)
    assert facts(stripped)["engine_bytes"] < facts(whole)["engine_bytes"]
    cli("verify", stripped, "--against", TENSORRT).refused(4, "no weights")


def test_the_timing_cache_stays_for_the_next_build(with_engine):
    """That it is read, test_tensorrt_config.py says of what the builder is told."""
    folder = with_engine()
    cache = folder / FOLDERS[TENSORRT] / "timing.cache"
    size = cache.stat().st_size
    assert add_engines(folder, [TENSORRT], changes={"refit": True}) == []
    assert cache.stat().st_size >= size > 0


def provider(**options):
    """ONNX Runtime's TensorRT provider; skips where this build has none, or none that takes this TensorRT."""
    import onnxruntime
    import tensorrt

    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("needs ONNX Runtime with its TensorRT provider: pip install onnxruntime-gpu")
    if not tensorrt.__version__.startswith("10."):
        pytest.skip(f"ONNX Runtime's provider links libnvinfer 10, TensorRT here is {tensorrt.__version__}")
    return [(PROVIDER, options)]


def registered():
    """The provider's option that has it open plugins that register themselves; skips where they are not named."""
    library = os.environ.get("LRQ_SELF_REGISTERING_PLUGINS")
    if library is None:
        pytest.skip("needs LRQ_SELF_REGISTERING_PLUGINS, the path of liblrq_plugins_trt10.so")
    return {"trt_extra_plugin_lib_paths": library}


def session_answer(path, providers, folder, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=providers)
    assert session.get_providers()[0] == PROVIDER
    with load(folder, target="onnxruntime") as transformer:
        return session.run(None, feeds(transformer.specs, inputs))[0]


@PLUGINS
def test_onnx_runtime_serves_the_plan(with_engine, plugins):
    providers = provider(**registered()) if plugins == "always" else provider()
    folder = with_engine(plugins=plugins, profiles=("samples=2:2:4",))
    inputs = recorded(folder, 2)
    got = session_answer(folder / FOLDERS[TENSORRT] / "model_ctx.onnx", providers, folder, inputs)
    assert nmse(got, expected(folder, inputs)) < FREE


def test_onnx_runtime_builds_the_network_with_plugins(with_engine):
    providers = provider(**registered())
    folder = with_engine(plugins="always")
    inputs = recorded(folder, 2)
    got = session_answer(folder / FOLDERS[TENSORRT] / "model_trt_plugins.onnx", providers, folder, inputs)
    assert nmse(got, expected(folder, inputs)) < FREE


def test_samples_are_drawn_with_the_plan(with_engine, package, cli, tmp_path):
    """`sample` takes the engine for the GPU; a package without one draws nearly the same."""
    folder, drawn = with_engine(profiles=("samples=1:4:8",)), {}
    for name, place, seed in (("gpu", folder, 1), ("cpu", package, 1), ("other", package, 2)):
        path = tmp_path / f"{name}.safetensors"
        outcome = cli("sample", place, "--steps", 4, "--images", 2, "--seed", seed, "-o", path)
        assert outcome.code == 0, outcome.err
        drawn[name] = load_file(path)["samples"].numpy()
    assert nmse(drawn["gpu"], drawn["cpu"]) < 1e-2 < nmse(drawn["other"], drawn["cpu"])
