"""What to build, as data: one frozen recipe, read from a preset, a TOML file and single overrides, in that order.

Every field is written out by `to_toml`, and `to_toml` read back gives the same recipe:

>>> load_recipe("w3a8").weights.bits
3
>>> load_recipe("w3a8", overrides={"weights.bits": "2"}).weights.bits
2
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, ValidationError, field_validator

from lrq_export.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from lrq_export.models.base import ModelFamily

SCHEMA = 1
DEFAULT_PRESET = "w4a8"
UNSET = "none"  # how TOML, which has no null, spells a gate that is not set
FAMILY_DEFAULT = "default"  # how it spells what is left to the model family
OVERRIDE = "--set"  # what errors call an override: the command line's word for it

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what TOML and torch.manual_seed both hold
Finite = Annotated[float, Field(allow_inf_nan=False)]
Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pattern = Annotated[str, StringConstraints(min_length=1)]
ClassName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\z")]


class Table(BaseModel):
    """One table of the recipe: frozen, typed strictly ("3" is no integer), no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Weights(Table):
    """How weights are quantized."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight code")
    method: Literal["tlq", "codebook"] = Field(
        "tlq", description="tlq: levels that shifts decode; codebook: a free INT8 table per row and group"
    )
    group_size: Size = Field(0, description="columns that share one pair of codebooks; 0 = the whole row")
    rounding: Literal["compensated", "nearest"] = Field(
        "compensated", description="compensated: each column's rounding error is carried into the columns to come"
    )
    bias_correction: bool = Field(True, description="undo in the bias what rounding shifts the mean output by")


class Activations(Table):
    """How inputs of linear layers are quantized."""

    bits: Literal[4, 6, 8, 16] = Field(8, description="bits per activation, per token; 16 = left in floating point")


class Rotation(Table):
    """How inputs and weights are rotated before they are quantized."""

    kind: Literal["auto", "hadamard", "none"] = Field(
        "auto", description="what spreads outliers before quantization; auto = what loses least on calibration inputs"
    )
    block: Size = Field(0, description="channels per rotation of kind hadamard; 0 = the layer's full width")
    signs: bool = Field(False, description="random signs before the rotation of kind hadamard")
    seed: Seed = Field(0, description="seed of the signs")


class Rewrite(Table):
    """How the graph's rewrites are proved."""

    validation: Literal["full", "fast"] = Field(
        "full", description="weights that prove each rewrite: full = the model's own; fast = random, of the same shapes"
    )
    keep_going: bool = Field(False, description="leave out a rewrite that fails its proof; otherwise the build stops")


class Calibration(Table):
    """What the floating-point model is watched on."""

    samples: Count = Field(64, description="denoiser inputs that are observed")
    batch: Count = Field(8, description="inputs per forward call")
    timesteps: Count = Field(20, description="distinct timesteps of synthetic inputs")
    seed: Seed = Field(0, description="seed of synthetic inputs")


class Sampling(Table):
    """The trajectories that the quantized and the floating-point model are compared on."""

    steps: Count = Field(20, description="denoising steps of one trajectory")
    seed: Seed = Field(0, description="seed of the first latents")
    images: Count = Field(20, description="images per comparison")
    guidance_scale: Finite = Field(1.0, description="classifier-free guidance; 1 = none")
    scheduler: ClassName = Field(
        FAMILY_DEFAULT, description="class name of a diffusers scheduler; default = the model family's"
    )


class Gates(Table):
    """Bounds that fail the build (exit 1) when they do not hold; None = reported only."""

    noise_nmse: Bound | None = Field(None, description="most NMSE of the predicted noise; none = not checked")
    psnr_db: Finite | None = Field(None, description="least same-seed PSNR in dB; none = not checked")
    parity_nmse: Bound = Field(1e-6, description="most NMSE between two forms of the same function")

    @field_validator("noise_nmse", "psnr_db", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if value == UNSET else value


MOST_THREADS = 1024
Threads = Annotated[int, Field(ge=0, le=MOST_THREADS)]


class Engine(Table):
    """Which engines a package holds beside ONNX Runtime's, and how TensorRT builds its own."""

    targets: Annotated[tuple[Literal["onnxruntime", "tensorrt", "tensorrt-rtx"], ...], Strict(False)] = Field(
        ("onnxruntime",), description="engines to build; onnxruntime, which checks are made with, always is"
    )
    profiles: Annotated[tuple[Pattern, ...], Strict(False)] = Field(
        (), description='sizes to build TensorRT engines for, each "AXIS=LEAST:USUAL:LARGEST ..."; none: as recorded'
    )
    plugins: Literal["auto", "always", "never"] = Field(
        "auto", description="whether TensorRT runs our plugins or the ops' bodies; auto: plugins if they are compiled"
    )
    activations: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type in which TensorRT computes what is between integer products, attention included"
    )
    compute_capabilities: Annotated[tuple[Literal["75", "80", "86", "89", "120", "121"], ...], Strict(False)] = Field(
        (), description="GPUs that tensorrt-rtx builds for; none: its own choice"
    )
    hardware: Literal["this", "same_compute_capability", "ampere_plus"] = Field(
        "this", description="GPUs that an engine of tensorrt runs on"
    )
    optimization: Annotated[int, Field(ge=0, le=5)] = Field(3, description="how long TensorRT looks for fast kernels")
    weight_streaming: bool = Field(False, description="weights that the GPU cannot hold are streamed to it")
    refit: bool = Field(False, description="the same weights can be put into a built engine again (kREFIT_IDENTICAL)")
    intra_op_threads: Threads = Field(0, description="of ONNX Runtime, within an op; 0: as many as there are cores")
    inter_op_threads: Threads = Field(0, description="of ONNX Runtime, for ops side by side; 0: its choice")
    strip: bool = Field(False, description="the engine is written without the weights that a refit brings")


