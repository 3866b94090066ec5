"""`lrq-export serve`, `serve-config` and `bench`: a package at work."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lrq_export.admit import admit
from lrq_export.errors import UsageError
from lrq_export.loading import admit_target
from lrq_export.recipe import MOST_THREADS

_SHOWN_LAYERS = 20
Package = Annotated[Path, typer.Argument(help="A package that lrq-export build wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable lines.")]
Name = Annotated[str | None, typer.Option(help="Name of the model; default: the package's folder.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of one run; default: as ONNX Runtime chooses.")
]


def add_serving(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(serve)
    app.command()(serve_config)
    app.command()(bench)


def serve(
    package: Package,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Name = None,
    target: Annotated[
        str, typer.Option(help="onnxruntime, tensorrt, tensorrt-rtx; auto: the one for a GPU if it can run here.")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 1,
    threads: Threads = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait; beyond them the answer is 503.")] = 16,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="DIMENSION=SIZE", help="Largest size of a dimension, e.g. samples=8.")
    ] = None,
    body_limit: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 64,
    body_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a request's body, and for its answer.")
    ] = 30.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=86_400, help="On SIGTERM: not ready, but serving, for so long before it stops.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Serve a package over the Open Inference Protocol v2 (KServe v2 REST), with metrics at /metrics."""
    admit_target(package, target)  # before what takes long to import
    from lrq_export.serving.server import serve as run

    def report(event: dict[str, Any]) -> None:
        lines = {
            "serving": "serving {model} ({target}) at {url}",
            "drained": "drained: {answered} requests were answered",
        }
        print(json.dumps(event) if as_json else lines[event["event"]].format(**event), flush=True)

    run(
        package, host=host, port=port, name=name, target=target, threads=threads, limits=_limits(limit or []),
        report=report, workers=workers, queue=queue, body_bytes=body_limit << 20, body_seconds=body_seconds,
        drain_seconds=drain_seconds,
    )  # fmt: skip


