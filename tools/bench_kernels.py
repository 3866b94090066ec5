"""Time the CUDA kernels beside their baselines on a GPU, in one process, turn by turn; medians and p10..p90.

    python tools/bench_kernels.py [--only decode rotate product linear few] [--turns 60] [--json FILE] [--markdown FILE]

Needs a GPU, a torch that sees it and liblrq_kernels ($LRQ_KERNELS). Every case rotates through buffers that together
are three times the L2 cache, captures its calls in one CUDA graph and replays the graphs of all contenders in turn, the
first one again at the end. Prints what was measured, the bar it is held to, and exits 1 where a bar is missed; bars are
for an H200 and elsewhere only reported. Activations are Gaussian, codes those of quantized Gaussian weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

import lrq_export.torch_ops  # noqa: F401  registers torch.ops.lrq
from graphs.ops import words
from graphs.ops.twin_log_dequant import random_exponents
from lrq_export.kernels import Format, KernelError, Layout, Tactic
from lrq_export.torch_ops import WeightForm

WARM_UP_SECONDS = 3.0  # until clocks have settled
BAR_DEVICE = "H200"
DEVICE = "cuda"
# rows and columns of weights, tokens, channels and blocks: all that a test on a CPU replaces by something small
FLUX = {"ffn-up": (12288, 3072), "ffn-down": (3072, 12288), "out": (3072, 3072), "single-in": (21504, 3072)}
FLUX_TOKENS = 4608
PIXART, PIXART_TOKENS = (4608, 1152), 8192
ROTATIONS = ((3072, 128), (3072, 256), (12288, 256), (1152, 128))
# K = 36, 12, 36, 12, 60 of H_K (x) H_2^m in columns, then 76, 108, 140 in columns that threads split.
WHOLE_ROTATIONS = (1152, 3072, 4608, 12288, 15360, 2432, 13824, 8960)
FEW, FEW_TOKENS = (18432, 3072), (1, 4, 16, 64)
LRQ = torch.ops.lrq


@dataclass
class Result:
    """One contender of one case: microseconds a call."""

    case: str
    contender: str
    median: float
    p10: float
    p90: float
    note: str = ""


@dataclass
class Bar:
    """What a case must reach; `value` of `at least` or `at most` `limit`."""

    what: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.what}: {self.value:.3g}, needed {sign} {self.limit:g}: {'met' if self.met else 'MISSED'}"


@dataclass
class Report:
    """All that one run measured."""

    device: str
    turns: int
    results: list[Result] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            f"{self.device}, {self.turns} turns",
            "",
            "| case | contender | µs | p10..p90 | |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.case} | {r.contender} | {r.median:.1f} | {r.p10:.1f}..{r.p90:.1f} | {r.note} |" for r in self.results
        ]
        return "\n".join([*lines, "", *(f"- {bar}" for bar in self.bars), ""])


class Bench:
    """Times contenders against each other and keeps what it found in `report`."""

    def __init__(self, turns: int):
        self.properties = torch.cuda.get_device_properties(0)
        self.cold_bytes = 3 * self.properties.L2_cache_size
        self.report = Report(self.properties.name, turns)
        self.turns = turns

    def sets(self, bytes_of_one: int) -> int:
        """How many sets of buffers leave nothing of a set in L2 by the time it is used again."""
        return max(2, -(-self.cold_bytes // max(bytes_of_one, 1)))

    def compare(self, case: str, contenders: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
        """Median µs of each contender, a function of the index of a buffer set. Their graphs are replayed in turn."""
        graphs = {name: self._capture(call, count) for name, call in contenders.items()}
        order = [*graphs, next(iter(graphs))]  # the first again at the end: drift shows
        times: dict[int, list[float]] = {place: [] for place in range(len(order))}
        for _ in range(self.turns):
            for place, name in enumerate(order):
                times[place].append(self._replay(graphs[name]) / count)
        for place, name in enumerate(order):
            p10, median, p90 = np.percentile(times[place], [10, 50, 90])
            note = "again" if place == len(graphs) else ""
            self.report.results.append(Result(case, name, median, p10, p90, note))
        return {name: float(np.median(times[place])) for place, name in enumerate(graphs)}

    def note(self, text: str) -> None:
        """Beside the last contender that was timed."""
        self.report.results[-2].note = text

    def hold(self, what: str, value: float, limit: float, at_least: bool = True) -> None:
        self.report.bars.append(Bar(what, value, limit, at_least))

    def warm_up(self) -> None:
        a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        while True:
            for _ in range(50):
                a @ a
            stop.record()
            stop.synchronize()
            if start.elapsed_time(stop) > 1000 * WARM_UP_SECONDS:
                return

    def _capture(self, call: Callable[[int], object], count: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for index in range(min(count, 3)):
                call(index)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Alive until the capture ends, so that each call writes memory of its own: what all wrote in turn would
            # stay in L2, as the inputs do not.
            results = [call(index) for index in range(count)]
        del results
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return 1000 * start.elapsed_time(stop)


@dataclass
class PackedWeight:
    """A random weight in words on the GPU, and what else a layer has."""

    codes: torch.Tensor
    levels: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    form: list[int]

    @classmethod
    def random(cls, rows: int, cols: int, bits: int) -> PackedWeight:
        rng = np.random.default_rng(rows + cols)
        # Codes of Gaussian weights are not uniform: small magnitudes are frequent on both sides.
        magnitude = np.minimum(
            np.abs(rng.standard_normal((rows, cols), np.float32)) * 2 ** (bits - 2), 2 ** (bits - 1) - 1
        )
        sign = rng.integers(0, 2, (rows, cols), np.uint8) << (bits - 1)
        codes = words.prepack(magnitude.astype(np.uint8) | sign, bits)
        form = WeightForm(rows, cols, cols, Format.TWIN_LOG, Layout.WORDS, bits).values()
        scale = rng.uniform(0.001, 0.01, rows).astype(np.float32)
        bias = rng.standard_normal(rows, np.float32)
        arrays = (codes, random_exponents(rng, rows, 1, bits), scale, bias)
        return cls(*(torch.from_numpy(array).to(DEVICE) for array in arrays), form)

    def linear(self, x: torch.Tensor, **options: object) -> torch.Tensor:
        return LRQ.linear(x, self.codes, self.levels, self.scale, self.bias, self.form, 8, **options)

    def product(
        self, codes: torch.Tensor, scales: torch.Tensor, decoded: torch.Tensor | None, **options
    ) -> torch.Tensor:
        return LRQ.linear_quantized(
            codes, scales, self.codes, self.levels, self.scale, self.bias, self.form, 8, torch.bfloat16,
            decoded=decoded, **options,
        )  # fmt: skip


def randn(*shape: int, sets: int = 1) -> list[torch.Tensor]:
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]


def bench_decode(bench: Bench) -> None:
    """Codes to INT8 beside a copy of as many bytes, read and written."""
    for bits in (4, 3):
        rows, cols = FLUX["ffn-up"]
        weight = PackedWeight.random(rows, cols, bits)
        moved = rows * cols + weight.codes.numel()
        sets = bench.sets(moved)
        codes = [weight.codes.clone() for _ in range(sets)]
        sources = [torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(sets)]
        targets = [torch.empty_like(source) for source in sources]
        times = bench.compare(
            f"decode {bits}-bit {rows}x{cols}",
            {
                "decode": lambda i, codes=codes, w=weight: LRQ.decode(codes[i], w.levels, w.form),
                "copy": lambda i, a=targets, b=sources: a[i].copy_(b[i]),
            },
            sets,
        )
        bench.note(f"{moved / times['copy'] / 1e6:.2f} TB/s")
        bench.hold(f"decode {bits}-bit, share of the copy's bandwidth", times["copy"] / times["decode"], 0.8)


def bench_rotate(bench: Bench) -> None:
    """Rotate and quantize beside a copy that moves three bytes an element; whole rows have no bar."""
    for cols, block in ROTATIONS:
        ratio = compare_rotation(bench, cols, block)
        bench.hold(f"rotate {cols}, block {block}, times the floor", ratio, 1.4, at_least=False)
    for cols in WHOLE_ROTATIONS:
        bench.note(f"the rotation takes {compare_rotation(bench, cols, cols):.2f} x that")


def compare_rotation(bench: Bench, cols: int, block: int) -> float:
    """How many times as long as the copy."""
    tokens, moved = FLUX_TOKENS, 3 * FLUX_TOKENS * cols
    sets = bench.sets(moved)
    x, signs = randn(tokens, cols, sets=sets), torch.ones(cols, device=DEVICE, dtype=torch.bfloat16)
    sources = [torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    times = bench.compare(
        f"rotate and quantize {tokens}x{cols}, block {block}",
        {
            "rotate_quantize": lambda i: LRQ.rotate_quantize(x[i], signs, block, 8),
            "gelu_tanh too": lambda i: LRQ.rotate_quantize(x[i], signs, block, 8, 4),
            "copy of 3 bytes an element": lambda i: targets[i].copy_(sources[i]),
        },
        sets,
    )
    return times["rotate_quantize"] / times["copy of 3 bytes an element"]


def fp8_product(tokens: int, rows: int, cols: int, sets: int) -> Callable[[int], object] | None:
    """torch._scaled_mm of FP8, None where this GPU or torch has none."""
    one = torch.ones((), device=DEVICE)
    a = [t.to(torch.float8_e4m3fn) for t in randn(tokens, cols, sets=sets)]
    b = [t.to(torch.float8_e4m3fn).t() for t in randn(rows, cols, sets=sets)]

    def call(i: int) -> torch.Tensor:
        return torch._scaled_mm(a[i], b[i], scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        call(0)
    except (RuntimeError, ValueError):
        return None
    return call


def product_contenders(weight: PackedWeight, tokens: int, sets: int) -> dict[str, Callable[[int], object]]:
    rows, cols = weight.form[:2]
    x, w = randn(tokens, cols, sets=sets), randn(rows, cols, sets=sets)
    quantized = [LRQ.rotate_quantize(t, None, 1, 8) for t in x]
    decoded = [LRQ.decode(weight.codes, weight.levels, weight.form) for _ in range(sets)]
    by_column = [d.t() for d in decoded]

    def int_mm(i: int) -> torch.Tensor:
        sums = torch._int_mm(quantized[i][0], by_column[i])
        return (sums * quantized[i][1] * weight.scale + weight.bias).to(torch.bfloat16)

    contenders = {
        "lrq product, INT8 resident": lambda i: weight.product(*quantized[i], decoded[i]),
        "torch bf16": lambda i: torch.nn.functional.linear(x[i], w[i]),
        "torch._int_mm, then scales and bias": int_mm,
    }
    if (fp8 := fp8_product(tokens, rows, cols, sets)) is not None:
        contenders["torch._scaled_mm FP8"] = fp8
    return contenders


def bench_product(bench: Bench) -> None:
    """The INT8 product with its epilogue beside bf16, FP8 and torch._int_mm; then every tile."""
    tokens = FLUX_TOKENS
    for name, (rows, cols) in FLUX.items():
        weight = PackedWeight.random(rows, cols, 4)
        sets = bench.sets(rows * cols + 3 * tokens * cols)
        times = bench.compare(f"product {name} {tokens}x{rows}x{cols}", product_contenders(weight, tokens, sets), sets)
        ours = times["lrq product, INT8 resident"]
        bench.hold(f"product {name} against bf16", times["torch bf16"] / ours, 1.6)
        bench.hold(f"product {name}, TOP/s", 2e-6 * tokens * rows * cols / ours, 1250)
        bench_tiles(bench, f"tiles {name}", weight, tokens, sets)


def bench_tiles(bench: Bench, case: str, weight: PackedWeight, tokens: int, sets: int) -> None:
    """What plan.h assumes of the tiles' speeds: to be corrected by this."""
    codes, scales = LRQ.rotate_quantize(randn(tokens, weight.form[1])[0], None, 1, 8)
    decoded = LRQ.decode(weight.codes, weight.levels, weight.form)
    contenders = {}
    for tactic in Tactic:
        call = lambda _, tactic=tactic: weight.product(codes, scales, decoded, tactic=int(tactic))  # noqa: E731
        if tactic.name.startswith("TILE") or tactic == Tactic.AUTO:
            try:
                call(0)
            except KernelError:
                continue  # not in the list of this architecture
            contenders[tactic.name] = call
    bench.compare(case, contenders, sets)