class Recipe(Table):
    """The whole recipe. `keep` None and the scheduler "default" leave the choice to the model family.

    An empty `keep` keeps nothing.
    """

    schema_version: Literal[1] = Field(SCHEMA, alias="schema", description="version of the recipe's keys")
    keep: Annotated[tuple[Pattern, ...], Strict(False)] | None = Field(
        None, description="shell patterns over linear layers left in floating point; default = the model family's list"
    )
    weights: Weights = Weights()
    activations: Activations = Activations()
    rotation: Rotation = Rotation()
    rewrite: Rewrite = Rewrite()
    calibration: Calibration = Calibration()
    sampling: Sampling = Sampling()
    gates: Gates = Gates()
    engine: Engine = Engine()

    @field_validator("keep", mode="before")
    @classmethod
    def _family_default(cls, value: Any) -> Any:
        return None if value == FAMILY_DEFAULT else value

    def for_family(self, family: "ModelFamily") -> "Recipe":
        """The recipe with nothing left open: what it leaves to the model family is as the family has it."""
        sampling = self.sampling
        if sampling.scheduler == FAMILY_DEFAULT:
            sampling = sampling.model_copy(update={"scheduler": family.scheduler})
        return self.model_copy(update={"keep": family.keep if self.keep is None else self.keep, "sampling": sampling})


def _preset(weight_bits: int, activation_bits: int) -> Recipe:
    return Recipe(weights=Weights(bits=weight_bits), activations=Activations(bits=activation_bits))


PRESETS: Mapping[str, Recipe] = {
    "w4a8": _preset(4, 8),
    "w3a8": _preset(3, 8),
    "w4a6": _preset(4, 6),
    "w3a6": _preset(3, 6),
    "w8a8": _preset(8, 8),
}


def _key(name: str) -> str:
    """The TOML key of a field of Recipe."""
    return Recipe.model_fields[name].alias or name


TABLES: Mapping[str, type[Table]] = {
    _key(name): field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Table)
}
# Every key of a recipe by its full dotted path, in the order in which to_toml writes them.
KEYS: tuple[str, ...] = tuple(_key(name) for name in Recipe.model_fields if _key(name) not in TABLES) + tuple(
    f"{table}.{name}" for table, model in TABLES.items() for name in model.model_fields
)


def load_recipe(
    preset: str | None = None, path: Path | None = None, overrides: Mapping[str, str] | None = None
) -> Recipe:
    """The preset (default w4a8), then the file's keys, then overrides such as {"weights.bits": "3"}; the last wins.

    Raises UsageError for an unknown preset or key, a wrong value, or a file that is no TOML.
    """
    values: dict[str, Any] = _preset_values(preset or DEFAULT_PRESET)
    origin: dict[str, str] = {}
    for source, layer in ((str(path), _file_values(path) if path else {}), (OVERRIDE, _override_values(overrides))):
        values.update(layer)
        origin.update(dict.fromkeys(layer, source))
    return _validated(values, origin)


def to_toml(recipe: Recipe) -> str:
    """The recipe with every key written out, in a fixed order; reading it back gives an equal recipe."""
    values = _flatten(recipe.model_dump(by_alias=True))
    lines, current = [], ""
    for key in KEYS:
        table, _, name = key.rpartition(".")
        if table != current:
            lines += ["", f"[{table}]"]
            current = table
        lines.append(f"{name} = {_toml_value(key, values[key])}")
    return "\n".join(lines) + "\n"


