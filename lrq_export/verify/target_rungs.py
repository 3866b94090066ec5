"""The rungs between model.onnx and a target (`against`), each measured on one package."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lrq_export.errors import UsageError
from lrq_export.onnx_file import read_model
from lrq_export.package import MODEL, QUANTIZED
from lrq_export.runtime import feeds
from lrq_export.verify import forced, ladder, nvidia
from lrq_export.verify.array_file import ArrayFile
from lrq_export.verify.bisect import Divergence, OnnxTensors, first_divergence, save_replay
from lrq_export.verify.bound import differing_weight
from lrq_export.verify.metrics import cosine, error_quantiles, nmse
from lrq_export.verify.rungs import blamed_layer, forced_model
from lrq_export.verify.sliced import ReadInput, SlicedModel
from lrq_export.verify.step import first_of, put_weights, reader_of, write_step
from lrq_export.verify.subject import Subject
from lrq_export.verify.target import Target

# Two correct implementations of a quantized model that run freely part by some 1e-6 (docs/graph.md). TensorRT's, too,
# computes in float32: polygraphy leaves TF32 off.
FREE_NMSE = 1e-4
# What an engine in half precision may lose, by its activations. Every tensor rounded, the demo lost 3.6e-4 and 2.8e-3
# at the worst input of a layer, an attention whose sum cancels, and 1.7e-6 and 2.0e-5 at the output (docs/engines.md).
HALF_NMSE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2}
Feed = Mapping[str, np.ndarray]
Runs = Iterable[tuple[int, str, np.ndarray]]  # case, tensor, value


@dataclass(frozen=True)
class Agreement:
    """How one tensor agrees with another, as polygraphy's comparator asks it: true if the NMSE is within the bound."""

    nmse: float
    cosine: float
    quantiles: Mapping[float, float]  # of the absolute error over the RMS of the reference
    bound: float

    def __bool__(self) -> bool:
        return self.nmse <= self.bound

    @classmethod
    def of(cls, got: np.ndarray, expected: np.ndarray, bound: float) -> "Agreement":
        if got.shape != expected.shape:
            return cls(math.inf, 0.0, {}, bound)
        return cls(nmse(got, expected), cosine(got, expected), error_quantiles(got, expected), bound)


