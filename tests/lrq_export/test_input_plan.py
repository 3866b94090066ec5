"""What a drop-in remembers of a call depends on shapes alone; values, dtypes, devices and layouts count anew."""

import threading

import numpy as np
import pytest
import torch

from lrq_export.errors import InputError, UsageError
from lrq_export.loading import load
from lrq_export.models.base import InputSpec
from lrq_export.runtime import MOST_PLANS, PackagedTransformer

SAMPLES, TEXT, SIDE, MASK = 2, 6, 8, "encoder_attention_mask"
DIT = {
    "_class_name": "DiTTransformer2DModel", "sample_size": SIDE, "num_layers": 1, "patch_size": 2, "in_channels": 1,
    "attention_head_dim": 12, "num_attention_heads": 2, "out_channels": 1, "num_embeds_ada_norm": 10,
}  # fmt: skip


class Listener:
    """A runner that keeps what it is fed, and answers the latents doubled."""

    def __init__(self, device: str = "cpu"):
        self.device, self.fed = torch.device(device), []

    def __call__(self, inputs):
        self.fed.append(inputs)
        return 2 * inputs["hidden_states"]

    def close(self):
        pass


def arguments(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(SAMPLES, 1, SIDE, SIDE, generator=generator),
        "encoder_hidden_states": torch.randn(SAMPLES, TEXT, 16, generator=generator),
        "timestep": torch.full((SAMPLES,), 100.0 * (1 + seed)),
    } | changes


def mask(hidden):
    """Hides the last words of the second sample."""
    made = torch.ones(SAMPLES, TEXT)
    made[1, TEXT - hidden :] = 0
    return made


def bare(transformer, given):
    """The session's answer to arrays that are all written out here."""
    whole = {MASK: torch.ones(SAMPLES, TEXT)} | given
    return torch.from_numpy(transformer.session.run(None, {name: each.numpy() for name, each in whole.items()})[0])


@pytest.fixture(scope="module")
def opened(package):
    with load(package, target="onnxruntime", threads=1) as transformer:
        yield transformer


@pytest.fixture
def drop_in(opened):
    """One that remembers nothing yet."""
    return PackagedTransformer(opened._runner, dict(opened.config))


@pytest.fixture
def listened(opened):
    """The drop-in's inputs, without its engine."""
    return PackagedTransformer(Listener(), dict(opened.config))


def test_values_and_masks_that_change_are_seen_while_shapes_stay(drop_in):
    calls = [
        arguments(0), arguments(1), arguments(1, **{MASK: mask(2)}), arguments(1), arguments(1, **{MASK: mask(4)}),
        arguments(0, **{MASK: mask(2)}), arguments(0),
    ]  # fmt: skip
    answers = [drop_in(**given, return_dict=False)[0] for given in calls]
    assert len(drop_in._plans) == 2  # with a mask and without
    for given, answer in zip(calls, answers, strict=True):  # not before all are given: an answer stays as it is
        assert torch.equal(answer, bare(drop_in, given))
    answers[-1].zero_()
    assert torch.equal(drop_in(**calls[-1]).sample, answers[0])


def test_a_mask_that_someone_wrote_into_would_be_noticed(drop_in):
    given = arguments()
    drop_in(**given)
    (plan,) = drop_in._plans.values()
    plan.absent[MASK][1, 2:] = 0
    assert not torch.equal(drop_in(**given).sample, bare(drop_in, given))


SAME_SHAPES = {
    "half precision": lambda given: given | {"encoder_hidden_states": given["encoder_hidden_states"].half()},
    "whole timesteps": lambda given: given | {"timestep": given["timestep"].long()},
    "transposed": lambda given: given | {"hidden_states": given["hidden_states"].mT.contiguous().mT},
    "with a gradient": lambda given: given | {"hidden_states": given["hidden_states"].clone().requires_grad_()},
    "as it was": lambda given: given,
}


def test_dtypes_layouts_and_gradients_may_change_while_shapes_stay(drop_in):
    given = arguments() | {"encoder_hidden_states": arguments()["encoder_hidden_states"].half().float()}
    wanted = bare(drop_in, given)
    for changed in SAME_SHAPES.values():
        answer = drop_in(**changed(given)).sample
        assert torch.equal(answer, wanted)
        assert not answer.requires_grad
    assert len(drop_in._plans) == 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_timestep_for_all_samples_is_read_in_every_call(listened, shape):
    for timestep in (400.0, 20.0):
        listened(**arguments(timestep=torch.full(shape, timestep)))
        assert torch.equal(listened._runner.fed[-1]["timestep"], torch.full((SAMPLES,), timestep))
    assert len(listened._plans) == 1


def test_no_argument_lends_its_memory_to_a_later_call(listened):
    """Arguments that are ready go to the engine as they lie, which another call must not see."""
    first, second = arguments(0), arguments(1)
    listened(**first)
    listened(**second)
    fed = listened._runner.fed
    for name, tensor in second.items():
        assert fed[1][name].data_ptr() == tensor.data_ptr() != fed[0][name].data_ptr()
    assert torch.equal(fed[1][MASK], torch.ones(SAMPLES, TEXT))


