"""How much of a difference between two methods is chance?

    python tools/measure_chance.py SOURCE [--methods tlq codebook quarot] [--bits 4] [--act-bits 8]

Quantizes the model by each method several times, with other signs in its rotations and all else alike, and draws the
same images each time. Prints ε-NMSE and same-seed PSNR of every run, then their mean and standard deviation by method.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from lrq_export.calibrate.run import observe
from lrq_export.comparison.run import Bench, layer_inputs, quantized
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import treatment_of
from lrq_export.plan import target_layers
from lrq_export.progress import Silent
from lrq_export.recipe import load_recipe
from lrq_export.source import gather_inputs, open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--methods", nargs="+", default=["tlq", "codebook", "quarot"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--signs", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the signs")
    parser.add_argument("--images", type=int, default=5, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the images")
    args = parser.parse_args()
    recipe = load_recipe(overrides={"sampling.images": str(args.images)})
    source = open_source(args.source)
    inputs = gather_inputs(source, recipe, None, None)
    model = source.load(source.model())
    layers = target_layers(source.model(), source.family, recipe)
    with tempfile.TemporaryDirectory() as folder:
        observed = observe(source.family, model, layers, inputs.calibration, recipe.calibration.batch, Path(folder))
        sources = layer_inputs(source, model, observed)
        bench = Bench(source, model, inputs, recipe, args.seeds, None, Silent())
        for method in args.methods:
            found = []
            for signs in args.signs:
                fitted = Fitted(sources, signs)
                stand_in, _ = quantized(model, sources, treatment_of(method), args.bits, args.act_bits, fitted)
                scores = bench.scores(stand_in)
                found.append(scores["psnr_db"])
                print(
                    f"{method} W{args.bits}A{args.act_bits}, signs {signs}: noise NMSE {scores['noise_nmse']:.2e}, "
                    f"PSNR {found[-1]:.2f} dB",
                    flush=True,
                )
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            print(f"{method}: {statistics.mean(found):.2f}{spread} dB over {len(found)} runs", flush=True)


if __name__ == "__main__":
    main()
