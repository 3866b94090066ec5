"""Time and memory of quantizing the linear layers of PixArt-XL/2, block by block, with and without error feedback.

Also of choosing their rotations, with error feedback in mind, as `rotation.kind = "auto"` does.

    python tools/bench_quantize.py [--blocks 1] [--bits 4]

Weights are random, as large as the true ones; E[x xᵀ] is that of inputs which live near a few hundred directions, as
activations do. Prints seconds by layer, the sum over all 28 blocks that follows, and how far the peak memory rose above
what weights, E[x xᵀ] and results of the largest layer take.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

import torch

from lrq_export.machine import describe_machine
from lrq_export.quant import twin_log
from lrq_export.quant.compensate import Feedback, quantize_compensated
from lrq_export.quant.transforms.equalize import equalizer
from lrq_export.quant.weight import dequantize
from lrq_export.rotations import choose, hadamard_candidates

BLOCKS, WIDTH, MLP = 28, 1152, 4608
HEAD = 72
# The inputs of one block, as rows of the layers that read one, its columns, and heads if it is an attention's output:
# self-attention and cross-attention (query, key, value; the output), then the two of the MLP.
INPUTS = (
    ([WIDTH] * 3, WIDTH, None), ([WIDTH], WIDTH, HEAD), ([WIDTH], WIDTH, None), ([WIDTH] * 2, WIDTH, None),
    ([WIDTH], WIDTH, HEAD), ([MLP], WIDTH, None), ([WIDTH], MLP, None),
)  # fmt: skip
LAYERS = sum(len(rows) for rows, _, _ in INPUTS)
TOKENS = 512  # that rotations are tried on
WAYS = ("to the nearest level", "with error feedback", "choosing rotations")


def inputs_of(cols: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens (2 cols, cols) near cols / 4 directions."""
    mix = torch.randn(cols // 4, cols, generator=generator)
    tokens = torch.randn(2 * cols, cols // 4, generator=generator) @ mix
    return tokens + 0.2 * mix.square().mean().sqrt() * torch.randn(2 * cols, cols, generator=generator)


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
    before, sums = peak_bytes(), dict.fromkeys(WAYS, 0.0)

    def timed(way: str, what: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        sums[way] += seconds
        print(f"{what} {way}: {seconds:.2f} s", flush=True)

    def rounded(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        return dequantize(fit(weight, importance))

    for block in range(args.blocks):
        for all_rows, cols, head in INPUTS:
            weights = [0.03 * torch.randn(rows, cols, generator=generator) for rows in all_rows]
            tokens = inputs_of(cols, generator)
            moments, tokens = tokens.T @ tokens / len(tokens), tokens[:TOKENS].clone()
            for weight in weights:
                what = f"block {block}: {len(weight)} x {cols}"
                timed(WAYS[0], what, partial(fit, weight, moments.diagonal()))
                timed(WAYS[1], what, lambda w=weight, m=moments: quantize_compensated(w, Feedback(m), fit))
            candidates = hadamard_candidates(cols, head, 0, equalizer(moments.diagonal(), weights))
            search = partial(choose, weights, tokens, moments, candidates, 8, rounded)
            timed(WAYS[2], f"block {block}: input of {cols}", search)
    for way, seconds in sums.items():
        print(f"all {BLOCKS * LAYERS} layers {way}: {seconds / args.blocks * BLOCKS / 60:.1f} minutes")
    largest = 4 * (MLP * WIDTH * 2 + MLP**2)
    print(f"memory beyond the largest layer's: {(peak_bytes() - before - largest) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
