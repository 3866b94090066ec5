"""How closely two correct float32 implementations of one quantized model can agree when each runs freely.

    python tools/measure_parity_floor.py out/digits-w4a8 examples/digits-pixart

Prints NMSE of pairs that compute the same function (docs/graph.md, "Parity ladder"). A pair that differs only in the
order of its sums differs by about 1e-14; one rounding of an activation that falls the other way is a whole step, which
later layers see. The last line gives every quantized layer the same input, and so has no such floor.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from graphs.float_model import float_model, weight_names
from lrq_export.engine.onnxruntime import MODEL as ENGINE_MODEL
from lrq_export.engine.onnxruntime import open_session, products_saturate
from lrq_export.evaluate import evaluate
from lrq_export.models import family_of
from lrq_export.package import MODEL, ONNXRUNTIME_ENGINE, QUANTIZED, verify_hashes
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe
from lrq_export.runtime import feeds
from lrq_export.saved_graphs import rewritten_graph
from lrq_export.source import Source, open_source
from lrq_export.verify import forced, ladder, rungs
from lrq_export.verify.metrics import nmse
from lrq_export.verify.reference import Reference
from lrq_export.verify.subject import Subject, quantized_model

MOVE = 1e-7  # relative, about one unit in the last place of float32
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("source", type=Path)
    arguments = parser.parse_args()
    subject = open_package(arguments.package, arguments.source)
    model = quantized_model(subject.family, subject.config, subject.quantized)
    cases = {
        "recorded": subject.few,
        "other sizes": ladder.other_shapes(subject.specs, subject.reference.inputs, seed=2),
    }
    for case, inputs in cases.items():
        for name, value in measurements(subject, model, inputs):
            print(f"{case:12} {name:62} {value:.2e}", flush=True)


def open_package(package: Path, source: Path) -> Subject:
    manifest = verify_hashes(package)
    config = manifest["source"]["config"]
    return Subject(
        package, Recipe.model_validate(manifest["recipe"]), family_of(config["_class_name"]), config,
        open_source(source), QuantizedFile(package / QUANTIZED), Reference.load(package),
    )  # fmt: skip


def measurements(subject: Subject, model: nn.Module, inputs: ladder.Inputs) -> Iterator[tuple[str, float]]:
    family, specs = subject.family, subject.specs
    yield "floating point: ONNX Runtime vs torch", floating_point_difference(subject, subject.source, inputs)
    quantized = ladder.run_torch(family, model, inputs)
    for seed in range(REPEATS):
        moved = ladder.run_torch(family, model, inputs | {"hidden_states": nudged(inputs["hidden_states"], seed)})
        yield f"quantized torch vs itself, latents moved by {MOVE:g} (seed {seed})", nmse(moved, quantized)
    portable = rungs.free_run(subject, inputs)
    yield "model.onnx vs quantized torch, free", nmse(portable, quantized)
    engine = ladder.run_session(open_session(subject.package / ONNXRUNTIME_ENGINE), specs, inputs)
    yield "engine vs quantized torch, free", nmse(engine, quantized)
    yield "engine vs model.onnx, free", nmse(engine, portable)
    if products_saturate():  # elsewhere the engine needs no option
        plain = onnxruntime.InferenceSession(
            str(subject.package / ONNXRUNTIME_ENGINE / ENGINE_MODEL), providers=["CPUExecutionProvider"]
        )
        careless = ladder.run_session(plain, specs, inputs)
        yield "engine without session.x64quantprecision vs model.onnx, free", nmse(careless, portable)
    yield "model.onnx vs quantized torch, each layer on the same input", forced_difference(subject, model, inputs)


def nudged(latents: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return latents * (1 + MOVE * noise)


def floating_point_difference(subject: Subject, source: Source, inputs: ladder.Inputs) -> float:
    """The rewritten graph with its weights in floating point, against the diffusers model."""
    traced = rewritten_graph(subject.package)
    read = source.checkpoint.read
    weights = {name: evaluate(each, read).numpy() for name, each in weight_names(traced).items()}
    session = onnxruntime.InferenceSession(float_model(traced).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, feeds(subject.specs, inputs) | weights)[0]
    return nmse(got, ladder.run_torch(subject.family, source.load(source.model()), inputs))


def forced_difference(subject: Subject, model: nn.Module, inputs: ladder.Inputs) -> float:
    answers = forced.torch_answers(subject.family, model, inputs, subject.tensor_of)
    case = forced.forced_inputs(feeds(subject.specs, inputs), answers)
    portable = rungs.forced_model(subject, subject.package / MODEL)
    return forced.worst_difference(portable, [case], [answers])[0]


if __name__ == "__main__":
    main()
