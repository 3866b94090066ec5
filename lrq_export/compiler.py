"""`build`: the stages load -> calibrate -> trace -> rewrite -> quantize -> engine -> verify, in order, resumable.

Every stage reads files and writes files, each whole or not at all. The package grows in OUT.partial, whose name carries
the fingerprint of all inputs; a killed build goes on where it stopped, and OUT is swapped in complete at the end.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphs import names
from graphs.checks import GraphError, check, check_complete
from graphs.passes import PIPELINE
from graphs.traced import TracedGraph
from lrq_export import __version__
from lrq_export.admit import admit
from lrq_export.bind import assemble, quantize_layers, write_portable
from lrq_export.calibrate.observed import Observed
from lrq_export.calibrate.run import observe
from lrq_export.calibrate.statistics import Moments
from lrq_export.engine.onnxruntime import build_engine
from lrq_export.engine.targets import (
    INPUTS,
    ONNXRUNTIME,
    add_engines,
    build_targets,
    engine_warnings,
    keep_engines,
    lacking,
)
from lrq_export.errors import CheckFailed, InputError, MissingError, UsageError
from lrq_export.machine import libraries, versions
from lrq_export.package import (
    MODEL,
    ONNXRUNTIME_ENGINE,
    QUANTIZED,
    RECIPE,
    REPORT,
    REPORT_PAGE,
    STATS,
    is_package,
    require_free_disk,
    write_bytes_atomic,
    write_json_atomic,
    write_manifest,
)
from lrq_export.plan import LayerPlan, plan_layers
from lrq_export.progress import Progress, Silent, stage
from lrq_export.proof import Proof
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Engine, Recipe, to_toml
from lrq_export.report_file import read_report
from lrq_export.rewrite import Outcome, rewrite
from lrq_export.rotations import choose_rotations
from lrq_export.sampling import check_steps, scheduler_from
from lrq_export.saved_graphs import TRACE, load_graph, pass_file, pass_files, rewritten_graph, save_graph
from lrq_export.source import Inputs, Source, calibration_path, conditions_path, fingerprint, gather_inputs, open_source
from lrq_export.trace import trace
from lrq_export.verify.reference import Reference, write_reference
from lrq_export.verify.report_page import write_report_page
from lrq_export.verify.run import climb
from lrq_export.workspace import Workspace, open_workspace, refuse_foreign

STAGES = ("load", "calibrate", "trace", "rewrite", "quantize", "engine", "verify")


@dataclass
class BuildResult:
    """Where the package is, whether every check held, and what was found. `report` is None when stopped early."""

    out: Path
    passed: bool
    report: dict[str, Any] | None
    stopped_after: str | None = None
    up_to_date: bool = False
    missing: tuple[MissingError, ...] = ()  # why engines that the recipe asks for could not be built here


@dataclass
class Job:
    """What every stage of one build needs."""

    source: Source
    recipe: Recipe
    plans: list[LayerPlan]
    inputs: Inputs
    inputs_fingerprint: str
    workspace: Workspace
    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)
    missing: list[MissingError] = field(default_factory=list)

    @property
    def compensates(self) -> bool:
        """Whether rounding errors are carried forward; at 8 bits rounding is fine enough as it is."""
        return self.recipe.weights.rounding == "compensated" and self.recipe.weights.bits != names.INT8_BITS

    @property
    def plans_file(self) -> Path:
        """Beside the layers: what was decided after calibration."""
        return self.workspace.layers / "plans.json"

    @property
    def decided(self) -> list[LayerPlan]:
        """The plans as calibration left them."""
        return [LayerPlan(**plan) for plan in json.loads(self.plans_file.read_text())]

    def observed(self) -> Observed:
        """What calibration saw; all but the statistics lies beside the layers, not in the package."""
        return Observed(self.workspace.layers, self.path / STATS)

    @property
    def path(self) -> Path:
        return self.workspace.path


def build(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    calibration: str | Path | None = None,
    conditions: str | Path | None = None,
    until: str = STAGES[-1],
    progress: Progress | None = None,
) -> BuildResult:
    """Compile the diffusers folder `source` into the package `out`.

    `calibration` holds recorded denoiser inputs, `conditions` rows of embeddings to sample with (default: the
    source's own calibration.safetensors and conditions.safetensors). `until` stops after a stage and leaves the work
    for a later call to finish.
    Raises an LrqError subclass for everything a user can get wrong; a failed check is `passed` False, not an error.
    """
    recipe, progress, out = recipe or Recipe(), progress or Silent(), Path(out)
    if until not in STAGES:
        raise UsageError(f"until: got {until!r}, needed one of {', '.join(STAGES)}")
    calibration, conditions = (Path(path) if path is not None else None for path in (calibration, conditions))
    timings: dict[str, float] = {}
    _check_place(Path(source), out)
    with stage(progress, "load", timings):
        opened = open_source(Path(source))
        recipe = recipe.for_family(opened.family)
        plans = plan_layers(opened.model(), opened.family, recipe)
        inputs = gather_inputs(opened, recipe, calibration, conditions)
        scheduler = scheduler_from(recipe.sampling.scheduler, opened.scheduler_config())
        check_steps(scheduler, recipe.sampling.steps, opened.family.latents(inputs.evaluation, inputs.conditions))
        files = [calibration_path(opened, calibration), conditions_path(opened, conditions)]
        key = fingerprint(opened, to_toml(_without_engines(recipe)), files, versions())
        without_any = recipe.model_copy(update={"engine": Engine()})
        inputs_fingerprint = fingerprint(opened, to_toml(without_any), files, {})
    if until == "load":
        return BuildResult(out, True, None, "load")
    if _is_finished(out, key):
        missing = () if STAGES.index(until) < STAGES.index("engine") else _add_engines(out, recipe, progress)
        report = read_report(out)
        return BuildResult(out, _all_passed(report), report, up_to_date=True, missing=missing)
    with open_workspace(out, key) as workspace:
        require_free_disk(
            workspace.partial, _estimated_bytes(opened, plans, len(inputs.calibration["timestep"].unique()))
        )
        job = Job(opened, recipe, plans, inputs, inputs_fingerprint, workspace, progress, timings)
        return _run(job, until, key)


def _check_place(source: Path, out: Path) -> None:
    """Raise UsageError for an output that would overwrite what is not ours, or grow within the checkpoint."""
    refuse_foreign(out.resolve())
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies in the source folder {source}", hint="write the package beside it")


def _is_finished(out: Path, key: str) -> bool:
    """Whether a whole package made from the same inputs is there. One that was edited is none: build it."""
    try:
        return is_package(out) and admit(out)["fingerprint"] == key
    except InputError:
        return False


def _without_engines(recipe: Recipe) -> Recipe:
    """What decides all of a package but the engines that come to a finished one, too: those it has are not lost."""
    threads = {name: getattr(recipe.engine, name) for name in ("intra_op_threads", "inter_op_threads")}
    return recipe.model_copy(update={"engine": Engine(**threads)})


def _add_engines(out: Path, recipe: Recipe, progress: Progress) -> tuple[MissingError, ...]:
    """Give a whole package the engines that the recipe asks for, and its settings of them; what is missing here.

    A recipe of ONNX Runtime's engine alone says nothing of others that the package has.
    """
    if set(recipe.engine.targets) <= {ONNXRUNTIME}:
        return ()
    settings = recipe.engine.model_dump(exclude={"targets"})
    return tuple(add_engines(out, recipe.engine.targets, changes=settings, progress=progress))


def _run(job: Job, until: str, key: str) -> BuildResult:
    write_bytes_atomic(job.path / RECIPE, to_toml(job.recipe).encode())
    last = STAGES.index(until)
    for name, run in (("calibrate", _calibrate), ("trace", _trace), ("rewrite", _rewrite), ("quantize", _quantize),
                      ("engine", _engine)):  # fmt: skip
        if STAGES.index(name) <= last:
            run(job)
    if until != STAGES[-1]:
        return BuildResult(job.path, True, None, until, missing=tuple(job.missing))
    report, samples = _verify(job)
    write_json_atomic(job.path / REPORT, report)
    graphs = (load_graph(job.path / TRACE), rewritten_graph(job.path))
    write_report_page(job.path / REPORT_PAGE, report, samples, graphs)
    write_manifest(job.path, _facts(job, key, report["warnings"]))
    job.workspace.commit()
    return BuildResult(job.workspace.out, _all_passed(report), report, missing=tuple(job.missing))


def _all_passed(report: dict[str, Any]) -> bool:
    return all(rung["passed"] is not False for rung in report["ladder"])


def _calibrate(job: Job) -> None:
    """Run the floating-point model: statistics of every planned layer, and its answers to judge others by."""
    recipe, source = job.recipe, job.source
    if (job.path / STATS).exists() and job.plans_file.exists() and Reference.exists(job.path):
        return
    work = len(job.inputs.calibration["hidden_states"]) + recipe.sampling.steps
    work += len(job.plans) if recipe.rotation.kind == "auto" else 0
    with stage(job.progress, "calibrate", job.timings, work):
        model = source.load(source.model())
        if not (job.path / STATS).exists():
            observe(
                source.family, model, [plan.name for plan in job.plans], job.inputs.calibration,
                recipe.calibration.batch, job.workspace.layers,
                lambda count: [job.progress.advance() for _ in range(count)],
                correlations=job.compensates, statistics=job.path / STATS,
            )  # fmt: skip
        observed = job.observed()
        if not job.plans_file.exists():
            write_json_atomic(job.plans_file, [plan.to_json() for plan in _rotated(job, model, observed)])
        statistics = observed.statistics
        summary = {plan.name: _summary(statistics.layer(plan.name)) for plan in job.plans}
        scheduler = scheduler_from(recipe.sampling.scheduler, source.scheduler_config())
        write_reference(job.path, source, model, scheduler, job.inputs, recipe.sampling, summary)


def _rotated(job: Job, model: nn.Module, observed: Observed) -> list[LayerPlan]:
    """The plans as the recipe has them, or with the rotations that lose least on what calibration saw."""
    if job.recipe.rotation.kind != "auto":
        return job.plans
    return choose_rotations(
        job.plans, observed, lambda name: model.get_parameter(name).detach(),
        lambda layer: job.source.family.head_width(model, layer), job.source.family.shares_attention,
        job.recipe.rotation.seed, job.progress.advance,
    )  # fmt: skip


def _trace(job: Job) -> None:
    path = job.path / TRACE
    if path.exists():
        return
    with stage(job.progress, "trace", job.timings):
        traced = trace(job.source.family, job.source.config, job.decided)
        check(traced)
        save_graph(path, traced)


def _rewrite(job: Job) -> None:
    """Run the pass pipeline; the graph after each pass is kept, for inspection and for parity rung R3."""
    files = {step.__name__: pass_file(job.path, index, step.__name__) for index, step in enumerate(PIPELINE)}
    if not all(file.exists() for file in files.values()):
        _run_passes(job, files)
    _check_complete(rewritten_graph(job.path))


def _run_passes(job: Job, files: dict[str, Path]) -> None:
    for stale in pass_files(job.path):  # a rewrite that was interrupted begins anew
        stale.unlink()
    settings, read = job.recipe.rewrite, job.source.checkpoint.read

    def keep(traced: TracedGraph, outcome: Outcome) -> None:
        save_graph(files[outcome.name], traced, outcome.to_json())
        job.progress.advance(outcome.name)

    with stage(job.progress, "rewrite", job.timings, len(PIPELINE)):
        proof = Proof(
            job.source.family.inputs(job.source.config), job.inputs.evaluation,
            read if settings.validation == "full" else None,
        )  # fmt: skip
        rewrite(
            load_graph(job.path / TRACE), PIPELINE, proof, job.recipe.gates.parity_nmse,
            keep_going=settings.keep_going, done=keep,
        )  # fmt: skip


def _check_complete(rewritten: TracedGraph) -> None:
    """What no package can do without, with --keep-going either: a node that names no plugin is run by its body."""
    try:
        check_complete(rewritten)
    except GraphError as error:
        raise CheckFailed(f"rewrite: {error}", hint="report this fault of lrq-export") from error


def _quantize(job: Job) -> None:
    traced, path = rewritten_graph(job.path), job.path
    if not (path / QUANTIZED).exists():
        with stage(job.progress, "quantize", job.timings, len(traced.linears)):
            quantize_layers(
                traced, job.decided, job.source.checkpoint, job.observed(), job.workspace.layers, job.progress.advance,
                bias_correction=job.recipe.weights.bias_correction,
            )  # fmt: skip
            assemble(traced, job.workspace.layers, path / QUANTIZED)
    if not (path / MODEL).exists():
        with stage(job.progress, "bind", job.timings):
            write_portable(traced, QuantizedFile(path / QUANTIZED), path / MODEL)


def _engine(job: Job) -> None:
    """ONNX Runtime's engine, which the checks are made with, then those of other targets."""
    folder, settings = job.path / ONNXRUNTIME_ENGINE, job.recipe.engine
    whole = (folder / "session.json").exists()  # written last
    keep_engines(job.workspace.out, job.path, job.workspace.layers, job.inputs_fingerprint)
    if whole and not lacking(job.path, settings):
        return
    with stage(job.progress, "engine", job.timings, 1 + len(lacking(job.path, settings))):
        if not whole:
            threads = (settings.intra_op_threads, settings.inter_op_threads)
            build_engine(rewritten_graph(job.path), QuantizedFile(job.path / QUANTIZED), folder, threads=threads)
            job.progress.advance("onnxruntime")
        job.missing += build_targets(job.path, job.source.config, settings, job.progress, job.workspace.layers)


def _verify(job: Job) -> tuple[dict[str, Any], Any]:
    with stage(job.progress, "verify", job.timings, 6):
        report, samples = climb(job.path, job.recipe, job.source.config, job.source, advance=job.progress.advance)
    report["warnings"] = job.inputs.warnings + report["warnings"] + engine_warnings(job.path)
    report["timings"] = [{"stage": name, "seconds": round(seconds, 2)} for name, seconds in job.timings.items()]
    report["tool"] = {"name": "lrq-export", "version": __version__, "libraries": libraries()}
    report["source"] |= {"path_name": job.source.checkpoint.path.resolve().name}
    return report, samples


def _facts(job: Job, key: str, warnings: list[str]) -> dict[str, Any]:
    """What the manifest says besides the hashes."""
    records = QuantizedFile(job.path / QUANTIZED).records
    return {
        "tool": {"name": "lrq-export", "version": __version__, "libraries": libraries()},
        "fingerprint": key,
        INPUTS: job.inputs_fingerprint,
        "source": {"fingerprint": job.source.checkpoint.fingerprint(), "config": _plain(job.source.config)},
        "scheduler": job.source.scheduler_config(),
        "recipe": job.recipe.model_dump(mode="json", by_alias=True),
        "layers": {name: vars(record) for name, record in records.items()},
        "warnings": warnings,
    }


def _summary(moments: Moments) -> dict[str, float]:
    """What the report shows of a layer's input: J of the LRQ-DiT paper measures size, the others outliers."""
    return {"rms": moments.rms, "kurtosis": moments.kurtosis, "peak_to_rms": moments.peak_to_rms}


def _estimated_bytes(source: Source, plans: list[LayerPlan], timesteps: int) -> int:
    """Disk that a build takes at most: per-layer files, quantized file, portable model, INT8 engine, kept floats."""
    planned = {f"{plan.name}.weight" for plan in plans}
    kept = [name for name in source.checkpoint.names() if name not in planned]
    floats = sum(4 * torch.Size(source.checkpoint.shape(name)).numel() for name in kept)
    codes = sum(plan.rows * plan.cols for plan in plans)
    tables = sum(
        plan.rows * (plan.cols // plan.group_size) * 2**plan.bits for plan in plans if plan.bits < names.INT8_BITS
    )
    statistics = sum(28 * plan.cols for plan in plans) * timesteps
    correlations = sum(4 * plan.cols**2 for plan in plans)
    return codes * 5 // 2 + 4 * tables + 4 * floats + statistics + correlations + (16 << 20)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(config.items())}
