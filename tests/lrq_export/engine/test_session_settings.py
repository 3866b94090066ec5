"""session.json: what a session is opened with, by everyone who opens it, and what `admit` lets it say."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from lrq_export.admit import _check_session
from lrq_export.engine.onnxruntime import open_session
from lrq_export.engine.session_settings import EXACT_PRODUCTS, FOLD_BODIES, STOP_SPINNING, SessionSettings
from lrq_export.errors import InputError
from lrq_export.loading import load
from lrq_export.runtime import feeds
from lrq_export.serving.repository import Layout, _parameters
from lrq_export.verify.reference import Reference

FOLDER = "engine/onnxruntime"


@pytest.fixture
def resettled(package, copy_of, reseal):
    """A copy of the package with another session.json."""

    def write(**changes):
        folder = copy_of(package)
        SessionSettings(where_products_saturate=EXACT_PRODUCTS, **changes).write(folder / FOLDER)
        reseal(folder)
        return folder

    return write


def test_a_build_writes_what_sessions_need(package):
    held = json.loads((package / FOLDER / "session.json").read_text())
    assert held["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert held["threads"] == {"intra_op": 0, "inter_op": 0}
    assert held["options"] == dict([STOP_SPINNING])  # no body is left to fold
    assert SessionSettings.read(package / FOLDER).where_products_saturate == EXACT_PRODUCTS


def test_threads_and_options_reach_the_session_and_triton(resettled):
    folder = resettled(intra_op_threads=1, inter_op_threads=2, options=dict([STOP_SPINNING, FOLD_BODIES]))
    options = load(folder).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 2)
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert load(folder, threads=2).session.get_session_options().intra_op_num_threads == 2
    parameters = _parameters(folder, Layout("name", 1, 8, 1, None, False, False, ()))
    assert (parameters["intra_op_thread_count"], parameters["inter_op_thread_count"]) == ("1", "2")


def test_a_session_of_an_older_package_is_the_same(package, copy_of, reseal):
    folder = copy_of(package)
    path = folder / FOLDER / "session.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({key: held[key] for key in ("config_where_products_saturate", "providers")}))
    assert SessionSettings.read(folder / FOLDER) == SessionSettings.read(package / FOLDER)


def test_folding_bodies_changes_no_bit(package):
    """Of the portable model, which has a body for each of its layers."""
    recorded, specs = Reference.load(package).inputs, load(package).specs
    fed = feeds(specs, {name: tensor[:2] for name, tensor in recorded.items()})
    answers = []
    for options in ({}, dict([FOLD_BODIES])):
        made = SessionSettings(options=options).session_options(saturate=False)
        session = onnxruntime.InferenceSession(str(package / "model.onnx"), made, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, fed)[0])
    assert np.array_equal(*answers)
    other = {name: torch.from_numpy(array) for name, array in fed.items()} | {"timestep": torch.tensor([1.0, 2.0])}
    assert not np.array_equal(answers[0], open_session(package / FOLDER).run(None, feeds(specs, other))[0])


REFUSED = {
    "an option that is not known": ({"options": {"session.log_severity": "0"}}, "session.log_severity"),
    "a value that is none": ({"options": {"session.disable_quant_qdq": "yes"}}, "session.disable_quant_qdq"),
    "a key that is not known": ({"library": {}}, "'library'"),
    "an option beside the lists": ({"session.disable_quant_qdq": "1"}, "session.disable_quant_qdq"),
    "a provider that loads a library": ({"providers": ["VitisAIExecutionProvider"]}, "VitisAIExecutionProvider"),
    "too many threads": ({"threads": {"intra_op": 1 << 20}}, "intra_op"),
    "no number of threads": ({"threads": {"inter_op": "2"}}, "inter_op"),
    "half a yes as threads": ({"threads": {"inter_op": True}}, "inter_op"),
    "other threads": ({"threads": {"session.disable_quant_qdq": 1}}, "session.disable_quant_qdq"),
    "a list of threads": ({"threads": [1, 2]}, "threads"),
}


@pytest.mark.parametrize(("changes", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_what_session_json_may_not_say_is_refused(tmp_path, changes, part):
    SessionSettings(where_products_saturate=EXACT_PRODUCTS, intra_op_threads=4).write(tmp_path)
    path = tmp_path / "session.json"
    _check_session(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=r"session\.json: ") as refused:
        _check_session(path)
    assert part in str(refused.value)
