"""Q-DiT's evolutionary search of one group size a layer (arXiv 2406.17343, Algorithm 1), for any objective and cost.

A genome holds one group size for each layer. The search minimises objective(genome) over the genomes that are legal,
cost(genome) <= budget:

    P_0     = {start} ∪ random genomes
    elite   = the K best of all genomes evaluated so far
    P_(t+1) = mutations of random elites ∪ crossovers of two random elites ∪ random genomes to fill up

Every genome of every population is new and legal. The only randomness is a generator seeded by the settings, and it
never depends on time or on what a state file holds: a search that is started again takes the same steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lrq_export.errors import UsageError
from lrq_export.progress import Progress, Silent, stage
from lrq_export.search.state import Evaluations, Genome

Cost = Callable[[Genome], float]
TRIES = 10  # draws for each wanted genome before giving up, as in Q-DiT


@dataclass(frozen=True)
class Space:
    """The group sizes each layer may take, ascending. Raises UsageError for a layer twice, or without a choice."""

    layers: tuple[str, ...]
    choices: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UsageError(f"layers: got {list(self.layers)}, needed at least one, each once")
        for layer in self.layers:
            choices = self.choices.get(layer, ())
            if not choices or choices[0] < 1 or list(choices) != sorted(set(choices)):
                raise UsageError(
                    f"{layer}: group sizes: got {list(choices)}, needed at least one, positive and ascending",
                    hint="offer group sizes that divide its columns",
                )

    def __contains__(self, genome: Genome) -> bool:
        return len(genome) == len(self.layers) and all(
            group in self.choices[layer] for layer, group in zip(self.layers, genome, strict=True)
        )

    def largest(self) -> Genome:
        """Every layer at its largest group size: fewest scales."""
        return tuple(self.choices[layer][-1] for layer in self.layers)

    def draw(self, rng: random.Random) -> Genome:
        """Every gene uniformly, legal or not."""
        return tuple(rng.choice(self.choices[layer]) for layer in self.layers)

    def mutate(self, parent: Genome, rate: float, rng: random.Random) -> Genome:
        """Each gene is drawn again with probability `rate`; the draw may be the old one."""
        return tuple(
            rng.choice(self.choices[layer]) if rng.random() < rate else group
            for layer, group in zip(self.layers, parent, strict=True)
        )

    def enlarge(self, genome: Genome, rng: random.Random) -> Genome:
        """One random gene, of those that are not at their largest choice, takes its next larger one."""
        smaller = [i for i, (group, most) in enumerate(zip(genome, self.largest(), strict=True)) if group < most]
        index = rng.choice(smaller)
        choices = self.choices[self.layers[index]]
        larger = choices[choices.index(genome[index]) + 1]
        return (*genome[:index], larger, *genome[index + 1 :])


def fixed(space: Space, group: int) -> Genome:
    """Every layer at its choice nearest to `group`; of two equally near, the larger, which costs less."""
    return tuple(min(space.choices[layer], key=lambda size: (abs(size - group), -size)) for layer in space.layers)


def crossover(first: Genome, second: Genome, rng: random.Random) -> Genome:
    """Each gene from either parent by a fair coin."""
    return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))


def weight_bits(space: Space, shapes: Mapping[str, tuple[int, int]], *, bits: int, side_bits: int) -> Cost:
    """Stored bits of the weights W (rows, cols): Σ rows cols bits + rows (cols / group) side_bits.

    `side_bits` are those of one group's scale and zero point. Raises UsageError for a choice that does not divide cols.
    """
    for layer in space.layers:
        cols = shapes[layer][1]
        for group in space.choices[layer]:
            if cols % group:
                raise UsageError(f"{layer}: got group size {group}, needed a divisor of its {cols} columns")

    def cost(genome: Genome) -> int:
        layers = zip((shapes[layer] for layer in space.layers), genome, strict=True)
        return sum(rows * (cols * bits + cols // group * side_bits) for (rows, cols), group in layers)

    return cost


def minus_mean_group(genome: Genome) -> float:
    """Q-DiT's own cost, as its code has it: mean(group) >= 128 is minus_mean_group(genome) <= -128."""
    return -sum(genome) / len(genome)


@dataclass(frozen=True)
class Problem:
    """The genome to find: least objective(genome) with cost(genome) <= budget.

    `cost` must not grow when a group does. `name` says what the objective measures and on what (model, bits, data): it
    is how a state file knows that its values belong to this objective.
    """

    name: str
    space: Space
    objective: Callable[[Genome], float]
    cost: Cost
    budget: float

    def legal(self, genome: Genome) -> bool:
        """Whether it is within the budget."""
        return self.cost(genome) <= self.budget

    def draw(self, rng: random.Random) -> Genome:
        """A random legal genome: the first legal draw, or after TRIES the last one with random groups enlarged."""
        for _ in range(TRIES):
            genome = self.space.draw(rng)
            if self.legal(genome):
                return genome
        return self.repair(genome, rng)

    def repair(self, genome: Genome, rng: random.Random) -> Genome:
        """Random groups enlarged until it is legal."""
        while not self.legal(genome):
            genome = self.space.enlarge(genome, rng)
        return genome

    def check(self, start: Genome) -> None:
        """Raise UsageError unless the budget can be met and `start` is a legal genome of the space."""
        least = self.cost(self.space.largest())
        if not least <= self.budget:
            raise UsageError(
                f"budget: got {self.budget}, needed at least {least}, the cost of every layer's largest group",
                hint="raise the budget or offer larger groups",
            )
        if start not in self.space:
            raise UsageError(f"start: got {start}, needed one choice for each of {len(self.space.layers)} layers")
        if not self.legal(start):
            raise UsageError(
                f"start: costs {self.cost(start)}, needed at most the budget {self.budget}",
                hint="start from larger groups or raise the budget",
            )


