"""The rungs of the parity ladder (`ladder`), each measured on one package."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lrq_export.bind import portable_weights
from lrq_export.engine.onnxruntime import MODEL as ENGINE_MODEL
from lrq_export.engine.onnxruntime import engine_weights, lower_linears, session_config
from lrq_export.onnx_file import WeightTensor, read_model
from lrq_export.package import MODEL, ONNXRUNTIME_ENGINE, QUANTIZED
from lrq_export.proof import Proof, difference
from lrq_export.runtime import PackagedTransformer, feeds
from lrq_export.sampling import ConditionalSampler, scheduler_from
from lrq_export.saved_graphs import rewritten_graph, saved_graphs
from lrq_export.verify import forced, ladder
from lrq_export.verify.array_file import ArrayFile
from lrq_export.verify.bound import differing_weight
from lrq_export.verify.metrics import nmse
from lrq_export.verify.reference import adapter_error
from lrq_export.verify.sliced import SlicedModel
from lrq_export.verify.subject import Subject


def r0(subject: Subject) -> ladder.Rung:
    value, note = subject.reference.adapter_nmse, "as recorded when the package was built"
    if subject.source is not None:
        model = subject.source.load(subject.source.model())
        masked = any(spec.optional for spec in subject.specs.values())
        value, note = adapter_error(subject.family, model, subject.few), "with and without a text mask" * masked
    return ladder.at_most(
        "R0", "traceable model vs diffusers", "the model adapter", value, subject.recipe.gates.parity_nmse, note
    )


def r1(subject: Subject, model: nn.Module) -> tuple[ladder.Rung, list[dict[str, float]]]:
    inputs, noise = subject.reference.inputs, subject.reference.noise
    got = ladder.run_torch(subject.family, model, inputs)
    rung = ladder.at_most(
        "R1", "quantized torch vs floating point", "the method (its loss, not a fault)", nmse(got, noise),
        subject.recipe.gates.noise_nmse, f"predicted noise on {len(noise)} inputs",
    )  # fmt: skip
    return rung, ladder.noise_error_by_timestep(got, noise, inputs["timestep"])


def torch_answers(subject: Subject, model: nn.Module) -> list[ArrayFile]:
    """What the quantized torch model computes for every case: its output and what each of its layers reads."""
    return [forced.torch_answers(subject.family, model, case, subject.tensor_of) for case in subject.cases]


def r2(subject: Subject, answers: list[ArrayFile]) -> ladder.Rung:
    """Teacher-forced (see `forced`) on recorded inputs and on random ones of other sizes; run freely for the note."""
    sliced = forced_model(subject, subject.package / MODEL)
    worst, tensor = forced.worst_difference(sliced, _forced_cases(subject, answers), answers)
    blamed = blamed_layer(subject, tensor)
    free = nmse(free_run(subject, subject.few), answers[0][forced.OUTPUT])
    traced = rewritten_graph(subject.package)
    worst, blamed = _or_changed_weight(
        subject.package / MODEL, portable_weights(traced, subject.quantized), worst, blamed
    )
    slices = "" if len(sliced.slices) == 1 else f" in {len(sliced.slices)} slices"
    return ladder.at_most(
        "R2", f"model.onnx in ONNX Runtime{slices} vs quantized torch", f"trace and binding (worst at {blamed})", worst,
        subject.recipe.gates.parity_nmse,
        f"each layer on the torch model's input; two sets of sizes; running freely they differ by {free:.1e}",
    )  # fmt: skip


def free_run(subject: Subject, inputs: ladder.Inputs) -> np.ndarray:
    """The output of model.onnx, nothing forced."""
    model = read_model(subject.package / MODEL)
    sliced = SlicedModel(model, subject.package)
    ((_, _, output),) = sliced.run([feeds(subject.specs, inputs).__getitem__])
    return output


def forced_model(subject: Subject, path: Path, config: dict[str, str] | None = None) -> SlicedModel:
    """The model at `path`, cut before every quantized layer."""
    model = read_model(path)
    forced.cut_model(model, set(subject.tensor_of.values()))
    return SlicedModel(model, path.parent, config=config)


def r3(subject: Subject) -> tuple[ladder.Rung, list[dict[str, Any]]]:
    """Every pass that changed the graph, proved again."""
    stages, passes = saved_graphs(subject.package)
    read = None if subject.source is None else subject.source.checkpoint.read
    proof = Proof(subject.specs, subject.few, read)
    before = proof.answers(stages[0])
    bound = min(subject.recipe.gates.parity_nmse, proof.bound(stages[0], before))
    for was, traced, row in zip(stages, stages[1:], passes, strict=False):
        if traced.to_onnx() != was.to_onnx():
            after = proof.answers(traced)
            row["nmse"], before = difference(after, before), after
    worst = max(passes, key=lambda row: row["nmse"] or 0.0)
    weights = "the real weights" if read is not None else "random weights of the same shapes"
    rung = ladder.at_most(
        "R3", "graph after each pass vs before it", f"the rewrites (worst: {worst['name']})", worst["nmse"] or 0.0,
        bound, f"in floating point, {weights}, three sets of shapes",
    )  # fmt: skip
    return rung, passes


def r4(subject: Subject, answers: list[ArrayFile]) -> ladder.Rung:
    """The engine against model.onnx, both teacher-forced with the same inputs."""
    cases = _forced_cases(subject, answers)
    expected = [ArrayFile() for _ in cases]
    for case, name, array in forced_model(subject, subject.package / MODEL).run(cases):
        expected[case][name] = array
    engine = subject.package / ONNXRUNTIME_ENGINE
    sliced = forced_model(subject, engine / ENGINE_MODEL, session_config(engine))
    worst, tensor = forced.worst_difference(sliced, cases, expected)
    lowered = rewritten_graph(subject.package)
    meant = engine_weights(lowered, subject.quantized, lower_linears(lowered))
    worst, blamed = _or_changed_weight(engine / ENGINE_MODEL, meant, worst, blamed_layer(subject, tensor))
    return ladder.at_most(
        "R4", "ONNX Runtime INT8 engine vs model.onnx", f"lowering and kernels (worst at {blamed})", worst,
        subject.recipe.gates.parity_nmse, "each layer on the same input",
    )  # fmt: skip


def r5(subject: Subject, transformer: PackagedTransformer, scheduler_config: dict[str, Any] | None):
    sampling, reference = subject.recipe.sampling, subject.reference
    scheduler = scheduler_from(sampling.scheduler, scheduler_config)
    drawn = subject.family.latents(reference.inputs, reference.conditions)
    sampler = ConditionalSampler(transformer, scheduler, reference.conditions, drawn)
    count = reference.latents.shape[1]
    latents = ladder.draw(sampler, count, sampling.steps, sampling.seed, sampling.guidance_scale)
    trajectory = ladder.trajectory_errors(latents, reference.latents)
    drawn.set_timesteps(scheduler, sampling.steps)
    for row, timestep in zip(trajectory, drawn.timestep(scheduler.timesteps).tolist(), strict=False):
        row["timestep"] = timestep
    images = ladder.image_errors(latents[-1], reference.latents[-1])
    rows = min(len(tensor) for tensor in reference.conditions.values())
    images["labels"] = [str(i % rows) for i in range(len(latents[-1]))]
    images["shown"] = drawn.shown
    value, bound = images["psnr_total_db"], subject.recipe.gates.psnr_db
    rung = ladder.Rung(
        "R5", f"{sampling.steps}-step samples of the engine vs floating point", "everything above, as a user sees it",
        "PSNR dB", value, bound, None if bound is None else value >= bound, f"{len(latents[-1])} images, same seeds",
    )  # fmt: skip
    last = {"float": reference.latents[-1], "quantized": latents[-1]}
    samples = {name: drawn.pictures(each).numpy() for name, each in last.items()}
    images["psnr_db"] = [float(min(value, 999.0)) for value in images["psnr_db"]]  # JSON has no infinity
    images["psnr_total_db"] = float(min(value, 999.0))
    return rung, trajectory, images, samples


def _forced_cases(subject: Subject, answers: list[ArrayFile]):
    pairs = zip(subject.cases, answers, strict=True)
    return [forced.forced_inputs(feeds(subject.specs, case), each) for case, each in pairs]


def blamed_layer(subject: Subject, tensor: str) -> str:
    """The quantized layer that reads `tensor`, which means more to a reader than the name of a tensor."""
    readers = [layer for layer, name in subject.tensor_of.items() if name == tensor]
    return f"the input of {readers[0]}" if readers else tensor


def _or_changed_weight(path: Path, meant: Iterable[WeightTensor], worst: float, blamed: str) -> tuple[float, str]:
    """Infinity and the weight's name if the file holds another weight than was meant, else what was measured."""
    changed = differing_weight(path, meant)
    return (worst, blamed) if changed is None else (math.inf, f"{changed}, whose bytes are not those of {QUANTIZED}")
