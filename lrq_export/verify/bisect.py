"""Find the first tensor at which two computations of one graph part, by marking outputs and halving.

A fault shows in what is computed from it. So the tensors that lead to a wrong output are searched: of one in the middle
both sides are asked; if it is wrong, only those before it remain, if it is right, all of those are cleared. What takes
time is to prepare a run, so one answers for several tensors, and three or four are enough. A fault can vanish again (a
mask, a rounding), so what was found is confirmed: everything that its node reads must be right, or the search goes on
there.

    divergence = first_divergence(OnnxTensors(engine, inputs), OnnxTensors(model, inputs), bound=1e-6)
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from lrq_export.errors import MissingError
from lrq_export.onnx_file import read_model
from lrq_export.package import atomic_file
from lrq_export.verify.metrics import cosine, error_quantiles, nmse
from lrq_export.verify.sliced import FOLDER_OPTION, frugal_options, refusals

# What a side is: named tensors of one run on fixed inputs. Of TensorRT, for example, an engine with these marked.
Tensors = Callable[[Sequence[str]], Mapping[str, np.ndarray]]
AT_ONCE = 15  # halving four times over
INPUTS, EXPECTED, ARRAYS = "inputs.json", "expected.json", "tensors.npz"


class OnnxTensors:
    """Tensors of an ONNX model in ONNX Runtime, any of which may be asked for.

    Args:
        path: the model; its external data, if any, lies beside it.
        inputs: what it is run on, by the names of its inputs.
        config: session options.
        providers: of ONNX Runtime.
    """

    def __init__(
        self,
        path: Path,
        inputs: Mapping[str, np.ndarray],
        *,
        config: Mapping[str, str] | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        self.path, self.inputs, self.config, self.providers = Path(path), dict(inputs), dict(config or {}), providers
        self.model = read_model(self.path)
        self.outputs = [value.name for value in self.model.graph.output]

    @cached_property
    def producer(self) -> dict[str, onnx.NodeProto]:
        """The node that computes each tensor, in the order of the graph."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    def replay_words(self, tensor: str, folder: Path) -> list[str]:
        """The command that computes a tensor in the same library; `folder` may get what it reads but its inputs."""
        return ["polygraphy", "run", str(self.path), "--onnxrt", "--onnx-outputs", tensor]

    def __call__(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Their values, of one session that has them as its outputs."""
        import onnxruntime

        options = frugal_options({FOLDER_OPTION: str(self.path.parent)} | self.config)
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        del marked.graph.output[:]
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)  # ONNX Runtime infers their types
        with refusals(self.path):
            session = onnxruntime.InferenceSession(marked.SerializeToString(), options, providers=list(self.providers))
            read = {value.name for value in session.get_inputs()}
            feed = {name: array for name, array in self.inputs.items() if name in read}
            return dict(zip(names, session.run(list(names), feed), strict=True))


@dataclass(frozen=True)
class Divergence:
    """The first tensor at which two sides part, and by how much there."""

    tensor: str
    node: str  # the name of the node that computes it
    op: str  # with its domain
    reads: tuple[str, ...]  # the tensors before it that were compared, and agree
    nmse: float
    cosine: float
    quantiles: dict[float, float]  # of the absolute error over the RMS of the reference
    runs: int  # of each side
    got: np.ndarray
    expected: np.ndarray

    def line(self) -> str:
        errors = ", ".join(f"{value:.1e} at {quantile:.0%}" for quantile, value in self.quantiles.items())
        agree = f"; its inputs agree ({', '.join(self.reads)})" if self.reads else ""
        return (
            f"first differs at {self.tensor}, computed by {self.op} {self.node}: NMSE {self.nmse:.1e}, "
            f"cosine {self.cosine:.6f}, errors over RMS {errors}{agree}"
        )


def first_divergence(
    subject: OnnxTensors,
    reference: Tensors,
    *,
    bound: float,
    common: Sequence[str] | None = None,
    at_once: int = AT_ONCE,
    advance: Callable[[str], None] = lambda tensor: None,
) -> Divergence | None:
    """The first tensor of `subject` whose NMSE against `reference` exceeds `bound`; None if no output's does.

    `common`: names that `reference` can answer; default: those of its graph, or all of them. `at_once`: tensors that
    one run is asked for; 1 leaves the fusions of a graph optimizer most alone. `advance` is told of every tensor.
    """
    search = _Search(subject, reference, bound, common, at_once, advance)
    wrong = search.wrong_among([name for name in subject.outputs if name in search.common])
    if not wrong:
        return None
    while True:
        found = search.halve(wrong[0])
        nearest = search.nearest_before(found)
        wrong = search.wrong_among(nearest)
        if not wrong:
            return search.divergence(found, nearest)


class _Search:
    def __init__(self, subject, reference, bound, common, at_once, advance):
        self.subject, self.reference, self.bound, self.advance = subject, reference, bound, advance
        if common is None and isinstance(reference, OnnxTensors):
            common = reference.producer.keys()
        known = subject.producer.keys()
        self.common = set(known) if common is None else set(common) & known
        self.rank = {name: index for index, name in enumerate(known)}
        self.at_once, self.runs = at_once, 0
        self.differs: dict[str, bool] = {}

    def wrong_among(self, names: Sequence[str]) -> list[str]:
        """Those that differ, in the order of the graph; what is not known yet is asked of one run of each side."""
        unknown = [name for name in names if name not in self.differs]
        for name, (got, expected) in self.values(unknown).items():
            self.advance(name)
            self.differs[name] = got.shape != expected.shape or nmse(*finite(got, expected)) > self.bound
        return sorted((name for name in names if self.differs[name]), key=self.rank.__getitem__)

    def values(self, names: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if not names:
            return {}
        self.runs += 1
        got, expected = self.subject(names), self.reference(names)
        return {name: (np.asarray(got[name]), np.asarray(expected[name])) for name in names}

    def halve(self, wrong: str) -> str:
        """A wrong tensor before which every one that was asked for is right; `wrong` itself, if there is no other."""
        suspects = self.before(wrong)
        while suspects:
            ordered = sorted(suspects, key=self.rank.__getitem__)
            parts = min(self.at_once, len(ordered)) + 1
            chosen = list(dict.fromkeys(ordered[index * len(ordered) // parts] for index in range(1, parts)))
            found = self.wrong_among(chosen or ordered[:1])
            for right in set(chosen or ordered[:1]) - set(found):
                suspects -= self.before(right) | {right}
            if found:
                wrong = found[0]
                suspects &= self.before(wrong)
        return wrong

    def before(self, name: str) -> set[str]:
        """The comparable tensors that lead to one."""
        stack, seen = [name], {name}
        while stack:
            node = self.subject.producer.get(stack.pop())
            for read in [] if node is None else node.input:
                if read not in seen:
                    seen.add(read)
                    stack.append(read)
        return (seen & self.common) - {name}

    def nearest_before(self, name: str) -> list[str]:
        """The comparable tensors that a tensor is computed from, through those that are not comparable."""
        found, stack, seen = [], [name], {name}
        while stack:
            node = self.subject.producer.get(stack.pop())
            for read in [] if node is None else node.input:
                if read in seen:
                    continue
                seen.add(read)
                if read in self.common:
                    found.append(read)
                else:
                    stack.append(read)
        return sorted(found, key=self.rank.__getitem__)

    def divergence(self, tensor: str, nearest: Sequence[str]) -> Divergence:
        got, expected = self.values([tensor])[tensor]
        node = self.subject.producer[tensor]
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        errors = (np.inf, 0.0, {})
        if got.shape == expected.shape:
            pair = finite(got, expected)
            errors = (nmse(*pair), cosine(*pair), error_quantiles(*pair))
        return Divergence(tensor, node.name, op, tuple(nearest), *errors, self.runs, got, expected)


def finite(got: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, with 0 where they agree on a value that no error can be taken of: -inf of a mask, NaN."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    agreed = ((got == expected) | (np.isnan(got) & np.isnan(expected))) & ~np.isfinite(expected)
    return np.where(agreed, 0.0, got), np.where(agreed, 0.0, expected)


def save_replay(folder: Path, divergence: Divergence, subject: OnnxTensors) -> str:
    """Save inputs and both values of the tensor; returns the command that compares them by hand, with polygraphy.

    Writes tensors.npz for NumPy, inputs.json and expected.json for `polygraphy run`.
    Raises MissingError without polygraphy.
    """
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import to_json
    except ImportError as error:
        raise MissingError("polygraphy is not installed", hint="pip install 'lrq-export[rtx]'") from error
    folder = Path(folder)
    arrays = {f"inputs.{name}": array for name, array in subject.inputs.items()}
    arrays |= {"got": divergence.got, "expected": divergence.expected}
    with atomic_file(folder / ARRAYS) as file:
        np.savez(file, **arrays)
    expected = RunResults()
    expected.append(("reference", [IterationResult({divergence.tensor: divergence.expected}, runner_name="reference")]))
    with atomic_file(folder / INPUTS) as file:
        file.write(to_json([subject.inputs]).encode())
    with atomic_file(folder / EXPECTED) as file:
        file.write(to_json(expected).encode())
    words = [
        *subject.replay_words(divergence.tensor, folder),
        "--load-inputs", str(folder / INPUTS), "--load-outputs", str(folder / EXPECTED),
    ]  # fmt: skip
    return shlex.join(words)
