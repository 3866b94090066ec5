"""A real server in a process of its own, as NVIDIA's own client and a process manager meet it."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.http as triton

from lrq_export.loading import load

SLOW = {"batch": 8, "size": 64}  # some tenths of a second, so that several are inside at a time


@contextmanager
def server(package, *arguments):
    """The process and the address of its server; killed if the test left it running."""
    command = [sys.executable, "-m", "lrq_export", "serve", str(package), "--port", "0", "--json", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        event = json.loads(line)
        assert event["target"] == "onnxruntime"
        yield process, event["url"].removeprefix("http://")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def session(package):
    return load(package, threads=1).session


@pytest.fixture(scope="module")
def address(package):
    with server(package, "--name", "tiny", "--threads", "1") as (process, address):
        yield address
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert json.loads(out)["unanswered"] == 0


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as client:
        yield client


def arrays(batch=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "hidden_states": rng.standard_normal((batch, 1, size, size), np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 6, 16), np.float32),
        "timestep": np.full(batch, 400, np.float32),
        "encoder_attention_mask": np.ones((batch, 6), np.float32),
    }


def as_inputs(given, binary=True):
    inputs = []
    for name, array in given.items():
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    return inputs


def test_the_client_finds_a_live_and_ready_server(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("another")
    assert client.get_server_metadata()["name"] == "lrq-export"


def test_the_client_reads_the_session_s_tensors(client, session):
    found = client.get_model_metadata("tiny")
    assert [each["name"] for each in found["inputs"]] == [each.name for each in session.get_inputs()]
    assert [each["name"] for each in found["outputs"]] == ["sample"]
    config = client.get_model_config("tiny")
    assert [each["dims"] for each in config["input"]] == [each["shape"] for each in found["inputs"]]


OUTPUTS = {"not requested": None, "in bytes": True, "in JSON": False}


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
@pytest.mark.parametrize("form", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_a_served_answer_is_the_session_s_bit_for_bit(client, session, binary, form):
    asked = None if form is None else [triton.InferRequestedOutput("sample", binary_data=form)]
    for given in (arrays(), arrays(batch=1, size=12, seed=1)):
        (wanted,) = session.run(None, given)
        answer = client.infer("tiny", as_inputs(given, binary), outputs=asked, request_id="seven")
        assert answer.get_response()["id"] == "seven"
        assert answer.as_numpy("sample").tobytes() == wanted.tobytes()


def test_one_bit_of_the_input_is_seen(client, session):
    """The twin: were answers compared loosely, or not computed from the input, this would not differ."""
    given = arrays()
    (wanted,) = session.run(None, given)
    given["hidden_states"].view(np.int32)[0, 0, 0, 0] ^= 1 << 20
    assert client.infer("tiny", as_inputs(given)).as_numpy("sample").tobytes() != wanted.tobytes()


def test_an_absent_mask_masks_nothing(client, session):
    given = arrays()
    (wanted,) = session.run(None, given)
    del given["encoder_attention_mask"]
    assert client.infer("tiny", as_inputs(given)).as_numpy("sample").tobytes() == wanted.tobytes()


def test_the_client_is_told_what_it_did_wrong(client):
    given = arrays()
    given["timestep"] = given["timestep"][:1]
    with pytest.raises(triton.InferenceServerException, match=r"\[400\] timestep: ") as caught:
        client.infer("tiny", as_inputs(given))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(triton.InferenceServerException, match=r"\[404\] got model 'other', needed tiny"):
        client.infer("other", as_inputs(arrays()))


def test_asynchronous_requests_are_all_answered(address, session):
    cases = [arrays(seed=seed) for seed in range(8)]
    with triton.InferenceServerClient(address, concurrency=4) as client:
        pending = [client.async_infer("tiny", as_inputs(given)) for given in cases]
        got = [each.get_result().as_numpy("sample") for each in pending]
    assert all(each.tobytes() == session.run(None, given)[0].tobytes() for each, given in zip(got, cases, strict=True))


HOSTILE = {
    "a length beyond the body": b"Inference-Header-Content-Length: 99999\r\nContent-Length: 2\r\n\r\n{}",
    "a length that is none": b"Inference-Header-Content-Length: -1\r\nContent-Length: 2\r\n\r\n{}",
    "a body of an exabyte": b"Content-Length: 1152921504606846976\r\n\r\n",
    "no HTTP": b"Content-Length: \xff\xfe\r\n\r\n",
}


@pytest.mark.parametrize("rest", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_requests_get_a_4xx_and_the_server_lives_on(address, client, rest):
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n" + rest)
        assert connection.recv(4096).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))
    assert client.is_server_live()


def test_nothing_is_computed_for_a_client_that_left(address, client):
    """It sends a whole request and goes, while two others keep the session busy."""
    body, length = client.generate_request_body(as_inputs(arrays()))
    threads, answered = start_slow_requests(address, 2)
    wait_for_metric(address, "lrq_running 1.0", "lrq_queue_depth 1.0")
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as leaving:
        head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        leaving.sendall(f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + body)
    wait_for_metric(address, 'lrq_failures_total{reason="gone"} 1.0')
    for thread in threads:
        thread.join(60)
    assert sorted(answered) == [0, 1]


def start_slow_requests(address, count):
    """So many clients with a request each; what they are answered, by the seed of the request."""
    answered = {}

    def ask(seed):
        with triton.InferenceServerClient(address) as client:
            answered[seed] = client.infer("tiny", as_inputs(arrays(**SLOW, seed=seed))).as_numpy("sample")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    return threads, answered


def wait_for_metric(address, *lines):
    until = time.monotonic() + 60
    while not set(lines) <= set(urllib.request.urlopen(f"http://{address}/metrics").read().decode().splitlines()):
        assert time.monotonic() < until
        time.sleep(0.01)


def stopped_under_load(package, signals):
    """Exit code, and which of three requests inside were answered, of a server that gets `signals` meanwhile."""
    with server(package, "--name", "tiny", "--threads", "1", "--queue", "4") as (process, address):
        threads, answered = start_slow_requests(address, 3)
        wait_for_metric(address, "lrq_requests_total 3.0")
        for number in signals:
            process.send_signal(number)
        for thread in threads:
            thread.join(60)
        process.communicate(timeout=60)
        with pytest.raises(ConnectionError):
            socket.create_connection(tuple(address.split(":")))
        return process.returncode, answered


def test_a_drained_server_answers_what_it_accepted_and_exits_with_0(package, session):
    code, answered = stopped_under_load(package, [signal.SIGTERM])
    assert code == 0
    assert sorted(answered) == [0, 1, 2]
    for seed, got in answered.items():
        assert got.tobytes() == session.run(None, arrays(**SLOW, seed=seed))[0].tobytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_second_signal_ends_it_at_once_and_says_so(package):
    """The twin: the requests above were really inside when the signal came."""
    code, answered = stopped_under_load(package, [signal.SIGTERM, signal.SIGINT])
    assert code == 5
    assert len(answered) < 3


def test_its_bounds_are_those_of_the_command(package):
    """Of workers, of a body, its seconds and sizes, and of a drain; each is another than without its flag."""
    flags = ("--workers", 2, "--body-limit", 1, "--body-seconds", 1.5, "--limit", "samples=8", "--drain-seconds", 2)
    with server(package, "--name", "tiny", "--threads", "1", *map(str, flags)) as (process, address):
        threads, answered = start_slow_requests(address, 2)
        wait_for_metric(address, "lrq_running 2.0")
        for thread in threads:
            thread.join(60)
        assert len(answered) == 2
        with triton.InferenceServerClient(address) as client:
            with pytest.raises(triton.InferenceServerException, match="needed at most 8"):
                client.infer("tiny", as_inputs(arrays(batch=9)))
            with pytest.raises(triton.InferenceServerException, match="needed at most 1048576 bytes"):
                client.infer("tiny", as_inputs(arrays(batch=8, size=256)))
        with half_a_request(address) as slow:
            assert b" 408 " in slow.recv(100)
        half_a_request(address).close()
        wait_for_metric(address, 'lrq_failures_total{reason="slow"} 1.0', 'lrq_failures_total{reason="gone"} 1.0')
        process.send_signal(signal.SIGTERM)
        with triton.InferenceServerClient(address) as client:
            until = time.monotonic() + 1.5
            while client.is_server_ready():
                assert time.monotonic() < until
            assert client.infer("tiny", as_inputs(arrays())).as_numpy("sample").shape == (2, 1, 8, 8)
        process.communicate(timeout=60)
        assert process.returncode == 0


def half_a_request(address):
    """A connection over which half of a body came."""
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello")
    return connection


@pytest.mark.parametrize("library", ["uvicorn", "fastapi", "prometheus_client"])
def test_a_library_that_is_missing_is_named_with_its_extra(package, cli, monkeypatch, library):
    for name in [name for name in sys.modules if name.startswith("lrq_export.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    cli("serve", package).refused(4, library, "lrq-export[serve]")


def test_a_port_that_is_taken_and_a_bad_name_are_usage_errors(package, cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cli("serve", package, "--port", port).refused(2, f"127.0.0.1:{port}", "cannot listen")
    cli("serve", package, "--name", "a/b").refused(2, "--name")
    cli("serve", package, "--target", "tensorrt").refused(4, "holds no tensorrt engine", "--target tensorrt")
    cli("serve", package, "--target", "tpu").refused(2, "target: got 'tpu'")
    cli("serve", package, "--limit", "samples").refused(2, "--limit", "DIMENSION=SIZE")
    cli("serve", package / "graphs").refused(3, "not an lrq-export package")
