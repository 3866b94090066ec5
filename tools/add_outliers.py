"""Give a trained checkpoint outlier channels, as large models have them, without changing what it computes.

    python tools/add_outliers.py SOURCE OUT [--salient 2] [--mild 8] [--peak 245] [--mild-peak 5]

SOURCE and OUT are PixArt or DiT transformers in diffusers layout. Whatever makes a chosen channel of a linear layer's
input is multiplied by k, and the columns of all layers that read it are divided by k: the model's output stays, the
channel's largest |x| on the calibration inputs becomes `--peak` (salient) or `--mild-peak` (mild). 245 and 5 are what
LRQ-DiT reports of PixArt. Computed in float64, stored in float32.

PixArt's blocks share one adaLN, so they share channels and factors too, and only the block of the largest input
reaches the peak. Two inputs have no exact factor and stay: of PixArt's attn2.to_q, the residual stream itself, and of
ff.net.2, behind a GELU.
"""

import argparse
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lrq_export.calibrate.inputs import batches, load_inputs
from lrq_export.calibrate.statistics import Moments
from lrq_export.checkpoint import CONFIG
from lrq_export.errors import InputError, LrqError, UsageError
from lrq_export.source import CALIBRATION, CONDITIONS, SCHEDULER, open_source

COPIED = (CONFIG, SCHEDULER, CONDITIONS, "classifier.onnx")
BATCH = 32
BLOCK = "block."  # what names of a block's own modules begin with in the tables below

Parts = tuple[tuple[str, int], ...]  # a parameter, and which of its chunks of `width` rows


@dataclass(frozen=True)
class Point:
    """A point of every block whose channels can be scaled by k without changing the output."""

    consumers: tuple[str, ...]  # all linear layers that read it: their columns are divided by k
    scaled: Parts  # rows r that become k r
    scaled_plus_one: Parts = ()  # rows r that become k (1 + r) - 1
    shared: bool = False  # one k for the points of all blocks


@dataclass(frozen=True)
class Site:
    """A Point of one block, or of all blocks that share it, under full names."""

    consumers: tuple[tuple[str, ...], ...]  # by block; those of one block read the same input
    scaled: Parts
    scaled_plus_one: Parts

    def scale(self, model: nn.Module, factors: torch.Tensor) -> None:
        """Multiply the channels by factors k (width,), in place."""
        width = len(factors)
        for name, chunk in self.scaled:
            _rows(model, name, width)[chunk].mul_(factors[:, None])
        for name, chunk in self.scaled_plus_one:
            rows = _rows(model, name, width)[chunk]
            rows.copy_((1 + rows) * factors[:, None] - 1)
        for name in (name for group in self.consumers for name in group):
            model.get_submodule(name).weight.data.div_(factors)


@dataclass(frozen=True)
class Wanted:
    """How many channels of every input become outliers, chosen at random, and their largest |x|."""

    salient: int = 2
    mild: int = 8
    peak: float = 245.0
    mild_peak: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What `add_outliers` did: factors by site, moments by layer, and the output before and after."""

    factors: list[tuple[Site, torch.Tensor]]  # float64 (width,), 1 for channels left alone
    before: dict[str, Moments]  # by the first of the layers that read an input
    after: dict[str, Moments]
    outputs: tuple[torch.Tensor, torch.Tensor]

    @property
    def difference(self) -> float:
        """Largest change of the output, relative to its largest value."""
        old, new = self.outputs
        return float((new - old).abs().max() / old.abs().max())


ATTENTION, MLP = ("block.attn1.to_q", "block.attn1.to_k", "block.attn1.to_v"), ("block.ff.net.0.proj",)


def value_of(attention: str) -> Point:
    """The input of an attention's output projection: attention mixes the tokens of a value channel, not channels."""
    value = f"{BLOCK}{attention}.to_v"
    return Point((f"{BLOCK}{attention}.to_out.0",), ((f"{value}.weight", 0), (f"{value}.bias", 0)))


def adaln_zero(consumers: tuple[str, ...], shift: int) -> Point:
    """norm(x) (1 + scale) + shift, both from the block's own linear layer; scale is the chunk after shift."""
    weight, bias = "block.norm1.linear.weight", "block.norm1.linear.bias"
    return Point(consumers, ((weight, shift), (weight, shift + 1), (bias, shift)), ((bias, shift + 1),))