@dataclass(frozen=True)
class Comparison(ladder.Rung):
    """A rung with more figures of the tensor that is worst there."""

    cosine: float | None = None
    quantiles: Mapping[float, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        finite = {f"{at:g}": error if math.isfinite(error) else None for at, error in self.quantiles.items()}
        return super().to_json() | {"quantiles": finite}

    @classmethod
    def of(cls, rung: str, title: str, blames: str, worst: Agreement, note: str) -> "Comparison":
        figures = (worst.cosine, worst.quantiles)
        return cls(rung, title, blames, "NMSE", worst.nmse, worst.bound, bool(worst), note, *figures)


@dataclass(frozen=True)
class Error:
    """A layer's input, or the output, that differs by more than the bound, and in which case."""

    case: int
    tensor: str


@dataclass(frozen=True)
class Bisection:
    """What halving found: the first tensor that differs and the command that replays it, or why there is none."""

    divergence: Divergence | None = None
    command: str | None = None
    lacks: str | None = None


class Compared:
    """A target and the model.onnx beside it, on the same inputs."""

    def __init__(self, subject: Subject, target: Target):
        self.subject, self.target = subject, target
        self.cases = [feeds(subject.specs, case) for case in subject.cases]
        self.errors: list[Error] = []
        self.changed_weight: str | None = None
        self.on_gpu = False  # whether it was NVIDIA's library that made the errors

    @cached_property
    def answers(self) -> list[ArrayFile]:
        """Of model.onnx for each case: the input of every quantized layer, and the output."""
        model = read_model(self.subject.package / MODEL)
        known = {value.name for value in model.graph.output}
        for name in sorted(set(self.subject.tensor_of.values()) - known):
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        answers = [ArrayFile() for _ in self.cases]
        sliced = SlicedModel(model, self.subject.package)
        for case, name, array in sliced.run([case.__getitem__ for case in self.cases]):
            answers[case][name] = array
        for case, fed in enumerate(self.cases):  # layers that read an input of the model
            for name in set(self.subject.tensor_of.values()) & fed.keys():
                answers[case][name] = fed[name]
        return answers

    def weights(self) -> Comparison:
        changed = self.changed_weight = differing_weight(self.target.path, self.target.weights())
        blames = "the engine's weights" if changed is None else f"{changed}, whose bytes are not those of {QUANTIZED}"
        return Comparison(
            "T1", f"its weights vs {QUANTIZED}", blames, "changed", float(changed is not None), 0.0, changed is None,
            "byte for byte",
        )  # fmt: skip

    def layers(self) -> Comparison:
        cut = forced_model(self.subject, self.target.path, self.target.config)
        return self._layers("T2", self.target.where, cut.model.graph, cut.run(self._reads()))

    def layers_on_gpu(self) -> Comparison:
        cut = forced_model(self.subject, self.target.path).model
        runs = nvidia.run_cut(self.target, cut, self._reads())
        return self._layers("T4", f"in {self.target.name}", cut.graph, runs)

    def output(self) -> Comparison:
        """Both run freely."""
        found = agreement(self.answers, self.cases, self.target.session(), self._free)
        title = f"output {self.target.where} vs {MODEL}"
        return Comparison.of("T3", title, "what adds up over layers", found, "both run freely")

    def output_on_gpu(self) -> Comparison:
        """Of the package's own plan, in the cases whose sizes it was built for."""
        profiles = {index: self.target.profile_of(self.subject.specs, case) for index, case in enumerate(self.cases)}
        fitting = {index: profile for index, profile in profiles.items() if profile is not None}
        if not fitting:
            raise UsageError(
                f"{self.target.plan}: takes none of the sizes compared", hint="name --inputs of sizes it was built for"
            )
        cases = [self.cases[index] for index in fitting]
        session = nvidia.PlanSession(self.target, cases, list(fitting.values()))
        found = agreement([self.answers[index] for index in fitting], cases, session, self._free)
        note = f"both run freely; {len(cases)} of {len(self.cases)} cases fit its profiles"
        return Comparison.of("T5", f"output of its plan vs {MODEL}", "the engine", found, note)

    def bisect(self, folder: Path) -> "Bisection":
        """The first tensor that differs, or why there is none to show.

        Searched is what leads from one layer's input to the first that differs from model.onnx, and before it, if a
        weight is another than was meant: what reads it, beside the same model with the right one. `folder` gets that
        part of both models.
        """
        cut = forced_model(self.subject, self.target.path, self.target.config).model
        weight = self.changed_weight if self.target.runs_in_onnxruntime else None
        reader = None if weight is None else reader_of(cut.graph, weight)
        suspects = [] if reader is None else [(reader, weight)]
        if self.errors:
            suspects.append((first_of(cut.graph, [error.tensor for error in self.errors]), None))
        order = {tensor: place for place, node in enumerate(cut.graph.node) for tensor in node.output}
        found = Bisection(lacks="given the same input, every layer agrees, and so does every weight that is read")
        if weight != self.changed_weight:
            found = Bisection(lacks=f"ONNX Runtime does not run what reads {self.changed_weight}")
        for tensor, wrong in sorted(suspects, key=lambda suspect: order[suspect[0]]):
            found = self._halve(folder, cut, tensor, wrong)
            if found.divergence is not None:
                break
        return found

    def _halve(self, folder: Path, cut: onnx.ModelProto, tensor: str, weight: str | None) -> "Bisection":
        """The first difference in the part that leads to `tensor`: from model.onnx's, or, of a wrong `weight`, its own.

        With the wrong weight both models are the target's, in ONNX Runtime, so that no difference is too small.
        """
        ours, theirs = folder / "target.onnx", folder / "reference.onnx"
        if weight is None:
            bound, read = self._parity, self._reads()[next(each.case for each in self.errors if each.tensor == tensor)]
            portable = forced_model(self.subject, self.subject.package / MODEL).model
            expected = write_step(portable, self.subject.package, tensor, theirs, read)
        else:
            bound, read = 0.0, self._reads()[0]
            expected = write_step(cut, self.target.path.parent, tensor, theirs, read)
            put_weights(theirs, self.target.weights())
        feed = write_step(cut, self.target.path.parent, tensor, ours, read)
        if self.on_gpu and weight is None:
            suspect = nvidia.TensorRtTensors(ours, feed, self.target)
        else:
            suspect = OnnxTensors(ours, feed, config=self.target.config)
        found = first_divergence(suspect, OnnxTensors(theirs, expected, config=self.target.config), bound=bound)
        if found is not None:
            return Bisection(found, save_replay(folder, found, suspect))
        if weight is None:
            why = f"run alone, the part that leads to {tensor} agrees: what differs is how it is fused with the rest"
        else:
            why = f"what reads {weight} computes the same on these inputs: name other --inputs"
        return Bisection(lacks=f"{why}; both are in {folder}")

    @property
    def _parity(self) -> float:
        return max(self.subject.recipe.gates.parity_nmse, HALF_NMSE[self.target.activations])

    @property
    def _free(self) -> float:
        return max(FREE_NMSE, HALF_NMSE[self.target.activations])

    def _reads(self) -> list[ReadInput]:
        return [forced.forced_inputs(*pair) for pair in zip(self.cases, self.answers, strict=True)]

    def _layers(self, rung: str, where: str, graph: onnx.GraphProto, runs: Runs) -> Comparison:
        """The rung of all tensors that `runs` yields, each in its case."""
        bound = self._parity
        worst, blamed, broken = None, "", []
        for case, name, array in runs:
            expected = self.answers[case][name]
            error = nmse(array, expected) if array.shape == expected.shape else math.inf
            if error > bound:
                broken.append(Error(case, name))
            if worst is None or error > worst.nmse:
                worst, blamed = Agreement.of(array, expected, bound), name
        if broken and not self.errors:
            self.errors, self.on_gpu = broken, rung == "T4"
        if broken:
            blamed = first_of(graph, [error.tensor for error in broken])
        blames = f"lowering and kernels ({'first' if broken else 'worst'} at {blamed_layer(self.subject, blamed)})"
        return Comparison.of(rung, f"layers {where} vs {MODEL}", blames, worst, "each layer on the same input")


def agreement(reference: Sequence[Feed], cases: Sequence[Feed], session: Any, bound: float) -> Agreement:
    """The worst agreement of what a session answers with `reference`, as polygraphy's comparator finds it."""
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator, IterationResult
    from polygraphy.logger import G_LOGGER

    found: list[Agreement] = []

    def judge(got: Feed, expected: Feed) -> dict[str, Agreement]:
        each = {name: Agreement.of(array, expected[name], bound) for name, array in got.items()}
        found.extend(each.values())
        return each

    with G_LOGGER.verbosity():  # of critical errors alone
        results = Comparator.run([OnnxrtRunner(session)], data_loader=list(cases))
        names = [output.name for output in session.get_outputs()]
        kept = [IterationResult({name: answers[name] for name in names}, runner_name=MODEL) for answers in reference]
        results.append((MODEL, kept))
        Comparator.compare_accuracy(results, compare_func=judge)
    return max(found, key=lambda each: each.nmse)
