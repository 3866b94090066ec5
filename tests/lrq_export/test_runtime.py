"""`load(OUT)` stands in for the diffusers transformer."""

import inspect
import json
import threading

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from lrq_export.doctor.system import System
from lrq_export.engine import run_obstacle, tensorrt_runner
from lrq_export.engine.built import FOLDERS
from lrq_export.engine.onnxruntime_runner import OnnxRuntimeRunner
from lrq_export.errors import InputError, LrqError, MissingError, UsageError
from lrq_export.loading import load
from lrq_export.models.base import InputSpec
from lrq_export.runtime import PackagedTransformer, feeds, tensors


@pytest.fixture(scope="module")
def drop_in(package):
    return load(package, threads=1)


@pytest.fixture(scope="module")
def original(tiny):
    return PixArtTransformer2DModel.from_pretrained(tiny.source).float()


def arguments(batch=2, text=6, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 1, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator),
        "timestep": torch.full((batch,), 400),
    }


def close(got, wanted):
    return float((got - wanted).square().sum() / wanted.square().sum())


def test_it_is_called_like_the_diffusers_transformer(drop_in):
    theirs = inspect.signature(PixArtTransformer2DModel.forward).parameters
    ours = inspect.signature(drop_in).parameters
    assert [name for name in theirs if name != "self"] == list(ours)
    assert [each.default for name, each in theirs.items() if name != "self"] == [each.default for each in ours.values()]


def test_it_has_the_config_dtype_and_device_that_pipelines_read(drop_in, original):
    assert dict(drop_in.config).keys() >= {key for key in original.config if not key.startswith("_")}
    for key in ("sample_size", "in_channels", "out_channels", "patch_size", "caption_channels"):
        assert getattr(drop_in.config, key) == original.config[key]
    assert drop_in.dtype == torch.float32
    assert drop_in.device == torch.device("cpu")
    assert drop_in.eval() is drop_in
    assert drop_in.to("cpu", torch.float16) is drop_in
    with drop_in.cache_context("cond", step_index=0):
        pass


def test_it_predicts_what_the_original_does_up_to_the_methods_loss(drop_in, original):
    for size in ({}, {"batch": 1, "text": 3, "height": 12, "width": 4}):
        given = arguments(**size)
        with torch.no_grad():
            wanted = original(**given).sample
        got = drop_in(**given).sample
        assert got.shape == wanted.shape
        assert 1e-7 < close(got, wanted) < 0.1


def test_return_dict_decides_the_kind_of_answer(drop_in):
    given = arguments()
    (got,) = drop_in(**given, return_dict=False)
    named = drop_in(**given)
    assert type(named).__name__ == "Transformer2DModelOutput"
    assert torch.equal(named.sample, got)
    assert torch.equal(drop_in.forward(**given).sample, got)
    assert torch.equal(named[0], got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_answer_has_the_dtype_of_the_latents(drop_in, dtype):
    given = arguments()
    given["hidden_states"] = given["hidden_states"].to(dtype)
    got = drop_in(**given).sample
    assert got.dtype == dtype
    assert close(got.float(), drop_in(**arguments()).sample) < 1e-2


def test_no_mask_is_a_mask_of_ones_and_a_mask_hides_text(drop_in, original):
    given, ones = arguments(), torch.ones(2, 6)
    bare = drop_in(**given).sample
    assert torch.equal(bare, drop_in(**given, encoder_attention_mask=ones).sample)
    assert torch.equal(bare, drop_in(**given, encoder_attention_mask=ones.bool()).sample)
    mask = ones.clone()
    mask[1, 3:] = 0
    masked = drop_in(**given, encoder_attention_mask=mask.long()).sample
    assert torch.equal(masked[0], bare[0])
    assert not torch.equal(masked[1], bare[1])
    # What is hidden does not matter.
    changed = given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][1, 3:] = 7.0
    assert close(drop_in(**changed, encoder_attention_mask=mask).sample, masked) < 1e-3
    with torch.no_grad():
        wanted = original(**given, encoder_attention_mask=mask).sample
    assert close(masked, wanted) < 0.1