def adaln_single(consumers: tuple[str, ...], shift: int) -> Point:
    """The same with rows from one linear layer of the whole model, plus a table of the block's own."""
    linear = [(f"adaln_single.linear.{part}", chunk) for part in ("weight", "bias") for chunk in (shift, shift + 1)]
    table = "block.scale_shift_table"
    return Point(consumers, (*linear, (table, shift)), ((table, shift + 1),), shared=True)


# By class of the model. Chunks of an adaLN: shift, scale and gate of the attention, then of the MLP.
POINTS = {
    "DiTTransformer2DModel": (adaln_zero(ATTENTION, 0), adaln_zero(MLP, 3), value_of("attn1")),
    "PixArtTransformer2DModel": (
        adaln_single(ATTENTION, 0),
        adaln_single(MLP, 3),
        value_of("attn1"),
        value_of("attn2"),
        Point(  # the projected text, which every block reads
            ("block.attn2.to_k", "block.attn2.to_v"),
            (("caption_projection.linear_2.weight", 0), ("caption_projection.linear_2.bias", 0)),
            shared=True,
        ),
    ),
}


@torch.no_grad()
def add_outliers(model: nn.Module, run: Callable[[nn.Module], torch.Tensor], wanted: Wanted) -> Outcome:
    """Scale channels of a float64 diffusers model in place; `run` shows it its calibration inputs, returns its output.

    Raises UsageError for a model of another class or an input without enough channels below the peaks.
    """
    sites = sites_of(model)
    generator = torch.Generator().manual_seed(wanted.seed)
    before, output = observe(model, sites, run)
    factors = []
    for site in sites:
        absmax = torch.stack([before[group[0]].channel_absmax for group in site.consumers]).amax(0)
        factors.append((site, choose_factors(absmax, wanted, generator, site.consumers[0][0])))
    for site, chosen in factors:
        site.scale(model, chosen)
    after, changed = observe(model, sites, run)
    return Outcome(factors, before, after, (output, changed))


def sites_of(model: nn.Module) -> list[Site]:
    """Every site of the model that its parameters can scale. Raises UsageError for an unknown class."""
    class_name = type(model).__name__
    if class_name not in POINTS:
        raise UsageError(f"outliers: got a {class_name}, needed one of {', '.join(POINTS)}")
    blocks = [f"transformer_blocks.{index}." for index in range(len(model.transformer_blocks))]
    sites = []
    for point in POINTS[class_name]:
        for group in [blocks] if point.shared else [[block] for block in blocks]:
            site = Site(
                tuple(tuple(_in_block(name, block) for name in point.consumers) for block in group),
                _existing(model, point.scaled, group),
                _existing(model, point.scaled_plus_one, group),
            )
            if site.scaled:  # PixArt without a caption projection reads the text as it comes
                sites.append(site)
    return sites


def choose_factors(absmax: torch.Tensor, wanted: Wanted, generator: torch.Generator, layer: str) -> torch.Tensor:
    """Factors k float64 (width,) that bring random channels from their absmax (width,) up to the wanted peaks."""
    factors = torch.ones(len(absmax), dtype=torch.float64)
    for count, peak in ((wanted.salient, wanted.peak), (wanted.mild, wanted.mild_peak)):
        # A channel that is always zero cannot grow; one above the peak is more of an outlier as it is.
        usable = torch.nonzero((absmax > 0) & (absmax < peak) & (factors == 1)).flatten()
        if len(usable) < count:
            raise UsageError(
                f"{layer}: got {len(usable)} input channels with a largest value below {peak:g}, needed {count}",
                hint="ask for fewer outliers or a higher peak",
            )
        chosen = usable[torch.randperm(len(usable), generator=generator)[:count]]
        factors[chosen] = peak / absmax[chosen].double()
    return factors


def observe(
    model: nn.Module, sites: list[Site], run: Callable[[nn.Module], torch.Tensor]
) -> tuple[dict[str, Moments], torch.Tensor]:
    """Moments of the input of every site in every block, by the first layer that reads it, and the model's output."""
    moments: dict[str, Moments] = {}
    with _watching(model, [group[0] for site in sites for group in site.consumers], moments):
        output = run(model)
    return moments, output


