"""The command line: parse, call one library function, print, exit with the code of the outcome."""

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lrq_export import __version__
from lrq_export.doctor_command import doctor
from lrq_export.engine_command import add_engines
from lrq_export.errors import Interrupted, LrqError, UsageError
from lrq_export.plugins_command import plugins
from lrq_export.serve_command import add_serving
from lrq_export.several_values import SeveralValues
from lrq_export.verify_command import verify_against

# Before torch is imported: its OpenMP threads then sleep while they wait. Spinning, they fight whatever else the
# machine runs: quantizing one 288 x 288 layer beside two busy processes took 9.4 s instead of 0.7 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Compile a diffusion transformer into a low-bit deployable package.",
)  # fmt: skip
app.add_typer(plugins, name="plugins")
add_serving(app)
app.command()(doctor)

Stage = Enum(
    "Stage", {name: name for name in ("load", "calibrate", "trace", "rewrite", "quantize", "engine", "verify")}
)
Validation = Enum("Validation", {name: name for name in ("full", "fast")})
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable lines instead of tables and bars.")]
CTRL_C = 130  # what typer makes of a KeyboardInterrupt
Package = Annotated[Path, typer.Argument(help="A package that lrq-export build wrote.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"lrq-export {__version__}")
        raise typer.Exit


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(help="Folder in diffusers layout, a transformer or a whole pipeline; or a package.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder of the package; a package as SOURCE is its own.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Engine to build: onnxruntime, tensorrt, tensorrt-rtx. May be repeated.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="w4a8 (default), w3a8, w4a6, w3a6 or w8a8.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe in TOML; overrides the preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One recipe key, e.g. weights.bits=3.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Recorded denoiser inputs (safetensors).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, to record calibration from.")] = None,
    conditions: Annotated[Path | None, typer.Option(help="Embeddings to sample with (safetensors).")] = None,
    validate: Annotated[
        Validation | None, typer.Option(help="Weights that prove each graph rewrite; default: the recipe's.")
    ] = None,
    keep_going: Annotated[
        bool | None, typer.Option("--keep-going", help="Leave out a rewrite that fails its proof; default: stop.")
    ] = None,
    until: Annotated[Stage, typer.Option(help="Stop after this stage.")] = Stage.verify,
    as_json: Json = False,
) -> None:
    """Quantize, trace, rewrite, bind and verify SOURCE into a package."""
    overrides = _overrides(set_ or [])
    if target is not None:
        overrides["engine.targets"] = json.dumps(_values("--target", target))
    if out is None:
        given = {"--preset": preset, "--recipe": recipe, "--calibration": calibration, "--prompts": prompts,
                 "--conditions": conditions, "--validate": validate, "--keep-going": keep_going}  # fmt: skip
        add_engines(source, overrides, [flag for flag, value in given.items() if value is not None], as_json)
        return
    from lrq_export.package import is_package

    if is_package(source):
        raise UsageError(
            f"-o {out}: {source} is a package itself",
            hint="leave -o out to add engines to it, or name the model that it was built from",
        )
    from lrq_export.calibrate.pipeline import record_prompts
    from lrq_export.compiler import build as run
    from lrq_export.engine.targets import finish_elsewhere
    from lrq_export.recipe import load_recipe

    if validate is not None:
        overrides["rewrite.validation"] = validate.value
    if keep_going:
        overrides["rewrite.keep_going"] = "true"
    settings = load_recipe(preset, recipe, overrides)
    if prompts is not None:
        if calibration is not None:
            raise UsageError("--prompts and --calibration exclude each other", hint="pass one of them")
        # Recording runs the whole pipeline: what can be refused without it is refused before.
        run(source, out, recipe=settings, conditions=conditions, until="load")
        calibration = record_prompts(source, prompts, settings, beside=out.resolve())
    with _progress(as_json) as progress:
        result = run(
            source, out, recipe=settings, calibration=calibration, conditions=conditions, until=until.value,
            progress=progress,
        )  # fmt: skip
    if result.up_to_date:
        print(json.dumps({"event": "up to date", "out": str(result.out)}) if as_json else f"{out} is up to date")
        if not result.passed:
            _show_report(result.report, as_json)
    elif result.report is None:
        where = "nothing was written" if result.stopped_after == "load" else f"its work is in {result.out}"
        print(
            json.dumps({"event": "stopped", "stage": result.stopped_after, "out": str(result.out)})
            if as_json
            else f"stopped after {result.stopped_after}: {where}; run again without --until to finish"
        )
    else:
        _show_report(result.report, as_json)
        if not as_json:
            print(f"package: {result.out}\nreport:  {result.out / 'report.html'}")
    if result.missing and result.passed:
        raise finish_elsewhere(out, result.missing, settings.engine.targets)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def verify(
    package: Package,
    source: Annotated[
        Path | None, typer.Option(help="The source folder: measures R0 again, R3 on real weights.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare this target with model.onnx: onnxruntime, tensorrt, tensorrt-rtx.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="With --against: how many samples, or recorded inputs (safetensors).")
    ] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="With --against: find the first wrong tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Check every hash, then climb the parity ladder again from the package's files, or compare one target."""
    if against is not None and source is None:
        raise typer.Exit(verify_against(package, against, inputs, bisect, as_json))
    if inputs is not None or bisect or against is not None:
        raise UsageError("--against excludes --source, and --inputs and --bisect need it", hint="see --help")
    _admit(package)
    report, _ = _verified(package, source, as_json)
    _show_report(report, as_json)
    raise typer.Exit(0 if all(rung["passed"] is not False for rung in report["ladder"]) else 1)


@app.command()
def sample(
    package: Package,
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG of the samples, or .safetensors of the latents.")],
    images: Annotated[int | None, typer.Option(help="How many; default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first latents; default: the recipe's.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of the conditions, e.g. 3,1,4.")] = None,
    pipeline: Annotated[Path | None, typer.Option(help="A diffusers pipeline folder to decode latents with.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; needs --pipeline.")] = None,
) -> None:
    """Draw samples through diffusers' scheduler with the engine in place of the transformer."""
    if (pipeline is None) != (prompts is None):
        raise UsageError("--pipeline and --prompts go together", hint="pass both, or neither")
    chosen = None if rows is None else _numbers("--rows", rows)
    _check_output(package, out)
    from lrq_export.sample import sample_conditions, sample_prompts

    with _progress(as_json=False) as progress:
        if pipeline is not None:
            written = sample_prompts(package, out, pipeline, prompts, steps=steps, seed=seed, progress=progress)
        else:
            written = sample_conditions(
                package, out, images=images, steps=steps, seed=seed, rows=chosen, progress=progress
            )
    print(written)


@app.command()
def inspect(
    package: Package,
    passes: Annotated[
        bool, typer.Option("--passes", help="What each rewrite did, and near misses with reasons.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="One line a quantized layer.")] = False,
    dump_after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Only the graph after this pass, or trace, as ONNX text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a package holds."""
    if dump_after is not None and (passes or layers or as_json):
        raise UsageError("--dump-after excludes --passes, --layers and --json", hint="ask for one of them")
    _admit(package)
    from lrq_export.inspect import describe, describe_layers, describe_passes, graph_text

    if dump_after is not None:
        print(graph_text(package, dump_after))
        return
    sections = [describe(package)]
    if passes:
        sections.append(describe_passes(package))
    if layers:
        sections.append(describe_layers(package))
    for section in sections:
        print(json.dumps(section.data) if as_json else section.text())


@app.command()
def report(
    package: Package,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write.")],
    source: Annotated[Path | None, typer.Option(help="The source folder, for figures that need its weights.")] = None,
) -> None:
    """Verify a package and write the findings as one offline HTML page."""
    _check_output(package, out)
    from lrq_export.report_file import read_report
    from lrq_export.saved_graphs import TRACE, load_graph, rewritten_graph
    from lrq_export.verify.report_page import write_report_page

    found, samples = _verified(package, source, as_json=False)
    built = read_report(package)  # what only the build could know; its hash is checked by now
    found |= {key: built[key] for key in ("source", "tool", "timings", "warnings")}
    write_report_page(out, found, samples, (load_graph(package / TRACE), rewritten_graph(package)))
    print(out)


@app.command(cls=SeveralValues)
def compare(
    source: Annotated[Path, typer.Argument(help="Folder in diffusers layout: a transformer, or a whole pipeline.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write; its figures go beside it as JSON.")],
    methods: Annotated[
        list[str] | None, typer.Option(help="Ways to quantize, e.g. tlq rtn; default: ours and every published one.")
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Bits per weight, e.g. 4 3, the default.")] = None,
    acts: Annotated[list[str] | None, typer.Option(help="Bits per activation, e.g. 8 6, the default.")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="Seeds to draw images with, e.g. 0 1 2, the default.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images of each seed; default: the recipe's.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Recorded denoiser inputs (safetensors).")] = None,
    conditions: Annotated[Path | None, typer.Option(help="Embeddings to sample with (safetensors).")] = None,
    judge: Annotated[
        Path | None, typer.Option(help="ONNX classifier of the images; default: the source's classifier.onnx.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One recipe key, e.g. sampling.steps=10.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize SOURCE in many ways and rank them by what its images lose.

    What OUT's JSON holds already, of the same SOURCE, inputs, seeds and settings, is not measured again.
    """
    from lrq_export.comparison.page import write_comparison_page
    from lrq_export.comparison.run import compare as run
    from lrq_export.comparison.treatments import DEFAULT
    from lrq_export.recipe import load_recipe

    chosen = list(DEFAULT) if methods is None else _values("--methods", methods)
    weight_bits = _several_numbers("--bits", bits or ["4,3"])
    act_bits = _several_numbers("--acts", acts or ["8,6"])
    drawn = _several_numbers("--seeds", seeds or ["0,1,2"])
    _check_seeds(drawn)
    overrides = _overrides(set_ or []) | ({} if images is None else {"sampling.images": str(images)})
    settings = load_recipe(overrides=overrides)
    _check_compared(overrides)
    _check_page(source, out)
    with _progress(as_json) as progress:
        report = run(
            source, chosen, bits=weight_bits, act_bits=act_bits, recipe=settings, calibration=calibration,
            conditions=conditions, seeds=drawn, judge=judge, kept=out.with_suffix(".json"), progress=progress,
        )  # fmt: skip
    written = write_comparison_page(out, report)
    _show_comparison(report, as_json)
    print(
        json.dumps({"event": "written", "page": str(out), "report": str(written)})
        if as_json
        else f"page:   {out}\nreport: {written}"
    )


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="Recipe file to write.")] = Path("recipe.toml"),
    preset: Annotated[str | None, typer.Option(help="w4a8 (default), w3a8, w4a6, w3a6 or w8a8.")] = None,
) -> None:
    """Write a recipe with every key spelled out, to edit and pass to build --recipe."""
    from lrq_export.package import write_bytes_atomic
    from lrq_export.recipe import load_recipe, to_toml

    if out.exists():
        raise UsageError(f"{out}: already exists", hint="choose another name or remove it")
    write_bytes_atomic(out, to_toml(load_recipe(preset)).encode())
    print(out)


def _admit(package: Path) -> None:
    """Refuse a package before a command imports what takes long, or could be attacked."""
    from lrq_export.admit import admit

    admit(package)


def _verified(package: Path, source: Path | None, as_json: bool) -> tuple[dict, dict]:
    """Climb the ladder in sight of the user; returns (report, samples)."""
    _admit(package)
    from lrq_export.progress import stage
    from lrq_export.verify.report_sections import RUNGS
    from lrq_export.verify.run import verify as run

    with _progress(as_json) as progress, stage(progress, "verify", {}, len(RUNGS)):
        return run(package, source=source, advance=progress.advance)


def _check_output(package: Path, out: Path) -> None:
    """Raise UsageError, before any work, for an output that cannot be written or would spoil the package."""
    _admit(package)  # what is no package is said first
    if out.is_dir():
        raise UsageError(f"{out}: is a folder, needed the name of a file", hint="name a file in it")
    if out.resolve().is_relative_to(package.resolve()):
        raise UsageError(
            f"{out}: lies in the package, which an added file makes invalid", hint="write it beside the package"
        )


def _check_page(source: Path, out: Path) -> None:
    """Raise UsageError, before any work, for a page that cannot be written, or its figures beside it."""
    from lrq_export.package import is_package

    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies in the source folder {source}", hint="write the page beside it")
    if any(is_package(folder) for folder in out.resolve().parents):
        raise UsageError(
            f"{out}: lies in a package, which an added file makes invalid", hint="write it beside the package"
        )
    for path in (out, *([out.with_suffix(".json")] if out.name else [])):
        if path.is_dir():
            raise UsageError(f"{path}: is a folder, needed the name of a file", hint="choose another name")
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"{out}: needed the name of a page", hint=f"e.g. {out}.html")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: its folder does not exist", hint=f"make {out.parent}, or choose another one")


# Keys of the recipe, or whole tables of it, that a comparison does not read, and why.
_NOT_COMPARED = {
    "weights": "--methods and --bits choose them", "activations": "--methods and --acts choose them",
    "rotation": "each method has its own", "sampling.seed": "--seeds chooses it", "gates": "a comparison has none",
}  # fmt: skip


def _check_compared(overrides: dict[str, str]) -> None:
    """Raise UsageError for a key that would be ignored."""
    for key in overrides:
        reason = _NOT_COMPARED.get(key) or _NOT_COMPARED.get(key.partition(".")[0])
        if reason is not None:
            raise UsageError(f"--set: {key}: a comparison does not read it: {reason}", hint="leave it out")


def _check_seeds(seeds: list[int]) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**63:  # what torch takes
            raise UsageError(f"--seeds: got {seed}, needed whole numbers from 0 to 2^63 - 1")


def _show_report(report: dict, as_json: bool) -> None:
    if as_json:
        for rung in report["ladder"]:
            print(json.dumps({"event": "rung"} | rung))
        print(json.dumps({"event": "sizes"} | report["sizes"]))
        for warning in report["warnings"]:
            print(json.dumps({"event": "warning", "said": warning}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("rung", "compares", "metric", "value", "bound", "")
    for rung in report["ladder"]:
        verdict = {True: "ok", False: "FAILED", None: "reported"}[rung["passed"]]
        bound = "–" if rung["bound"] is None else f"{rung['bound']:.3g}"
        value = "–" if rung["value"] is None else f"{rung['value']:.3g}"
        table.add_row(rung["rung"], rung["title"], rung["metric"], value, bound, verdict)
    console = Console()
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    sizes = report["sizes"]
    console.print(f"packed weights: {sizes['packed_ratio']:.3f} of their fp16 bytes")
    failed = [rung for rung in report["ladder"] if rung["passed"] is False]
    if failed:
        console.print(f"first broken rung: {failed[0]['rung']}, which blames {failed[0]['blames']}", markup=False)


def _show_comparison(report: dict, as_json: bool) -> None:
    from lrq_export.comparison.ranking import decibels, finite, name_of, rows_at, settings, verdict
    from lrq_export.verify.markup import digits, scientific

    if as_json:
        for row in finite(report)["rows"]:
            print(json.dumps({"event": "row"} | row))
        print(json.dumps({"event": "reference"} | finite(report["reference"])))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    for setting in settings(report):
        name = Column(name_of(setting), overflow="fold")
        table = Table(name, "PSNR dB", "ε-NMSE", "Fréchet", "accuracy", "bits", "s", "deploys")
        for row in rows_at(report, setting):
            table.add_row(
                Text(row["title"]), decibels(row["psnr_db"]), scientific(row["noise_nmse"]),
                digits(row["frechet"], ",.3f"), digits(row["accuracy"], ".1%"), digits(row["bits_per_weight"], ".2f"),
                digits(row["seconds"], ",.1f"), "yes" if row["obstacle"] is None else "no",
            )  # fmt: skip
        console.print(table)
    if report["reference"]["accuracy"] is not None:
        console.print(f"accuracy in floating point: {report['reference']['accuracy']:.1%}")
    for setting in settings(report):
        console.print(verdict(rows_at(report, setting)), markup=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False)


def _overrides(pairs: list[str]) -> dict[str, str]:

    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set: got {pair!r}, needed KEY=VALUE", hint="e.g. --set weights.bits=3")
        overrides[key] = value
    return overrides


def _numbers(flag: str, text: str) -> list[int]:

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag}: got {text!r}, needed whole numbers, e.g. 4 3") from None


def _values(flag: str, given: list[str]) -> list[str]:
    """What commas and repeated flags separate, each value once. Raises UsageError for commas alone."""
    values = list(dict.fromkeys(value for part in given for value in part.split(",") if value))
    if not values:
        raise UsageError(f"{flag}: got {','.join(given)!r}, needed at least one value")
    return values


def _several_numbers(flag: str, given: list[str]) -> list[int]:
    return list(dict.fromkeys(_numbers(flag, ",".join(_values(flag, given)))))


def _progress(as_json: bool):
    from lrq_export.progress import shown

    return shown(as_json)


def main() -> None:
    """Run the command line; a user error is one line on standard error and its exit code."""
    interrupted = Interrupted("interrupted", hint="run the same command again to resume")
    try:
        code = app(standalone_mode=False)
    except LrqError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(interrupted)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(UsageError(f"{error.filename}: {error.strerror}", hint="check the path and its permissions"))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors, whose class typer does not export
        if usage is None:
            raise
        _fail(_usage_error(usage(), getattr(error, "ctx", None)))
    if code == CTRL_C:
        _fail(interrupted)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(text: str, context: typer.Context | None) -> UsageError:
    """What click says of a command line, and where to read what it takes."""
    command = "lrq-export" if context is None else context.command_path
    return UsageError(text.rstrip(".?! \n"), hint=f"see {command} --help")


def _fail(error: LrqError) -> None:
    print(f"lrq-export: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