@dataclass(frozen=True)
class Settings:
    """The numbers of the search; the defaults are those of Q-DiT's script. Raises UsageError for impossible ones."""

    population: int = 50
    elite: int = 10
    mutations: int = 25
    crossovers: int = 25
    generations: int = 10
    mutation_rate: float = 0.1  # of each gene
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "elite", "generations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: got {getattr(self, name)}, needed at least 1")
        children = (self.mutations, self.crossovers)
        if min(children) < 0 or sum(children) > self.population:
            raise UsageError(
                f"mutations and crossovers: got {self.mutations} and {self.crossovers}, needed at least 0 each and "
                f"together at most the population {self.population}"
            )
        if not 0 < self.mutation_rate <= 1:
            raise UsageError(f"mutation_rate: got {self.mutation_rate}, needed more than 0, at most 1")


@dataclass(frozen=True)
class Result:
    """What a search found."""

    best: Genome
    value: float  # of the best
    history: tuple[float, ...]  # the best value after each evaluation

    @property
    def evaluations(self) -> int:
        """Genomes evaluated, those read from a state file included."""
        return len(self.history)


def evolve(
    problem: Problem,
    settings: Settings,
    start: Genome,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Search from `start`, usually `fixed(space, 128)`, through population x generations genomes.

    Fewer when the space has no more to offer. With `state`, what was evaluated is kept in that file, and a search that
    was stopped and is started again with it evaluates nothing twice and ends with the same result. A value that is not
    finite is the worst there is. Raises UsageError for a budget that cannot be met, a start beyond it or a state of
    another search, InputError for a damaged state.
    """
    problem.check(start)
    evaluations = Evaluations(state, _facts(problem, settings, start))
    rng, shown = random.Random(settings.seed), progress or Silent()
    values: dict[Genome, float] = {}  # in the order of evaluation
    history: list[float] = []
    with stage(shown, "search", {}, settings.population * settings.generations):
        for genome in _candidates(problem, settings, start, rng, values):
            values[genome] = evaluations.value(genome, problem.objective)
            history.append(min([values[genome], *history[-1:]]))
            shown.advance(f"best {history[-1]:.6g}")
    (best,) = fittest(values, 1)
    return Result(best, values[best], tuple(history))


def random_search(
    problem: Problem,
    settings: Settings,
    start: Genome,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """What chance finds with as many evaluations from the same start: `evolve` without mutations and crossovers."""
    return evolve(problem, replace(settings, mutations=0, crossovers=0), start, state, progress)


def fittest(values: Mapping[Genome, float], count: int) -> list[Genome]:
    """The `count` genomes of least value, best first; of equal ones those evaluated first."""
    return sorted(values, key=values.__getitem__)[:count]


def _candidates(
    problem: Problem, settings: Settings, start: Genome, rng: random.Random, values: Mapping[Genome, float]
) -> Iterator[Genome]:
    """Every genome to evaluate, in order; `values` must hold those before it whenever the next one is asked for."""
    population = [start]
    for _ in range(settings.generations):
        _fill(population, settings.population, lambda: problem.draw(rng), problem, values)
        yield from population
        population = _children(problem, settings, rng, values)


def _children(problem: Problem, settings: Settings, rng: random.Random, values: Mapping[Genome, float]) -> list[Genome]:
    """New legal mutations and crossovers of the elite, up to the settings' numbers of each."""
    elite, children = fittest(values, settings.elite), []

    def mutation() -> Genome:
        return problem.space.mutate(rng.choice(elite), settings.mutation_rate, rng)

    def crossing() -> Genome:
        return crossover(*rng.sample(elite, 2), rng)

    _fill(children, settings.mutations, mutation, problem, values)
    if len(elite) > 1:
        _fill(children, len(children) + settings.crossovers, crossing, problem, values)
    return children


def _fill(
    population: list[Genome],
    size: int,
    make: Callable[[], Genome],
    problem: Problem,
    values: Mapping[Genome, float],
) -> None:
    """Append what `make` returns, if new and legal, until there are `size`, or TRIES were made for each missing one."""
    for _ in range(TRIES * (size - len(population))):
        if len(population) == size:
            return
        genome = make()
        if genome not in values and genome not in population and problem.legal(genome):
            population.append(genome)


def _facts(problem: Problem, settings: Settings, start: Genome) -> dict[str, object]:
    """What a state file must agree with. The cost is known by what it says of the start: functions have no name."""
    return {
        "objective": problem.name,
        "layers": problem.space.layers,
        "choices": {layer: problem.space.choices[layer] for layer in problem.space.layers},
        "start": start,
        "start_cost": str(float(problem.cost(start))),  # text, because JSON has no inf
        "budget": str(float(problem.budget)),
        "settings": asdict(settings),
    }
