"""`lrq-export verify OUT --against TARGET`: what a target computes beside the portable model.onnx, rung by rung.

T1  weights in the target's model   those of quantized.safetensors, byte for byte
T2  every quantized layer's input   model.onnx's, each layer before it given what model.onnx gives it (`forced`)
T3  the output                      model.onnx's, both run freely, by polygraphy's comparator
T4  as T2, in NVIDIA's library, where it and a GPU are at hand
T5  as T3, the package's own plan, likewise

Of a target of NVIDIA, T2 and T3 run in ONNX Runtime the network that its parser reads, if that is in standard ops
and not in bfloat16, for which it has few kernels on the CPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrq_export.calibrate.inputs import load_inputs
from lrq_export.errors import LrqError, MissingError
from lrq_export.loading import admit_target
from lrq_export.models import family_of, model_inputs
from lrq_export.package import MANIFEST, QUANTIZED
from lrq_export.quantized import QuantizedFile
from lrq_export.recipe import Recipe
from lrq_export.verify.one_model import check_one_model
from lrq_export.verify.reference import Reference
from lrq_export.verify.subject import PARITY_SAMPLES, Subject
from lrq_export.verify.target import Target
from lrq_export.verify.target_rungs import Bisection, Compared, Comparison

RUNGS = ("T1", "T2", "T3", "T4", "T5")


@dataclass
class Findings:
    """What was compared. `not_run` says what this machine lacks for the rungs that are missing."""

    rungs: list[Comparison] = field(default_factory=list)
    not_run: LrqError | None = None
    bisection: Bisection | None = None  # None: it was not asked for, or all rungs hold

    @property
    def broken(self) -> list[Comparison]:
        return [rung for rung in self.rungs if not rung.passed]

    @property
    def ran(self) -> bool:
        """Whether anything was computed, and not only weights compared."""
        return len(self.rungs) > 1


def compare(
    package: str | Path,
    against: str,
    *,
    inputs: Path | None = None,
    samples: int = PARITY_SAMPLES,
    replay: Path | None = None,
    advance: Callable[[str], None] = lambda rung: None,
) -> Findings:
    """Compare a target of a package with its model.onnx, on recorded inputs and on random ones of other sizes.

    `inputs`: a file of recorded denoiser inputs; default: those that the package keeps. `samples`: how many of them.
    `replay`: a folder for the first tensor that differs, found by halving, and what it is computed from; nothing is
    written where all rungs hold. Raises UsageError for an unknown target, MissingError for one that the package does
    not hold, or without polygraphy; InputError for a bad package, an engine of another version than the library here,
    or bad inputs.
    """
    package = Path(package)
    manifest, target = admit_target(package, against), Target(against, package)
    if find_spec("polygraphy") is None:
        raise MissingError("polygraphy is not installed", hint="pip install 'lrq-export[rtx]'")
    compared = Compared(_subject(package, manifest, inputs, samples), target)
    findings = Findings(not_run=target.obstacle())
    rungs = [compared.weights]
    if target.runs_in_onnxruntime:
        rungs += [compared.layers, compared.output]
    if target.is_nvidia and findings.not_run is None:
        rungs += [compared.layers_on_gpu, compared.output_on_gpu]
    for climb in rungs:
        findings.rungs.append(climb())
        advance(findings.rungs[-1].rung)
    if replay is not None and findings.broken:
        findings.bisection = compared.bisect(replay)
    return findings


def _subject(package: Path, manifest: Mapping[str, Any], inputs: Path | None, samples: int) -> Subject:
    config, reference = manifest["source"]["config"], Reference.load(package)
    specs, family = model_inputs(config, str(package / MANIFEST)), family_of(config["_class_name"])
    recipe, quantized = Recipe.model_validate(manifest["recipe"]), QuantizedFile(package / QUANTIZED)
    subject = Subject(package, recipe, family, config, None, quantized, reference, samples)
    check_one_model(subject)
    if inputs is not None:
        subject.reference = replace(reference, inputs=load_inputs(inputs, specs, samples))
    return subject
