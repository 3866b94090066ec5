"""What an engine's inspector may say: answers as TensorRT writes them, and each fault of them by its name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrq_export.engine import tensorrt_worker
from lrq_export.engine.plan_layers import NodeTypes, judged_types, layer_faults
from lrq_export.engine.tensorrt_worker import CannotBuild

QKV, NORM, WEIGHT = "blocks.0.to_q+to_k+to_v", "blocks.0.norm", "blocks.0.proj"
NODES = {
    QKV: NodeTypes("float16", "float16"),
    NORM: NodeTypes("float16", "float16"),
    WEIGHT: NodeTypes(None, "float16"),  # codes in, a weight out
}
FREE = "N/A due to dynamic shapes"


def layer(name, kind, reads=FREE, writes=FREE, nodes=()):
    return {
        "Name": name, "LayerType": kind, "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
        "Inputs": [{"Name": "in", "Location": "Device", "Dimensions": [-1, 64], "Format/Datatype": reads}],
        "Outputs": [{"Name": "out", "Location": "Device", "Dimensions": [-1, 64], "Format/Datatype": writes}],
    }  # fmt: skip


def told_in_words():
    """Names are all there is of nodes: TensorRT's fusions, copies to other layouts, formats as sentences."""
    half = "Row major linear FP16 format"
    return {
        "copy": layer(f"Reformatting CopyNode for Input Tensor 0 to {QKV}", "Reformat", "Row major linear FP32", half),
        QKV: layer(QKV, "PluginV3", half, half),
        NORM: layer(NORM, "PluginV3", half, half),
        WEIGHT: layer(WEIGHT, "PluginV3", "Row major Int8 format", half),
        "rest": layer("scores + softmax", "CaskGemmMatrixMultiply", half, half),
    }


def told_by_the_compiler():
    """Layers of TensorRT's compiler have names of its own; nodes are in the metadata, free sizes hide the types."""
    return {
        "copy": layer(f"Reformatting CopyNode for Input Tensor 0 to {QKV}", "Reformat", nodes=[QKV]),
        "cast": layer("__mye3812_cast", "cast", "Float", "Half", nodes=[QKV]),
        QKV: layer(QKV, "PluginV3", nodes=[QKV]),
        NORM: layer(NORM, "PluginV3", nodes=[NORM]),
        WEIGHT: layer(WEIGHT, "custom_layer", "Int8", "Half", nodes=[WEIGHT]),
        "rest": layer("__myl_MulAdd_myl3_5", "kgen", nodes=["scores", "softmax"]),
    }


def in_two_profiles():
    """All layers once more, under another name."""
    once = told_by_the_compiler()
    return once | {f"{name} [profile 1]": each | {"Name": f"{each['Name']} [profile 1]"} for name, each in once.items()}


STYLES = pytest.mark.parametrize(("style", "judged"), [(told_in_words, 3), (told_by_the_compiler, 1)])


@STYLES
def test_an_engine_of_one_plugin_layer_for_each_node_is_well(style, judged):
    layers = list(style().values())
    assert layer_faults(layers, NODES) == []
    assert judged_types(layers, NODES) == judged
    assert layer_faults(layers, {}) == []  # without plugins


@STYLES
def test_a_node_without_a_layer_is_named(style, judged):
    layers = style()
    del layers[QKV]  # its copy alone runs nothing
    assert layer_faults(list(layers.values()), NODES) == [f"{QKV}: got no layer in profile 0, needed a plugin layer"]


@pytest.mark.parametrize(
    "fallback",
    [
        layer(QKV, "CaskGemmMatrixMultiply"),
        layer(f"decode + {QKV}", "CaskGemmMatrixMultiply"),
        layer(f"PWN(PWN(decode), {QKV})", "PointWiseV2"),
        layer("__myl_FcAdd_myl3_5", "gemm", nodes=["decode", QKV]),
        layer("{ForeignNode[a...b]}", "Myelin", nodes=[QKV]),
    ],
    ids=lambda each: each["Name"],
)
@STYLES
def test_a_node_that_something_else_runs_is_named_with_it(style, judged, fallback):
    (fault,) = layer_faults(list((style() | {QKV: fallback}).values()), NODES)
    assert fault == f"{QKV}: got {fallback['Name']!r} of the type {fallback['LayerType']}, needed a plugin layer alone"


@STYLES
def test_a_node_that_something_else_runs_beside_its_plugin_is_named(style, judged):
    beside = layer("__myl_FcAdd_myl3_5", "gemm", nodes=[QKV])
    (fault,) = layer_faults([*style().values(), beside], NODES)
    assert fault == f"{QKV}: got '__myl_FcAdd_myl3_5' of the type gemm, needed a plugin layer alone"


def test_a_node_whose_name_is_part_of_another_s_is_not_taken_for_it():
    longer = layer(f"{NORM}.rotated", "PluginV3")
    faults = layer_faults(list((told_in_words() | {NORM: longer}).values()), NODES)
    assert faults == [f"{NORM}: got no layer in profile 0, needed a plugin layer"]


def test_an_engine_of_two_profiles_has_each_plugin_in_both():
    layers = in_two_profiles()
    assert layer_faults(list(layers.values()), NODES) == []
    assert judged_types(list(layers.values()), NODES) == 2


