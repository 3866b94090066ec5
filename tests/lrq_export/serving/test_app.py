"""The routes and the queue over a model that answers when it is told to, and the requests that are refused."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from lrq_export.errors import UsageError
from lrq_export.models.base import SAMPLES, InputSpec
from lrq_export.serving import server
from lrq_export.serving.admission import LONGEST_WAIT, Admission
from lrq_export.serving.app import PIECE, Answer, Bounds, Service, create_app
from lrq_export.serving.model import ServedModel
from lrq_export.serving.protocol import JSON_LENGTH, RefusedError, TensorInfo

SPECS = {
    "x": InputSpec((SAMPLES, 2, "width"), multiple_of=2), "t": InputSpec((SAMPLES,)),
    "mask": InputSpec((SAMPLES, "width"), optional=True), "label": InputSpec((SAMPLES,), classes=10, optional=True),
}  # fmt: skip
X = np.arange(8, dtype=np.float32).reshape(1, 2, 4) / 3


class Doubling:
    """An engine that answers 2x, once `gate` is open."""

    specs = SPECS

    def __init__(self, target="onnxruntime", device="cpu"):
        self.target, self.device = target, torch.device(device)
        self.gate, self.entered, self.fed = threading.Event(), threading.Semaphore(0), []
        self.gate.set()
        self.error = None

    def run(self, fed):
        self.fed.append(fed)
        self.entered.release()
        assert self.gate.wait(20)
        if self.error:
            raise self.error
        return 2 * fed["x"]


@contextmanager
def serving(limits=None, target="onnxruntime", device="cpu", **bounds):
    session = Doubling(target, device)
    outputs = {"y": TensorInfo("y", "FP32", (-1, 2, -1))}
    service = Service(ServedModel(session, "double", outputs, limits), Bounds(**bounds))
    with TestClient(create_app(service)) as client:
        yield client, session, service
    session.gate.set()
    service.close()


def inputs(x=X, t=None, **more):
    arrays = {"x": x, "t": np.full(len(x), 5, np.float32) if t is None else t} | more
    return [
        {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.reshape(-1).tolist()}
        for name, array in arrays.items()
    ]


def infer(client, x=X, **more):
    return client.post("/v2/models/double/infer", json={"inputs": inputs(x, **more)})


def metric(client, name, **labels):
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    wanted = f"{name}{{{text}}}" if text else name
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.rsplit(" ", 1)[0] == wanted]
    return float(line.rsplit(" ", 1)[1])


def test_health_and_metadata():
    with serving() as (client, _, service):
        assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
        assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_configuration"]
        for path in ("/v2/models/double", "/v2/models/double/versions/1"):
            assert client.get(f"{path}/ready").status_code == 200
            found = client.get(path).json()
            assert found["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 2, -1]}
            assert client.get(f"{path}/config").json()["max_batch_size"] == 0
        service.draining = True
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503


@pytest.mark.parametrize(
    ("target", "device", "platform", "backend", "kind"),
    [
        ("onnxruntime", "cpu", "onnxruntime_onnx", "onnxruntime", "KIND_CPU"),
        ("onnxruntime", "cuda", "onnxruntime_onnx", "onnxruntime", "KIND_GPU"),
        ("tensorrt", "cuda:1", "tensorrt_plan", "tensorrt", "KIND_GPU"),
        ("tensorrt-rtx", "cuda", "tensorrt-rtx_plan", "tensorrt-rtx", "KIND_GPU"),
    ],
)
def test_the_engine_that_is_served_is_told(target, device, platform, backend, kind):
    with serving(target=target, device=device) as (client, _, _):
        assert client.get("/v2/models/double").json()["platform"] == platform
        config = client.get("/v2/models/double/config").json()
        assert (config["platform"], config["backend"]) == (platform, backend)
        assert config["instance_group"] == [{"kind": kind, "count": 1}]


@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_keeps_its_place_until_it_is_read_or_time_is_up(reads):
    service = Service(
        ServedModel(Doubling(), "double", {"y": TensorInfo("y", "FP32", (-1, 2, -1))}), Bounds(body_seconds=0.3)
    )
    body, inside = json.dumps({"inputs": inputs()}).encode(), []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        inside.append((message["type"], service.admission.inside))
        assert (service.admission.sending, service.admission.waiting) == (1, 0)
        if message.get("body") and not reads:
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v2/models/double/infer", "headers": [], "query_string": b""}
    asyncio.run(create_app(service)(scope, receive, send))
    service.close()
    assert inside[:2] == [("http.response.start", 1), ("http.response.body", 1)]
    assert service.admission.inside == 0
    counted = service.metrics.registry.get_sample_value
    assert counted("lrq_answered_total") == reads
    assert counted("lrq_failures_total", {"reason": "unread"}) == (not reads)
    assert service.admission.sending == 0


def test_a_long_answer_is_sent_in_pieces():
    told, body = [], bytes(range(256)) * 4096

    async def send(message):
        told.append(message)

    asyncio.run(Answer(body, {}, 5, stays, lambda whole: told.append(whole))({}, None, send))
    start, *pieces, last, whole = told
    assert dict(start["headers"])[b"content-length"] == str(len(body)).encode()
    assert b"".join(piece["body"] for piece in pieces) == body
    assert [len(piece["body"]) for piece in pieces] == [PIECE] * 4
    assert (last["body"], last["more_body"], whole) == (b"", False, True)


async def stays():
    return False


async def leaves():
    return True


def test_an_answer_to_a_client_that_left_is_not_counted_as_read():
    """What is sent behind its back vanishes without an error."""
    told = []

    async def send(message):
        pass

    asyncio.run(Answer(b"x", {}, 5, leaves, told.append)({}, None, send))
    asyncio.run(Answer(b"x", {}, 5, stays, told.append)({}, None, send))
    assert told == [False, True]


def test_a_drain_waits_before_it_refuses(monkeypatch):
    """For so long load balancers need to notice that the server is not ready any more."""
    monkeypatch.setattr(server, "LINGER_SECONDS", 0)
    uvicorn = SimpleNamespace(should_exit=False, server_state=SimpleNamespace(connections=[]))

    async def drained():
        ending = asyncio.create_task(server.end(uvicorn, SimpleNamespace(admission=Admission(1, 1)), 0.3))
        await asyncio.sleep(0.1)
        assert not uvicorn.should_exit
        await ending

    asyncio.run(drained())
    assert uvicorn.should_exit


def test_a_drain_does_not_wait_for_who_does_not_read(monkeypatch):
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    ended, admission = [], Admission(1, 1)
    connection = SimpleNamespace(transport=SimpleNamespace(abort=lambda: ended.append(admission.sending)))
    uvicorn = SimpleNamespace(should_exit=False, server_state=SimpleNamespace(connections=[connection]))

    async def drained():
        with admission.admitted(), admission.answering():
            await asyncio.wait_for(server.end(uvicorn, SimpleNamespace(admission=admission), 0.0), 10)

    asyncio.run(drained())
    assert ended == [1]


def test_a_drain_leaves_those_who_read_nothing_once_all_are_answered(monkeypatch):
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.1)
    events, admission = [], Admission(1, 1)
    connection = SimpleNamespace(transport=SimpleNamespace(abort=lambda: events.append(admission.inside)))
    uvicorn = SimpleNamespace(should_exit=False, server_state=SimpleNamespace(connections={1: connection}.values()))

    async def drained():
        with admission.admitted():
            ending = asyncio.create_task(server.end(uvicorn, SimpleNamespace(admission=admission), 0.0))
            await asyncio.sleep(0.3)
            assert uvicorn.should_exit
            assert events == []
        await ending

    asyncio.run(drained())
    assert events == [0]


@pytest.mark.parametrize(
    "path", ["/v2/models/other", "/v2/models/double/versions/2", "/v3", "/v2/models/double/infer/x"]
)
def test_what_is_not_there_is_404_in_one_line(path):
    with serving() as (client, _, _):
        answer = client.get(path)
        assert answer.status_code == 404
        assert list(answer.json()) == ["error"]


def test_an_answer_is_the_session_s():
    with serving() as (client, session, _):
        (output,) = infer(client).json()["outputs"]
        assert np.array(output["data"], np.float32).tobytes() == (2 * X).tobytes()
        assert session.fed[0]["mask"].tolist() == [[1, 1, 1, 1]]
        assert metric(client, "lrq_requests_total") == metric(client, "lrq_answered_total") == 1
        assert metric(client, "lrq_request_seconds_count") == metric(client, "lrq_run_seconds_count") == 1


NOT_TAKEN = {
    "a multiple that is none": ({"x": X[:, :, :3]}, "multiple of 2"),
    "samples that differ": ({"t": np.zeros(2, np.float32)}, "samples"),
    "a timestep for all": ({"x": np.repeat(X, 2, 0), "t": np.zeros(1, np.float32)}, "needed [2]"),
    "a mask of another width": ({"mask": np.ones((1, 6), np.float32)}, "width"),
    "no such class": ({"label": np.array([10], np.float32)}, "labels"),
    "infinite": ({"x": np.full_like(X, np.inf)}, "finite"),
    "not a number": ({"t": np.full(1, np.nan, np.float32)}, "finite"),
    "too many samples": ({"x": np.repeat(X, 3, 0)}, "at most 2"),
}


@pytest.mark.parametrize(("arrays", "part"), NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_what_the_model_does_not_take_is_refused(arrays, part):
    arrays = {"x": X} | arrays
    arrays.setdefault("t", np.full(len(arrays["x"]), 5, np.float32))
    entries, blob = [], b""
    for name, array in arrays.items():
        blob += array.tobytes()
        parameters = {"binary_data_size": array.nbytes}
        entries.append({"name": name, "datatype": "FP32", "shape": list(array.shape), "parameters": parameters})
    text = json.dumps({"inputs": entries}).encode()
    with serving(limits={"samples": 2}) as (client, session, _):
        answer = client.post("/v2/models/double/infer", content=text + blob, headers={JSON_LENGTH: str(len(text))})
        assert answer.status_code == 400
        assert part in answer.json()["error"]
        assert len(answer.json()["error"].splitlines()) == 1
        assert session.fed == []
        assert metric(client, "lrq_failures_total", reason="invalid") == 1


def test_what_samples_share_is_the_same_for_all_of_them():
    """The model takes the first sample's, which would answer the others wrongly."""
    positions = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    with serving() as (_, session, service):
        session.specs = service.model.specs = {"x": SPECS["x"], "ids": InputSpec((SAMPLES, "tokens", 2), shared=True)}
        given = {"x": X.repeat(2, 0), "ids": positions.repeat(2, 0)}
        assert service.model.check(given)["ids"].shape == (2, 2, 2)
        given["ids"][1, 0, 1] += 1
        with pytest.raises(RefusedError, match="ids: got values that differ between samples"):
            service.model.check(given)