@contextmanager
def _watching(model: nn.Module, layers: list[str], moments: dict[str, Moments]) -> Iterator[None]:
    def add(layer: str, arguments: tuple[torch.Tensor, ...]) -> None:
        seen = Moments.of(arguments[0].flatten(0, -2))
        moments[layer] = moments[layer].merge(seen) if layer in moments else seen

    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, arguments, layer=layer: add(layer, arguments))
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_block(name: str, block: str) -> str:
    return block + name.removeprefix(BLOCK) if name.startswith(BLOCK) else name


def _existing(model: nn.Module, parts: Parts, blocks: list[str]) -> Parts:
    """Full names of those that the model has (a bias may be missing), each once."""
    names = {name for name, _ in model.named_parameters()}
    full = dict.fromkeys((_in_block(name, block), chunk) for block in blocks for name, chunk in parts)
    return tuple((name, chunk) for name, chunk in full if name in names)


def _rows(model: nn.Module, name: str, width: int) -> torch.Tensor:
    """A view (chunks, width, n) of a weight (chunks * width, n), or with n = 1 of a bias or a table."""
    parameter = model.get_parameter(name).data
    return parameter.view(-1, width, parameter.shape[1] if name.endswith(".weight") else 1)


def run_on(inputs: Mapping[str, torch.Tensor], call: Callable) -> Callable[[nn.Module], torch.Tensor]:
    """Runs a model on inputs, a batch at a time; `call` is that of its family."""
    return lambda model: torch.cat([call(model, batch) for batch in batches(inputs, BATCH)])


def print_outcome(outcome: Outcome) -> None:
    print(f"{'input of':44} {'peak':>16} {'kurtosis':>20}")
    for layer, old in outcome.before.items():
        new = outcome.after[layer]
        peaks, kurtoses = f"{old.absmax:7.2f} {new.absmax:8.2f}", f"{old.kurtosis:9.1f} {new.kurtosis:10.1f}"
        print(f"{layer:44} {peaks} {kurtoses}")
    print(f"output: relative difference {outcome.difference:.1e} in float64")


def convert(source_folder: Path, out: Path, calibration: Path, wanted: Wanted) -> Outcome:
    """Write the checkpoint with outliers to `out`. Raises LrqError for what is wrong with the source."""
    if out.resolve() == source_folder.resolve():
        raise UsageError(f"{out}: got the source as output folder, needed another", hint="name a new folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: got a file, needed a folder or a name that is free", hint="name a new folder")
    for name, peak in (("--peak", wanted.peak), ("--mild-peak", wanted.mild_peak)):
        if not (math.isfinite(peak) and peak > 0):
            raise UsageError(f"{name}: got {peak}, needed a finite positive number")
    if not source_folder.is_dir():
        raise InputError(f"{source_folder}: no such folder", hint="name a folder in diffusers layout")
    if not calibration.is_file():
        raise InputError(f"{calibration}: not found", hint="name recorded inputs with --calibration")
    source = open_source(source_folder)
    inputs = load_inputs(calibration, source.family.inputs(source.config))
    model = source.load(source.model()).double()
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    outcome = add_outliers(model, run_on(wide, source.family.call), wanted)
    out.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(out)
    for name in COPIED:  # the config as it was, without this machine's path in it
        if (source.checkpoint.path / name).is_file():
            shutil.copy(source.checkpoint.path / name, out / name)
    shutil.copy(calibration, out / CALIBRATION)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--salient", type=int, default=Wanted.salient, help="channels of every input brought to --peak")
    parser.add_argument("--mild", type=int, default=Wanted.mild, help="channels of every input brought to --mild-peak")
    parser.add_argument("--peak", type=float, default=Wanted.peak)
    parser.add_argument("--mild-peak", type=float, default=Wanted.mild_peak)
    parser.add_argument("--calibration", type=Path, help=f"recorded inputs, else {CALIBRATION} in the source")
    parser.add_argument("--seed", type=int, default=Wanted.seed)
    args = parser.parse_args()
    wanted = Wanted(args.salient, args.mild, args.peak, args.mild_peak, args.seed)
    try:
        print_outcome(convert(args.source, args.out, args.calibration or args.source / CALIBRATION, wanted))
    except LrqError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
