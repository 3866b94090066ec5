"""The Triton repository parses with NVIDIA's own messages and says of the model what the session says."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import onnx
import onnxruntime
import pytest
import tritonclient
import yaml
from google.protobuf import json_format, text_format

from lrq_export.errors import MissingError, UsageError
from lrq_export.models.flux import Flux
from lrq_export.serving import repository
from lrq_export.serving.kserve import write_kserve
from lrq_export.serving.plugin_libraries import registers_itself, with_companions
from lrq_export.serving.repository import Layout, warnings, write_repository
from lrq_export.serving.signature import outputs_of
from lrq_export.serving.triton import KIND_AUTO, config_json, config_text, model_config


@pytest.fixture(scope="module")
def messages():
    """tritonclient's model_config_pb2, without the gRPC that its package asks for."""
    path = Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parsed(messages):
    def parse(model: Path):
        return text_format.Parse((model / "config.pbtxt").read_text(), messages.ModelConfig())

    return parse


def test_the_repository_describes_the_session(package, parsed, tmp_path):
    (model,) = write_repository(package, tmp_path / "repository", Layout("tiny", threads=2, instances=3))
    config = parsed(model)
    session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"))
    assert (config.name, config.backend, config.platform) == ("tiny", "onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert list(config.version_policy.specific.versions) == [1]
    assert [(group.kind, group.count) for group in config.instance_group] == [(0, 3)]  # KIND_AUTO
    assert config.parameters["session.force_spinning_stop"].string_value == "1"
    assert config.parameters["session.x64quantprecision"].string_value == "1"
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    for described, values in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [each.name for each in described] == [each.name for each in values]
        for each, value in zip(described, values, strict=True):
            assert each.data_type == 11  # TYPE_FP32
            rest = [size if isinstance(size, int) else -1 for size in value.shape[1:]]
            assert list(each.dims) == (rest or [1])
            assert each.HasField("reshape") == (not rest)
    assert (model / "1" / "model.onnx").read_bytes() == (package / "engine/onnxruntime/model.onnx").read_bytes()
    assert "VNNI" in (tmp_path / "repository" / "README.md").read_text()


@pytest.mark.parametrize(("old", "new"), [("TYPE_FP32", "TYPE_F32"), ("dims", "dimensions"), ("[-1", "[-1,,")])
def test_a_config_that_is_none_does_not_parse(package, messages, tmp_path, old, new):
    """The twin: NVIDIA's message refuses what it does not know."""
    (model,) = write_repository(package, tmp_path / "repository", Layout("tiny"))
    text = (model / "config.pbtxt").read_text()
    assert old in text
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text.replace(old, new, 1), messages.ModelConfig())


def test_the_served_config_is_the_same_message(messages, package):
    outputs = outputs_of(package).values()
    config = model_config('odd "name"', outputs, outputs, kind=KIND_AUTO, max_batch=4, parameters={"a\nb": 'c"d'})
    from_text = text_format.Parse(config_text(config), messages.ModelConfig())
    assert from_text == json_format.ParseDict(config_json(config), messages.ModelConfig())
    assert from_text.parameters["a\nb"].string_value == 'c"d'


