"""Climb the parity ladder over a package: at the end of a build, and again from its files alone with `verify`."""

import json
import math
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from graphs.ops import twin_log_dequant
from lrq_export.bind import portable_weights
from lrq_export.engine.onnxruntime import SESSION, engine_weights, lower_linears, open_session
from lrq_export.errors import InputError
from lrq_export.evaluate import evaluate, rotation_of
from lrq_export.memory import give_back
from lrq_export.models import family_of
from lrq_export.models.base import ModelFamily
from lrq_export.package import MODEL, MODEL_DATA, ONNXRUNTIME_ENGINE, QUANTIZED, verify_hashes
from lrq_export.quant.rotation import Rotation
from lrq_export.quantized import FOLDED, LayerTensors, QuantizedFile
from lrq_export.recipe import Recipe
from lrq_export.runtime import PackagedTransformer
from lrq_export.sampling import scheduler_from
from lrq_export.saved_graphs import rewritten_graph, saved_graphs
from lrq_export.source import Source, open_source
from lrq_export.verify import forced, ladder
from lrq_export.verify.bound import differing_weight
from lrq_export.verify.metrics import nmse
from lrq_export.verify.reference import Reference, adapter_error
from lrq_export.verify.sessions import frugal_options

HISTOGRAMS = 6  # layers whose weights are drawn against their levels
FOLD_LIMIT = 100_000_000  # weights; larger models are decoded on every run rather than folded to dense float32
PARITY_SAMPLES = 3


def verify(
    package: str | Path, *, source: str | Path | None = None, advance: Callable[[str], None] = lambda rung: None
) -> tuple[dict[str, Any], Any]:
    """Check hashes, then climb the ladder from the package's files; returns (report, samples).

    With `source`, R0 is measured again and R3 uses the real weights; without, R0 is as recorded, R3's are random.
    Raises InputError for any edited, missing or added file.
    """
    package = Path(package)
    manifest = verify_hashes(package)
    recipe = Recipe.model_validate(manifest["recipe"])
    config = manifest["source"]["config"]
    opened = open_source(Path(source)) if source is not None else None
    if opened is not None and opened.checkpoint.fingerprint() != manifest["source"]["fingerprint"]:
        raise InputError(
            f"{source}: is not the source that {package} was built from: its fingerprint differs",
            hint="pass the folder that the package was built from, or leave out --source",
        )
    return climb(package, recipe, config, opened, scheduler=manifest["scheduler"], advance=advance)


@dataclass
class Climb:
    """What the rungs share."""

    package: Path
    recipe: Recipe
    family: ModelFamily
    config: dict[str, Any]
    source: Source | None
    quantized: QuantizedFile
    reference: Reference

    @property
    def specs(self):
        return self.family.inputs(self.config)

    @property
    def few(self) -> ladder.Inputs:
        """A handful of evaluation inputs, spread over the timesteps."""
        count = len(self.reference.inputs["hidden_states"])
        rows = np.linspace(0, count - 1, min(PARITY_SAMPLES, count)).round().astype(int)
        return {name: tensor[rows] for name, tensor in self.reference.inputs.items()}

    @property
    def cases(self) -> list[ladder.Inputs]:
        """The recorded inputs, and random ones of another batch, size and text length."""
        return [self.few, ladder.other_shapes(self.specs, self.reference.inputs, seed=2)]


