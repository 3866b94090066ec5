"""What the drop-in adds to a bare session run: `lrq_export.load(OUT)` called as diffusers calls a transformer.

    python tools/bench_dropin.py OUT [--batch N] [--threads N] [--turns N] [--most PERCENT]

Both answer the package's evaluation inputs, turn by turn in an order drawn for each turn; medians are compared. A bare
run is `session.run` of the same session on arrays that lie there already; it has two places in a turn, and what these
differ by is what the machine adds by chance. Exits with 1 if an answer differs in a bit, or if the drop-in adds more
than --most percent. Run it on a quiet machine.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lrq_export import load
from lrq_export.models.base import nest
from lrq_export.runtime import ONNXRUNTIME, feeds
from lrq_export.verify.reference import Reference


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    figures = []
    with load(options.package, target=ONNXRUNTIME, threads=options.threads) as transformer:
        recorded = Reference.load(options.package).inputs
        for batch in options.batch:
            rows = torch.arange(batch) % len(recorded["hidden_states"])
            inputs = {name: tensor[rows] for name, tensor in recorded.items()}
            figures.append({"batch": batch} | measured(transformer, inputs, options.turns))
    print(json.dumps(figures, indent=2))
    faults = [f"batch {each['batch']}: answers differ" for each in figures if not each["same bits"]]
    faults += [
        f"batch {each['batch']}: adds {each['added %']} %, needed at most {options.most:g}"
        for each in figures
        if each["added %"] > options.most
    ]
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--most", type=float, default=3.0, help="percent that the drop-in may add")
    return parser.parse_args(arguments)


def measured(transformer, inputs: dict[str, torch.Tensor], turns: int) -> dict:
    """Milliseconds of both, medians over the turns; the first turn warms up."""
    session, fed, given = transformer.session, feeds(transformer.specs, inputs), nest(inputs)
    runs = {
        "bare": lambda: session.run(None, fed)[0],
        "bare again": lambda: session.run(None, fed)[0],
        "drop-in": lambda: transformer(**given, return_dict=False)[0].numpy(),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    dice, wanted, same = np.random.default_rng(0), runs["bare"](), True
    for _ in range(turns):
        for name in dice.permutation(list(runs)):
            started = time.perf_counter()
            answer = runs[name]()
            times[name].append(1000 * (time.perf_counter() - started))
            same = same and np.array_equal(answer, wanted)
    medians = {name: float(np.median(each)) for name, each in times.items()}
    bare = float(np.median(times["bare"] + times["bare again"]))
    added = medians["drop-in"] - bare
    return {
        "turns": turns, "bare ms": round(bare, 3), "drop-in ms": round(medians["drop-in"], 3),
        "added ms": round(added, 3), "added %": round(100 * added / bare, 2),
        "by chance %": round(100 * abs(medians["bare"] - medians["bare again"]) / bare, 2), "same bits": bool(same),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