def test_a_server_sends_what_is_small_at_once():
    with server.listen("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_missing_input_is_named():
    with serving() as (client, _, _):
        answer = client.post("/v2/models/double/infer", json={"inputs": inputs()[:1]})
        assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "t")


def test_a_limit_on_a_dimension_that_is_none_is_a_usage_error():
    with pytest.raises(UsageError, match="needed one of samples, width"), serving(limits={"depth": 1}):
        pass


def test_a_full_queue_says_when_to_come_back_and_loses_nobody():
    with serving(workers=1, queue=2) as (client, session, service):
        session.gate.clear()
        answers = [None] * 3

        def ask(index):
            answers[index] = infer(client, X + index)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        assert session.entered.acquire(timeout=20)
        wait_for(lambda: service.admission.inside == 3)
        assert (metric(client, "lrq_running"), metric(client, "lrq_queue_depth")) == (1, 2)
        refused = infer(client)
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["Retry-After"]) <= LONGEST_WAIT
        assert "queue is full" in refused.json()["error"]
        assert client.get("/v2/health/ready").status_code == 200  # busy is not broken
        session.gate.set()
        for thread in threads:
            thread.join(20)
        for index, answer in enumerate(answers):
            (output,) = answer.json()["outputs"]
            assert np.array(output["data"], np.float32).tobytes() == (2 * (X + np.float32(index))).tobytes()
        assert infer(client).status_code == 200
        assert metric(client, "lrq_failures_total", reason="busy") == 1
        assert service.admission.inside == service.admission.running == 0


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_session_that_fails_is_500_and_the_next_request_is_served():
    with serving(queue=0) as (client, session, _):
        session.error = RuntimeError("out of\nmemory")
        answer = infer(client)
        assert (answer.status_code, answer.json()) == (500, {"error": "the engine failed: out of memory"})
        session.error = None
        assert infer(client).status_code == 200
        assert metric(client, "lrq_failures_total", reason="failed") == 1


