"""Run the passes over a traced graph, each one proved before the next begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphs.checks import GraphError, check, check_preserved
from graphs.integer_data import check_same_integers, integer_layers
from graphs.passes import Pass
from graphs.passes.result import PassResult
from graphs.traced import TracedGraph
from lrq_export.errors import CheckFailed, LrqError
from lrq_export.proof import Answers, Proof, difference


@dataclass(frozen=True)
class Outcome:
    """What became of one pass. `nmse` None: it fired nowhere, so there was nothing to prove."""

    name: str
    result: PassResult
    nmse: float | None
    refused: str | None = None  # why the pass was left out

    def to_json(self) -> dict[str, Any]:
        skipped = [{"node": each.node, "reason": each.reason} for each in self.result.skipped]
        return {
            "name": self.name, "fired": self.result.fired, "skipped": skipped, "nmse": self.nmse,
            "refused": self.refused,
        }  # fmt: skip


def rewrite(
    traced: TracedGraph,
    passes: Sequence[Pass],
    proof: Proof,
    bound: float,
    *,
    keep_going: bool = False,
    done: Callable[[TracedGraph, Outcome], None] = lambda graph, outcome: None,
) -> TracedGraph:
    """The graph after all passes; `traced` stays as it is. `done` gets the graph after each, and what became of it.

    A pass must leave a graph that holds to `graphs.checks`, decodes the same integers and answers as before to an NMSE
    of `bound`, or of the proof's own where that is less. One that does not raises CheckFailed, or with `keep_going`
    counts as if it had not run.
    """
    integers = integer_layers(traced)
    answers: Answers | None = None
    for step in passes:
        after = traced.copy()
        try:
            result = step(after)
            check(after)
            check_preserved(traced, after)
            measured = None
            if result.fired:
                integers_now = integer_layers(after)
                check_same_integers(integers, integers_now)
                if answers is None:
                    answers = _sound_answers(traced, proof)
                    bound = min(bound, proof.bound(traced, answers))
                now = proof.answers(after)
                measured = difference(now, answers)
                if not measured <= bound:
                    raise GraphError(
                        "its answers", f"NMSE {measured:.1e} against those before it", f"at most {bound:.2g}"
                    )
                answers, integers = now, integers_now
                traced = after  # a pass that did not fire has changed nothing, whatever it left behind
            outcome = Outcome(step.__name__, result, measured)
        except LrqError:  # of the source's weights: no pass is to blame
            raise
        except Exception as error:  # a check that failed, a map that does not fit, or what a broken graph raises
            if not keep_going:
                raise CheckFailed(
                    f"rewrite: pass {step.__name__}: {_said(error)}",
                    hint="report this fault of lrq-export; --keep-going builds without the pass",
                ) from error
            outcome = Outcome(step.__name__, PassResult(), None, _said(error))
        done(traced, outcome)
    return traced


def _sound_answers(traced: TracedGraph, proof: Proof) -> Answers:
    """Those of the graph before any pass has fired, for whose faults none is to blame; raises CheckFailed for them."""
    try:
        answers = proof.answers(traced)
    except LrqError:  # of the source's weights
        raise
    except Exception as error:
        raise CheckFailed(
            f"rewrite: the traced graph does not run: {_said(error)}", hint="report this fault of lrq-export"
        ) from error
    if not all(np.isfinite(answer).all() for answer in answers):
        raise CheckFailed(
            "rewrite: the traced graph answers NaN or infinity, before any pass",
            hint="look for such numbers in the checkpoint and in the recorded inputs",
        )
    return answers


def _said(error: Exception) -> str:
    """The message of an error, with its kind unless it is one that a check raises."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
