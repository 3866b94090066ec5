"""Which graph each pass is measured against: `lrq_export.rewrite` with answers that the test makes up."""

import numpy as np
import pytest

from graphs.passes.patterns import redirect_readers
from graphs.passes.result import PassResult
from lrq_export.errors import CheckFailed, LrqError
from lrq_export.rewrite import rewrite

TWO = """
two (float[batch, 24] x) => (float[batch, 24] y)
{
    u = Linear<rows = 24, cols = 24>(x)
    v = Linear<rows = 24, cols = 24>(x)
    y = Add(u, v)
}
"""
BOUND = 1e-6  # between the NMSE of two graphs 0.001 and 0.002 apart


class Answering:
    """In place of a proof: a graph answers with its name, a number."""

    def __init__(self):
        self.asked = []

    def answers(self, traced):
        self.asked.append(traced.graph.name)
        return [np.array([float(traced.graph.name)]), np.ones(1)]

    def bound(self, traced, answers):
        return 1.0


def answers(number, fired=1):
    def step(traced):
        traced.graph.name = number
        return PassResult(fired)

    return step


def without_v(traced):
    (add,) = [node for node in traced.graph.nodes if node.name.startswith("Add") and node.outputs[0].name == "y"]
    redirect_readers(add.inputs[1], add.inputs[0])
    traced.forget_unused()
    return PassResult(1)


@pytest.fixture
def traced(parse):
    traced = parse(TWO)
    traced.graph.name = "1"
    return traced


def run(traced, *steps, keep_going=False):
    proof, kept = Answering(), []
    after = rewrite(traced, steps, proof, BOUND, keep_going=keep_going, done=lambda _, outcome: kept.append(outcome))
    return after, kept, proof.asked


def test_each_pass_is_measured_against_the_graph_right_before_it(traced):
    steps = [answers(number) for number in ("1.0009", "1.0018", "1.0027")]
    after, outcomes, asked = run(traced, *steps)
    assert after.graph.name == "1.0027"
    assert [outcome.nmse for outcome in outcomes] == pytest.approx([0.0009**2] * 3, rel=0.01)
    assert asked == ["1", "1.0009", "1.0018", "1.0027"]  # each once


def test_the_bound_is_between_a_step_and_two(traced):
    with pytest.raises(CheckFailed, match="needed at most 1e-06"):
        run(traced, answers("1.0018"))


def test_a_pass_that_is_left_out_is_no_measure_for_the_next(traced):
    after, outcomes, _ = run(
        traced, answers("1.0009"), answers("1.5"), answers("1.0018"), answers("7", fired=0), answers("1.0027"),
        keep_going=True,
    )  # fmt: skip
    assert after.graph.name == "1.0027"
    assert [outcome.refused is not None for outcome in outcomes] == [False, True, False, False, False]
    near = pytest.approx(0.0009**2, rel=0.01)
    assert [outcome.nmse for outcome in outcomes] == [near, None, near, None, near]


@pytest.mark.parametrize("worst", [0, 1])
def test_the_worst_of_all_answers_counts(traced, worst):
    class Uneven(Answering):
        def answers(self, graph):
            right, wrong = np.ones(1), np.array([float(graph.graph.name)])
            return [wrong, right] if worst == 0 else [right, wrong]

    with pytest.raises(CheckFailed, match="NMSE"):
        rewrite(traced, [answers("1.5")], Uneven(), BOUND)


def test_layers_of_a_pass_that_is_left_out_are_there_for_the_next(traced):
    """Its integers were compared, and then its answers were wrong."""

    def wrong(graph):
        return answers("1.5")(graph) and without_v(graph)

    after, outcomes, _ = run(traced, wrong, answers("1.0009"), keep_going=True)
    assert [outcome.refused is not None for outcome in outcomes] == [True, False]
    assert set(after.linears) == {"u.codes", "v.codes"}


@pytest.mark.parametrize("keep_going", [False, True])
@pytest.mark.parametrize(
    ("answer", "said"), [(None, "does not run: Fail: no shape"), (np.nan, "answers NaN"), (np.inf, "NaN or inf")]
)
def test_a_graph_that_was_wrong_before_is_no_fault_of_a_pass(traced, answer, said, keep_going):
    class Fail(Exception):
        pass

    class Wrong(Answering):
        def answers(self, graph):
            if answer is None:
                raise Fail("no shape")
            return [np.array([1.0, answer])]

    with pytest.raises(CheckFailed, match=f"rewrite: the traced graph .*{said}"):
        rewrite(traced, [answers("1")], Wrong(), BOUND, keep_going=keep_going)


def test_an_error_that_no_check_raises_is_named_by_its_kind(traced):
    def wrong(graph):
        return {}["signs48.0-24"]

    with pytest.raises(CheckFailed, match=r"pass wrong: KeyError: 'signs48\.0-24'"):
        run(traced, wrong)


def test_a_layer_that_has_gone_does_not_come_back(traced):
    def as_it_was(graph):
        was = traced.copy()
        graph.graph, graph.linears, graph.tensors = was.graph, was.linears, was.tensors
        return PassResult(1)

    with pytest.raises(CheckFailed, match="the integer data of v: there was no such layer"):
        run(traced, without_v, as_it_was)


def test_a_fault_of_the_source_is_no_fault_of_a_pass(traced):
    class Unreadable(Answering):
        def answers(self, graph):
            raise LrqError("the source: no such tensor")

    with pytest.raises(LrqError, match="the source: no such tensor") as caught:
        rewrite(traced, [answers("1")], Unreadable(), BOUND, keep_going=True)
    assert not isinstance(caught.value, CheckFailed)
