"""What will be done to each linear layer, decided before the graph is traced, each choice with its reason."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graphs import names
from graphs.ops import hadamard
from lrq_export.errors import UsageError
from lrq_export.models.base import ModelFamily
from lrq_export.recipe import Recipe, select_layers


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer y = x Wᵀ + b, W (rows, cols)."""

    name: str
    rows: int
    cols: int
    bits: int
    group_size: int
    act_bits: int
    block: int  # channels a rotation spans; 0 means the input is not rotated
    signs_seed: int | None
    reason: str
    method: str = names.TWIN_LOG  # of recipe.weights: what the codes index; at 8 bits there are no codes
    equalizer: str | None = None  # divisors of the input channels (`graphs.equalizer`), with a rotation

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def target_layers(model: nn.Module, family: ModelFamily, recipe: Recipe) -> list[str]:
    """Names of the linear layers that the recipe does not keep in floating point, in module order.

    Raises UsageError for a keep pattern that matches nothing, CheckFailed when nothing is left to quantize.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return select_layers(linears, list(family.keep if recipe.keep is None else recipe.keep))[0]


def plan_layers(model: nn.Module, family: ModelFamily, recipe: Recipe) -> list[LayerPlan]:
    """Plan every linear layer that the recipe does not keep in floating point, in module order.

    With rotation.kind `auto` no layer is rotated yet: `rotations.choose_rotations` does that after calibration.
    Raises UsageError for a keep pattern that matches nothing, a rotation block or a group size that does not divide a
    layer's columns, block or signs where no rotation has them; CheckFailed when nothing is left to quantize.
    """
    rotation = recipe.rotation
    if rotation.kind != "hadamard" and (rotation.block or rotation.signs):
        key = "block" if rotation.block else "signs"
        raise UsageError(
            f"rotation.{key}: got {getattr(rotation, key)} with rotation.kind {rotation.kind}, needed hadamard",
            hint="set rotation.kind=hadamard, which rotates every layer so",
        )
    layers = target_layers(model, family, recipe)
    return [_plan_layer(name, model.get_submodule(name), model, family, recipe) for name in layers]


def _plan_layer(name: str, linear: nn.Linear, model: nn.Module, family: ModelFamily, recipe: Recipe) -> LayerPlan:
    rows, cols = linear.weight.shape
    group_size = recipe.weights.group_size or cols
    if cols % group_size:
        raise UsageError(
            f"{name}: weights.group_size is {group_size}, needed a divisor of its {cols} columns",
            hint=f"set weights.group_size to one of {_some_divisors(cols)}, or 0 for one group a row",
        )
    block, reason = _choose_block(name, cols, family.head_width(model, name), recipe)
    signs = recipe.rotation.signs and not family.shares_attention(name)
    signs_seed = recipe.rotation.seed if block and signs else None
    return LayerPlan(
        name, rows, cols, recipe.weights.bits, group_size, recipe.activations.bits, block, signs_seed, reason,
        recipe.weights.method,
    )  # fmt: skip


def _choose_block(name: str, cols: int, head_width: int | None, recipe: Recipe) -> tuple[int, str]:
    rotation = recipe.rotation
    if rotation.kind != "hadamard":
        return 0, f"rotation.kind is {rotation.kind}"
    by_head = 1 if head_width is None else max(hadamard.blocks(head_width))
    if by_head > 1:
        whole = f"head width {head_width}" if by_head == head_width else f"{by_head} of {head_width} channels of a head"
        return by_head, f"{whole}: folds into the value projection"
    if rotation.block:
        if cols % rotation.block or not hadamard.supported(rotation.block):
            usable = [block for block in hadamard.blocks(cols) if block >= min(8, cols)]
            raise UsageError(
                f"{name}: rotation.block is {rotation.block}, needed a divisor of its {cols} input channels "
                "that has a Hadamard matrix",
                hint=f"set rotation.block to one of {usable}, or 0 for the full width",
            )
        return rotation.block, f"rotation.block of the recipe: {rotation.block}"
    if hadamard.supported(cols):
        return cols, f"full width {cols}"
    block = hadamard.blocks(cols)[-1]
    return block, f"no Hadamard matrix of width {cols} is known by Paley's constructions: blocks of {block}"


def _some_divisors(number: int) -> list[int]:
    """Divisors from 8 up to the number: what one would sensibly choose as a block or a group."""
    return [d for d in range(min(8, number), number + 1) if number % d == 0]