@pytest.mark.parametrize("timestep", [torch.tensor(400), torch.tensor([400]), torch.tensor([400, 400.0])])
def test_one_timestep_serves_all_samples(drop_in, timestep):
    given = arguments()
    got = drop_in(**given | {"timestep": timestep}).sample
    assert torch.equal(got, drop_in(**given).sample)


def test_conditions_that_the_model_has_no_use_for_are_ignored(drop_in):
    given = arguments()
    for unused in ({"resolution": None, "aspect_ratio": None}, {"resolution": torch.ones(2, 2)}, {}):
        assert torch.equal(drop_in(**given, added_cond_kwargs=unused).sample, drop_in(**given).sample)


WRONG = {
    "rank of latents": ("hidden_states", torch.ones(2, 1, 8), "hidden_states"),
    "channels": ("hidden_states", torch.ones(2, 3, 8, 8), "(2, 3, 8, 8)"),
    "height of half a patch": (
        "hidden_states",
        torch.ones(2, 1, 7, 8),
        "got shape (2, 1, 7, 8), needed (samples, 1, height, width) with height a positive multiple of 2",
    ),
    "no latents": ("hidden_states", None, "hidden_states"),
    "no samples": ("hidden_states", torch.ones(0, 1, 8, 8), "(0, 1, 8, 8)"),
    "no text": ("encoder_hidden_states", None, "got None, needed a tensor of shape (samples, text, 16)"),
    "width of text": ("encoder_hidden_states", torch.ones(2, 6, 15), "(2, 6, 15)"),
    "batch of text": ("encoder_hidden_states", torch.ones(3, 6, 16), "samples = 2 as in hidden_states"),
    "length of mask": ("encoder_attention_mask", torch.ones(2, 5), "(2, 5)"),
    "rank of mask": ("encoder_attention_mask", torch.ones(6), "(6,)"),
    "batch of timestep": ("timestep", torch.ones(3), "timestep"),
    "no timestep": ("timestep", None, "timestep"),
    "number as timestep": ("timestep", 500, "timestep: got 500, needed a torch.Tensor"),
    "array of latents": ("hidden_states", np.ones((2, 1, 8, 8), np.float32), "got a ndarray, needed a torch.Tensor"),
}