def climb(
    package: Path,
    recipe: Recipe,
    config: dict[str, Any],
    source: Source | None,
    *,
    scheduler: dict[str, Any] | None = None,
    advance: Callable[[str], None] = lambda rung: None,
) -> tuple[dict[str, Any], Any]:
    """All rungs over the files of `package`; returns (report, samples)."""
    family = family_of(config["_class_name"])
    quantized, reference = QuantizedFile(package / QUANTIZED), Reference.load(package)
    state = Climb(package, recipe, family, config, source, quantized, reference)
    rungs = [_r0(state)]
    give_back()
    advance("R0")
    model = quantized_model(family, config, quantized)
    r1, by_timestep = _r1(state, model)
    give_back()
    advance("R1")
    r2, answers = _r2(state, model)
    del model
    give_back()
    advance("R2")
    r3, passes = _r3(state)
    give_back()
    advance("R3")
    layers, histograms = _layers(state), _histograms(state)  # the float model is in memory only while no session is
    give_back()
    r4 = _r4(state, answers)
    give_back()
    advance("R4")
    session = open_session(package / ONNXRUNTIME_ENGINE)
    scheduler = source.scheduler_config() if source is not None else scheduler
    r5, trajectory, images, samples = _r5(state, PackagedTransformer(session, config), scheduler)
    give_back()
    advance("R5")
    rungs += [r1, r2, r3, r4, r5]
    report = {
        "schema": 1,
        "source": {"class_name": config["_class_name"], "parameters": _parameters(state)},
        "machine": describe_machine(),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "warnings": [],
        "ladder": [rung.to_json() for rung in rungs],
        "passes": passes,
        "layers": layers,
        "histograms": histograms,
        "noise_error_by_timestep": by_timestep,
        "trajectory": trajectory,
        "images": images,
        "sizes": _sizes(state),
        "timings": [],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return report, samples


def quantized_model(family: ModelFamily, config: dict[str, Any], quantized: QuantizedFile) -> nn.Module:
    """The diffusers model with every quantized layer replaced by one that computes with exactly the package's codes."""
    model = family.construct(config)
    for layer in quantized.records:
        model.set_submodule(layer, quantized.module(layer))
    for name in quantized.float_names():
        owner, _, leaf = name.rpartition(".")
        if owner in quantized.records:
            continue  # the bias of a quantized layer, which owns it
        parameter = nn.Parameter(quantized.read(name).clone(), requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = parameter
    return model


def _r0(state: Climb) -> ladder.Rung:
    value, note = state.reference.adapter_nmse, "as recorded when the package was built"
    if state.source is not None:
        model = state.source.load(state.source.model())
        value, note = adapter_error(state.family, model, state.few), "with and without a text mask"
    return ladder.at_most(
        "R0", "traceable model vs diffusers", "the model adapter", value, state.recipe.gates.parity_nmse, note
    )


def _r1(state: Climb, model: nn.Module) -> tuple[ladder.Rung, list[dict[str, float]]]:
    inputs, noise = state.reference.inputs, state.reference.noise
    got = ladder.run_torch(state.family, model, inputs)
    rung = ladder.at_most(
        "R1", "quantized torch vs floating point", "the method (its loss, not a fault)", nmse(got, noise),
        state.recipe.gates.noise_nmse, f"predicted noise on {len(noise)} inputs",
    )  # fmt: skip
    return rung, ladder.noise_error_by_timestep(got, noise, inputs["timestep"])


def _r2(state: Climb, model: nn.Module) -> tuple[ladder.Rung, list[forced.Answers]]:
    """Teacher-forced (see `forced`) on recorded inputs and on random ones of other sizes; run freely for the note."""
    tensor_of = forced.layer_inputs(onnx.load(state.package / MODEL, load_external_data=False))
    names = list(dict.fromkeys(tensor_of.values()))
    layer_of = {tensor: layer for layer, tensor in reversed(tensor_of.items())}
    session = forced.ForcedSession(state.package / MODEL, names, portable_config(state))
    reference = [forced.torch_answers(state.family, model, case, tensor_of) for case in state.cases]
    worst, where = 0.0, "sample"
    for case, answers in zip(state.cases, reference, strict=True):
        error, tensor = forced.worst_difference(session.run(state.specs, case, answers), answers)
        worst, where = max((worst, where), (error, tensor))
    del session
    free = nmse(ladder.run_session(portable_session(state), state.specs, state.few), reference[0].output)
    traced = rewritten_graph(state.package)
    changed = differing_weight(state.package / MODEL, portable_weights(traced, state.quantized))
    if changed is not None:
        worst, where = math.inf, f"{changed}, whose bytes are not those of {QUANTIZED}"
    where = f"the input of {layer_of[where]}" if where in layer_of else where
    rung = ladder.at_most(
        "R2", "model.onnx in ONNX Runtime vs quantized torch", f"trace and binding (worst at {where})", worst,
        state.recipe.gates.parity_nmse,
        f"each layer on the torch model's input; two sets of sizes; running freely they differ by {free:.1e}",
    )  # fmt: skip
    return rung, reference


def _r3(state: Climb) -> tuple[ladder.Rung, list[dict[str, Any]]]:
    stages, passes = saved_graphs(state.package)
    read = None if state.source is None else state.source.checkpoint.read
    errors = ladder.rewrites(stages, read, state.specs, state.few)
    for row in passes:
        row["nmse"] = errors[row["name"]]
    weights = "the real weights" if read is not None else "random weights of the same shapes"
    worst = max(errors, key=lambda name: errors[name])
    rung = ladder.at_most(
        "R3", "graph after each pass vs before it", f"the rewrites (worst: {worst})", errors[worst],
        state.recipe.gates.parity_nmse, f"in floating point, {weights}, two sets of shapes",
    )  # fmt: skip
    return rung, passes


def _r4(state: Climb, reference: list[forced.Answers]) -> ladder.Rung:
    """The engine against model.onnx, both teacher-forced with the same inputs."""
    names = list(reference[0].layer_inputs)
    engine = state.package / ONNXRUNTIME_ENGINE
    settings = json.loads((engine / SESSION).read_text())["config"]
    portable = forced.ForcedSession(state.package / MODEL, names, portable_config(state))
    expected = [portable.run(state.specs, case, each) for case, each in zip(state.cases, reference, strict=True)]
    del portable
    session = forced.ForcedSession(engine / MODEL, names, settings)
    worst, where = 0.0, "sample"
    for case, each, answers in zip(state.cases, reference, expected, strict=True):
        error, tensor = forced.worst_difference(session.run(state.specs, case, each), answers)
        worst, where = max((worst, where), (error, tensor))
    lowered = rewritten_graph(state.package)
    changed = differing_weight(engine / MODEL, engine_weights(lowered, state.quantized, lower_linears(lowered)))
    if changed is not None:
        worst, where = math.inf, f"{changed}, whose bytes are not those of {QUANTIZED}"
    return ladder.at_most(
        "R4", "ONNX Runtime INT8 engine vs model.onnx", f"lowering and kernels (worst at {where})", worst,
        state.recipe.gates.parity_nmse, "each layer on the same input",
    )  # fmt: skip


def _r5(state: Climb, transformer: PackagedTransformer, scheduler_config: dict[str, Any] | None):
    sampling, reference = state.recipe.sampling, state.reference
    scheduler = scheduler_from(sampling.scheduler, scheduler_config)
    latents = ladder.draw(
        transformer, scheduler, reference.conditions, reference.latents.shape[1], sampling.steps, sampling.seed,
        sampling.guidance_scale,
    )  # fmt: skip
    trajectory = ladder.trajectory_errors(latents, reference.latents)
    scheduler.set_timesteps(sampling.steps)
    for row, timestep in zip(trajectory, scheduler.timesteps.tolist(), strict=False):
        row["timestep"] = timestep
    images = ladder.image_errors(latents[-1], reference.latents[-1])
    rows = min(len(tensor) for tensor in reference.conditions.values())
    images["labels"] = [str(i % rows) for i in range(len(latents[-1]))]
    value, bound = images["psnr_total_db"], state.recipe.gates.psnr_db
    rung = ladder.Rung(
        "R5", f"{sampling.steps}-step samples of the engine vs floating point", "everything above, as a user sees it",
        "PSNR dB", value, bound, None if bound is None else value >= bound, f"{len(latents[-1])} images, same seeds",
    )  # fmt: skip
    samples = {"float": reference.latents[-1].numpy(), "quantized": latents[-1].numpy()}
    images["psnr_db"] = [float(min(value, 999.0)) for value in images["psnr_db"]]  # JSON has no infinity
    images["psnr_total_db"] = float(min(value, 999.0))
    return rung, trajectory, images, samples


def portable_session(state: Climb):
    """model.onnx in stock ONNX Runtime; weights of small models are folded at load, which only saves time."""
    import onnxruntime

    options = frugal_options()
    for key, value in portable_config(state).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(state.package / MODEL), options, providers=["CPUExecutionProvider"])


def portable_config(state: Climb) -> dict[str, str]:
    weights = sum(record.rows * record.cols for record in state.quantized.records.values())
    return {"session.disable_quant_qdq": "1"} if weights <= FOLD_LIMIT else {}


def _layers(state: Climb) -> list[dict[str, Any]]:
    errors = _output_errors(state)
    rows = []
    for name, record in state.quantized.records.items():
        layer = state.quantized.layer(name)
        rows.append(
            {
                "layer": name, "rows": record.rows, "cols": record.cols, "bits": record.bits,
                "act_bits": record.act_bits, "group_size": record.group_size, "block": record.block,
                "rotated_by": record.rotated_by, "reason": record.reason, "weight_nmse": record.weight_nmse,
                "weighted_nmse": record.weighted_nmse, "output_nmse": errors.get(name),
                "bytes": layer.bytes(), "bytes_fp16": 2 * record.rows * record.cols,
            } | state.reference.statistics[name]
        )  # fmt: skip
    return rows


def _output_errors(state: Climb) -> dict[str, float]:
    """NMSE of every layer on the floating-point model's activations; needs the source."""
    if state.source is None:
        return {}
    model = state.source.load(state.source.model())

    def replacement(name: str):
        """The quantized layer in the floating-point model's basis: folded rotations are undone on both sides."""
        record = state.quantized.records[name]
        folded = Rotation(record.cols, record.block, record.signs_seed) if record.rotated_by == FOLDED else None

        def run(x: torch.Tensor) -> torch.Tensor:
            module = state.quantized.module(name)  # decoded for each call: all at once would be a second model
            y = module(x if folded is None else folded.apply(x))
            for step in reversed(record.output_steps()):
                y = rotation_of(step, y.shape[-1]).apply_inverse(y)
            return y

        return run

    return ladder.layer_output_errors(state.family, model, replacement, list(state.quantized.records), state.few)


def _histograms(state: Climb) -> list[dict[str, Any]]:
    """A few layers' weights in units of their row scale; where the source is not at hand, the decoded integers."""
    names = list(state.quantized.records)
    chosen = [names[i] for i in sorted({round(j) for j in np.linspace(0, len(names) - 1, HISTOGRAMS)})]
    return [_histogram(state, state.quantized.layer(name)) for name in chosen]


def _histogram(state: Climb, layer: LayerTensors) -> dict[str, Any]:
    integers = layer.integer_weight().numpy()
    edges = np.linspace(-160, 160, 81)
    values = integers.astype(np.float32) if state.source is None else _source_integers(state, layer)
    counts, _ = np.histogram(values.clip(-160, 160), edges)
    return {
        "layer": layer.record.layer,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "levels": _mean_levels(layer),
    }


def _mean_levels(layer: LayerTensors) -> list[float]:
    """The value of every code, averaged over rows and groups; of the 255 levels at 8 bits one in 16 is drawn."""
    if layer.exponents is None:
        return [float(level) for level in range(-112, 113, 16)]
    values = twin_log_dequant.table(layer.exponents.numpy(), layer.record.bits, 4, 6)
    return sorted(values.mean(axis=(0, 1)).tolist())


def _source_integers(state: Climb, layer: LayerTensors) -> np.ndarray:
    """The floating-point weight in the layer's own basis, in units of its row scales."""
    traced = rewritten_graph(state.package)
    weight = next(each for each in traced.linears.values() if each.layer == layer.record.layer)
    return (evaluate(weight.weight, state.source.checkpoint.read) / layer.scale[:, None]).numpy()


def _sizes(state: Climb) -> dict[str, Any]:
    layers = [state.quantized.layer(name) for name in state.quantized.records]
    packed = sum(layer.bytes() for layer in layers)
    fp16 = sum(2 * layer.record.rows * layer.record.cols for layer in layers)
    floats = sum(state.quantized.read(name).numel() for name in state.quantized.float_names())
    data = state.package / MODEL_DATA
    engine = state.package / ONNXRUNTIME_ENGINE
    return {
        "source_fp16_bytes": fp16 + 2 * floats,
        "packed_bytes": packed,
        "kept_float_bytes": 4 * floats,
        "model_bytes": (state.package / MODEL).stat().st_size + (data.stat().st_size if data.exists() else 0),
        "engine_bytes": sum(file.stat().st_size for file in engine.iterdir()),
        "packed_ratio": packed / fp16,
    }


def _parameters(state: Climb) -> int:
    floats = sum(state.quantized.read(name).numel() for name in state.quantized.float_names())
    return floats + sum(record.rows * record.cols for record in state.quantized.records.values())


def describe_machine() -> dict[str, Any]:
    """The processor and the features that decide how fast integer products are."""
    processor, features = "unknown", []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        processor = fields.get("model name", processor)
        known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
        features = [name for name in known if name in fields.get("flags", "").split()]
    return {"processor": processor, "cores": os.cpu_count(), "features": features}