@pytest.fixture
def shared_inputs(monkeypatch):
    """The inputs of FLUX, whose position ids are one for all samples."""
    widths = {"in_channels": 16, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    specs = Flux().inputs(widths | {"axes_dims_rope": (2, 2, 4), "guidance_embeds": True})
    monkeypatch.setattr(repository, "model_inputs", lambda config, where: specs)
    return specs


def test_inputs_that_samples_share_are_not_batched(package, parsed, tmp_path, shared_inputs):
    (model,) = write_repository(package, tmp_path, Layout("tiny"))
    config = parsed(model)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [len(each.dims) for each in config.input] == [len(spec.shape) for spec in shared_inputs.values()]
    assert not any(each.HasField("reshape") for each in config.input)


def test_a_version_is_added_and_never_replaced(package, copy_of, tmp_path):
    linked, models = copy_of(package), tmp_path / "models"  # a link changes a file's ctime, and others read the package
    write_repository(linked, models, Layout("tiny"))
    with pytest.raises(UsageError, match="--model-version 2"):
        write_repository(linked, models, Layout("tiny"))
    write_repository(linked, models, Layout("tiny", version=2, link=True))
    assert sorted(path.name for path in (models / "tiny").iterdir()) == ["1", "2", "config.pbtxt"]
    assert (models / "tiny/2/model.onnx").samefile(linked / "engine/onnxruntime/model.onnx")


def test_what_a_watching_server_sees_is_whole(package, parsed, tmp_path, monkeypatch):
    """A config names its version: the first is there before its version, each later one is switched to when it lies."""
    seen, replace = [], os.replace

    def watched(source, target):
        replace(source, target)
        target = Path(target)
        model = target.parent if target.parent.name == "tiny" else None
        if model is not None:
            versions = sorted(path.name for path in model.iterdir() if path.name.isdecimal())
            assert all(set(os.listdir(model / each)) >= {"model.onnx"} for each in versions)
            served = [str(each) for each in parsed(model).version_policy.specific.versions]
            seen.append((target.name, served, versions))

    monkeypatch.setattr(os, "replace", watched)
    for version in (1, 2):
        write_repository(package, tmp_path, Layout("tiny", version=version))
    assert seen == [
        ("config.pbtxt", ["1"], []), ("1", ["1"], ["1"]),
        ("2", ["1"], ["1", "2"]), ("config.pbtxt", ["2"], ["1", "2"]),
    ]  # fmt: skip


def set_session(package, reseal, **changes):
    path = package / "engine/onnxruntime/session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(package)


@pytest.mark.parametrize(("gpu", "providers", "kind"), [
    (None, ["CUDAExecutionProvider", "CPUExecutionProvider"], 0), (None, ["CPUExecutionProvider"], 2),
    (True, ["CPUExecutionProvider"], 1), (False, ["CUDAExecutionProvider", "CPUExecutionProvider"], 2),
])  # fmt: skip
def test_the_kind_is_that_of_the_providers_or_as_asked(
    package, parsed, copy_of, reseal, tmp_path, gpu, providers, kind
):
    edited = copy_of(package, "edited")
    set_session(edited, reseal, providers=providers)
    (model,) = write_repository(edited, tmp_path / "r", Layout("tiny", gpu=gpu))
    assert parsed(model).instance_group[0].kind == kind  # AUTO, GPU, CPU: 0, 1, 2


def test_options_that_triton_drops_are_told(package, copy_of, reseal, parsed, cli, tmp_path):
    edited = copy_of(package, "edited")
    set_session(edited, reseal, options={"session.disable_quant_qdq": "1"}, config_where_products_saturate={})
    done = cli("serve-config", edited, "--triton", tmp_path / "r", "--name", "tiny")
    assert "warning: tiny: Triton's stock ONNX Runtime backend does not hand on session.disable_quant_qdq;" in done.out
    assert dict(parsed(tmp_path / "r/tiny").parameters).keys() == {"session.disable_quant_qdq"}
    assert "decoded anew in every run" in (tmp_path / "r/README.md").read_text()
    set_session(edited, reseal, options={})
    assert "warning" not in cli("serve-config", edited, "--triton", tmp_path / "s", "--name", "tiny").out


def test_the_portable_model_is_right_without_any_option(package, parsed, tmp_path):
    (model,) = write_repository(package, tmp_path, Layout("tiny", portable=True))
    assert set(parsed(model).parameters) == {"session.force_spinning_stop", "session.disable_quant_qdq"}
    assert any(node.domain == "lrq" for node in onnx.load(model / "1/model.onnx").graph.node)
    assert "VNNI" not in (tmp_path / "README.md").read_text()


def test_a_plan_becomes_a_model_of_its_own(package, parsed, copy_of, reseal, tmp_path):
    with_plan = copy_of(package, "with-plan")
    engine = with_plan / "engine/tensorrt"
    engine.mkdir()
    (engine / "model.plan").write_bytes(b"a plan")
    reseal(with_plan)
    library = tmp_path / "liblrq_plugins.so"
    library.write_bytes(b"a library")
    models = write_repository(with_plan, tmp_path / "r", Layout("tiny", plugins=(library,)))
    config = parsed(models[1])
    assert (config.name, config.backend) == ("tiny-tensorrt", "tensorrt")
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert (models[1] / "1/model.plan").read_bytes() == b"a plan"
    assert (models[1] / "plugins/liblrq_plugins.so").read_bytes() == b"a library"
    readme = (tmp_path / "r/README.md").read_text()
    assert "--backend-config=tensorrt,plugins=tiny-tensorrt/plugins/liblrq_plugins.so" in readme
    assert list(config.version_policy.specific.versions) == [1]
    assert "registers nothing" in warnings(with_plan, Layout("tiny", plugins=(library,)))[-1]
    (engine / "build.json").write_text(json.dumps({"target": "tensorrt", "version": "10.16", "plugins": True}))
    assert "pass --plugins" in warnings(with_plan, Layout("tiny"))[-1]
    (engine / "build.json").unlink()
    assert len(write_repository(with_plan, tmp_path / "cpu", Layout("tiny", gpu=False))) == 1
    with pytest.raises(UsageError, match="--plugins"):
        write_repository(package, tmp_path / "s", Layout("tiny", plugins=(library,)))
    with pytest.raises(MissingError, match="no such library"):
        write_repository(with_plan, tmp_path / "s", Layout("tiny", plugins=(tmp_path / "none.so",)))
    assert not (tmp_path / "s").exists()


PROFILES = {  # what each takes of samples: whether and how far requests are batched, and the profiles that are named
    (): (0, []),
    ((1, 4),): (4, []),
    ((1, 4), (1, 32)): (4, ["0", "1"]),
    ((1, 32), (2, 16)): (8, ["0", "1"]),
    ((1, 1), (1, 4)): (0, ["0", "1"]),
}


@pytest.mark.parametrize("samples", PROFILES)
def test_a_plan_is_batched_as_all_of_its_profiles_allow(package, parsed, copy_of, reseal, plan_of, tmp_path, samples):
    """Triton reads a plan's first profile alone, and batches as far as that goes, unless the config says otherwise."""
    folder, (batch, named) = copy_of(package), PROFILES[samples]
    profiles = [{"samples": [least, least, most], "height": [8, 8, 8]} for least, most in samples]
    built = {"target": "tensorrt", "version": "1", "plugins": False, "profiles": profiles}
    (folder / "engine/tensorrt").mkdir()
    (folder / "engine/tensorrt/model.plan").write_bytes(plan_of("tensorrt"))
    (folder / "engine/tensorrt/build.json").write_text(json.dumps(built))
    reseal(folder)
    onnx_model, plan = map(parsed, write_repository(folder, tmp_path / "r", Layout("tiny", instances=3)))
    assert (plan.platform, plan.backend, plan.max_batch_size) == ("tensorrt_plan", "tensorrt", batch)
    assert plan.HasField("dynamic_batching") == (batch > 0)
    assert [(group.count, list(group.profile)) for group in plan.instance_group] == [(3, named)]
    rank = {tensor.name: len(tensor.reshape.shape or tensor.dims) for tensor in plan.input}
    assert rank["hidden_states"] == (3 if batch else 4)  # the sign by which Triton's backend knows
    if batch:
        assert (plan.input, plan.output) == (onnx_model.input, onnx_model.output)
        assert plan.dynamic_batching.max_queue_delay_microseconds == 1000
    none = parsed(write_repository(folder, tmp_path / "none", Layout("tiny", max_batch=0))[1])
    assert none.max_batch_size == 0
    told = (tmp_path / "r/README.md").read_text()
    assert (f"TensorRT backend, batches of up to {batch}" if batch else "TensorRT backend, no batching") in told


def test_a_plan_whose_inputs_samples_share_is_not_batched(
    package, parsed, copy_of, plan_of, reseal, shared_inputs, tmp_path
):
    folder = copy_of(package)
    built = {"target": "tensorrt", "version": "1", "plugins": False, "profiles": [{"samples": [1, 1, 4]}]}
    (folder / "engine/tensorrt").mkdir()
    (folder / "engine/tensorrt/model.plan").write_bytes(plan_of("tensorrt"))
    (folder / "engine/tensorrt/build.json").write_text(json.dumps(built))
    reseal(folder)
    plan = parsed(write_repository(folder, tmp_path, Layout("tiny"))[1])
    assert plan.max_batch_size == 0
    assert len(next(tensor for tensor in plan.input if tensor.name == "img_ids").dims) == 3


def test_a_plan_without_weights_is_refused_before_anything_is_written(package, copy_of, reseal, cli, plan_of, tmp_path):
    stripped, folder = copy_of(package, "stripped"), tmp_path / "r"
    built = {"target": "tensorrt", "version": "1", "plugins": False}
    engine = stripped / "engine/tensorrt"
    engine.mkdir()
    (engine / "model.plan").write_bytes(plan_of("tensorrt"))
    (engine / "build.json").write_text(json.dumps(built | {"options": {"strip": True}}))
    reseal(stripped)
    cli("serve-config", stripped, "--triton", folder).refused(
        4, f"{engine}: the engine has no weights (engine.strip)", "--set engine.strip=false"
    )
    assert not folder.exists()
    service = tmp_path / "service.yaml"  # of a service alone, too
    cli("serve-config", stripped, "--kserve", service).refused(4, "the engine has no weights")
    cli("serve-config", package, "--kserve", service, "--plugins", "x.so").refused(2, "--plugins: the package has no")
    assert not service.exists()
    assert cli("serve-config", stripped, "--kserve", service, "--no-gpu").code == 0  # which leaves the plan out
    (engine / "build.json").write_text(json.dumps(built | {"plugins": True}))
    reseal(stripped)
    assert "the plan has plugins, and none were named" in cli("serve-config", stripped, "--kserve", service).out
    (engine / "build.json").write_text(json.dumps(built))
    reseal(stripped)
    assert len(write_repository(stripped, folder, Layout("tiny"))) == 2


NAMES = {
    "Tiny_W4.a8": "tiny-w4-a8", "4bit": "m-4bit", "a" * 90: "a" * 53, "4" * 90: "m-" + "4" * 51, "___": "model",
    "a" * 52 + "_b": "a" * 52,
}  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), NAMES.items())
def test_the_kserve_service_has_a_name_that_kubernetes_takes(name, wanted, tmp_path):
    write_kserve(tmp_path / "k.yaml", Layout(name), "s3://bucket/models: #1")
    service = yaml.safe_load((tmp_path / "k.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == wanted
    model = service["spec"]["predictor"]["model"]
    assert (model["modelFormat"], model["protocolVersion"]) == ({"name": "triton"}, "v2")
    assert model["storageUri"] == "s3://bucket/models: #1"
    assert model["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert not {"resources", "args"} & model.keys()


@pytest.fixture
def libraries(tmp_path):
    """As `plugins build` makes them: what registers the plugins links libnvinfer and them, and they the kernels."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    needs = {
        "libnvinfer.so.10": (), "liblrq_kernels.so": (), "liblrq_plugins.so": ("liblrq_kernels.so",),
        "liblrq_plugins_trt10.so": ("liblrq_plugins.so", "libnvinfer.so.10"),
    }  # fmt: skip
    for name, needed in needs.items():
        command = ["gcc", "-shared", "-x", "c", "/dev/null", "-x", "none", "-Wl,--no-as-needed", f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-L.", *(f"-l:{each}" for each in needed), "-o", name], cwd=tmp_path, check=True)
    return tmp_path


def test_a_library_is_copied_with_what_it_needs_beside_it(libraries):
    registering, alone = libraries / "liblrq_plugins_trt10.so", libraries / "liblrq_plugins.so"
    ours = ["liblrq_plugins_trt10.so", "liblrq_plugins.so", "liblrq_kernels.so"]  # libnvinfer is Triton's own
    assert [path.name for path in with_companions(registering)] == ours
    assert [path.name for path in with_companions(alone)] == ours[1:]
    assert registers_itself(registering)
    assert not registers_itself(alone)
    (libraries / "liblrq_kernels.so").unlink()
    assert [path.name for path in with_companions(registering)] == ours[:2]


def test_a_service_with_a_plan_has_a_gpu_and_its_plugins(tmp_path):
    layout = Layout("Tiny", plugins=(Path("a/one.so"), Path("b/two.so")))
    write_kserve(tmp_path / "k.yaml", layout, "s3://models", plan=True)
    model = yaml.safe_load((tmp_path / "k.yaml").read_text())["spec"]["predictor"]["model"]
    assert model["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    folder = "/mnt/models/Tiny-tensorrt/plugins"
    assert model["args"] == [f"--backend-config=tensorrt,plugins={folder}/one.so;{folder}/two.so"]


def test_a_service_on_gpus_alone_asks_for_one(tmp_path):
    write_kserve(tmp_path / "k.yaml", Layout("Tiny", gpu=True), "s3://models")
    model = yaml.safe_load((tmp_path / "k.yaml").read_text())["spec"]["predictor"]["model"]
    assert model["resources"] == {"limits": {"nvidia.com/gpu": "1"}}


def test_the_command_writes_both_and_refuses_the_package_itself(package, cli, tmp_path):
    repository, service = tmp_path / "repository", tmp_path / "service.yaml"
    done = cli("serve-config", package, "--triton", repository, "--kserve", service, "--name", "tiny", "--json")
    assert done.code == 0
    assert json.loads(done.out)["files"] == [str(repository / "tiny"), str(service)]
    assert service.exists()
    cli("serve-config", package, "--triton", package / "triton").refused(2, "lies in the package")
    cli("serve-config", package, "--kserve", package / "service.yaml").refused(2, "lies in the package")
    cli("serve-config", package / "graphs", "--triton", tmp_path / "x").refused(3, "not an lrq-export package")


def test_a_service_is_written_without_a_repository(package, cli, tmp_path):
    """One that is there already, or elsewhere."""
    service = tmp_path / "service.yaml"
    assert cli("serve-config", package, "--kserve", service, "--storage-uri", "s3://models").out == f"{service}\n"
    assert yaml.safe_load(service.read_text())["spec"]["predictor"]["model"]["storageUri"] == "s3://models"
    assert list(tmp_path.iterdir()) == [service]


UNFINISHED = {
    "nothing to write": ((), "nothing to write", "Fix: pass --triton DIR, --kserve FILE, or both"),
    "no file": (("--kserve",), "'--kserve' requires an argument", "--help"),
    "a flag for a file": (("--kserve", "--triton", "r"), "--kserve: got --triton, needed a path", "--kserve PATH"),
    "a flag for a folder": (("--triton", "--link"), "--triton: got --link, needed a path", "--triton PATH"),
    "an unknown flag": (("--kserv", "x"), "No such option: --kserv", "serve-config --help"),
}


@pytest.mark.parametrize(("arguments", "said", "fix"), UNFINISHED.values(), ids=UNFINISHED.keys())
def test_an_unfinished_command_says_what_is_missing(package, cli, arguments, said, fix):
    cli("serve-config", package, *arguments).refused(2, said, "Fix: ", fix)
