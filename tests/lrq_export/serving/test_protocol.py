"""What the wire may hold: every tensor comes through bit for bit, and everything else is refused in one line."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.serving.protocol import (
    JSON_LENGTH,
    JSON_LIMIT,
    InferRequest,
    RefusedError,
    TensorInfo,
    Wanted,
    parse_request,
    render_answer,
)

INPUTS = {
    "x": TensorInfo("x", "FP32", (-1, 3)), "t": TensorInfo("t", "FP32", (-1,)), "n": TensorInfo("n", "INT64", (-1,)),
}  # fmt: skip
OUTPUTS = {"y": TensorInfo("y", "FP32", (-1, 3))}
X = np.array([[1.5, -0.0, 1e-45], [3e38, 0.1, -7]], np.float32)
EVERYTHING = tuple(Wanted(name, True) for name in OUTPUTS)


def entry(name="x", array=X, datatype="FP32", **changes):
    """An input whose bytes follow the JSON."""
    parameters = {"binary_data_size": array.nbytes}
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "parameters": parameters} | changes


def as_json(data, name="x", shape=(2, 3), datatype="FP32"):
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": data}


def body_of(*inputs, blob=b"", **message):
    """A body, and what its header says."""
    text = json.dumps({"inputs": list(inputs)} | message).encode()
    return text + blob, str(len(text))


def parse(body, length=None):
    return parse_request(body, length, INPUTS, OUTPUTS)


def refusal(body, length=None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(body, length)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    return caught.value


def test_bytes_behind_the_json_are_the_tensors_in_their_order():
    t = np.array([4, 5], np.float32)
    body, length = body_of(entry("t", t), entry(), blob=t.tobytes() + X.tobytes())
    got = parse(body, length)
    assert got.arrays["x"].tobytes() == X.tobytes()
    assert got.arrays["t"].tobytes() == t.tobytes()
    assert all(array.flags.aligned and array.flags.writeable for array in got.arrays.values())
    assert got.outputs == (Wanted("y", False),)


def test_tensors_in_another_order_are_seen():
    """The twin: had the order been lost, x would hold t's bytes."""
    body, length = body_of(entry("t", X[0]), entry("x", X[1:]), blob=X[1:].tobytes() + X[0].tobytes())
    assert parse(body, length).arrays["x"].tobytes() != X[1:].tobytes()


@pytest.mark.parametrize("data", [X.tolist(), X.reshape(-1).tolist()], ids=["nested", "flat"])
def test_numbers_in_json_keep_every_bit(data):
    assert parse(*body_of(as_json(data))[:1]).arrays["x"].tobytes() == X.tobytes()


def test_whole_numbers_of_json_are_floats_too_but_not_the_other_way_round():
    assert parse(body_of(as_json([1, 2, 3], shape=(1, 3)))[0]).arrays["x"].tolist() == [[1, 2, 3]]
    assert parse(body_of(as_json([2**53 + 1], "n", (1,), "INT64"))[0]).arrays["n"].tolist() == [2**53 + 1]
    assert "n: data" in str(refusal(body_of(as_json([1.0], "n", (1,), "INT64"))[0]))


def test_outputs_are_asked_for_by_name_and_form():
    x = as_json(X.tolist())
    assert parse(body_of(x, parameters={"binary_data_output": True})[0]).outputs == (Wanted("y", True),)
    assert parse(body_of(x, outputs=[{"name": "y"}])[0]).outputs == (Wanted("y", False),)
    asked = [{"name": "y", "parameters": {"binary_data": True}}]
    assert parse(body_of(x, outputs=asked)[0]).outputs == (Wanted("y", True),)


HOSTILE_LENGTHS = ["", " ", "-1", "+5", "0x10", "1e3", "٣", "1_0", "9" * 40, "18446744073709551616", "5, 5", "nan"]


@pytest.mark.parametrize("length", HOSTILE_LENGTHS)
def test_a_hostile_header_length_is_refused(length):
    body, _ = body_of(entry(), blob=X.tobytes())
    refused = refusal(body, length)
    assert refused.status == 400
    assert JSON_LENGTH in str(refused)


@pytest.mark.parametrize("off", [-1, 1, -20, 5])
def test_a_header_length_that_is_off_is_refused(off):
    body, length = body_of(entry(), blob=X.tobytes())
    assert refusal(body, str(int(length) + off)).status == 400


