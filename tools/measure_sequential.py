"""Does it help to calibrate each block on what the quantized blocks before it really produce?

    python tools/measure_sequential.py [SOURCE] [--bits 4 3] [--act-bits 8] [--images 10] [--seeds 0 1 2]

Quantizes the model by the default treatment twice: every layer calibrated on the floating-point model, and block by
block, each block calibrated on the model whose earlier blocks are quantized already. Prints ε-NMSE and same-seed PSNR.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from lrq_export.calibrate.run import observe
from lrq_export.comparison.activations import Clock
from lrq_export.comparison.layer import treat
from lrq_export.comparison.run import Bench, layer_inputs, quantized
from lrq_export.comparison.transforms import Fitted
from lrq_export.comparison.treatments import treatment_of
from lrq_export.plan import target_layers
from lrq_export.progress import Silent
from lrq_export.recipe import load_recipe
from lrq_export.source import Source, gather_inputs, open_source

ROOT = Path(__file__).resolve().parents[1]


def blocks_of(layers: list[str]) -> list[list[str]]:
    """Layers by block, in the order in which the model runs them: `transformer_blocks.3.attn1.to_q` is of block 3."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        blocks.setdefault(".".join(layer.split(".")[:2]), []).append(layer)
    return list(blocks.values())


def observed_inputs(source: Source, model: nn.Module, layers: list[str], inputs, batch: int, weights: nn.Module):
    """The inputs of `layers` in `model`; the layers' own weights are those of `weights`."""
    folder = Path(tempfile.mkdtemp())
    observed = observe(source.family, model, layers, inputs, batch, folder)
    return layer_inputs(source, weights, observed)


@torch.no_grad()
def block_by_block(source: Source, exact: nn.Module, layers: list[str], inputs, batch: int, bits: int, act_bits: int):
    """The quantized model, each block treated on what the treated blocks before it produce."""
    treatment, clock = treatment_of("tlq"), Clock()
    model, _ = quantized(exact, [], treatment, bits, act_bits, Fitted([]))
    for block in blocks_of(layers):
        for each in observed_inputs(source, model, block, inputs, batch, exact):
            for name, layer in treat(each, treatment, bits, act_bits, clock, Fitted([])).layers.items():
                model.set_submodule(name, layer)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=ROOT / "examples" / "digits-pixart")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    recipe = load_recipe(overrides={"sampling.images": str(args.images)})
    source = open_source(args.source)
    inputs = gather_inputs(source, recipe, args.source / "calibration.safetensors", None)
    layers = target_layers(source.model(), source.family, recipe)
    exact, batch = source.load(source.model()), recipe.calibration.batch
    bench = Bench(source, exact, inputs, recipe, args.seeds, None, Silent())
    fitted = Fitted(observed_inputs(source, exact, layers, inputs.calibration, batch, exact))
    for bits in args.bits:
        models = {
            "on floating point": lambda bits=bits: quantized(
                exact, fitted.inputs, treatment_of("tlq"), bits, args.act_bits, fitted
            )[0],
            "block by block": lambda bits=bits: block_by_block(
                source, exact, layers, inputs.calibration, batch, bits, args.act_bits
            ),
        }
        for name, make in models.items():
            scores = bench.scores(make())
            by_seed = ", ".join(f"{decibels:.1f}" for decibels in scores["psnr_db_by_seed"])
            print(
                f"W{bits}A{args.act_bits} {name}: noise NMSE {scores['noise_nmse']:.2e}, "
                f"PSNR {scores['psnr_db']:.2f} dB ({by_seed})",
                flush=True,
            )


if __name__ == "__main__":
    main()