@pytest.mark.parametrize(("name", "tensor", "part"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_input_is_named(drop_in, name, tensor, part):
    with pytest.raises(LrqError) as caught:
        drop_in(**arguments() | {name: tensor})
    assert isinstance(caught.value, (InputError, UsageError))
    assert name in str(caught.value)
    assert part in str(caught.value)


def test_arguments_that_the_package_cannot_honour_are_refused(drop_in):
    with pytest.raises(UsageError, match="attention_mask"):
        drop_in(**arguments(), attention_mask=torch.ones(2, 16))
    with pytest.raises(UsageError, match="cross_attention_kwargs"):
        drop_in(**arguments(), cross_attention_kwargs={"scale": 0.5})


def test_sizes_that_were_admitted_once_are_and_others_are_still_refused(drop_in):
    given = arguments() | {"encoder_attention_mask": torch.ones(2, 6)}
    first = drop_in(**given).sample
    assert len(drop_in._plans) >= 1
    assert torch.equal(drop_in(**given).sample, first)
    strided = given | {"hidden_states": given["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert not strided["hidden_states"].is_contiguous()
    assert torch.equal(drop_in(**strided).sample, first)
    assert torch.equal(drop_in(**given | {"encoder_attention_mask": torch.ones(2, 6).bool()}).sample, first)
    with pytest.raises(InputError, match="encoder_attention_mask"):
        drop_in(**given | {"encoder_attention_mask": torch.ones(2, 5)})
    with pytest.raises(TypeError, match="multiple values"):
        drop_in(given["hidden_states"], **given)
    with pytest.raises(TypeError, match="hidden_states"):
        drop_in(timestep=given["timestep"])


def test_several_threads_may_call_it(drop_in):
    wanted = [drop_in(**arguments(seed=seed)).sample for seed in range(4)]
    got = [None] * 4

    def call(seed):
        got[seed] = drop_in(**arguments(seed=seed)).sample

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))


def test_an_edited_package_is_not_loaded(package, copy_of):
    edited = copy_of(package)
    (edited / "report.html").write_text("edited")
    with pytest.raises(InputError, match=r"report\.html: was edited"):
        load(edited)


def test_a_package_without_an_engine_says_so(package, copy_of, reseal):
    bare = copy_of(package)
    (bare / "engine/onnxruntime/model.onnx").unlink()
    reseal(bare)
    with pytest.raises(MissingError, match="no ONNX Runtime engine"):
        load(bare)


def test_a_target_is_taken_if_it_is_there(package, drop_in):
    assert torch.equal(
        load(package, target="onnxruntime", threads=1)(**arguments()).sample, drop_in(**arguments()).sample
    )
    with pytest.raises(MissingError, match="holds no tensorrt engine") as missing:
        load(package, target="tensorrt")
    assert f"lrq-export build {package} --target tensorrt" in str(missing.value)
    with pytest.raises(UsageError, match="needed one of auto, tensorrt, tensorrt-rtx, onnxruntime"):
        load(package, target="openvino")


@pytest.fixture
def machine(monkeypatch, drop_in):
    """One with a GPU and version 1 of both libraries, whose engines a stand-in runs; and the folders it opened."""
    opened = []

    def stand_in(folder, target):
        opened.append(folder)
        return OnnxRuntimeRunner(drop_in.session)

    monkeypatch.setattr(System, "gpu", lambda system: "H100")
    monkeypatch.setattr(run_obstacle, "installed_tensorrt", lambda *_: "1")
    monkeypatch.setattr(tensorrt_runner, "TensorRtRunner", stand_in)
    return opened


@pytest.fixture
def with_engine(package, copy_of, reseal, plan_of):
    """A package that holds an engine of NVIDIA's, whose build.json says so."""

    def make(target, **facts):
        folder = copy_of(package)
        place = folder / FOLDERS[target]
        place.mkdir()
        (place / "model.plan").write_bytes(plan_of(target, facts.get("version", "1")))
        (place / "build.json").write_text(json.dumps({"target": target, "plugins": False, "version": "1"} | facts))
        reseal(folder)
        return folder

    return make


@pytest.mark.parametrize("version", ["1", "1.post2"])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_for_a_gpu_is_taken_where_it_can_run(with_engine, drop_in, machine, target, version):
    folder = with_engine(target, version=version)
    with load(folder) as transformer:
        assert transformer.target == target
        assert torch.equal(transformer(**arguments()).sample, drop_in(**arguments()).sample)
    assert machine == [folder / FOLDERS[target]]


def no_gpu(patch):
    patch.setattr(System, "gpu", lambda system: None)


def no_library(patch):
    patch.setattr(run_obstacle, "installed_tensorrt", lambda *_: None)
    patch.setattr(System, "folders", lambda system, module: [])


def no_plugins(patch):
    patch.setattr(System, "plugin_library", lambda system: None)


def refused(patch):
    """As TensorRtRunner does a plan that its library does not take, whatever version it is of."""

    def refuse(folder, target):
        raise InputError(f"{folder}: {target} 1 does not take it")

    patch.setattr(tensorrt_runner, "TensorRtRunner", refuse)


def too_large(patch):
    def allocate(folder, target):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    patch.setattr(tensorrt_runner, "TensorRtRunner", allocate)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("lose", "facts", "reason"),
    [
        (no_gpu, {}, "no CUDA GPU"),
        (no_library, {}, "is not installed"),
        (no_plugins, {"plugins": True}, "is not compiled"),
        (lambda patch: None, {"version": "2"}, "is of .* 2, the library here is 1"),
        (lambda patch: None, {"options": {"strip": True}}, "no weights"),
        (refused, {}, "does not take it"),
        (too_large, {}, "too little free memory: CUDA out of memory"),
    ],
    ids=["GPU", "library", "plugins", "version", "weights", "refused", "memory"],
)
def test_where_its_engine_cannot_run_onnx_runtime_s_is_taken_unless_it_is_asked_for(
    with_engine, machine, monkeypatch, target, lose, facts, reason
):
    folder = with_engine(target, **facts)
    lose(monkeypatch)
    assert load(folder, threads=1).target == "onnxruntime"
    with pytest.raises((MissingError, InputError), match=reason):
        load(folder, target=target)
    assert machine == []


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", True])
def test_a_number_of_threads_that_is_none_is_refused(package, threads):
    with pytest.raises(UsageError, match="threads: got"):
        load(package, threads=threads)


def test_a_closed_transformer_answers_no_more(package):
    with load(package, threads=1) as transformer:
        transformer(**arguments())
    for late in (lambda: transformer(**arguments()), lambda: transformer.session):
        with pytest.raises(UsageError, match="the transformer is closed"):
            late()
    transformer.close()


def test_closing_waits_for_the_calls_that_run(drop_in):
    """A runner that computes until it is let go."""
    inside, let_go, closed, answers = threading.Event(), threading.Event(), [], []

    def runner(inputs):
        inside.set()
        assert let_go.wait(30)
        assert not closed
        return torch.zeros(1)

    runner.device, runner.close = torch.device("cpu"), lambda: closed.append(True)
    transformer = PackagedTransformer(runner, dict(drop_in.config))
    caller = threading.Thread(target=lambda: answers.append(transformer.run({})))
    caller.start()
    assert inside.wait(30)
    closers = [threading.Thread(target=transformer.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    closers[0].join(0.1)
    assert all(closer.is_alive() for closer in closers)
    let_go.set()
    for thread in (caller, *closers):
        thread.join(30)
    assert (closed, len(answers)) == ([True], 1)


def test_bound_inputs_and_outputs_give_the_same_bits(drop_in):
    """As on CUDA, where tensors are bound to where they lie; here that is the CPU's memory."""
    bound, plain = (OnnxRuntimeRunner(drop_in.session, bind=bind) for bind in (True, False))
    for batch, height in ((2, 8), (1, 12)):
        inputs = tensors(drop_in.specs, arguments(batch=batch, height=height))
        assert bound._output_shape(inputs) == (batch, 1, height, 8)
        assert torch.equal(bound(inputs), plain(inputs))
    assert not torch.equal(bound(inputs), plain(inputs | {"timestep": torch.zeros(1)}))


def test_what_is_bound_lies_as_the_engine_reads_it(drop_in):
    """It is told an address alone, not strides."""
    bound, plain = (OnnxRuntimeRunner(drop_in.session, bind=bind) for bind in (True, False))
    turned = arguments(batch=2, height=8)
    turned["hidden_states"] = turned["hidden_states"].transpose(2, 3)
    straight = turned | {"hidden_states": turned["hidden_states"].contiguous()}
    assert torch.equal(bound(tensors(drop_in.specs, turned)), plain(tensors(drop_in.specs, straight)))


def test_an_absent_optional_input_takes_its_sizes_from_the_others():
    specs = {
        "hidden_states": InputSpec(("samples", 1, "height", "width")), "text": InputSpec(("samples", "length", 3)),
        "mask": InputSpec(("samples", "length"), optional=True),
    }  # fmt: skip
    fed = feeds(specs, {"hidden_states": torch.ones(2, 1, 4, 4), "text": torch.ones(2, 7, 3)})
    assert fed["mask"].shape == (2, 7)
    assert (fed["mask"] == 1).all()
