"""Engines of TensorRT-RTX, built on a machine without a GPU by NVIDIA's own parser and builder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import trt_build

from lrq_export.engine import tensorrt
from lrq_export.engine.plan_layers import NodeTypes
from lrq_export.engine.targets import add_engines, engines
from lrq_export.errors import CheckFailed
from lrq_export.package import load_manifest, verify_hashes
from lrq_export.quantized import QuantizedFile
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.verify import nvidia
from lrq_export.verify.against import _subject
from lrq_export.verify.bisect import Divergence, save_replay
from lrq_export.verify.target import Target
from lrq_export.verify.target_rungs import Compared, Error

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install lrq-export[rtx]")
pytestmark = pytest.mark.rtx
SIZES = {"profiles": ("samples=1:2:2 height=8:8:16 width=8:8:16",), "compute_capabilities": ("86", "120")}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Plugins whose kernels are CPU loops: no builder calls them."""
    trt_build.skip_if_missing()
    return trt_build.build_library(tmp_path_factory.mktemp("library"), trt_build.all_headers()[0])


def facts(folder):
    verify_hashes(folder)
    ((target, engine),) = engines(folder)
    assert target == "tensorrt-rtx"
    built = json.loads((engine / "build.json").read_text())
    assert built["engine_bytes"] == (engine / "model.plan").stat().st_size > 0
    return built


def test_without_plugins_an_engine_of_standard_ops_is_built(package, copy_of, monkeypatch):
    monkeypatch.setattr(tensorrt, "find_library", lambda: None)
    folder = copy_of(package)
    assert add_engines(folder, ["tensorrt-rtx"], changes=SIZES) == []
    built = facts(folder)
    assert (built["plugins"], built["plugin_layers"]) == (False, 0)
    assert built["layers"] > 1000


def test_with_plugins_every_lrq_node_is_one_plugin_layer(package, copy_of, monkeypatch, library):
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    folder = copy_of(package)
    assert add_engines(folder, ["tensorrt-rtx"], changes=SIZES) == []
    built = facts(folder)
    assert built["plugins"]
    assert built["plugin_layers"] == built["nodes"] > 10


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
def test_engines_in_half_precision_are_built(package, copy_of, monkeypatch, library, activations, plugins):
    monkeypatch.setattr(tensorrt, "find_library", lambda: library if plugins else None)
    folder = copy_of(package)
    assert add_engines(folder, ["tensorrt-rtx"], changes=SIZES | {"activations": activations}) == []
    built = facts(folder)
    assert built["options"]["activations"] == activations
    assert built["plugin_layers"] == built["nodes"] == (len(Target("tensorrt-rtx", folder).plugin_nodes))
    assert Target("tensorrt-rtx", folder).activations == activations


def test_weights_can_be_streamed_and_left_out_only_with_a_gpu(package, copy_of, monkeypatch, library):
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    folder = copy_of(package)
    assert add_engines(folder, ["tensorrt-rtx"], changes=SIZES | {"weight_streaming": True}) == []
    assert facts(folder)["options"]["weight_streaming"]
    if tensorrt.gpu_at_hand() is not None:
        pytest.skip("this machine has a GPU: test_trt.py strips a plan")
    for name in ("refit", "strip"):
        (missing,) = add_engines(folder, ["tensorrt-rtx"], changes=SIZES | {name: True})
        assert f"builds no engine that can be refitted (engine.{name})" in missing.message
    monkeypatch.setattr(tensorrt.Request, "cannot_refit", lambda request: None)
    for changes in ({"refit": True, "strip": False}, {"strip": True}):
        with pytest.raises(CheckFailed, match=r"Invalid Engine.*; IBuilder::buildSerializedNetwork: .*CUDA_SUCCESS"):
            add_engines(folder, ["tensorrt-rtx"], changes=changes)


def test_a_node_without_a_plugin_is_named(package, copy_of, monkeypatch, library):
    """The twin that must fail: as if the graph had one lrq node more than the parser found plugins for."""
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    write = tensorrt.write_network
    lost = {"lost": NodeTypes("float32", "float32")}
    monkeypatch.setattr(tensorrt, "write_network", lambda *arguments, **options: write(*arguments, **options) | lost)
    with pytest.raises(CheckFailed, match="no plugin runs lost"):
        add_engines(copy_of(package), ["tensorrt-rtx"], changes=SIZES)


