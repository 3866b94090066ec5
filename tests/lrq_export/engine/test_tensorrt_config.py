"""What the builder is told of a recipe's options, with polygraphy's own CreateConfig watched; no library is needed."""

from types import SimpleNamespace

import pytest

from lrq_export.engine import tensorrt_worker
from lrq_export.engine.built import RTX, TENSORRT
from lrq_export.recipe import Engine

TRT = SimpleNamespace(
    ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
    HardwareCompatibilityLevel=SimpleNamespace(NONE="none", AMPERE_PLUS="ampere", SAME_COMPUTE_CAPABILITY="same"),
    BuilderFlag=SimpleNamespace(REFIT_IDENTICAL="refit"),
    ComputeCapability=SimpleNamespace(SM86="sm 86", SM120="sm 120"),
)


@pytest.fixture
def told(monkeypatch):
    """The keyword arguments of CreateConfig, the flags that are set and the compute capabilities, of some settings."""
    polygraphy_trt = pytest.importorskip("polygraphy.backend.trt", reason="needs polygraphy, of the extra rtx")

    def tell(target, **settings):
        flags, capabilities, given = [], [], {}
        config = SimpleNamespace(
            set_flag=flags.append, set_compute_capability=lambda each, index: capabilities.insert(index, each)
        )

        def create(**options):
            given.update(options)
            return lambda builder, network: config

        monkeypatch.setattr(polygraphy_trt, "CreateConfig", create)
        job = {
            "target": target,
            "profiles": [],
            "timing_cache": "timing.cache",
            "options": Engine(**settings).model_dump(),
        }
        assert tensorrt_worker._config(TRT, None, None, job) is config
        return given, flags, capabilities

    return tell


@pytest.mark.parametrize(("target", "inspected"), [(TENSORRT, {"layers": 3}), (RTX, None)])
def test_an_engine_is_built_of_a_strongly_typed_network_and_inspected(monkeypatch, tmp_path, target, inspected):
    """TensorRT-RTX opens no engine without a GPU."""
    polygraphy_trt = pytest.importorskip("polygraphy.backend.trt", reason="needs polygraphy, of the extra rtx")
    library = SimpleNamespace(__version__="11.4", LayerType=SimpleNamespace(PLUGIN_V3="plugin"))
    parsed, seen = [], []

    def network_from_onnx_path(path, **options):
        parsed.append((path, options))
        return "builder", SimpleNamespace(num_layers=0, get_layer=None), "parser"

    def inspect(trt, file, nodes, listed):
        seen.append((trt, file.read_bytes(), nodes, listed.name))
        return {"layers": 3}

    monkeypatch.setattr(polygraphy_trt, "network_from_onnx_path", network_from_onnx_path)
    monkeypatch.setattr(polygraphy_trt, "engine_bytes_from_network", lambda *_, **__: b"plan")
    for name, fake in {"_library": lambda target: library, "_config": lambda *_: None, "_inspect": inspect}.items():
        monkeypatch.setattr(tensorrt_worker, name, fake)
    job = {
        "target": target, "plugins": None, "model": "model.onnx", "plugin_nodes": {}, "timing_cache": None,
        "engine": str(tmp_path / "model.plan"), "layers": str(tmp_path / "layers.json"),
    }  # fmt: skip
    answer = tensorrt_worker.run(job)
    assert parsed == [("model.onnx", {"strongly_typed": True})]
    assert (answer["engine_bytes"], answer["inspected"]) == (4, inspected)
    assert seen == ([(library, b"plan", {}, "layers.json")] if inspected else [])


def test_by_default_nothing_is_asked_for(told):
    given, flags, _ = told(TENSORRT)
    assert (given["hardware_compatibility_level"], given["load_timing_cache"]) == ("none", "timing.cache")
    assert (given["weight_streaming"], given["strip_plan"], flags) == (False, False, [])
    assert given["profiling_verbosity"] == "detailed"  # names of layers, for the inspector and for profiles


@pytest.mark.parametrize(("hardware", "level"), [("ampere_plus", "ampere"), ("same_compute_capability", "same")])
def test_hardware_is_a_level_of_compatibility(told, hardware, level):
    assert told(TENSORRT, hardware=hardware)[0]["hardware_compatibility_level"] == level


@pytest.mark.parametrize("target", [TENSORRT, RTX])
def test_what_is_refitted_or_stripped_can_be_refitted(told, target):
    assert told(target, refit=True)[1] == ["refit"]
    given, flags, _ = told(target, strip=True)
    assert (given["strip_plan"], flags) == (True, ["refit"])
    assert told(target, weight_streaming=True)[0]["weight_streaming"] is True
    assert told(target, optimization=5)[0]["builder_optimization_level"] == 5


def test_rtx_builds_for_the_capabilities_that_are_named(told):
    assert told(RTX, compute_capabilities=("86", "120"))[2] == ["sm 86", "sm 120"]
    assert "load_timing_cache" not in told(RTX)[0]
