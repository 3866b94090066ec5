"""Time and memory of quantizing the linear layers of PixArt-XL/2, block by block, with and without error feedback.

    python tools/bench_quantize.py [--blocks 1] [--bits 4]

Weights are random, as large as the true ones; E[x xᵀ] is that of inputs which live near a few hundred directions, as
activations do. Prints seconds by layer, the sum over all 28 blocks that follows, and how far the peak memory rose above
what weights, E[x xᵀ] and results of the largest layer take.
"""

import argparse
import resource
import time
from functools import partial

import torch

from lrq_export.machine import describe_machine
from lrq_export.quant import twin_log
from lrq_export.quant.compensate import Feedback, quantize_compensated

BLOCKS, WIDTH, MLP = 28, 1152, 4608
# Of one block: self-attention and cross-attention (query, key, value, output), then the two of the MLP.
SHAPES = [(WIDTH, WIDTH)] * 8 + [(MLP, WIDTH), (WIDTH, MLP)]


def correlation(cols: int, generator: torch.Generator) -> torch.Tensor:
    """E[x xᵀ] (cols, cols) of inputs near cols / 4 directions."""
    mix = torch.randn(cols // 4, cols, generator=generator)
    tokens = torch.randn(2 * cols, cols // 4, generator=generator) @ mix
    tokens += 0.2 * mix.square().mean().sqrt() * torch.randn(2 * cols, cols, generator=generator)
    return tokens.T @ tokens / len(tokens)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    print(describe_machine())
    generator = torch.Generator().manual_seed(0)
    fit = partial(twin_log.quantize, bits=args.bits)
    before, sums = peak_bytes(), {"to the nearest level": 0.0, "with error feedback": 0.0}
    for block in range(args.blocks):
        for rows, cols in SHAPES:
            weight = 0.03 * torch.randn(rows, cols, generator=generator)
            moments = correlation(cols, generator)
            ways = {
                "to the nearest level": lambda weight=weight, moments=moments: fit(weight, moments.diagonal()),
                "with error feedback": lambda weight=weight, moments=moments: quantize_compensated(
                    weight, Feedback(moments), fit
                ),
            }
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds = time.perf_counter() - started
                sums[name] += seconds
                print(f"block {block}: {rows} x {cols} {name}: {seconds:.2f} s", flush=True)
    for name, seconds in sums.items():
        print(f"all {BLOCKS * len(SHAPES)} layers {name}: {seconds / args.blocks * BLOCKS / 60:.1f} minutes")
    largest = 4 * (MLP * WIDTH * 2 + MLP**2)
    print(f"memory beyond the largest layer's: {(peak_bytes() - before - largest) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
