"""Group sizes of a tiny PixArt: stand-ins are the treated model, searches improve it, and nothing is computed twice."""

import json
from dataclasses import replace
from math import isfinite

import pytest
import search_groups
import torch

from lrq_export.comparison.run import quantized
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import TREATMENTS
from lrq_export.errors import UsageError
from lrq_export.search import groups
from lrq_export.search.evolution import Problem, Settings, evolve, fixed, minus_mean_group
from lrq_export.search.groups import (
    LIMITS,
    OBJECTIVES,
    StandIns,
    Subject,
    group_sizes,
    search_space,
    treatment_of_group,
)

BITS, ACT_BITS = 4, 8
LEAST = 2  # the tiny model is 24 wide: with groups of 16 at least there would be nothing to choose
QUICK = Settings(population=6, elite=2, mutations=3, crossovers=3, generations=3)
INPUTS = 2 * 6 + 1  # six in each block, and the text, which both blocks read


@pytest.fixture(scope="module")
def subject(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    return Subject.observe(tiny.source, tiny.calibration, tiny.recipe(), folder)


@pytest.fixture(scope="module")
def stand_ins(subject):
    return StandIns(subject, search_space(subject.layers, least=LEAST), BITS, ACT_BITS)


def noise_of(subject, model):
    with torch.no_grad():
        return subject.source.family.call(model, subject.inputs.evaluation)


def treated_as(subject, genome):
    """The model, each of its inputs treated by itself, one after the other."""
    model, fitted = subject.model, Fitted(subject.layers)
    with torch.no_grad():
        for source, group in zip(subject.layers, genome, strict=True):
            model, _ = quantized(model, [source], treatment_of_group(group), BITS, ACT_BITS, fitted)
    return model


def treated_alike(subject, treatment):
    with torch.no_grad():
        return quantized(subject.model, subject.layers, treatment, BITS, ACT_BITS, Fitted(subject.layers))


def mixed(space):
    """The smallest, the largest and those between, in turn."""
    return tuple(space.choices[layer][i % len(space.choices[layer])] for i, layer in enumerate(space.layers))


class Counted:
    def __init__(self, objective):
        self.objective, self.asked = objective, []

    def __call__(self, genome):
        self.asked.append(genome)
        return self.objective(genome)


def problem_of(subject, stand_ins, objective, limit="bits"):
    start, cost = fixed(stand_ins.space, 8), LIMITS[limit](stand_ins)
    counted = Counted(OBJECTIVES[objective](subject, stand_ins))
    return Problem(objective, stand_ins.space, counted, cost, cost(start)), start


# --- the space


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (288, (16, 32, 48, 96, 144, 288)),
        (1152, (16, 36, 96, 192, 576, 1152)),
        (96, (16, 24, 32, 48, 96)),
        (24, (24,)),
        (8, (8,)),
        (17, (17,)),
    ],
)
def test_sizes_are_divisors_from_the_least_to_the_width(width, sizes):
    assert group_sizes(width) == sizes


@pytest.mark.parametrize("width", range(1, 300, 7))
def test_every_size_divides_and_there_are_no_more_than_asked_for(width):
    sizes = group_sizes(width, least=4, most=3)
    assert all(width % size == 0 and size >= min(4, width) for size in sizes)
    assert 1 <= len(sizes) <= 3
    assert sizes[-1] == width


def test_layers_that_read_one_tensor_have_one_gene(subject, stand_ins):
    assert len(stand_ins.space.layers) == len(subject.layers) == INPUTS
    for source in subject.layers:
        choices = stand_ins.space.choices[source.layers[0]]
        assert len(choices) > 1
        assert all(linear.in_features % group == 0 for linear in source.linears for group in choices)


def test_a_space_of_other_inputs_is_refused(subject):
    with pytest.raises(UsageError, match="needed the 13 inputs of the model"):
        StandIns(subject, search_space(subject.layers[1:]), BITS, ACT_BITS)


# --- the model a genome stands for


def test_swapped_stand_ins_are_the_model_treated_with_that_grouping(subject, stand_ins):
    genomes = [mixed(stand_ins.space), stand_ins.space.largest(), fixed(stand_ins.space, 8), mixed(stand_ins.space)]
    noises = [noise_of(subject, stand_ins.model(genome)) for genome in genomes]
    for genome, noise in zip(genomes, noises, strict=True):
        assert torch.equal(noise, noise_of(subject, treated_as(subject, genome)))
    assert len({noise.sum().item() for noise in noises}) == 3  # groups matter, and swaps leave nothing behind


def test_groups_of_the_whole_width_are_the_ungrouped_treatment(subject, stand_ins):
    ungrouped, treated = treated_alike(subject, replace(TREATMENTS["q_dit"], group=None))
    genome = stand_ins.space.largest()
    assert genome == tuple(source.width for source in subject.layers)
    assert torch.equal(noise_of(subject, stand_ins.model(genome)), noise_of(subject, ungrouped))
    assert stand_ins.weight_bits(genome) == sum(each.weight_bits for each in treated)