def test_what_inference_mode_remembered_serves_outside_of_it(drop_in):
    with torch.inference_mode():
        drop_in(**arguments(0))
    assert torch.equal(drop_in(**arguments(1)).sample, bare(drop_in, arguments(1)))


def test_every_call_feeds_the_device_of_the_engine(opened):
    elsewhere = PackagedTransformer(Listener("meta"), dict(opened.config))
    for device in ("cpu", "meta", "cpu"):
        fed = elsewhere._inputs({name: tensor.to(device) for name, tensor in arguments().items()})
        assert {tensor.device.type for tensor in fed.values()} == {"meta"}
        (plan,) = elsewhere._plans.values()
        assert fed[MASK] is plan.absent[MASK]  # made there once, and not brought there in every call


def test_threads_with_masks_and_without_get_their_own_answers(drop_in):
    calls = [arguments(seed, **({MASK: mask(seed)} if seed % 2 else {})) for seed in range(6)]
    wanted, got = [bare(drop_in, given) for given in calls], [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def call(index):
        start.wait(30)
        for _ in range(5):
            got[index].append(drop_in(**calls[index]).sample)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(answers) for answers in got] == [5] * len(calls)
    assert all(torch.equal(answer, wanted[index]) for index, answers in enumerate(got) for answer in answers)


@pytest.mark.parametrize("labels", [torch.tensor([3, 11]), torch.tensor([3.0, 2.5]), torch.tensor([-1])])
def test_labels_of_no_class_are_refused_in_every_call(labels):
    transformer = PackagedTransformer(Listener(), DIT)
    given = {"hidden_states": torch.ones(SAMPLES, 1, SIDE, SIDE), "timestep": torch.ones(SAMPLES)}
    sound = torch.full_like(labels, 3)
    for _ in range(2):
        assert torch.equal(transformer(**given, class_labels=sound).sample, 2 * given["hidden_states"])
        with pytest.raises(InputError, match=r"class_labels: got .*, needed labels: whole numbers from 0 to 10"):
            transformer(**given, class_labels=labels)
    assert len(transformer._plans) == 1


class OnGpu(torch.Tensor):
    """Labels that say they lie on a GPU, where reading them waits for all that runs there."""

    is_cuda = True


def test_labels_on_a_gpu_are_waited_for_once(monkeypatch):
    transformer, waited, check = PackagedTransformer(Listener(), DIT), [], InputSpec.check_labels

    def count(spec, name, tensor):
        if spec.classes is not None:
            waited.append(name)
        check(spec, name, tensor)

    monkeypatch.setattr(InputSpec, "check_labels", count)
    given = {"hidden_states": torch.ones(SAMPLES, 1, SIDE, SIDE), "timestep": torch.ones(SAMPLES)}
    labels = torch.tensor([3, 4]).as_subclass(OnGpu)
    for times in (1, 1, 1):
        transformer(**given, class_labels=labels)
        assert len(waited) == times
    labels[0] = 11  # written into, so it is read again, and never taken for checked
    for times in (2, 3):
        with pytest.raises(InputError, match="class_labels: got 11 at"):
            transformer(**given, class_labels=labels)
        assert len(waited) == times
    transformer(**given, class_labels=torch.tensor([1, 2]).as_subclass(OnGpu))
    on_cpu = torch.tensor([1, 2])
    for times in (5, 6):  # no write by NumPy is counted, and nothing is waited for
        transformer(**given, class_labels=on_cpu)
        assert len(waited) == times


def test_what_is_refused_is_refused_again_and_not_remembered(listened):
    listened(**arguments())
    for _ in range(2):
        with pytest.raises(InputError, match=f"{MASK}: got shape \\(2, 5\\)"):
            listened(**arguments(**{MASK: torch.ones(SAMPLES, TEXT - 1)}))
        with pytest.raises(InputError, match="timestep: got None"):
            listened(**arguments(timestep=None))
        with pytest.raises(UsageError, match=r"no input for cross_attention_kwargs\.scale"):
            listened(**arguments(cross_attention_kwargs={"scale": 0.5}))
        for value, told in ((1, "1"), (np.ones((SAMPLES, TEXT)), "a ndarray")):  # no tensor, and not absent either
            with pytest.raises(InputError, match=f"{MASK}: got {told}, needed a torch.Tensor"):
                listened(**arguments(**{MASK: value}))
    assert (len(listened._plans), len(listened._runner.fed)) == (1, 1)
    listened(**arguments(cross_attention_kwargs={"scale": None}))


def test_sizes_without_end_do_not_fill_the_memory(listened):
    for length in range(1, MOST_PLANS + 10):
        listened(**arguments(encoder_hidden_states=torch.zeros(SAMPLES, length, 16)))
        assert np.array_equal(listened._runner.fed[-1][MASK], np.ones((SAMPLES, length)))
    assert len(listened._plans) == 9