def select_layers(names: Iterable[str], keep_patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """(quantized, kept): the layers that no pattern matches, and those that one does; both in the order of `names`.

    Raises UsageError for a pattern that matches nothing and CheckFailed when nothing is left to quantize.
    """
    names = list(names)
    for pattern in keep_patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"keep: pattern {pattern!r} matches none of {len(names)} linear layers", hint=_aim(pattern, names)
            )
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in keep_patterns)]
    quantized = [name for name in names if name not in set(kept)]
    if not quantized:
        raise CheckFailed(
            f"keep: nothing was left to quantize, {len(kept)} of {len(names)} linear layers are kept in floating point",
            hint="remove or narrow a pattern of keep",
        )
    return quantized, kept


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def _aim(pattern: str, names: Sequence[str]) -> str:
    """Where a pattern that matched nothing may have aimed."""
    if not names:
        return "the model has no linear layers"
    near = nearest(pattern, names)
    examples = ", ".join(names[:: max(1, len(names) // 3)][:3])
    return (
        f"write it over names such as {examples}"
        if near is None
        else f"the nearest layer is {near}; others: {examples}"
    )


def _preset_values(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        guess = "" if near is None else f"did you mean {near}? "
        raise UsageError(
            f"preset: got {name!r}, needed one of {', '.join(PRESETS)}", hint=f"{guess}a file goes to --recipe"
        )
    return _flatten(PRESETS[name].model_dump(by_alias=True))


def _file_values(path: Path) -> dict[str, Any]:
    """The keys of a TOML file by dotted path. Raises UsageError with the line of a syntax error."""
    try:
        tree = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: got byte 0x{error.object[error.start]:02x} at offset {error.start}, needed a text file in UTF-8",
            hint="pass a TOML recipe",
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}", hint="strings need quotes, tables a [name]") from error
    for name, value in tree.items():
        if isinstance(value, dict) and name not in TABLES:
            _check_known(f"{name}.{next(iter(value), '')}".removesuffix("."), str(path))
        if name in TABLES and not isinstance(value, dict):
            raise UsageError(
                f"{path}: {name}: got {_shown(value)}, needed a table", hint=f"write [{name}] and its keys below"
            )
    values = _flatten(tree)
    for key in values:
        _check_known(key, str(path))
    return values


def _override_values(overrides: Mapping[str, str] | None) -> dict[str, Any]:
    """Overrides as TOML values; a bare word is a string."""
    values = {}
    for key, text in (overrides or {}).items():
        _check_known(key, OVERRIDE)
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed = {}
        values[key] = parsed["value"] if parsed.keys() == {"value"} else text
    return values


def _check_known(key: str, source: str) -> None:
    """Raise UsageError for a key that no recipe has, naming the nearest one."""
    if key in KEYS:
        return
    leaf = key.rpartition(".")[2]
    near_table = None if "." in key else nearest(key, TABLES)
    if near_table == key:
        hint = f"name a key of it, such as {key}.{next(iter(TABLES[key].model_fields))}"
    elif leaf in KEYS:
        hint = f"{leaf} belongs at the top of the recipe, before the first [table]"
    else:
        homes = [known for known in KEYS if known.rpartition(".")[2] == leaf]
        near = near_table or nearest(key, homes or KEYS) or nearest(leaf, KEYS) or (homes[0] if homes else None)
        hint = f"did you mean {near}?" if near else f"known keys are {', '.join(KEYS)}"
    shown = key if key.isprintable() else repr(key)
    raise UsageError(f"{source}: {shown}: unknown key", hint=hint)


def _validated(values: Mapping[str, Any], origin: Mapping[str, str]) -> Recipe:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        (tree.setdefault(table, {}) if table else tree)[name] = value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2] if isinstance(part, str) and part in _PARTS)
        needed = _NEEDED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
        raise UsageError(
            f"{origin.get(key, 'recipe')}: {key}: got {_shown(first['input'])}, needed {needed}", hint=_meaning(key)
        ) from None


_PARTS = {part for key in KEYS for part in key.split(".")}
# What pydantic says in Python's words, in TOML's.
_NEEDED = {
    "tuple_type": 'a list of strings, or "default"',
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "string_pattern_mismatch": "the name of a class",
}


def _meaning(key: str) -> str:
    """What a key means, as the hint of a wrong value."""
    table, _, name = key.rpartition(".")
    fields = TABLES[table].model_fields if table else {_key(field): info for field, info in Recipe.model_fields.items()}
    return f"{key} is: {fields[name].description}"


def _shown(value: Any) -> str:
    """A value on one line, cut when it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Keys by dotted path; only tables are descended into, so a wrong dict stays one value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        else:
            flat[name] = value
    return flat


def _toml_value(key: str, value: Any) -> str:
    if value is None:
        return _toml_value(key, FAMILY_DEFAULT if key == "keep" else UNSET)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML also forbids a bare DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml_value(key, item) for item in value) + "]"
    return repr(value)
