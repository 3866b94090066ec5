"""What rewriting costs and what it brings: seconds and memory of the passes, and ONNX Runtime's time of a block.

    python tools/bench_passes.py block [--threads 2] [--runs 15]
    python tools/bench_passes.py rewrite CONFIG [--proof SOURCE]
    python tools/bench_passes.py rewrite PACKAGE/graphs/0-trace.onnx

block: a PixArt-XL/2 of two blocks (1152 wide, 1024 tokens, batch 2, 120 text tokens), lowered with and without the
passes, timed turn by turn in one process. rewrite: the graph of a model's config.json, traced without its weights, and
the passes over it, checked; with --proof each pass is proved on the weights of a checkpoint. A graph that was traced
before is taken as it is.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import make_pixart_xl
import torch
from bench_cpu import show, show_operators

import lrq_export
from graphs.checks import check, check_preserved
from graphs.passes import PIPELINE
from graphs.passes.bind_plugins import bind_plugins
from graphs.passes.make_linear import make_linear
from graphs.traced import TracedGraph
from lrq_export.engine import onnxruntime as engine
from lrq_export.engine.attention import fuse_attention
from lrq_export.machine import describe_machine
from lrq_export.models import current_config, family_of
from lrq_export.plan import plan_layers
from lrq_export.proof import Proof
from lrq_export.recipe import load_recipe
from lrq_export.rewrite import Outcome, rewrite
from lrq_export.runtime import feeds
from lrq_export.saved_graphs import load_graph
from lrq_export.source import open_source
from lrq_export.trace import trace

SMALL = {"calibration.samples": "2", "calibration.timesteps": "2", "sampling.images": "1", "sampling.steps": "1"}
HADAMARD = {"rotation.kind": "hadamard"}  # chosen by shape: no calibration is needed
WITHOUT = (make_linear, bind_plugins)  # what no engine can do without
VARIANTS = {
    "rewritten": (PIPELINE, fuse_attention),
    "as traced, attention fused": (WITHOUT, fuse_attention),
    "as traced": (WITHOUT, lambda graph: 0),
}
BLOCKS = 2  # so that embedders and the caption projection do not weigh much


def bench_block(threads: int, runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pixart_xl.write_model(folder / "source", blocks=BLOCKS)
        recipe = lrq_export.load_recipe(overrides=SMALL | HADAMARD)
        sessions, engines = {}, {}
        for title, (passes, fuse) in VARIANTS.items():
            out = folder / title
            with (
                mock.patch("lrq_export.compiler.PIPELINE", passes),
                mock.patch("lrq_export.engine.onnxruntime.fuse_attention", fuse),
            ):
                lrq_export.build(folder / "source", out, recipe=recipe, until="engine")
            engines[title] = out.with_name(f"{out.name}.partial") / "package" / "engine" / "onnxruntime"
            sessions[title] = engine.open_session(engines[title], threads)
        source = open_source(folder / "source")
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(2, 4, 64, 64, generator=generator),
            "encoder_hidden_states": torch.randn(2, 120, 4096, generator=generator),
            "timestep": torch.tensor([500.0, 20.0]),
        }
        feed = feeds(source.family.inputs(source.config), inputs)
        timed = {title: lambda session=session: session.run(None, feed)[0] for title, session in sessions.items()}
        show(f"PixArt-XL/2 of {BLOCKS} blocks, 1024 tokens, batch 2", timed, runs, "rewritten", "as traced")
        for title, path in engines.items():
            print(f"\n{title}: where the time goes")
            show_operators(path / engine.MODEL, threads, engine.session_config(path), feed)


def bench_rewrite(config_file: Path, source_folder: Path | None) -> None:
    config = current_config(json.loads(config_file.read_text()))
    family, recipe = family_of(config["_class_name"]), load_recipe(overrides=HADAMARD)
    plans = plan_layers(family.construct(config), family, recipe)
    started = time.perf_counter()
    traced = trace(family, config, plans)
    print(f"trace: {time.perf_counter() - started:.1f} s, {len(traced.graph.nodes)} nodes, {memory()}")
    if source_folder is None:
        run_passes(traced)
        return
    started = time.perf_counter()
    recorded = {
        name: torch.randn([SIZES.get(extent, extent) for extent in spec.shape])
        for name, spec in family.inputs(config).items()
    }
    proof = Proof(family.inputs(config), recorded, open_source(source_folder).checkpoint.read)
    traced = rewrite(traced, PIPELINE, proof, recipe.gates.parity_nmse, done=tell)
    seconds = time.perf_counter() - started
    print(f"passes, checks and proof: {seconds:.1f} s, {len(traced.graph.nodes)} nodes, {memory()}")


def run_passes(traced: TracedGraph) -> None:
    started, nodes = time.perf_counter(), len(traced.graph.nodes)
    for step in PIPELINE:
        after = traced.copy()
        fired = step(after).fired
        check(after)
        check_preserved(traced, after)
        traced = after
        print(f"  {step.__name__}: {fired}", flush=True)
    seconds = time.perf_counter() - started
    print(f"passes and checks: {seconds:.1f} s, {nodes} to {len(traced.graph.nodes)} nodes, {memory()}")


SIZES = {"samples": 1, "height": 32, "width": 32, "text": 20, "tokens": 64, "frames": 2}


def tell(traced, outcome: Outcome) -> None:
    moved = "" if outcome.nmse is None else f", answers moved by NMSE {outcome.nmse:.1e}"
    print(f"  {outcome.name}: {outcome.result.fired}{moved}", flush=True)


def memory() -> str:
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["block", "rewrite"])
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--proof", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{describe_machine()['processor']}, {args.threads} threads")
    if args.what == "block":
        bench_block(args.threads, args.runs)
    elif args.config is None:
        parser.error("rewrite needs the config.json of a model, or a traced graph")
    elif args.config.suffix == ".onnx":
        run_passes(load_graph(args.config))
    else:
        bench_rewrite(args.config, args.proof)


if __name__ == "__main__":
    main()
