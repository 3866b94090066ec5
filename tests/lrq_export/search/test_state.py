"""A search that was stopped anywhere goes on from its file and ends as if nothing had happened."""

import json
import math
import multiprocessing
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrq_export.errors import InputError, UsageError
from lrq_export.package import TEMPORARY
from lrq_export.search.evolution import Problem, Settings, Space, evolve, fixed, minus_mean_group, random_search

LAYERS = tuple(f"blocks.{index}" for index in range(6))
SPACE = Space(LAYERS, dict.fromkeys(LAYERS, (32, 64, 128, 192, 288)))
START = fixed(SPACE, 128)
NUMBERS = Settings(population=6, elite=3, mutations=2, crossovers=2, generations=4, seed=3)
EVALUATIONS = 24


class Stopped(Exception):
    pass


def loss(genome):
    """Wants 32 first and 288 last; every seventh genome diverges."""
    if sum(genome) % 7 == 0:
        return math.nan
    return sum(abs(group - wanted) ** 0.5 for group, wanted in zip(genome, range(32, 320, 48), strict=True)) / 3


class Objective:
    """`loss`, until `stop` is raised instead of evaluation number `last` + 1."""

    def __init__(self, last=math.inf, stop=Stopped):
        self.last, self.stop, self.asked = last, stop, []

    def __call__(self, genome):
        if len(self.asked) >= self.last:
            raise self.stop
        self.asked.append(genome)
        return loss(genome)


def problem_of(objective, **changes):
    return Problem(
        **{"name": "loss", "space": SPACE, "objective": objective, "cost": minus_mean_group, "budget": -128} | changes
    )


@settings(max_examples=25, deadline=None)
@given(
    stops=st.lists(st.integers(0, EVALUATIONS - 1), max_size=4),
    search=st.sampled_from([evolve, random_search]),
)
def test_a_search_stopped_anywhere_ends_like_one_that_was_not(tmp_path_factory, stops, search):
    undisturbed = Objective()
    needed = search(problem_of(undisturbed), NUMBERS, START)
    state = tmp_path_factory.mktemp("state") / "search.json"
    asked = []
    for last in stops:
        objective = Objective(last - len(asked))
        if last < len(asked):
            continue
        with pytest.raises(Stopped):
            search(problem_of(objective), NUMBERS, START, state)
        asked += objective.asked
    rest = Objective()
    assert search(problem_of(rest), NUMBERS, START, state) == needed
    assert asked + rest.asked == undisturbed.asked
    assert needed.evaluations == len(undisturbed.asked) == EVALUATIONS


def test_a_finished_search_is_read_without_an_evaluation(tmp_path):
    state = tmp_path / "search.json"
    needed = evolve(problem_of(Objective()), NUMBERS, START, state)
    before = state.read_bytes()
    assert evolve(problem_of(Objective(last=0)), NUMBERS, START, state) == needed
    assert state.read_bytes() == before


def test_every_evaluation_is_kept_at_once(tmp_path):
    state = tmp_path / "search.json"
    seen = []

    def objective(genome):
        seen.append(len(json.loads(state.read_text())["values"]))
        return loss(genome)

    evolve(problem_of(objective), NUMBERS, START, state)
    assert seen == list(range(EVALUATIONS))


def test_a_kill_loses_nothing(tmp_path):
    state = tmp_path / "search.json"
    needed = evolve(problem_of(Objective()), NUMBERS, START)

    def killed_at_the_tenth():
        objective = Objective()

        def mortal(genome):
            if len(objective.asked) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return objective(genome)

        evolve(problem_of(mortal), NUMBERS, START, state)

    child = multiprocessing.get_context("fork").Process(target=killed_at_the_tenth)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    (tmp_path / f".search.json.1{TEMPORARY}").write_text('{"half":')  # what a kill while writing leaves
    rest = Objective()
    assert evolve(problem_of(rest), NUMBERS, START, state) == needed
    assert len(rest.asked) == EVALUATIONS - 9
    assert os.listdir(tmp_path) == ["search.json"]


