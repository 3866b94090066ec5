"""Would the dual transform ever be chosen? It is tried beside the rotations of `auto` on every input of a model.

    python tools/measure_dual.py SOURCE [--bits 4] [--act-bits 8]

Twice: on the input as it is, and on the input with its channels equalized, as rotations get it. Prints how often each
candidate loses least, its work left out of account, and how the better dual transform compares with the best rotation.
"""

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from lrq_export.calibrate.run import observe
from lrq_export.comparison.inputs import LayerInput
from lrq_export.comparison.run import layer_inputs
from lrq_export.plan import target_layers
from lrq_export.quant.methods import METHODS
from lrq_export.quant.transforms.base import Chain
from lrq_export.quant.transforms.dual import fit_dual
from lrq_export.quant.transforms.equalize import equalizer, fit_equalizer
from lrq_export.recipe import load_recipe
from lrq_export.rotations import Candidate, choose, hadamard_candidates
from lrq_export.source import gather_inputs, open_source

DUAL, EQUALIZED_DUAL = "dual transform", "equalized dual transform"


def losses(source: LayerInput, bits: int, act_bits: int) -> dict[str, float]:
    """Output error of every candidate on one input."""
    moments = source.correlation.diagonal()
    scaling = fit_equalizer(moments, source.weights)
    candidates = hadamard_candidates(source.width, source.head_width, 0, equalizer(moments, source.weights))
    candidates += [
        Candidate(DUAL, fit_dual(source.tokens)),
        Candidate(EQUALIZED_DUAL, Chain((scaling, fit_dual(scaling.apply(source.tokens))))),
    ]

    def quantize(weight, moment):
        return METHODS["tlq"].quantize(weight, moment, bits=bits).dequantize()

    return choose(source.weights, source.tokens, source.correlation, candidates, act_bits, quantize).losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    args = parser.parse_args()
    recipe, source = load_recipe(), open_source(args.source)
    inputs = gather_inputs(source, recipe, None, None)
    model, layers = source.load(source.model()), target_layers(source.model(), source.family, recipe)
    wins, ratios = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        observed = observe(source.family, model, layers, inputs.calibration, recipe.calibration.batch, Path(folder))
        for each in layer_inputs(source, model, observed):
            found = losses(each, args.bits, args.act_bits)
            wins[min(found, key=found.__getitem__)] += 1
            dual = min(found[name] for name in (DUAL, EQUALIZED_DUAL))
            ratios.append(dual / min(loss for name, loss in found.items() if name not in (DUAL, EQUALIZED_DUAL)))
    print(f"W{args.bits}A{args.act_bits}, {len(ratios)} inputs; least output error: ", end="")
    print(", ".join(f"{name} {count}" for name, count in wins.most_common()))
    print(
        f"the better dual transform loses {min(ratios):.2f} to {max(ratios):.2f} times what the best rotation loses, "
        f"median {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
