"""Whether the files of a package are of one model, whatever their hashes say: asked before anything is computed."""

from pathlib import Path

from lrq_export import trial
from lrq_export.errors import InputError
from lrq_export.models.base import SAMPLES, Sizes
from lrq_export.package import MANIFEST, QUANTIZED
from lrq_export.quantized import QuantizedFile
from lrq_export.verify import reference
from lrq_export.verify.subject import Subject

_AGAIN = "build the package again"


def check_one_model(subject: Subject) -> None:
    """Raise InputError for a config that makes no model, weights of another model, or answers to other inputs."""
    manifest = subject.package / MANIFEST
    needed = trial.shapes(manifest, subject.family, subject.config)
    _check_weights(subject.package / QUANTIZED, subject.quantized, needed)
    trial.run(manifest, subject.family, subject.config)
    _check_reference(subject)


def _check_weights(path: Path, quantized: QuantizedFile, needed: dict[str, tuple[int, ...]]) -> None:
    held = {f"{name}.weight": (record.rows, record.cols) for name, record in quantized.records.items()}
    held |= {name: quantized.file.entry(name).shape for name in quantized.float_names()}
    biases = {record.bias for record in quantized.records.values()}  # a layer may have got one
    for name in sorted(needed.keys() | held.keys() - biases):
        if held.get(name) != needed.get(name):
            got, wanted = (f"shape {each[name]}" if name in each else "no such tensor" for each in (held, needed))
            raise InputError(f"{path}: {name}: got {got}, needed {wanted} of the manifest's model", hint=_AGAIN)


def _check_reference(subject: Subject) -> None:
    path, inputs = subject.package / reference.FILE, subject.reference.inputs
    sizes = Sizes(f"{path}: inputs.", hint=_AGAIN)
    for name, spec in subject.specs.items():
        if name in inputs:
            sizes.admit(name, tuple(inputs[name].shape), spec)
        elif not spec.optional:
            raise InputError(f"{path}: inputs.{name} is missing", hint=_AGAIN)
    unknown = inputs.keys() - subject.specs.keys()
    if unknown:
        raise InputError(f"{path}: inputs.{min(unknown)} is unknown to the manifest's model", hint=_AGAIN)
    answers, latents = subject.reference.noise, subject.reference.latents
    rank, conditions = inputs["hidden_states"].ndim, subject.reference.conditions
    if answers.ndim != rank or len(answers) != sizes[SAMPLES]:
        raise InputError(
            f"{path}: noise: got shape {tuple(answers.shape)} for {sizes[SAMPLES]} inputs, needed one for each",
            hint=_AGAIN,
        )
    if latents.ndim != rank + 1 or not latents.numel():
        raise InputError(f"{path}: latents: got shape {tuple(latents.shape)}, needed steps of samples", hint=_AGAIN)
    if not conditions or not all(tensor.ndim and len(tensor) for tensor in conditions.values()):
        raise InputError(f"{path}: conditions: needed a row of each at least", hint=_AGAIN)
    unseen = subject.quantized.records.keys() - subject.reference.statistics.keys()
    if unseen:
        raise InputError(f"{path}: statistics: {min(unseen)} is missing", hint=_AGAIN)