def test_bodies_have_a_limit_declared_or_not():
    with serving(body_bytes=1000) as (client, _, _):
        declared = client.post("/v2/models/double/infer", content=b"x" * 1001)
        chunked = client.post("/v2/models/double/infer", content=(b"x" * 400 for _ in range(3)))
        assert [each.status_code for each in (declared, chunked)] == [413, 413]
        assert metric(client, "lrq_failures_total", reason="too large") == 2


def test_compressed_bodies_and_two_lengths_are_refused():
    with serving() as (client, _, _):
        packed = client.post("/v2/models/double/infer", content=b"x", headers={"Content-Encoding": "gzip"})
        twice = client.post("/v2/models/double/infer", content=b"{}", headers=[(JSON_LENGTH, "1"), (JSON_LENGTH, "2")])
        assert (packed.status_code, twice.status_code) == (415, 400)


def test_retry_after_follows_the_queue():
    admission = Admission(workers=2, queue=6)
    assert admission.seconds_until_free() == 1
    admission.running = 1
    admission.done(3.0)
    admission.inside = 8
    assert admission.seconds_until_free() == 12
    with pytest.raises(RefusedError) as caught, admission.admitted():
        pass
    assert caught.value.headers == {"Retry-After": "12"}
    assert admission.inside == 8
