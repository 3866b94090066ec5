"""Run the floating-point model on calibration inputs and watch the input of every planned linear layer."""

from collections.abc import Callable

import torch
from torch import nn

from lrq_export.calibrate.correlations import Correlations
from lrq_export.calibrate.inputs import TIMESTEP, batches
from lrq_export.calibrate.statistics import Statistics
from lrq_export.models.base import ModelFamily
from lrq_export.plan import LayerPlan
from lrq_export.quant.rotation import Rotation


@torch.no_grad()
def observe(
    family: ModelFamily,
    model: nn.Module,
    plans: list[LayerPlan],
    inputs: dict[str, torch.Tensor],
    batch: int,
    done: Callable[[int], None] = lambda samples: None,
    correlations: Correlations | None = None,
) -> Statistics:
    """Statistics of every planned layer's input, before and after its rotation, per timestep.

    Fills `correlations` on the way when they are asked for.

    Batches hold one timestep each and come in a fixed order, so the same inputs give the same statistics.
    """
    statistics, now = Statistics(), [0.0]

    def watch(plan: LayerPlan) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        rotation = Rotation(plan.cols, plan.block, plan.signs_seed) if plan.block else None

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0]
            rotated = None if rotation is None else rotation.apply(x)
            statistics.observe(plan.name, now[0], x, rotated)
            if correlations is not None:
                correlations.observe(plan.name, x if rotated is None else rotated)

        return hook

    handles = [model.get_submodule(plan.name).register_forward_pre_hook(watch(plan)) for plan in plans]
    try:
        for part in batches(inputs, batch):
            now[0] = float(part[TIMESTEP][0])
            family.call(model, part)
            done(len(part[TIMESTEP]))
    finally:
        for handle in handles:
            handle.remove()
    return statistics
