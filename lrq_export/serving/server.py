"""`lrq-export serve`: the application under uvicorn, from the first connection to the last answer.

SIGTERM and SIGINT drain it: what was accepted is answered, then the process ends. A second signal ends it at once.
"""

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrq_export.errors import Interrupted, MissingError, UsageError

# A client that sends its next request on a connection that the server is just closing loses it: uvicorn's own 5 s are
# shorter than many clients pause between two steps.
KEEP_ALIVE_SECONDS = 75
LINGER_SECONDS = 5  # for the last bytes of answers, at the end of a drain
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Report = Callable[[dict[str, Any]], None]


def serve(
    package: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    target: str = "auto",
    threads: int | None = None,
    limits: Mapping[str, int] | None = None,
    drain_seconds: float = 0.0,
    report: Report = lambda event: None,
    **bounds: Any,
) -> None:
    """Serve an engine of a package, that of `target` as in `load`, until a signal says to stop.

    `bounds` are those of `app.Bounds`.

    `report` is told {"event": "serving", "url", "model"} once requests are taken, and {"event": "drained", ...} at the
    end. For `drain_seconds` after the signal the server says that it is not ready and takes requests all the same: as
    long as load balancers need to notice. Raises InputError for a bad package, UsageError for a port that is taken.
    """
    name = check_name(name or Path(package).resolve().name)
    try:
        import uvicorn

        from lrq_export.serving.app import Bounds, Service, create_app
    except ImportError as error:
        raise MissingError(
            f"serving needs {error.name}, which is not installed", hint="pip install 'lrq-export[serve]'"
        ) from error
    from lrq_export.loading import load
    from lrq_export.serving.model import ServedModel
    from lrq_export.serving.signature import outputs_of

    with (
        load(package, target=target, threads=threads) as transformer,
        contextlib.closing(
            Service(ServedModel(transformer, name, outputs_of(Path(package)), limits), Bounds(**bounds))
        ) as service,
        listen(host, port) as listener,
    ):
        config = uvicorn.Config(
            create_app(service), log_config=None, access_log=False, lifespan="off", http="h11", ws="none",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # its own handlers end the process by the signal, not with 0
        report({"event": "serving", "url": url_of(listener), "model": name, "target": transformer.target})
        unanswered = asyncio.run(_until_signalled(server, service, listener, drain_seconds))
        answered = int(service.metrics.registry.get_sample_value("lrq_answered_total"))
        report({"event": "drained", "answered": answered, "unanswered": unanswered})
    if unanswered:
        raise Interrupted(f"stopped at once: {unanswered} requests were not answered")


async def _until_signalled(server: Any, service: Any, listener: socket.socket, drain_seconds: float) -> int:
    """Serve; returns how many requests were left without an answer."""
    loop, ending = asyncio.get_running_loop(), []  # of a task the loop itself keeps no hold

    def stop() -> None:
        if service.draining:
            server.should_exit = server.force_exit = True
            return
        service.draining = True
        ending.append(loop.create_task(end(server, service, drain_seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listener])
    for task in ending:
        task.cancel()
    return service.admission.inside


async def end(server: Any, service: Any, drain_seconds: float) -> None:
    """Take no more requests after `drain_seconds`; once all are computed, leave those who do not read their answers."""
    await asyncio.sleep(drain_seconds)
    server.should_exit = True
    while service.admission.inside > service.admission.sending:
        await asyncio.sleep(0.05)
    await asyncio.sleep(LINGER_SECONDS)
    for connection in list(server.server_state.connections):
        connection.transport.abort()


def check_name(name: str) -> str:
    """A name that paths and configurations can hold as it is."""
    if not NAME.fullmatch(name):
        raise UsageError(f"--name: got {name!r}, needed letters, digits, dots, dashes and underscores")
    return name


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections already. Raises UsageError for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{host}:{port}: cannot listen: {reason}", hint="choose another --host or --port") from None
    # Connections inherit it. asyncio, which would set it, takes such a socket for none of TCP; without it the kernel
    # keeps an answer's body back until its headers are acknowledged: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