def test_one_group_everywhere_is_q_dit_of_compare(subject, stand_ins):
    model, treated = treated_alike(subject, replace(TREATMENTS["q_dit"], group=8))
    genome = fixed(stand_ins.space, 8)
    assert genome == (8,) * INPUTS
    assert torch.equal(noise_of(subject, stand_ins.model(genome)), noise_of(subject, model))
    assert stand_ins.bits_per_weight(genome) == pytest.approx(4 + 32 / 8)  # two half-precision numbers a group
    assert stand_ins.weight_bits(genome) == sum(each.weight_bits for each in treated)


def test_the_floating_point_model_is_left_as_it_was(tiny, subject, stand_ins):
    stand_ins.model(stand_ins.space.largest())
    untouched = subject.source.load(subject.source.model())
    assert torch.equal(noise_of(subject, subject.model), noise_of(subject, untouched))


def test_a_genome_of_another_space_is_refused(stand_ins):
    with pytest.raises(UsageError, match=r"got \(5,"):
        stand_ins.model((5,) * INPUTS)


# --- what it is worth


def test_noise_error_is_that_of_the_treated_model(subject, stand_ins):
    objective = OBJECTIVES["noise"](subject, stand_ins)
    smallest = tuple(choices[0] for choices in stand_ins.space.choices.values())
    assert 0 < objective(smallest) < objective(stand_ins.space.largest()) < 0.5


def test_noise_is_judged_on_inputs_of_every_timestep(subject, stand_ins, monkeypatch):
    """Four timesteps, four inputs each: without one of them, what the search finds would be for the others."""
    monkeypatch.setattr(groups, "NOISE_INPUTS", 4)
    seen = []

    class Family:
        def call(self, model, inputs):
            seen.append(sorted(inputs["timestep"].tolist()))
            return inputs["hidden_states"]

    calibration = {"timestep": torch.arange(16).remainder(4).mul(300.0), "hidden_states": torch.ones(16, 1)}
    asked = replace(
        subject, source=replace(subject.source, family=Family()),
        inputs=replace(subject.inputs, calibration=calibration),
    )  # fmt: skip
    assert OBJECTIVES["noise"](asked, stand_ins)(stand_ins.space.largest()) == 0
    assert seen == [[0.0, 300.0, 600.0, 900.0]] * 2


def test_output_error_adds_up_over_the_inputs_and_is_that_of_its_definition(subject, stand_ins):
    large, small = stand_ins.space.largest(), mixed(stand_ins.space)
    model, expected = treated_as(subject, small), 0.0
    for source in subject.layers:
        for name, weight in zip(source.layers, source.weights, strict=True):
            # ‖x Wᵀ‖² as a norm: H = Lᵀ L.
            values, vectors = torch.linalg.eigh(source.correlation.double())
            root = values.clamp_min(0).sqrt()[:, None] * vectors.T
            lost = root @ (weight - model.get_submodule(name).weight).double().T
            expected += float(lost.square().sum() / (root @ weight.double().T).square().sum())
    assert stand_ins.output_error(small) == pytest.approx(expected, rel=1e-6)
    swapped = [(*small[:i], large[i], *small[i + 1 :]) for i in range(INPUTS)]
    steps = sum(stand_ins.output_error(genome) - stand_ins.output_error(small) for genome in swapped)
    assert stand_ins.output_error(large) - stand_ins.output_error(small) == pytest.approx(steps)


def test_image_distance_compares_features_of_drawn_images(subject, stand_ins, monkeypatch, tmp_path):
    drawn = []

    class Pixels:
        """A judge whose features are the first pixels."""

        def __init__(self, path):
            assert path.name == "classifier.onnx"

        def run(self, images):
            drawn.append(images)
            return images.flatten(1)[:, :4].numpy(), None

    with pytest.raises(UsageError, match=r"classifier\.onnx: not found, needed a classifier"):
        OBJECTIVES["frechet"](subject, stand_ins)
    checkpoint = replace(subject.source.checkpoint, path=tmp_path)
    (tmp_path / "classifier.onnx").touch()
    monkeypatch.setattr(groups, "Judge", Pixels)
    monkeypatch.setattr(groups, "IMAGES", 8)
    monkeypatch.setattr(groups, "STEPS", 2)
    judged = replace(subject, source=replace(subject.source, checkpoint=checkpoint))
    objective = OBJECTIVES["frechet"](judged, stand_ins)
    largest = stand_ins.space.largest()
    assert objective(largest) == objective(largest) > 0
    assert len(drawn) == 3
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert groups.frechet_distance(*[drawn[0].flatten(1)[:, :4].numpy()] * 2) < objective(largest)


# --- searches