def _place(option: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a flag in the place of a path: the one after an option whose value was forgotten."""
    if str(value).startswith("-"):
        raise UsageError(f"--{option.name}: got {value}, needed a path", hint=f"pass --{option.name} PATH")
    return value


def serve_config(
    package: Package,
    triton: Annotated[
        Path | None, typer.Option(callback=_place, help="Folder to write, or add to, as a Triton model repository.")
    ] = None,
    kserve: Annotated[
        Path | None, typer.Option(callback=_place, help="YAML file to write for a KServe InferenceService.")
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(help="Where the cluster finds the repository.")
    ] = "pvc://models/lrq-export",
    name: Name = None,
    model_version: Annotated[
        int, typer.Option(min=1, help="Version to write; Triton serves the one written last.")
    ] = 1,
    max_batch: Annotated[int, typer.Option(min=0, help="Samples of a batch of requests; 0: no batching.")] = 8,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model that Triton runs at a time.")] = 1,
    threads: Threads = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="model.onnx instead of the engine: right on processors without VNNI.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
    plugins: Annotated[list[Path] | None, typer.Option(help="Plugin library of the TensorRT plan, to copy.")] = None,
    gpu: Annotated[
        bool | None,
        typer.Option(help="On GPUs alone, or none and no TensorRT plan; default: on those that the server has."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an NVIDIA Triton model repository for a package, a KServe service over such a one, or both."""
    places = [place for place in (triton, kserve) if place is not None]
    if not places:
        raise UsageError("serve-config: nothing to write", hint="pass --triton DIR, --kserve FILE, or both")
    for place in places:
        if place.resolve().is_relative_to(package.resolve()):
            raise UsageError(f"{place}: lies in the package, which an added file makes invalid", hint="write beside it")
    admit(package)  # before what takes long to import
    from lrq_export.serving.kserve import write_kserve
    from lrq_export.serving.repository import (
        Layout,
        check_plan,
        plan_warnings,
        serves_plan,
        warnings,
        write_repository,
    )
    from lrq_export.serving.server import check_name

    layout = Layout(
        check_name(name or package.resolve().name), model_version, max_batch, instances, threads, portable, link,
        tuple(plugins or ()), gpu,
    )  # fmt: skip
    check_plan(package, layout)
    written = [] if triton is None else [str(model) for model in write_repository(package, triton, layout)]
    if kserve is not None:
        write_kserve(kserve, layout, storage_uri, serves_plan(package, layout))
        written.append(str(kserve))
    said = (plan_warnings if triton is None else warnings)(package, layout)
    if as_json:
        print(json.dumps({"event": "written", "files": written, "warnings": said}))
    else:
        print("\n".join([*written, *(f"warning: {each}" for each in said)]))


def bench(
    package: Package,
    source: Annotated[
        Path | None, typer.Option(help="The folder that the package was built from: without it, no baselines.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Samples of a run; may be given again.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Turns that are timed.")] = 30,
    threads: Threads = None,
    require_speedup: Annotated[
        float | None, typer.Option(help="Exit with 1 unless a target is so many times as fast as the fastest baseline.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also time the layers of each target, one by one.")] = False,
    as_json: Json = False,
) -> None:
    """Time each target of a package and, with --source, the same model in fp32 and bf16, in turns."""
    if require_speedup is not None and source is None:
        raise UsageError("--require-speedup: nothing to compare with", hint="pass --source")
    if require_speedup is not None and not 0 < require_speedup < float("inf"):
        raise UsageError(f"--require-speedup: got {require_speedup}, needed a number above 0", hint="e.g. 1.5")
    admit(package)  # before what takes long to import
    from lrq_export.bench.run import bench as run
    from lrq_export.bench.run import require_speedup as check

    report = run(package, source=source, batches=tuple(batch or [1]), runs=runs, threads=threads, layers=layers)
    if as_json:
        for event, rows in (("row", report["rows"]), ("layer", report["layers"])):
            for row in rows:
                print(json.dumps({"event": event} | row))
        print(json.dumps({"event": "machine"} | report["machine"]))
    else:
        _show_bench(report["rows"])
        print(_machine_line(report["machine"]))
        if source is None:
            print("no baselines in fp32 and bf16: pass --source, the folder that the package was built from")
        _show_layers(report["layers"])
    if require_speedup is not None:
        check(report, require_speedup)


def _show_bench(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    def shown(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    on_gpu = any(row["device_mib"] is not None for row in rows)
    figures = ("p50\nms", "p90\nms", "p99\nms", "per s", "peak\nMiB", *(["GPU\nMiB"] if on_gpu else []), "speed-\nup")
    columns = (Column(name, no_wrap=True) for name in ("batch", "target", "device", *figures))
    table = Table(*columns, box=SIMPLE_HEAD, padding=0, pad_edge=False, collapse_padding=True)
    for row in rows:
        numbers = [shown(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "samples_per_second")]
        memory = [shown(row[key], 0) for key in ("peak_mib", *(["device_mib"] if on_gpu else []))]
        table.add_row(
            str(row["batch"]), row["target"], row["device"] or "–", *numbers, *memory, shown(row["speedup"])
        )  # fmt: skip
    Console().print(table)
    for row in rows:
        if row["note"]:
            print(f"batch {row['batch']}, {row['target']}: {row['note']}")


def _machine_line(machine: dict[str, Any]) -> str:
    gpus = [f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in machine.get("gpus", ())]
    driver = [f"driver {machine['driver']}"] if gpus else []
    return ", ".join([machine["processor"], f"{machine['cores']} cores", *gpus, *driver])


def _limits(pairs: list[str]) -> dict[str, int]:
    limits = {}
    for pair in pairs:
        dimension, _, size = pair.partition("=")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--limit: got {pair!r}, needed DIMENSION=SIZE", hint="e.g. --limit samples=8")
        limits[dimension] = int(size)
    return limits


def _show_layers(layers: list[dict[str, Any]]) -> None:
    """The slowest of each target and batch; --json has all of them."""
    from rich.console import Console
    from rich.table import Table

    for batch, target in dict.fromkeys((row["batch"], row["target"]) for row in layers):
        rows = [row for row in layers if (row["batch"], row["target"]) == (batch, target)]
        title = f"{target}, batch {batch}: {min(_SHOWN_LAYERS, len(rows))} of {len(rows)} layers"
        table = Table("layer", "p50 ms", "share", title=title, title_justify="left")
        for row in rows[:_SHOWN_LAYERS]:
            table.add_row(row["layer"], f"{row['p50_ms']:.3f}", f"{100 * row['share']:.1f} %")
        Console().print(table)