def bench_linear(bench: Bench) -> None:
    """A whole layer, rotation, quantization, decode and product, beside bf16 and its INT8-resident twin."""
    cases = [(FLUX_TOKENS, *shape, name, 1.45) for name, shape in FLUX.items()]
    cases.append((PIXART_TOKENS, *PIXART, "PixArt ffn-up", 1.35))
    for tokens, rows, cols, name, limit in cases:
        weight, block = PackedWeight.random(rows, cols, 4), 256 if cols % 256 == 0 else 128
        sets = bench.sets(2 * (tokens + rows) * cols)
        x, w = randn(tokens, cols, sets=sets), randn(rows, cols, sets=sets)
        packed = [PackedWeight(weight.codes.clone(), weight.levels, weight.scale, weight.bias, weight.form) for _ in x]
        decoded = [LRQ.decode(weight.codes, weight.levels, weight.form) for _ in x]
        contenders = {
            "lrq linear, packed": lambda i, p=packed, x=x, b=block: p[i].linear(x[i], block=b),
            "lrq linear, INT8 resident": lambda i, p=packed, x=x, b=block, d=decoded: p[i].linear(
                x[i], block=b, decoded=d[i], tactic=0
            ),
            "torch bf16": lambda i, x=x, w=w: torch.nn.functional.linear(x[i], w[i]),
        }
        times = bench.compare(f"linear {name} {tokens}x{rows}x{cols}", contenders, sets)
        bench.hold(f"linear {name} against bf16", times["torch bf16"] / times["lrq linear, packed"], limit)
        ratio = times["lrq linear, packed"] / times["lrq linear, INT8 resident"]
        bench.hold(f"linear {name}, times its INT8-resident twin", ratio, 1.08, at_least=False)