def test_a_profile_without_any_plugin_is_seen_by_its_other_layers():
    layers = in_two_profiles()
    for name in NODES:
        del layers[f"{name} [profile 1]"]
    faults = layer_faults(list(layers.values()), NODES)
    assert faults == [f"{name}: got no layer in profile 1, needed a plugin layer" for name in NODES]


@pytest.mark.parametrize(("profile", "ending"), [(0, ""), (1, " [profile 1]")])
def test_a_node_that_falls_back_in_one_profile_is_named(profile, ending):
    layers = in_two_profiles()
    del layers[f"{QKV}{ending}"]
    (fault,) = layer_faults(list(layers.values()), NODES)
    assert fault == f"{QKV}: got no layer in profile {profile}, needed a plugin layer"
    gemm = layer(f"__myl_Fc_myl3_9{ending}", "gemm", nodes=[QKV])
    (fault,) = layer_faults([*layers.values(), gemm], NODES)
    assert fault == f"{QKV}: got {gemm['Name']!r} of the type gemm, needed a plugin layer alone"


@STYLES
def test_a_node_that_runs_twice_is_named(style, judged):
    layers = list(style().values())
    twin = next(each for each in layers if each["Name"] == NORM)
    assert layer_faults([*layers, twin], NODES) == [f"{NORM}: got 2 plugin layers in profile 0, needed one"]


def test_a_plugin_that_runs_more_than_one_node_is_named_at_both():
    shared = layer("__myl_0", "PluginV3", nodes=[NORM, QKV, "scores"])
    layers = told_in_words() | {NORM: shared}
    del layers[QKV]
    assert layer_faults(list(layers.values()), NODES) == [
        f"{name}: its plugin layer also runs {other}, needed one of its own"
        for name, other in ((QKV, NORM), (NORM, QKV))
    ]


@pytest.mark.parametrize(("reads", "writes"), [("Float", "Half"), ("Half", "Row major linear FP32")])
def test_a_plugin_in_another_type_is_named(reads, writes):
    layers = list((told_in_words() | {NORM: layer(NORM, "PluginV3", reads, writes)}).values())
    does = "reads" if reads == "Float" else "writes"
    assert layer_faults(layers, NODES) == [f"{NORM}: its plugin {does} float32, needed float16 as in the graph"]
    brain = NODES | {NORM: NodeTypes("bfloat16", "bfloat16")}
    assert (
        layer_faults(list((told_in_words() | {NORM: layer(NORM, "PluginV3", "BFloat16", "BF16")}).values()), brain)
        == []
    )


def test_an_engine_that_tells_names_alone_cannot_be_judged():
    (fault,) = layer_faults([QKV, NORM, WEIGHT], NODES)
    assert fault.startswith(f"{QKV}: got the layer's name alone")


class Runtime:
    """Knows some plans, and may be told nothing: by default NVIDIA's runs no code that a plan brings along."""

    __slots__ = ("plans",)

    def __init__(self, plans):
        self.plans = plans

    def deserialize_cuda_engine(self, plan):
        return self.plans.get(plan)


def nvidia_library(plans, **more):
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    made = {"Logger": logger, "Runtime": lambda logger: Runtime(plans)}
    return SimpleNamespace(__name__="tensorrt", __version__="10.16", **made, **more)


def test_a_plan_is_opened_without_the_right_to_run_code_of_its_own():
    library = nvidia_library({b"known": "engine"})
    runtime, engine = tensorrt_worker._deserialized(library, b"known")
    assert engine == "engine"
    with pytest.raises(AttributeError):  # the twin: what polygraphy does of its own accord
        runtime.engine_host_code_allowed = True
    with pytest.raises(CannotBuild, match=r"tensorrt 10\.16 does not take the engine"):
        tensorrt_worker._deserialized(library, b"other")
    assert "engine_from_bytes" not in Path(tensorrt_worker.__file__).read_text()


@pytest.fixture
def inspect(tmp_path):
    """The worker's own check, of an engine whose inspector answers with these layers."""
    plan, listed = tmp_path / "model.plan", tmp_path / "layers.json"
    plan.write_bytes(b"a plan")

    def run(layers):
        text = json.dumps({"Layers": layers, "Bindings": ["x"]})
        answer = SimpleNamespace(get_engine_information=lambda form: text if form == "json" else "")
        engine = SimpleNamespace(create_engine_inspector=lambda: answer)
        library = nvidia_library({b"a plan": engine}, LayerInformationFormat=SimpleNamespace(JSON="json"))
        return tensorrt_worker._inspect(library, plan, NODES, listed), json.loads(listed.read_text())["Layers"]

    return run


def test_the_build_ends_with_the_first_fault_and_their_number(inspect):
    layers = list(told_in_words().values())
    assert inspect(layers) == ({"layers": 5, "plugin_layers_of_told_type": 3}, layers)
    with pytest.raises(
        CannotBuild, match=r"^blocks.0.norm: got no layer in profile 0, needed a plugin layer; and 1 more like it$"
    ):
        inspect([each for each in layers if each["Name"] not in (NORM, WEIGHT)])