BROKEN = {
    "nothing": (b"", "JSON"),
    "no JSON": (b"{", "JSON"),
    "a list": (b"[]", "object"),
    "not UTF-8": (b'{"inputs": "\xff"}', "JSON"),
    "NaN": (body_of(as_json([float("nan")] * 6))[0], "NaN"),
    "deep": (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    "a number of many digits": (b'{"inputs":' + b"9" * 10_000 + b"}", "JSON"),
    "an id that is a number": (body_of(as_json(X.tolist()), id=3)[0], "id"),
    "no inputs": (b"{}", "inputs"),
    "inputs of numbers": (b'{"inputs":[1]}', "inputs"),
    "parameters in a list": (body_of(as_json(X.tolist()) | {"parameters": []})[0], "parameters"),
    "an unknown input": (body_of(as_json([1], "z", (1,)))[0], "one of x, t, n"),
    "a name in a list": (body_of(as_json([1]) | {"name": ["x"]})[0], "one of x, t, n"),
    "an input twice": (body_of(as_json(X.tolist()), as_json(X.tolist()))[0], "twice"),
    "another type": (body_of(as_json(X.tolist(), datatype="FP64"))[0], "FP64"),
    "no type": (body_of(as_json(X.tolist(), datatype=None))[0], "needed FP32"),
    "no shape": (body_of({"name": "x", "datatype": "FP32", "data": [1]})[0], "shape"),
    "another rank": (body_of(as_json([1, 2, 3], shape=(3,)))[0], "shape"),
    "another size": (body_of(as_json([1, 2], shape=(1, 2)))[0], "needed [-1, 3]"),
    "a size of zero": (body_of(as_json([], shape=(0, 3)))[0], "shape"),
    "a negative size": (body_of(as_json([1], shape=(-1, 3)))[0], "shape"),
    "a size in a string": (body_of(as_json([1], shape=("1", 3)))[0], "shape"),
    "a size that is true": (body_of(as_json([1, 2, 3], shape=(True, 3)))[0], "shape"),
    "a fraction as a size": (body_of(as_json([1, 2, 3], shape=(1.0, 3)))[0], "shape"),
    "too few numbers": (body_of(as_json([1, 2, 3]))[0], "data"),
    "ragged lists": (body_of(as_json([[1, 2, 3], [4]]))[0], "data"),
    "lists of another shape": (body_of(as_json([[1, 2], [3, 4], [5, 6]]))[0], "data"),
    "words": (body_of(as_json(["1"] * 6))[0], "data"),
    "null": (body_of(as_json([None] * 6))[0], "data"),
    "truth": (body_of(as_json([True] * 6))[0], "data"),
    "objects": (body_of(as_json([{}] * 6))[0], "data"),
    "no data": (body_of(as_json(None))[0], "data"),
    "numbers that do not fit": (body_of(as_json([2**63], "n", (1,), "INT64"))[0], "hold"),
    "an unknown output": (body_of(as_json(X.tolist()), outputs=[{"name": "z"}])[0], "one of y"),
    "classification": (
        body_of(as_json(X.tolist()), outputs=[{"name": "y", "parameters": {"classification": 1}}])[0], "classification",
    ),
    "shared memory": (body_of(entry(parameters={"shared_memory_region": "a"}))[0], "shared memory"),
    "a flag that is a number": (body_of(as_json(X.tolist()), parameters={"binary_data_output": 1})[0], "true or false"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "part"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_refused_by_name(body, part):
    refused = refusal(body)
    assert (refused.status, refused.reason) == (400, "invalid")
    assert part in str(refused)


WRONG_BYTES = {
    "fewer than claimed": (entry(), X.tobytes()[:-1]), "more than claimed": (entry(), X.tobytes() + b"\0"),
    "another number than the shape's": (entry(parameters={"binary_data_size": 20}), X.tobytes()[:20]),
    "a negative number": (entry(parameters={"binary_data_size": -24}), X.tobytes()),
    "a fraction": (entry(parameters={"binary_data_size": 24.0}), X.tobytes()),
    "both forms": (entry(data=[1]), X.tobytes()),
}  # fmt: skip


@pytest.mark.parametrize(("claimed", "blob"), WRONG_BYTES.values(), ids=WRONG_BYTES.keys())
def test_bytes_that_are_not_what_was_claimed_are_refused(claimed, blob):
    body, length = body_of(claimed, blob=blob)
    assert refusal(body, length).status == 400


@pytest.mark.parametrize("shape", [(2**31 - 1, 3), (2**63, 3), (10**400, 3)])
def test_a_huge_claim_takes_no_memory(shape):
    size = 12 * shape[0]
    body, length = body_of(entry(shape=list(shape), parameters={"binary_data_size": size}), blob=X.tobytes())
    claimed = body_of(as_json([1, 2, 3], shape=shape))[0]
    tracemalloc.start()
    refusal(body, length)
    refusal(claimed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_json_without_end_is_too_large():
    refused = refusal(b" " * (JSON_LIMIT + 1))
    assert (refused.status, refused.reason) == (413, "too large")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400), st.one_of(st.none(), st.text(max_size=12), st.integers(0, 400).map(str)))
def test_random_bytes_are_refused_and_nothing_else_is_raised(body, length):
    refusal(body, length)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_request_is_refused_or_whole(data):
    body, length = body_of(entry(), entry("t", X[0]), blob=X.tobytes() + X[0].tobytes())
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        arrays = parse(damaged, length).arrays
    except RefusedError:
        return
    assert all(array.dtype == INPUTS[name].dtype for name, array in arrays.items())
    assert all(array.ndim == len(INPUTS[name].shape) for name, array in arrays.items())


def answer(array, *wanted, id=None):
    return render_answer("m", "1", InferRequest(id, {}, wanted), {"y": array}, OUTPUTS)


def test_an_answer_is_json_with_its_tensors_behind_it():
    headers, body = answer(X, *EVERYTHING, id="seven")
    length = int(headers[JSON_LENGTH])
    message = json.loads(body[:length])
    assert (message["model_name"], message["model_version"], message["id"]) == ("m", "1", "seven")
    (output,) = message["outputs"]
    assert output == {
        "name": "y", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24},
    }  # fmt: skip
    assert body[length:] == X.tobytes()


def test_an_answer_in_json_keeps_every_bit():
    headers, body = answer(X, Wanted("y", False))
    assert JSON_LENGTH not in headers
    (output,) = json.loads(body)["outputs"]
    assert np.array(output["data"], np.float32).tobytes() == X.tobytes()


def test_nan_is_answered_in_bytes_but_not_in_json():
    broken = np.full((1, 3), np.nan, np.float32)
    assert answer(broken, *EVERYTHING)[1].endswith(broken.tobytes())
    with pytest.raises(RefusedError, match="NaN") as caught:
        answer(broken, Wanted("y", False))
    assert (caught.value.status, caught.value.reason) == (500, "failed")