def test_a_plugin_of_another_type_than_its_node_is_named(package, copy_of, monkeypatch, library):
    """As if the graph that the parser reads were still in float32 where the recipe asks for float16."""
    monkeypatch.setattr(tensorrt, "find_library", lambda: library)
    write = tensorrt.write_network

    def in_float16(*arguments, **options):
        return dict.fromkeys(write(*arguments, **options), NodeTypes("float16", "float16"))

    monkeypatch.setattr(tensorrt, "write_network", in_float16)
    with pytest.raises(CheckFailed, match=r"its plugin reads float32, needed float16 as in the graph"):
        add_engines(copy_of(package), ["tensorrt-rtx"], changes=SIZES)


def test_a_process_that_ends_without_an_answer_is_an_error(package, copy_of, monkeypatch, tmp_path):
    """As RTX's parser does where it does not find its own library."""
    broken = tmp_path / "liblrq_plugins.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(tensorrt, "find_library", lambda: broken)
    folder = copy_of(package)
    with pytest.raises(CheckFailed, match="tensorrt-rtx: "):
        add_engines(folder, ["tensorrt-rtx"], changes=SIZES)
    verify_hashes(folder)


@pytest.mark.parametrize("plugins", [False, True])
def test_engines_of_a_comparison_have_the_tensors_that_are_asked_for(package, copy_of, monkeypatch, library, plugins):
    """All of `verify --against` that needs no GPU: a cut network is parsed, its outputs marked, an engine built."""
    monkeypatch.setattr(tensorrt, "find_library", lambda: library if plugins else None)
    monkeypatch.setattr(nvidia, "find_library", lambda: library)
    folder, build, answers = copy_of(package), tensorrt.run_worker, []
    tensorrt.write_network(
        rewritten_graph(folder),
        QuantizedFile(folder / "quantized.safetensors"),
        folder / "engine/tensorrt-rtx",
        plugins,
    )
    target = Target("tensorrt-rtx", folder)
    assert bool(target.plugin_nodes) == plugins

    def without_running(job):
        assert job["do"] == "infer"
        answers.append(build(job | {"do": "mark"}))
        return {"error": "there is no GPU"}

    monkeypatch.setattr(tensorrt, "run_worker", without_running)
    compared = Compared(subject_of(folder), target)
    with pytest.raises(CheckFailed, match="there is no GPU"):
        compared.layers_on_gpu()
    tensor = compared.subject.tensor_of["transformer_blocks.1.ff.net.2"]
    compared.errors, compared.on_gpu = [Error(1, tensor)], True
    with pytest.raises(CheckFailed, match="there is no GPU"):
        compared.bisect(folder.parent / "replay")
    whole, step = (answer["engine_bytes"] for answer in answers)
    assert whole > step > 1000
    built, told = built_by_hand(target, folder.parent / "replay", tensor)
    assert built, told
    if plugins:  # the twin that must fail
        monkeypatch.setattr(nvidia, "find_library", lambda: folder / "none.so")
        assert not built_by_hand(target, folder.parent / "replay", tensor)[0]
    with pytest.raises(CheckFailed):
        nvidia.run(target, [{"x": np.zeros(2, np.float32)}], model=folder / "replay" / "none", outputs=["nothing"])
    assert "error" in answers[-1]


def built_by_hand(target, folder, tensor):
    """Whether the command that replays a difference builds its engine: then it needs a GPU."""
    model = onnx.load(folder / "target.onnx")
    feed = {value.name: np.zeros([size.dim_value for size in value.type.tensor_type.shape.dim], np.float32)
            for value in model.graph.input}  # fmt: skip
    found = Divergence(tensor, "", "", (), 0.0, 1.0, {}, 1, np.zeros(1), np.zeros(1))
    command = save_replay(folder, found, nvidia.TensorRtTensors(folder / "target.onnx", feed, target))
    plan, programs = folder / "by_hand.plan", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plan.unlink(missing_ok=True)
    command += f" --save-engine {shlex.quote(str(plan))}"
    done = subprocess.run(command, shell=True, env=os.environ | {"PATH": programs}, capture_output=True, text=True)
    return plan.is_file(), done.stdout + done.stderr


def subject_of(package):
    return _subject(package, load_manifest(package), None, 2)