def test_a_file_may_be_named_like_a_pattern(tmp_path):
    other = tmp_path / f".a.json.1{TEMPORARY}"
    other.write_text("another search is writing this")
    evolve(problem_of(Objective()), NUMBERS, START, tmp_path / "[ab].json")
    assert other.exists()


def refused(kind, match, state, numbers=NUMBERS, start=START, **changes):
    """Refused in one line with a way out, before any evaluation, with the file as it was."""
    before = state.read_bytes() if state.is_file() else None
    objective = Objective()
    with pytest.raises(kind, match=match) as caught:
        evolve(problem_of(objective, **changes), numbers, start, state)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert objective.asked == []
    assert (state.read_bytes() if state.is_file() else None) == before


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "search.json"
    with pytest.raises(Stopped):
        evolve(problem_of(Objective(last=5)), NUMBERS, START, path)
    return path


def test_a_state_of_another_search_is_refused_by_what_differs(state):
    other_layers = ("other", *LAYERS[1:])
    fewer = {**SPACE.choices, "blocks.2": (32, 64, 128)}
    for match, changes in {
        r"settings\.seed: got 3, needed 4": {"numbers": Settings(**{**vars(NUMBERS), "seed": 4})},
        r"settings\.mutations: got 2, needed 0": {"numbers": Settings(**{**vars(NUMBERS), "mutations": 0})},
        'objective: got "loss", needed "loss on other images"': {"name": "loss on other images"},
        r'layers: got \["blocks\.0".*needed \["other"': {
            "space": Space(other_layers, dict.fromkeys(other_layers, SPACE.choices["blocks.0"]))
        },
        r"choices\.blocks\.2: got \[32, 64, 128, 192, 288\], needed \[32, 64, 128\]": {"space": Space(LAYERS, fewer)},
        r"start: got \[128, .*needed \[192": {"start": (192, *START[1:])},
        'budget: got "-128.0", needed "-100.0"': {"budget": -100},
        'start_cost: got "-128.0", needed "-768.0"': {"cost": lambda genome: -sum(genome)},
    }.items():
        refused(UsageError, f"search.json: holds another search: {match}", state, **changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ('{"format": "lrq-export search"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "needed an lrq-export search of schema 1"),
        ('{"format": "lrq-export search", "schema": 2}', "needed an lrq-export search of schema 1"),
        ('{"format": "lrq-export search", "schema": 1}', "values: needed a finite number or null"),
        ('{"format": "lrq-export search", "schema": 1, "values": {"1": NaN}}', "values: needed a finite"),
        ('{"format": "lrq-export search", "schema": 1, "values": {"1": true}}', "values: needed a finite"),
    ],
    ids=["empty", "half", "deep", "a list", "schema", "no values", "NaN", "a boolean"],
)
def test_a_damaged_state_is_refused(tmp_path, text, match):
    path = tmp_path / "search.json"
    path.write_text(text)
    refused(InputError, f"search.json: .*{match}", path)


def test_a_state_that_depends_on_more_is_of_another_search(state):
    kept = json.loads(state.read_text())
    kept["facts"]["settings"]["islands"] = 2
    state.write_text(json.dumps(kept))
    refused(UsageError, r"settings\.islands: got 2, needed null", state)


def test_a_state_without_facts_is_of_another_search(tmp_path):
    path = tmp_path / "search.json"
    path.write_text('{"format": "lrq-export search", "schema": 1, "values": {}}')
    refused(UsageError, "holds another search: facts: got null", path)


def test_a_state_that_cannot_be_kept_is_refused_before_the_work(tmp_path):
    refused(UsageError, "cannot read: Is a directory", tmp_path)
    (tmp_path / "file").write_text("")
    refused(UsageError, "cannot (read|write): (Not a directory|File exists)", tmp_path / "file" / "search.json")
