"""The routes of the Open Inference Protocol v2 over one model, with Prometheus metrics beside them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lrq_export import __version__
from lrq_export.errors import LrqError
from lrq_export.serving.admission import Admission
from lrq_export.serving.metrics import Metrics
from lrq_export.serving.model import VERSION, ServedModel
from lrq_export.serving.protocol import JSON_LENGTH, InferRequest, RefusedError, invalid, parse_request, render_answer
from lrq_export.serving.triton import config_json, model_config

PIECE = 1 << 18  # bytes of an answer that are handed to its connection at a time
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
log = logging.getLogger("lrq_export.serving")


@dataclass(frozen=True)
class Bounds:
    """What a server takes at most."""

    workers: int = 1  # requests in the session at a time; each uses all of its threads
    queue: int = 16  # requests that wait
    body_bytes: int = 64 << 20
    body_seconds: float = 30.0  # from a request's headers to the last byte of its body; as long to read the answer


class Answer(Response):
    """Sent in pieces, each when the client has read most of those before; `sent` is told whether it read all in time.

    `gone` tells whether the client has left: what is sent to it then vanishes.
    """

    def __init__(
        self,
        content: bytes,
        headers: Mapping[str, str],
        seconds: float,
        gone: Callable[[], Awaitable[bool]],
        sent: Callable[[bool], None],
    ):
        super().__init__(content, headers=dict(headers))
        self._seconds, self._gone, self._sent = seconds, gone, sent

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        whole = False
        try:
            async with asyncio.timeout(self._seconds):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for begin in range(0, len(self.body), PIECE):
                    piece = self.body[begin : begin + PIECE]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                whole = not await self._gone()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            whole = False
            log.warning("an answer was not read in %g s", self._seconds)
        finally:
            self._sent(whole)


class Service:
    """One model with its queue and its counters. Everything but `_run` happens on the event loop."""

    def __init__(self, model: ServedModel, bounds: Bounds):
        self.model, self.bounds = model, bounds
        self.admission = Admission(bounds.workers, bounds.queue)
        self.metrics = Metrics(self.admission)
        self.draining = False  # still serving, but no longer ready for more
        self._threads = ThreadPoolExecutor(bounds.workers, thread_name_prefix="lrq-serve")

    async def infer(self, request: Request) -> Response:
        """Answer one request with tensors, or with one line that says why not."""
        started = time.perf_counter()
        self.metrics.requests.inc()
        with ExitStack() as place:
            try:
                place.enter_context(self.admission.admitted())
                body = await read_body(request, self.bounds)
                headers, answer = await self._in_turn(request, body)
            except RefusedError as refused:
                self.metrics.failures.labels(refused.reason).inc()
                return error_response(refused.status, str(refused), refused.headers)
            place.enter_context(self.admission.answering())
            held = place.pop_all()  # until the answer is sent

        def sent(whole: bool) -> None:
            held.close()
            if not whole:
                self.metrics.failures.labels("unread").inc()
                return
            self.metrics.answered.inc()
            self.metrics.request_seconds.observe(time.perf_counter() - started)

        return Answer(answer, headers, self.bounds.body_seconds, request.is_disconnected, sent)

    async def _in_turn(self, request: Request, body: bytearray) -> tuple[dict[str, str], bytes]:
        await self.admission.turn()
        seconds = None
        try:
            if await request.is_disconnected():
                raise RefusedError(499, "gone", "the client left before its turn")
            loop = asyncio.get_running_loop()
            headers, answer, seconds = await loop.run_in_executor(
                self._threads, self._run, body, request.headers.getlist(JSON_LENGTH)
            )
            return headers, answer
        finally:
            self.admission.done(seconds)

    def _run(self, body: bytearray, json_lengths: list[str]) -> tuple[dict[str, str], bytes, float]:
        """Headers and body of the answer, and the seconds that the engine took."""
        model = self.model
        if len(json_lengths) > 1:
            raise invalid(f"{JSON_LENGTH}: got it {len(json_lengths)} times, needed it once")
        asked, fed = self._checked(body, json_lengths[0] if json_lengths else None)
        started = time.perf_counter()
        try:
            arrays = model.run(fed)
        except Exception as error:  # runtimes have classes of their own for every kind of failure
            log.exception("the engine failed")
            raise RefusedError(500, "failed", f"the engine failed: {' '.join(str(error).split())[:200]}") from error
        seconds = time.perf_counter() - started
        self.metrics.run_seconds.observe(seconds)
        return *render_answer(model.name, VERSION, asked, arrays, model.outputs), seconds

    def _checked(self, body: bytearray, json_length: str | None) -> tuple[InferRequest, dict[str, Any]]:
        asked = parse_request(body, json_length, self.model.inputs, self.model.outputs)
        try:
            return asked, self.model.check(asked.arrays)
        except LrqError as error:
            raise invalid(str(error)) from None

    def close(self) -> None:
        self._threads.shutdown(wait=True)


async def read_body(request: Request, bounds: Bounds) -> bytearray:
    """The whole body. Raises RefusedError for one that is too large, takes too long, or never ends."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > bounds.body_bytes:
        raise too_large(bounds)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "invalid", "Content-Encoding: needed none: compressed bodies are not offered")
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > bounds.body_bytes:
                    raise too_large(bounds)
                body += chunk
    except TimeoutError:
        message = f"body: got {len(body)} bytes in {bounds.body_seconds:g} s, needed all"
        raise RefusedError(408, "slow", message, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise RefusedError(499, "gone", "the client left before its body was read") from None
    return body


def too_large(bounds: Bounds) -> RefusedError:
    message = f"body: needed at most {bounds.body_bytes} bytes"
    return RefusedError(413, "too large", message, {"Connection": "close"})


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=dict(headers or {}))


def create_app(service: Service) -> FastAPI:
    """The application; `service` is closed by whoever made it."""
    app, model = FastAPI(openapi_url=None), service.model
    config = config_json(
        model_config(
            model.name, model.inputs.values(), model.outputs.values(), kind=model.kind, platform=model.platform
        )
    )

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), error.headers)

    def check_name(name: str, version: str) -> None:
        if name != model.name:
            raise HTTPException(404, f"got model {name[:60]!r}, needed {model.name}")
        if version != VERSION:
            raise HTTPException(404, f"got version {version[:60]!r} of {model.name}, needed {VERSION}")

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response()

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return Response(status_code=503 if service.draining else 200)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "lrq-export", "version": __version__, "extensions": EXTENSIONS}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = VERSION) -> dict[str, Any]:
        check_name(name, version)
        return model.metadata()

    @app.get("/v2/models/{name}/config")
    @app.get("/v2/models/{name}/versions/{version}/config")
    async def configuration(name: str, version: str = VERSION) -> dict[str, Any]:
        check_name(name, version)
        return config

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return await ready()

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return await service.infer(request)

    @app.get("/metrics")
    async def metrics() -> Response:
        content_type, page = service.metrics.render()
        return Response(page, headers={"Content-Type": content_type})

    return app