@pytest.mark.parametrize("objective", ["noise", "output"])
@pytest.mark.parametrize("limit", LIMITS)
def test_the_objective_falls_or_stays_within_the_budget(subject, stand_ins, objective, limit):
    problem, start = problem_of(subject, stand_ins, objective, limit)
    result = evolve(problem, QUICK, start)
    assert list(result.history) == sorted(result.history, reverse=True)
    assert result.value <= result.history[0] == OBJECTIVES[objective](subject, stand_ins)(start)
    for genome in problem.objective.asked:
        assert all(source.width % group == 0 for source, group in zip(subject.layers, genome, strict=True))
        assert problem.cost(genome) <= problem.budget
    if limit == "mean":
        assert -minus_mean_group(result.best) >= -minus_mean_group(start)
    else:
        assert stand_ins.bits_per_weight(result.best) <= stand_ins.bits_per_weight(start)


def test_a_resumed_search_evaluates_nothing_twice(subject, stand_ins, tmp_path):
    problem, start = problem_of(subject, stand_ins, "noise")
    undisturbed = evolve(problem, QUICK, start)
    asked = problem.objective.asked

    def until_the_fifth(genome):
        if len(stopped.objective.asked) > 5:
            raise KeyboardInterrupt
        return problem.objective.objective(genome)

    stopped = replace(problem, objective=Counted(until_the_fifth))
    with pytest.raises(KeyboardInterrupt):
        evolve(stopped, QUICK, start, tmp_path / "state.json")
    resumed, _ = problem_of(subject, stand_ins, "noise")
    assert evolve(resumed, QUICK, start, tmp_path / "state.json") == undisturbed
    assert resumed.objective.asked == asked[5:]


# --- the tool


@pytest.fixture
def tool(tiny, monkeypatch, capsys):
    """Run the tool on the tiny model; returns exit code and output."""
    monkeypatch.setattr(search_groups, "search_space", lambda layers: search_space(layers, least=LEAST))
    monkeypatch.setattr(search_groups, "FIXED_GROUP", 8)
    monkeypatch.setattr(search_groups, "IMAGE_SEEDS", (1,))

    def run(*words):
        capsys.readouterr()
        arguments = [tiny.source, "--calibration", tiny.calibration, "--population", 6, "--generations", 2, *words]
        with pytest.raises(SystemExit) as stopped:
            search_groups.main([str(word) for word in arguments], tiny.recipe())
        return stopped.value.code, capsys.readouterr().out

    return run


def test_the_tool_compares_the_searches_and_a_second_run_only_reads(tool, tmp_path, monkeypatch):
    words = ["--seeds", 0, 1, "--objective", "output", "--state", tmp_path / "state", "--out", tmp_path / "report.json"]
    code, printed = tool(*words)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("fixed", None), ("evolution", 0), ("random", 0), ("evolution", 1), ("random", 1),
    ]  # fmt: skip
    assert [row["evaluations"] for row in rows] == [1, 12, 12, 12, 12]
    assert all(row["bits_per_weight"] <= rows[0]["bits_per_weight"] for row in rows)
    assert all(row["objective"] <= rows[0]["objective"] for row in rows)
    assert all(0 < row["noise_nmse"] < 0.5 and isfinite(row["psnr_db"]) for row in rows)
    assert code == (not search_groups.evolution_won(report))
    assert printed.count("| evolution |") == 3
    assert search_groups.figure(rows[1]["objective"]) in printed

    def never(subject, stand_ins):
        return lambda genome: pytest.fail("was evaluated again")

    monkeypatch.setitem(OBJECTIVES, "output", never)
    assert tool(*words) == (code, printed)
    assert json.loads((tmp_path / "report.json").read_text()) == report


ENDED = {
    "evolution wins": (3.0, [1.0, 2.0], [2.0, 2.0], True),
    "only in the mean": (3.0, [1.0, 2.5], [2.0, 2.0], True),
    "chance is as good": (3.0, [1.0, 2.0], [2.0, 1.0], False),
    "chance is better": (3.0, [2.0, 2.0], [1.0, 2.0], False),
    "nothing was found": (3.0, [3.0, 3.0], [3.0, 3.0], False),
}


@pytest.mark.parametrize(("fixed_value", "evolution", "random", "won"), ENDED.values(), ids=ENDED.keys())
def test_evolution_has_to_win_against_both(fixed_value, evolution, random, won):
    values = {"fixed": [fixed_value], "evolution": evolution, "random": random}
    rows = [{"method": method, "objective": value} for method, found in values.items() for value in found]
    assert search_groups.evolution_won({"rows": rows}) is won


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seeds", 1, 1), "--seeds: got [1, 1], needed each once"),
        (("--generations", 0), "generations: got 0, needed at least 1"),
        (("--out", "none/report.json"), "--out: got none/report.json, needed a file in a folder that exists"),
        (("--state", "taken"), "--state: taken: cannot make the folder: File exists"),
    ],
)
def test_wrong_arguments_end_before_any_work(tool, tmp_path, monkeypatch, words, said):
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_groups, "search", lambda *_: pytest.fail("began"))
    assert tool(*words)[0] == said
