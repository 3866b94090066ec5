"""Search the group size of every input of a model as Q-DiT does, and see what evolution is worth.

    python tools/search_groups.py SOURCE [--calibration FILE] [--objective noise] [--state FOLDER] [--out FILE.json]

Evolution, random search with as many evaluations and one fixed group are compared, for every seed of the search: by the
objective, and on evaluation inputs and images of seeds that no objective sees. Exits 1 unless evolution ends below
both others in its own objective, in the mean over the seeds. With --state, a search that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrq_export.comparison.judge import FILE, Judge
from lrq_export.comparison.run import Bench
from lrq_export.errors import LrqError, UsageError
from lrq_export.machine import describe_machine
from lrq_export.package import write_json_atomic
from lrq_export.progress import Bar, Progress, stage
from lrq_export.recipe import Recipe, load_recipe
from lrq_export.search.evolution import (
    Problem,
    Result,
    Settings,
    evolve,
    fixed,
    minus_mean_group,
    random_search,
)
from lrq_export.search.groups import LIMITS, OBJECTIVES, StandIns, Subject, search_space
from lrq_export.search.state import Genome
from lrq_export.source import CALIBRATION, conditions_path, fingerprint

SCHEMA = 1
FIXED_GROUP = 96  # what all is compared with, and what sets the budget
IMAGE_SEEDS = (1, 2)  # of the images that are judged; the objective `frechet` draws with another
METHODS = {"evolution": evolve, "random": random_search}
COLUMNS = {
    "objective": "objective", "held-out ε-NMSE": "noise_nmse", "Fréchet": "frechet", "PSNR dB": "psnr_db",
    "mean group": "mean_group", "bits a weight": "bits_per_weight",
}  # fmt: skip


def settings(population: int, generations: int, seed: int) -> Settings:
    """Q-DiT's proportions: half the population are mutations, half crossovers, of a fifth that is the elite."""
    half = population // 2
    return Settings(population, max(2, population // 5), half, half, generations, seed=seed)


def problem(subject: Subject, stand_ins: StandIns, args: argparse.Namespace) -> tuple[Problem, Genome]:
    """What is searched, and where from: the fixed group, whose cost is the budget."""
    start, cost = fixed(stand_ins.space, FIXED_GROUP), LIMITS[args.limit](stand_ins)
    # Both methods of a seed begin with the same genomes, and all of them with the start.
    objective = functools.cache(OBJECTIVES[args.objective](subject, stand_ins))
    return Problem(name(subject, args), stand_ins.space, objective, cost, cost(start)), start


def name(subject: Subject, args: argparse.Namespace) -> str:
    """Says by a digest on which files the values depend."""
    source = subject.source
    judge = source.checkpoint.path / FILE
    files = [args.calibration, conditions_path(source, None), judge if judge.is_file() else None]
    digest = fingerprint(source, subject.recipe.model_dump_json(), files, {})
    return f"{args.objective} of {source.family.class_name} at W{args.bits}A{args.act_bits}, files {digest[:16]}"


def search(args: argparse.Namespace, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The report: the fixed group's row, then one for each seed and method."""
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.observe(args.source, args.calibration, recipe, Path(folder), progress)
        stand_ins = StandIns(subject, search_space(subject.layers), args.bits, args.act_bits, progress)
    wanted, start = problem(subject, stand_ins, args)
    found: list[tuple[str, int | None, Result]] = []
    for seed in args.seeds:
        for method, run in METHODS.items():
            state = None if args.state is None else args.state / f"{method}-{seed}.json"
            numbers = settings(args.population, args.generations, seed)
            found.append((method, seed, run(wanted, numbers, start, state, progress)))
    first = found[0][2].history[0]  # every search begins with the fixed group
    found.insert(0, ("fixed", None, Result(start, first, (first,))))
    return {
        "schema": SCHEMA,
        "problem": wanted.name,
        "machine": describe_machine(),
        "objective": args.objective,
        "limit": args.limit,
        "budget": wanted.budget,
        "population": args.population,
        "generations": args.generations,
        "image_seeds": list(IMAGE_SEEDS),
        "images": recipe.sampling.images * len(IMAGE_SEEDS),
        "choices": {layer: list(wanted.space.choices[layer]) for layer in wanted.space.layers},
        "rows": judged(subject, stand_ins, found, progress),
    }


def judged(
    subject: Subject, stand_ins: StandIns, found: Sequence[tuple[str, int | None, Result]], progress: Progress
) -> list[dict[str, Any]]:
    """What was found, on inputs and images that no search saw."""
    path, rows = subject.source.checkpoint.path / FILE, []
    judge = Judge(path) if path.is_file() else None
    with stage(progress, "reference", {}, len(IMAGE_SEEDS)):
        bench = Bench(subject.source, subject.model, subject.inputs, subject.recipe, IMAGE_SEEDS, judge, progress)
    with stage(progress, "judge", {}, len(found)):
        for method, seed, result in found:
            scores = bench.scores(stand_ins.model(result.best))
            rows.append({
                "method": method, "seed": seed, "objective": result.value, "evaluations": result.evaluations,
                "mean_group": -minus_mean_group(result.best), "bits_per_weight": stand_ins.bits_per_weight(result.best),
                "genome": list(result.best), "history": list(result.history),
            } | scores)  # fmt: skip
            progress.advance(method)
    return rows


def check(args: argparse.Namespace) -> None:
    """Raise UsageError before any work for what could not be searched, kept or written afterwards."""
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds: got {args.seeds}, needed each once")
    settings(args.population, args.generations, 0)
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UsageError(f"--out: got {args.out}, needed a file in a folder that exists")
    if args.state is not None:
        try:
            args.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--state: {args.state}: cannot make the folder: {error.strerror}") from error


def mean_of(report: dict[str, Any], method: str, figure: str) -> float:
    return float(np.mean([row[figure] for row in report["rows"] if row["method"] == method]))


def evolution_won(report: dict[str, Any]) -> bool:
    """Whether it ended below the fixed group and below random search, in the mean over the seeds."""
    ended = {method: mean_of(report, method, "objective") for method in ("fixed", *METHODS)}
    return ended["evolution"] < min(ended["fixed"], ended["random"])


def table(report: dict[str, Any]) -> str:
    """In Markdown: every row, and the means of the methods that have seeds. Without a judge there is no distance."""
    columns = {title: key for title, key in COLUMNS.items() if report["rows"][0][key] is not None}
    lines = [["search", "seed", *columns], ["---"] * (2 + len(columns))]
    for row in report["rows"]:
        seed = "–" if row["seed"] is None else str(row["seed"])
        lines.append([row["method"], seed, *(figure(row[key]) for key in columns.values())])
    for method in METHODS:
        lines.append([method, "mean", *(figure(mean_of(report, method, key)) for key in columns.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float) -> str:
    return f"{value:.3e}" if abs(value) < 0.1 else f"{value:.4g}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", type=Path, help=f"recorded inputs, else {CALIBRATION} in the source")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--act-bits", type=int, default=8, choices=(4, 6, 8, 16))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the searches")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--objective", choices=OBJECTIVES, default="noise")
    parser.add_argument("--limit", choices=LIMITS, default="bits", help="budget: stored bits, or Q-DiT's mean group")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="keeps what was evaluated")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


def main(arguments: Sequence[str] | None = None, recipe: Recipe | None = None) -> None:
    args = parser().parse_args(arguments)
    args.calibration = args.calibration or args.source / CALIBRATION
    progress = Bar()
    try:
        check(args)
        report = search(args, recipe or load_recipe(), progress)
        if args.out is not None:
            write_json_atomic(args.out, report)
    except LrqError as error:
        raise SystemExit(str(error)) from error
    finally:
        progress.stop()
    print(table(report))
    won = evolution_won(report)
    if not won:
        print("evolution does not beat both random search and the fixed group")
    sys.exit(not won)


if __name__ == "__main__":
    main()