def bench_few(bench: Bench) -> None:
    """Few tokens: adaLN, time and text projections."""
    for bits in (4, 3):
        rows, cols = FEW
        weight = PackedWeight.random(rows, cols, bits)
        for tokens in FEW_TOKENS:
            sets = bench.sets(weight.codes.numel())
            x, w = randn(tokens, cols, sets=sets), randn(rows, cols, sets=sets)
            packed = [
                PackedWeight(weight.codes.clone(), weight.levels, weight.scale, weight.bias, weight.form) for _ in x
            ]
            times = bench.compare(
                f"few tokens {bits}-bit {tokens}x{rows}x{cols}",
                {
                    "lrq linear": lambda i, p=packed, x=x: p[i].linear(x[i]),
                    "torch bf16": lambda i, x=x, w=w: torch.nn.functional.linear(x[i], w[i]),
                },
                sets,
            )
            if tokens <= 16:
                bench.hold(f"{tokens} tokens, {bits}-bit, against bf16", times["torch bf16"] / times["lrq linear"], 3.0)


CASES = {
    "decode": bench_decode,
    "rotate": bench_rotate,
    "product": bench_product,
    "linear": bench_linear,
    "few": bench_few,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels: needs a CUDA GPU and a torch that sees it; nothing was measured", file=sys.stderr)
        return 4
    bench = Bench(arguments.turns)
    bench.warm_up()
    failed = []
    for name in arguments.only:
        try:
            CASES[name](bench)
        except Exception:  # what was measured before, and what is measured after it, is kept
            print(f"bench_kernels: {name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            failed.append(name)
        torch.cuda.empty_cache()
        if arguments.markdown:
            arguments.markdown.write_text(bench.report.markdown())
        if arguments.json:
            arguments.json.write_text(json.dumps(asdict(bench.report), indent=1))
    print(bench.report.markdown())
    if failed:
        print(f"bench_kernels: not measured: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 1 if BAR_DEVICE in bench.report.device and not all(bar.met for bar in bench.report.bars) else 0


if __name__ == "__main__":
    sys.exit(main())
