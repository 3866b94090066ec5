"""Time and error of the weight search, and of the exact integer product: `python tools/bench_search.py [--threads 2]`.

Errors are relative squared errors on synthetic rows; times are CPU seconds of this process, and ratios compare products
measured in turn in one run. A busy machine inflates all of them.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from lrq_export.quant import twin_log, uniform
from lrq_export.quant.level_sets import searched_sets
from lrq_export.quant.linear import QuantizedLinear
from lrq_export.quant.methods import METHODS
from lrq_export.quant.weight import dequantize

SHAPES = [(1152, 1152), (4608, 1152), (1152, 4608)]
GROUP_SIZE = 128


def sample(kind: str, rows: int, cols: int) -> torch.Tensor:
    """Rows like those of a trained linear layer, from light to heavy tails."""
    rng = np.random.default_rng(0)
    draw = {"gauss": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size)}
    draw["t4"] = lambda size: rng.standard_t(4, size=size)
    return 0.03 * torch.from_numpy(draw[kind]((rows, cols))).float()


def error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """Relative squared error."""
    return ((rounded - weight).double().square().sum() / weight.double().square().sum()).item()


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of a few calls: least disturbed by other processes."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def print_errors() -> None:
    """Every method of `quant.methods`, 512 rows of 1152, then Twin-Log in groups."""
    samples = {
        f"{kind} {bits}": (sample(kind, 512, 1152), bits) for kind in ("gauss", "t4", "laplace") for bits in (2, 3, 4)
    }
    print(f"{'method':20}" + "".join(f"{name:>11}" for name in samples))
    for method in METHODS.values():
        errors = [error(weight, method.quantize(weight, bits=bits).dequantize()) for weight, bits in samples.values()]
        print(f"{method.name:20}" + "".join(f"{each:11.4g}" for each in errors), flush=True)
    grouped = [
        error(weight, dequantize(twin_log.quantize(weight, bits=bits, group_size=GROUP_SIZE)))
        for weight, bits in samples.values()
    ]
    print(f"{f'tlq, groups of {GROUP_SIZE}':20}" + "".join(f"{each:11.4g}" for each in grouped), flush=True)


def print_search_times() -> None:
    """CPU seconds and microseconds a weight, by shape and bits."""
    print(f"\n{'rows x cols':14}{'bits':>5}{'group':>7}{'CPU s':>8}{'us/weight':>11}{'peak MB':>9}")
    for bits in twin_log.BITS:
        searched_sets(bits)  # listed once a process; not part of a layer's time
    for rows, cols in [*SHAPES, (4608, 4608)]:
        weight = sample("gauss", rows, cols)
        for bits, group_size in ((2, None), (3, None), (4, None), (4, GROUP_SIZE)):
            seconds = cpu_seconds(lambda: twin_log.quantize(weight, bits=bits, group_size=group_size))  # noqa: B023
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            each = seconds / weight.numel() * 1e6
            print(
                f"{f'{rows} x {cols}':14}{bits:5}{group_size or '-':>7}{seconds:8.2f}{each:11.3f}{peak:9}", flush=True
            )


def print_product_times() -> None:
    """The exact product of QuantizedLinear against its alternatives, 1024 tokens."""
    header = f"{'rows x cols':14}{'bits':>5}{'ranges':>8}{'float32 ms':>12}"
    print(f"\n{header}{'exact':>7}{'float64':>9}{'_int_mm':>9}   (times float32)")
    for rows, cols in ((1152, 1152), (4608, 1152), (1152, 4608)):
        dense = sample("gauss", rows, cols)
        for bits in (4, 8):
            weight = twin_log.quantize(dense, bits=4) if bits == 4 else uniform.quantize(dense)
            layer = QuantizedLinear(weight)
            q = torch.randint(-127, 128, (1024, cols)).float()
            integers = layer.weight.float()
            plain = cpu_seconds(lambda: q @ integers.T)  # noqa: B023
            exact = cpu_seconds(lambda: layer._integer_product(q))  # noqa: B023
            double = cpu_seconds(lambda: q.double() @ integers.double().T)  # noqa: B023
            native = cpu_seconds(lambda: torch._int_mm(q.to(torch.int8), layer.weight.T), repeats=1)  # noqa: B023
            ratios = "".join(f"{value / plain:{width}.2f}" for value, width in ((exact, 7), (double, 9), (native, 9)))
            print(f"{f'{rows} x {cols}':14}{bits:5}{len(layer._ranges):8}{plain * 1e3:12.1f}{ratios}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print_errors()
    print_search_times()
    print_product_times()
